"""Many scans in one run: kills, neighbours on the same folder, dead workers, changed and removed scans."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines import preprocess as module
from pipelines.claims import claim, share_folder
from pipelines.manifest import read_manifest
from pipelines.preprocess import preprocess
from pipelines.preprocess_scan import Outcome, ScanJob, do_scan
from pipelines.scans.nifti import write_scan
from pipelines.source_index import INDEX_FILE, signature_of
from pipelines.volumes import VolumeSpec
from pipelines.workers import run_in_processes

SPEC = VolumeSpec(spacing_mm=6.0, shape=(14, 28, 28), window_hu=(-200, 300))
ROOT = Path(__file__).resolve().parents[2]
NUM_SCANS = 40
RUN = """
import json, sys
from pathlib import Path
from pipelines.preprocess import preprocess
from pipelines.volumes import VolumeSpec
spec = VolumeSpec.from_dict(json.loads(sys.argv[3]))
record = preprocess(Path(sys.argv[1]), Path(sys.argv[2]), spec, num_workers=2)
print(record.num_new, record.num_unchanged)
"""


def put_scan(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.RandomState(seed).randint(-900, 900, (12, 13, 14)).astype(np.int16)
    write_scan(array, np.diag([4.0, 4.0, 5.0, 1.0]), path)
    return path


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Forty scans, one of them cut."""
    folder = tmp_path / "in"
    for number in range(NUM_SCANS):
        put_scan(folder / f"{number:02d}.nii", number)
    cut = folder / "17.nii"
    cut.write_bytes(cut.read_bytes()[:900])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def start(scans: Path, output: Path) -> subprocess.Popen[str]:
    """A process of its own that preprocesses."""
    command = [sys.executable, "-c", RUN, str(scans), str(output), json.dumps(SPEC.as_dict())]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)


