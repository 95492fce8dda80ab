"""Preprocessing from scan file to cached volume: volumes a minute and peak memory, ours against SimpleITK, MONAI,
TorchIO and decompression alone (`volume_jobs.py`), one run on the same files. How far volumes agree is told first.

The files are a generated CT of 512 x 512 x 200 voxels and, with --scans, the largest .nii.gz of a folder. Every job
runs in processes of its own, first in one with the threads it takes by itself, then in one a core with one thread each.
The other libraries are installed by `pip install '.[bench]'`; those that are not there are left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from common import write_results
from volume_files import write_generated_scan
from volume_jobs import JOBS, SIDE, read_volume

from photon.errors import PhotonError
from pipelines.grids import VOLUME_SPECS, aligned_taps, frame_of, is_aligned
from pipelines.scans.scan import Scan, read_scan

NEEDS = {"simpleitk": "SimpleITK", "monai": "monai", "monai_onto_grid": "monai", "torchio": "torchio"}
LIBRARIES = ("numba", "numcodecs", "isal", "SimpleITK", "monai", "torchio")
SECONDS_A_JOB = 20.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS": "1"}
EDGE = 2
"""Voxels from the edge of the field of view within which conventions may differ."""


def main() -> None:
    """Measure what the arguments ask for and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=Path, help="folder with real scans")
    parser.add_argument("--max-scans", type=int, default=12, help="how many of them, the largest first")
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--seconds", type=float, default=SECONDS_A_JOB, help="time to spend on each job")
    parser.add_argument("--dry-run", action="store_true", help="print, but write no results file")
    arguments = parser.parse_args()
    names = [name for name in arguments.jobs if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]
    content: dict[str, Any] = {
        "cores": os.cpu_count(),
        "libraries": {name: version(name) for name in LIBRARIES if importlib.util.find_spec(name)},
        "not_installed": sorted(set(arguments.jobs) - set(names)),
    }
    with tempfile.TemporaryDirectory() as folder:
        generated = Path(folder) / "generated.nii.gz"
        write_generated_scan(generated)
        content["generated"] = compare([generated], names, Path(folder), arguments.seconds)
        if arguments.scans:
            scans = real_scans(arguments.scans, arguments.max_scans)
            content["real"] = {"scans": [path.name for path in scans]}
            content["real"] |= compare(scans, names, Path(folder), arguments.seconds)
    if arguments.dry_run:
        print(json.dumps(content, indent=1))
    else:
        write_results("volumes", content)


def compare(scans: list[Path], names: list[str], folder: Path, seconds: float) -> dict[str, Any]:
    """Agreement with ours, then speed and memory of every job on these scans."""
    agreement = {name: agreement_with_ours(name, scans, folder) for name in names if name in NEEDS}
    print(json.dumps({"agreement_hu": agreement}, indent=1), flush=True)
    rows: dict[str, Any] = {}
    for name in names:
        rows[name] = {
            "one_process": run(name, scans, folder, seconds, num_processes=1, environment={}),
            "a_process_a_core": run(name, scans, folder, seconds, os.cpu_count() or 1, ONE_THREAD),
        }
        print(name, json.dumps(rows[name]), flush=True)
    return {"agreement_hu": agreement, "jobs": rows, "ours_over": ratios(rows)}


def run(
    name: str, scans: list[Path], folder: Path, seconds: float, num_processes: int, environment: dict[str, str]
) -> dict[str, Any]:
    """Do a job in several processes at once, for about so many seconds, after each has warmed up."""
    once = _timed(_start(name, scans, folder, 1, 1, environment), len(scans))["seconds_a_volume"] * len(scans)
    repeats = max(2, round(seconds / once))
    return _timed(_start(name, scans, folder, repeats, num_processes, environment), repeats * len(scans))


