"""Preprocessing on threads, Dask or Ray, through Prefect's task runners: the same stage, its scans handed out in
chunks.

A Prefect task costs tens of milliseconds, whatever it does (benchmarks/bench_archive.py); a chunk of `SCANS_PER_TASK`
scans takes so much longer that this is below 5 % of it. Runners are imported only when they are asked for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from flows import settings

settings.apply()

from prefect import flow, task  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.futures import as_completed  # noqa: E402
from prefect.task_runners import TaskRunner, ThreadPoolTaskRunner  # noqa: E402

from photon.errors import PhotonError  # noqa: E402
from pipelines.preprocess import preprocess  # noqa: E402
from pipelines.preprocess_scan import Outcome, ScanJob, do_scan  # noqa: E402
from pipelines.results import PreprocessRecord  # noqa: E402
from pipelines.volumes import VolumeSpec  # noqa: E402
from pipelines.workers import default_num_workers  # noqa: E402

_log = logging.getLogger("photon")

SCANS_PER_TASK = 128
CLUSTERS = ("dask", "ray")
RUNNERS = ("processes", "threads", *CLUSTERS)


def run_preprocess(
    input: Path,
    output: Path,
    spec: VolumeSpec,
    *,
    runner: str,
    scans_per_task: int | None = None,
    address: str | None = None,
    num_workers: int | None = None,
    **options: Any,
) -> PreprocessRecord:
    """`pipelines.preprocess.preprocess` with its scans done by a Prefect task runner.

    Args:
        runner: ``threads``, ``dask`` or ``ray``; ``processes`` does without Prefect.
        scans_per_task: chunk, `SCANS_PER_TASK` by default; the last scans of a run wait for its slowest chunk.
        address: of a running Dask or Ray cluster that sees the same files; without it one is started here.
        num_workers: threads or processes here, or those of a cluster that is started here.
        options: further arguments of :func:`preprocess`.

    Raises:
        PhotonError: ``RUNNER_UNKNOWN``, ``RUNNER_MISSING``, ``OPTION_UNUSED`` for an argument that the runner has no
            use for, and those of :func:`preprocess`.
    """
    if runner not in RUNNERS:
        raise PhotonError("RUNNER_UNKNOWN", runner, "there is no such runner.", f"Choose one of: {', '.join(RUNNERS)}.")
    _check_options(runner, scans_per_task, address, num_workers)
    if runner == "processes":
        return preprocess(input, output, spec, num_workers=num_workers, **options)
    task_runner = make_task_runner(runner, address, num_workers or default_num_workers())

    @flow(name="preprocess", persist_result=False, task_runner=task_runner)
    def preprocess_flow() -> Any:  # no arguments: Prefect would store them, and needs none
        return preprocess(input, output, spec, run_jobs=in_tasks(scans_per_task or SCANS_PER_TASK), **options)

    with settings.embedded_server(), settings.quiet_flow_errors():
        record: Any = preprocess_flow()
    return cast(PreprocessRecord, record)


def _check_options(runner: str, scans_per_task: int | None, address: str | None, num_workers: int | None) -> None:
    """What would be ignored is refused: whoever says it expects it to count."""
    if address is not None and runner not in CLUSTERS:
        fact = f"the runner {runner} works on this machine alone."
        raise PhotonError("OPTION_UNUSED", "--address", fact, "Leave it out, or say --runner dask or --runner ray.")
    if scans_per_task is not None and runner == "processes":
        fact = f"the runner {runner} hands scans out one by one."
        raise PhotonError("OPTION_UNUSED", "--scans-per-task", fact, "Leave it out, or choose another --runner.")
    if num_workers is not None and address is not None:
        fact = f"a running {runner} cluster has the workers it has."
        raise PhotonError("OPTION_UNUSED", "--workers", fact, "Leave it out, or --address, to start a cluster here.")


def make_task_runner(name: str, address: str | None, num_workers: int) -> TaskRunner[Any]:
    """The Prefect task runner of a name of `RUNNERS`; each of its workers does one scan at a time."""
    if name == "threads":
        return ThreadPoolTaskRunner(max_workers=num_workers)
    try:
        if name == "dask":
            os.environ.setdefault("DASK_LOGGING__DISTRIBUTED", "warning")
            from prefect_dask import DaskTaskRunner

            if address:
                return DaskTaskRunner(address=address)
            cluster = {"n_workers": num_workers, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
            return DaskTaskRunner(cluster_kwargs=cluster)
        from prefect_ray import RayTaskRunner

        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local = {"num_cpus": num_workers, "include_dashboard": False, "log_to_driver": False}
        return RayTaskRunner(address=address, init_kwargs={} if address else local)
    except ImportError as error:
        fact = f"its packages are not installed ({error.name})."
        raise PhotonError("RUNNER_MISSING", name, fact, "Run pip install 'photon-volumes[runners]'.") from error


class Chunk:
    """Jobs that are handed out together. A class of its own: Prefect and Dask would look for futures in lists and
    dataclasses, and Dask would rebuild them."""

    def __init__(self, jobs: Sequence[ScanJob]) -> None:
        self.jobs = jobs


@task(name="preprocess-scans", persist_result=False, cache_policy=NO_CACHE, log_prints=False)
def do_chunk(chunk: Chunk) -> list[Outcome]:
    """A chunk of scans, one after another, on a worker."""
    return [do_scan(job) for job in chunk.jobs]


def in_tasks(scans_per_task: int) -> Callable[[Sequence[ScanJob]], Iterator[tuple[ScanJob, Outcome | None]]]:
    """A runner of jobs for :func:`preprocess`, to be used inside a flow; its task runner decides where they run."""

    def run_jobs(jobs: Sequence[ScanJob]) -> Iterator[tuple[ScanJob, Outcome | None]]:
        chunks = [Chunk(jobs[start : start + scans_per_task]) for start in range(0, len(jobs), scans_per_task)]
        submitted = {do_chunk.submit(chunk): chunk.jobs for chunk in chunks}
        for future in as_completed(list(submitted)):
            chunk = submitted[future]
            outcomes: Sequence[Outcome | None]
            try:
                outcomes = future.result()
            except PhotonError:
                raise
            except Exception as error:  # the worker died; which of the scans it was is found out one by one
                _log.warning("A chunk of %d scans failed (%s); they are done alone.", len(chunk), type(error).__name__)
                outcomes = [None] * len(chunk)
            yield from zip(chunk, outcomes, strict=True)

    return run_jobs
