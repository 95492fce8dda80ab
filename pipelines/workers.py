"""Work spread over processes, of which the system may kill any without taking the others' work along."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

WORKER_MEMORY_BYTES = 3 << 29
"""1.5 GiB: a scan of 512 x 512 x 1000 voxels and its decompressed bytes."""


def run_in_processes(
    function: Callable[[Job], Result], jobs: Iterable[Job], num_workers: int
) -> Iterator[tuple[Job, Result | None]]:
    """Jobs with their results as they finish, None for one whose worker died.

    Every worker has a pool of its own and one job at a time, so that a dead one names its job and loses no other.
    An error that ``function`` raises is raised here.
    """
    queue = iter(jobs)
    pools = [_new_pool() for _ in range(num_workers)]
    running: dict[Future[Result], tuple[Job, int]] = {}

    def start_next(slot: int) -> None:
        for job in queue:
            running[pools[slot].submit(function, job)] = (job, slot)
            return

    try:
        for slot in range(num_workers):
            start_next(slot)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, slot = running.pop(future)
                try:
                    result = future.result()
                except BrokenProcessPool:
                    pools[slot].shutdown(wait=False)
                    pools[slot], result = _new_pool(), None
                start_next(slot)
                yield job, result
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def default_num_workers() -> int:
    """One worker a core that this process may use, and not more than there is memory for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = available_memory_bytes()
    return cores if memory is None else max(1, min(cores, memory // WORKER_MEMORY_BYTES))


def available_memory_bytes() -> int | None:
    """Memory that can be had without swapping, container limits counted; None where the system does not tell."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")) - used)
    except (OSError, ValueError):  # no such files, or a limit called "max"
        pass
    return max(min(found), 0) if found else None


def _new_pool() -> ProcessPoolExecutor:
    # A fork of a process with threads (a tracker, torch) can hang, so workers start afresh.
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for jobs for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