def _start(
    name: str, scans: list[Path], folder: Path, repeats: int, num_processes: int, environment: dict[str, str]
) -> list[subprocess.Popen[str]]:
    workers = []
    for number in range(num_processes):
        output = folder / str(number)
        output.mkdir(exist_ok=True)
        command = [sys.executable, str(Path(__file__).parent / "volume_jobs.py"), name, str(output), str(repeats)]
        path = os.pathsep.join(entry for entry in sys.path if entry)
        workers.append(
            subprocess.Popen(
                [*command, *map(str, scans)],
                env=os.environ | environment | {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )
    return workers


def _timed(workers: list[subprocess.Popen[str]], num_volumes: int) -> dict[str, Any]:
    """Let warm workers go at once, and wait for the last."""
    for worker in workers:
        assert worker.stdout
        line = worker.stdout.readline()
        while line and line != "ready\n":
            line = worker.stdout.readline()
        if not line:
            raise RuntimeError(f"{worker.args} ended before it was ready")
    started = time.perf_counter()
    for worker in workers:
        assert worker.stdin
        worker.stdin.write("\n")
        worker.stdin.flush()
    told = [json.loads(worker.communicate()[0].strip().splitlines()[-1]) for worker in workers]
    wall_s = time.perf_counter() - started
    times = [seconds for each in told for seconds in each["times_s"]]
    if not times:
        return {}
    return {
        "num_processes": len(workers),
        "num_volumes": num_volumes * len(workers),
        "volumes_a_minute": 60 * num_volumes * len(workers) / wall_s,
        "seconds_a_volume": statistics.median(times),
        "best_seconds_a_volume": min(times),
        "cpu_seconds_a_volume": sum(each["cpu_s"] for each in told) / num_volumes / len(workers),
        "peak_mib_a_process": max(each["peak_mib"] for each in told),
    }


def ratios(rows: dict[str, Any]) -> dict[str, Any]:
    """Our speed and memory over those of every other job."""
    if "photon" not in rows:
        return {}
    return {
        name: {
            way: {
                "speed": rows["photon"][way]["volumes_a_minute"] / row[way]["volumes_a_minute"],
                "peak_memory": rows["photon"][way]["peak_mib_a_process"] / row[way]["peak_mib_a_process"],
            }
            for way in row
        }
        for name, row in rows.items()
        if name != "photon"
    }


def agreement_with_ours(name: str, scans: list[Path], folder: Path) -> dict[str, float]:
    """Differences in HU to our volumes inside the field of view: mean and largest; rounding explains up to 1."""
    means, largest = [], []
    for path in scans:
        for job in ("photon", name):
            _timed(_start(job, [path], folder, 0, 1, {}), 0)  # warming up leaves its volume
        ours, theirs = (read_volume(job, folder / "0" / f"{job}.volume").astype(np.int32) for job in ("photon", name))
        difference = np.abs(ours - theirs)[inner(read_scan(path))]
        means.append(float(difference.mean()))
        largest.append(int(difference.max()))
    return {"mean": statistics.mean(means), "largest": max(largest)}


def inner(scan: Scan) -> np.ndarray:
    """bool [Z, Y, X]: voxels of the grid well inside the field of view; the middle half of a tilted scan."""
    spec, frame = VOLUME_SPECS["iso1mm"], frame_of(scan.array.shape, scan.affine)
    lines = []
    for taps, extent in zip(
        aligned_taps(frame, spec), (n * mm for n, mm in zip(frame.shape, frame.spacing_mm, strict=True)), strict=True
    ):
        line = np.zeros(SIDE, bool)
        if is_aligned(frame, spec):
            inside = np.flatnonzero(taps.is_inside)
            line[inside[EDGE] : inside[-1 - EDGE] + 1] = True
        else:
            half = min(int(extent / 4), SIDE // 2)
            line[SIDE // 2 - half : SIDE // 2 + half] = True
        lines.append(line)
    return lines[0][:, None, None] & lines[1][:, None] & lines[2]


def real_scans(folder: Path, limit: int) -> list[Path]:
    """The largest gzipped NIfTI scans below a folder that are readable, by voxels."""
    sizes = {}
    for path in sorted(folder.rglob("*.nii.gz")):
        try:
            scan = read_scan(path)
        except PhotonError:
            continue
        if np.unique(scan.array[::4, ::4, ::4]).size > 256:  # no label map
            sizes[path] = scan.array.size
    return sorted(sizes, key=lambda path: (-sizes[path], path.name))[:limit]


if __name__ == "__main__":
    main()