def processes_of_session(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_killed_in_the_middle_and_started_again(scans: Path, tmp_path: Path) -> None:
    preprocess(scans, tmp_path / "whole", SPEC, num_workers=1)
    out = tmp_path / "out"
    process = start(scans, out)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.parquet").exists(), "it was killed too late for this test"
    while processes_of_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of_session(process.pid), "workers outlive their killed parent"
    (out / ".05.safetensors.abc.tmp").write_bytes(b"half a volume")
    done = len(list(out.glob("*.safetensors")))
    record = preprocess(scans, out, SPEC, num_workers=2)
    assert record.num_unchanged == done >= 3 and record.num_new == NUM_SCANS - 1 - done
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(out.glob(".*.safetensors.*.tmp"))


def test_two_processes_share_the_work(scans: Path, tmp_path: Path) -> None:
    both = [start(scans, tmp_path / "out") for _ in range(2)]
    counts = [process.communicate(timeout=120)[0].split() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(int(new) for new, _ in counts) == NUM_SCANS - 1, "a scan was done twice, or not at all"
    assert all(int(new) + int(unchanged) == NUM_SCANS - 1 for new, unchanged in counts)
    preprocess(scans, tmp_path / "alone", SPEC, num_workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def kill_on_seven(number: int) -> int:
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_a_dead_worker_costs_its_own_job() -> None:
    results = dict(run_in_processes(kill_on_seven, range(12), 2))
    assert results == {number: None if number == 7 else number * number for number in range(12)}


@pytest.mark.parametrize("is_fatal_alone", [True, False])
def test_a_scan_that_kills_its_worker_costs_one_row(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_fatal_alone: bool
) -> None:
    def run_jobs(jobs: Sequence[ScanJob]) -> Iterator[tuple[ScanJob, Outcome | None]]:
        for job in jobs:
            yield job, None if job.source.scan_id == "05" else do_scan(job)

    def run_alone(_: object, jobs: Sequence[ScanJob], num_workers: int) -> Iterator[tuple[ScanJob, Outcome | None]]:
        assert num_workers == 1
        for job in jobs:
            yield job, None if is_fatal_alone else do_scan(job)

    monkeypatch.setattr(module, "run_in_processes", run_alone)
    record = preprocess(scans, tmp_path / "out", SPEC, run_jobs=run_jobs)
    refused = {"SCAN_TRUNCATED": 1} | ({"WORKER_KILLED": 1} if is_fatal_alone else {})
    assert record.refused_by_code == refused and record.num_ok == NUM_SCANS - sum(refused.values())
    assert len(read_manifest(Path(record.manifest))) == NUM_SCANS


def test_a_fault_of_a_reader_costs_one_row_and_quotes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        put_scan(tmp_path / "in" / f"{name}.nii")
    from pipelines import preprocess_scan

    whole = preprocess_scan.read_scan

    def read(path: Path, **options: object) -> object:
        if path.name == "a.nii":
            raise KeyError("Doe^John")
        return whole(path, **options)

    monkeypatch.setattr(preprocess_scan, "read_scan", read)
    record = preprocess(tmp_path / "in", tmp_path / "out", SPEC)
    row = read_manifest(Path(record.manifest)).row(0, named=True)
    assert (record.num_ok, row["status"]) == (1, "SCAN_FAULT")
    assert "KeyError" in row["message"] and "Doe" not in row["message"]


def age(folder: Path) -> None:
    """Let the clock pass for the index: it does not trust files changed just now."""
    for path in folder.iterdir():
        assert signature_of(path) is None
    time.sleep(2.1)


def test_unchanged_sources_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines import preprocess_scan

    scans, out = tmp_path / "in", tmp_path / "out"
    for name in ("a", "b", "c"):
        put_scan(scans / f"{name}.nii")
    (scans / "b.nii").write_bytes((scans / "b.nii").read_bytes()[:900])
    age(scans)
    hashed: list[str] = []
    read: list[str] = []
    digest, reader = preprocess_scan.file_digest, preprocess_scan.read_scan
    monkeypatch.setattr(preprocess_scan, "file_digest", lambda path: hashed.append(path.name) or digest(path))
    monkeypatch.setattr(
        preprocess_scan, "read_scan", lambda path, **options: read.append(path.name) or reader(path, **options)
    )

    def run() -> tuple[list[str], list[str]]:
        hashed.clear()
        read.clear()
        preprocess(scans, out, SPEC)
        return sorted(hashed), sorted(read)

    assert run() == ([], ["a.nii", "b.nii", "c.nii"])
    manifest = (out / "manifest.parquet").read_bytes()
    assert run() == ([], [])
    assert (out / "manifest.parquet").read_bytes() == manifest
    # The same length and times, set back: the inode's own time tells.
    before = (scans / "a.nii").stat()
    put_scan(scans / "a.nii", 5)
    os.utime(scans / "a.nii", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run() == (["a.nii"], ["a.nii"])
    (out / INDEX_FILE).write_bytes(b"\xff\n[1, 2]\n{\n" + (out / INDEX_FILE).read_bytes()[:20])
    assert run() == (["a.nii", "c.nii"], ["b.nii"])


def test_scans_in_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans, out = tmp_path / "in", tmp_path / "out"
    plain = put_scan(tmp_path / "a.nii", 3)
    cut = plain.read_bytes()[:900]
    scans.mkdir()
    with zipfile.ZipFile(scans / "some.zip", "w") as archive:
        archive.write(plain, "deep/a.nii")
        archive.writestr("cut.nii", cut)
    age(scans)
    record = preprocess(scans, out, SPEC)
    assert (record.num_new, record.refused_by_code) == (1, {"SCAN_TRUNCATED": 1})
    rows = read_manifest(Path(record.manifest)).to_dicts()
    assert [row["source"] for row in rows] == ["some.zip/deep/a.nii", "some.zip/cut.nii"]
    preprocess(tmp_path / "in" / "some.zip", tmp_path / "alone", SPEC)
    assert (tmp_path / "alone" / "a.safetensors").read_bytes() == (out / "a.safetensors").read_bytes()

    def refuse(_: object) -> None:
        raise AssertionError("an unchanged archive is unpacked again")

    from pipelines import preprocess_scan

    monkeypatch.setattr(preprocess_scan, "located", refuse)
    record = preprocess(scans, out, SPEC)
    assert (record.num_unchanged, record.refused_by_code) == (1, {"SCAN_TRUNCATED": 1})


def test_scans_that_are_gone_leave_the_manifest(tmp_path: Path) -> None:
    scans, out = tmp_path / "in", tmp_path / "out"
    for name in ("a", "b", "c"):
        put_scan(scans / f"{name}.nii")
    preprocess(scans, out, SPEC)
    (scans / "b.nii").unlink()
    record = preprocess(scans, out, SPEC)
    assert (record.removed, record.num_without_row, record.num_unchanged) == (["b"], 1, 2)
    assert (out / "b.safetensors").exists()
    record = preprocess(scans, out, SPEC, is_pruning=True)
    assert (record.removed, record.num_without_row) == ([], 0)
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["a.safetensors", "c.safetensors"]
    assert read_manifest(out / "manifest.parquet")["scan_id"].to_list() == ["a", "c"]


HOLD = """
import sys, time
from pathlib import Path
from pipelines.claims import claim, share_folder
with share_folder(Path(sys.argv[1]), "theirs"), claim(Path(sys.argv[1]), "a"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_claims_end_with_their_holder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with claim(tmp_path, "a") as is_ours, claim(tmp_path, "b") as is_other_ours:
            assert (is_ours, is_other_ours) == (False, True)
        with pytest.raises(PhotonError, match="OUTPUT_BUSY"), share_folder(tmp_path, "ours"):
            pass
        with share_folder(tmp_path, "theirs"):
            pass
        process.kill()
        with claim(tmp_path, "a", is_waiting=True) as is_ours:
            assert is_ours
    with share_folder(tmp_path, "ours"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere claims hold between processes alone")
def test_claims_hold_between_threads(tmp_path: Path) -> None:
    with claim(tmp_path, "a") as is_ours, claim(tmp_path, "a") as is_another:
        assert (is_ours, is_another) == (True, False)
        with claim(tmp_path, "b") as is_other:
            assert is_other
        with claim(tmp_path, "a") as is_still_held:
            assert not is_still_held
