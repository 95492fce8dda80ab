"""Ten thousand scans in one run: what the run costs besides the scans, and whether memory stays flat.

The scans are tiny, so that nearly all that is measured is orchestration: finding, claiming, handing to processes, rows,
journal, manifest. `--runner dask` (or threads, Prefect's own) measures the same through Prefect's tasks, for several
numbers of scans a task, with the time that a real scan of 512 x 512 x 200 takes beside it.

    python benchmarks/bench_archive.py --num-scans 10000
    python benchmarks/bench_archive.py --runner dask --num-scans 512
"""

from __future__ import annotations

import argparse
import gzip
import os
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import write_results

from pipelines.preprocess import preprocess
from pipelines.preprocess_scan import Outcome, ScanJob, do_scan
from pipelines.scans.find import find_scans
from pipelines.scans.nifti import write_scan
from pipelines.volumes import VOLUME_SPECS, VolumeSpec
from pipelines.workers import run_in_processes

TINY = VolumeSpec(spacing_mm=12.0, shape=(14, 28, 28), window_hu=(-200, 300))


def make_scans(folder: Path, number: int) -> None:
    """Tiny scans of random voxels in sub-folders of a hundred."""
    random = np.random.RandomState(0)
    for index in range(number):
        path = folder / f"{index // 100:03d}" / f"{index:05d}.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_scan(random.randint(-900, 900, (8, 9, 10)).astype(np.int16), np.diag([4.0, 4.0, 5.0, 1.0]), path)


def seconds_per_scan(folder: Path, output: Path, spec: VolumeSpec, limit: int) -> float:
    """Of the work itself, in this process, after one scan that does not count."""
    output.mkdir()
    jobs = [
        ScanJob(source=source, output=output, spec=spec, modality="ct") for source in find_scans(folder)[: limit + 1]
    ]
    do_scan(jobs[0])
    started = time.perf_counter()
    for job in jobs[1:]:
        do_scan(job)
    return (time.perf_counter() - started) / max(len(jobs) - 1, 1)


def real_scan_seconds(folder: Path) -> float:
    """From a .nii.gz of 512 x 512 x 200 to its volume of the preset `photon`."""
    random = np.random.RandomState(0)
    smooth = np.cumsum(random.randint(-3, 4, (512, 512, 200)), axis=0, dtype=np.int16)
    plain = folder / "large.nii"
    write_scan(smooth, np.diag([0.8, 0.8, 1.5, 1.0]), plain)
    for name in ("1.nii.gz", "2.nii.gz"):
        (folder / "large").mkdir(exist_ok=True)
        (folder / "large" / name).write_bytes(gzip.compress(plain.read_bytes(), 4))
    return seconds_per_scan(folder / "large", folder / "large-volumes", VOLUME_SPECS["photon"], 1)


def rss_mib(pid: int) -> int:
    """Memory of a process; 0 for one that has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize() >> 20
    except OSError:
        return 0


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they started."""
    try:
        children = [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(grandchild for child in children for grandchild in descendants(child))]


def timed_scan(job: ScanJob) -> tuple[Outcome, float]:
    """A scan, and how long it took where it was done."""
    started = time.perf_counter()
    return do_scan(job), time.perf_counter() - started


def run_processes(folder: Path, scans: Path, num_scans: int, num_workers: int) -> dict[str, Any]:
    """One run from nothing, one with nothing to do, with the memory of this process on the way."""
    memory: list[tuple[int, int]] = []

    def note(done: int, total: int, _: str) -> None:
        if done % max(total // 10, 1) == 0:
            memory.append((rss_mib(os.getpid()), max(map(rss_mib, descendants(os.getpid())), default=0)))

    in_workers: list[float] = []

    def run_jobs(jobs: Sequence[ScanJob]) -> Iterator[tuple[ScanJob, Outcome | None]]:
        for job, result in run_in_processes(timed_scan, jobs, num_workers):
            assert result is not None
            in_workers.append(result[1])
            yield job, result[0]

    found = {}
    for name in ("first", "unchanged"):
        memory.clear()
        in_workers.clear()
        started = time.perf_counter()
        record = preprocess(scans, folder / "volumes", TINY, modality="ct", run_jobs=run_jobs, on_progress=note)
        elapsed = time.perf_counter() - started
        assert record.num_ok == num_scans and record.num_new == (num_scans if name == "first" else 0)
        found[name] = {
            "elapsed_s": elapsed,
            "ms_per_scan": 1e3 * elapsed / num_scans,
            "work_ms_per_scan": 1e3 * sum(in_workers) / num_scans,
            "orchestration_ms_per_scan": 1e3 * (elapsed * num_workers - sum(in_workers)) / num_scans,
            "rss_mib_by_tenth": [own for own, _ in memory],
            "largest_worker_mib_by_tenth": [most for _, most in memory],
        }
    return found


def run_tasks(folder: Path, num_scans: int, runner: str, num_workers: int, work_s: float) -> list[dict[str, float]]:
    """Time of Prefect's tasks for several numbers of scans a task, less the work itself."""
    from flows import settings
    from flows.preprocess import run_preprocess

    settings.apply(folder / "state")
    rows = []
    with settings.embedded_server():
        for per_task in (1, 8, 32, 64, 128):
            number = min(num_scans, 64 * per_task)
            part = folder / f"scans-{per_task}"
            make_scans(part, number)
            moments: list[float] = []
            run_preprocess(
                part,
                folder / f"volumes-{per_task}",
                TINY,
                modality="ct",
                runner=runner,
                scans_per_task=per_task,
                num_workers=num_workers,
                on_progress=lambda *_, moments=moments: moments.append(time.perf_counter()),
            )
            # From the first chunk's end to the last's: a cluster takes seconds to start, once.
            per_scan = (moments[-1] - moments[0]) / max(number - per_task, 1)
            rows.append(
                {
                    "scans_per_task": per_task,
                    "num_scans": number,
                    "overhead_ms_per_scan": 1e3 * (per_scan * num_workers - work_s),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-scans", type=int, default=10_000)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--runner", default="processes", help="processes, threads, dask or ray")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="photon-bench-") as name:
        folder = Path(name)
        make_scans(folder / "scans", options.num_scans if options.runner == "processes" else 200)
        work_s = seconds_per_scan(folder / "scans", folder / "alone", TINY, 200)
        found: dict[str, Any] = {"num_scans": options.num_scans, "tiny_scan_ms": 1e3 * work_s}
        found["real_scan_ms"] = 1e3 * real_scan_seconds(folder)
        if options.runner == "processes":
            found |= {"num_workers": options.num_workers}
            found |= run_processes(folder, folder / "scans", options.num_scans, options.num_workers)
            spent = found["first"]["orchestration_ms_per_scan"]
            found["orchestration_share_of_a_real_scan"] = spent / (spent + found["real_scan_ms"])
        else:
            found["tasks"] = run_tasks(folder, options.num_scans, options.runner, options.num_workers, work_s)
            for row in found["tasks"]:
                row["share_of_a_real_scan"] = row["overhead_ms_per_scan"] / (
                    row["overhead_ms_per_scan"] + found["real_scan_ms"]
                )
    write_results(f"archive_{options.runner}", found)


if __name__ == "__main__":
    main()
