"""Preprocessing through Prefect's task runners."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

import flows.preprocess as module
from flows.preprocess import in_tasks, make_task_runner, run_preprocess
from photon.errors import PhotonError
from pipelines.preprocess import preprocess
from pipelines.preprocess_scan import Outcome, ScanJob, do_scan
from pipelines.scans.nifti import write_scan
from pipelines.volumes import VolumeSpec

SPEC = VolumeSpec(spacing_mm=6.0, shape=(14, 28, 28), window_hu=(-200, 300))
NUM_SCANS = 10


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Ten scans, one of them cut."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(NUM_SCANS):
        array = np.random.RandomState(number).randint(-900, 900, (12, 13, 14)).astype(np.int16)
        write_scan(array, np.diag([4.0, 4.0, 5.0, 1.0]), folder / f"{number}.nii")
    (folder / "7.nii").write_bytes((folder / "7.nii").read_bytes()[:900])
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("runner", ["threads", "dask", "ray"])
@pytest.mark.usefixtures("prefect_server")
def test_runners_do_what_processes_do(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runner: str
) -> None:
    if runner != "threads" and importlib.util.find_spec(f"prefect_{runner}") is None:
        pytest.skip(f"prefect-{runner} is not installed")
    expected = preprocess(scans, tmp_path / "expected", SPEC)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a scan was done without the runner")

    monkeypatch.setattr("pipelines.preprocess.run_in_processes", refuse)
    seen: list[int] = []
    record = run_preprocess(
        scans, tmp_path / "out", SPEC, runner=runner, scans_per_task=3, num_workers=2,
        on_progress=lambda done, total, _: seen.append(done),
    )  # fmt: skip
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert record.refused_by_code == expected.refused_by_code == {"SCAN_TRUNCATED": 1}
    assert seen == list(range(1, NUM_SCANS + 1))
    again = run_preprocess(scans, tmp_path / "out", SPEC, runner=runner, scans_per_task=3, num_workers=2)
    assert (again.num_new, again.num_unchanged) == (0, NUM_SCANS - 1)


@pytest.mark.usefixtures("prefect_server")
def test_a_chunk_whose_worker_died_is_done_scan_by_scan(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(job: ScanJob) -> Outcome:
        if job.source.scan_id == "4":
            raise RuntimeError("the worker died")
        return do_scan(job)

    monkeypatch.setattr(module, "do_scan", die)
    chunks: list[int] = []

    @flow(task_runner=ThreadPoolTaskRunner(max_workers=2), persist_result=False)
    def run() -> None:
        jobs = in_tasks(3)

        def counted(given: Sequence[ScanJob]) -> Iterator[tuple[ScanJob, Outcome | None]]:
            for job, outcome in jobs(given):
                chunks.append(outcome is None)
                yield job, outcome

        record = preprocess(scans, tmp_path / "out", SPEC, run_jobs=counted)
        assert (record.num_ok, record.num_refused) == (NUM_SCANS - 1, 1)

    run()
    assert sum(chunks) == 3 and len(chunks) == NUM_SCANS


@pytest.mark.parametrize(
    ("runner", "options", "named"),
    [
        ("processes", {"address": "tcp://127.0.0.1:1"}, "--address"),
        ("threads", {"address": "tcp://127.0.0.1:1"}, "--address"),
        ("processes", {"scans_per_task": 5}, "--scans-per-task"),
        ("dask", {"address": "tcp://127.0.0.1:1", "num_workers": 2}, "--workers"),
    ],
)
def test_options_that_a_runner_has_no_use_for(
    scans: Path, tmp_path: Path, runner: str, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(PhotonError, match="OPTION_UNUSED") as refused:
        run_preprocess(scans, tmp_path / "out", SPEC, runner=runner, **options)
    assert refused.value.subject == named and runner in refused.value.fact
    assert not (tmp_path / "out").exists()


def test_runners_that_are_not_there(scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PhotonError, match="RUNNER_UNKNOWN"):
        run_preprocess(scans, tmp_path / "out", SPEC, runner="slurm")
    for name in ("dask", "ray"):
        monkeypatch.setitem(sys.modules, f"prefect_{name}", None)
        with pytest.raises(PhotonError, match="RUNNER_MISSING"):
            make_task_runner(name, None, 1)
