"""The benchmark of preprocessing: its jobs do the same work, and what it tells is of the job alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_volumes  # noqa: E402
import volume_jobs  # noqa: E402

from pipelines.scans.nifti import write_scan  # noqa: E402
from pipelines.scans.scan import read_scan  # noqa: E402


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    array = np.random.default_rng(0).integers(-1000, 1000, (60, 50, 40), np.int16)
    path = tmp_path / "a.nii.gz"
    write_scan(array, np.array([[-2, 0, 0, 9], [0, 0, -2.5, 4], [0, 3.0, 0, 1], [0, 0, 0, 1]]), path)
    return path


def test_ours_and_simpleitk_make_the_same_volume(scan: Path, tmp_path: Path) -> None:
    volumes = []
    for name in ("photon", "simpleitk"):
        volume_jobs.JOBS[name]()(scan, tmp_path / name)
        volumes.append(volume_jobs.read_volume(name, tmp_path / name).astype(np.int32))
    is_inner = bench_volumes.inner(read_scan(scan))
    assert is_inner.sum() > 100_000
    difference = np.abs(volumes[0] - volumes[1])[is_inner]
    assert difference.max() <= 1 and difference.mean() < 0.01


def test_decompression_reads_to_the_checksum(scan: Path, tmp_path: Path) -> None:
    content = bytearray(scan.read_bytes())
    content[-6] ^= 1
    broken = tmp_path / "broken.nii.gz"
    broken.write_bytes(content)
    for name in ("decompress_isal", "decompress_zlib"):
        volume_jobs.JOBS[name]()(scan, tmp_path / "none")
        with pytest.raises(OSError):  # gzip.BadGzipFile
            volume_jobs.JOBS[name]()(broken, tmp_path / "none")


def test_a_job_tells_of_its_own_process(scan: Path, tmp_path: Path) -> None:
    ballast = np.ones(1 << 25)  # 256 MiB here is none of its business
    row = bench_volumes.run("decompress_isal", [scan], tmp_path, 0.0, 2, bench_volumes.ONE_THREAD)
    del ballast
    assert row["num_volumes"] == 4 and 0 < row["peak_mib_a_process"] < 200
    assert row["volumes_a_minute"] > 0 and row["cpu_seconds_a_volume"] < 5
