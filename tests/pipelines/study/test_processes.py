"""Work in a process of its own: results, tracking, progress, errors, death."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from photon.errors import PhotonError
from pipelines.study.memory import peak_memory, reset_peak
from pipelines.study.processes import launch_here, launch_in_process
from pipelines.tracking import MemoryTracker


def talk(value: int, *, tracker: Any, on_progress: Any) -> dict[str, int]:
    import torch

    tracker.log_hyperparameters({"value": value})
    tracker.log({"loss": 0.5}, step=3)
    tracker.log_summary({"accuracy": 1.0})
    tracker.log_tags({"a": "b"})
    tracker.log_table("t", {"c": [1, 2]})
    tracker.log_dataset("data", "v", "p")
    tracker.log_artifact(Path("x"), "folder")
    tracker.finish("FAILED")
    on_progress(1, 2, "half")
    return {"double": 2 * value, "pid": os.getpid(), "threads": torch.get_num_threads()}


def refuse(*, tracker: Any, on_progress: Any) -> None:
    raise PhotonError("SPLIT_EMPTY", "data", "nothing.", "Mend it.")


def fail(*, tracker: Any, on_progress: Any) -> None:
    raise KeyError("the missing key")


def die(*, tracker: Any, on_progress: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("launch", [launch_here, launch_in_process])
def test_what_goes_through(launch: Any) -> None:
    tracker, seen = MemoryTracker(), []
    result = launch(talk, {"value": 21}, tracker=tracker, on_progress=lambda *told: seen.append(told), threads=1)
    assert result["double"] == 42 and result["threads"] == 1
    assert (result["pid"] == os.getpid()) == (launch is launch_here)
    assert seen == [(1, 2, "half")]
    assert tracker.hyperparameters == {"value": 21}
    assert tracker.steps == [(3, {"loss": 0.5})]
    assert tracker.summary == {"accuracy": 1.0} and tracker.tags == {"a": "b"}
    assert tracker.tables == {"t": {"c": [1, 2]}} and tracker.datasets == [("data", "v", "p")]
    assert tracker.artifacts == [(Path("x"), "folder")]


def test_errors_come_back_as_they_are() -> None:
    def launch(work: Any) -> None:
        launch_in_process(work, {}, tracker=MemoryTracker(), on_progress=lambda *_: None, threads=1)

    with pytest.raises(PhotonError) as refused:
        launch(refuse)
    assert (refused.value.code, refused.value.remedy) == ("SPLIT_EMPTY", "Mend it.")
    with pytest.raises(RuntimeError, match="the missing key"):
        launch(fail)
    with pytest.raises(PhotonError) as lost:
        launch(die)
    assert lost.value.code == "WORKER_LOST" and "-9" in lost.value.fact


def test_a_peak_of_memory_is_seen_and_forgotten() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system cannot forget a peak")
    reset_peak()
    before = peak_memory()["peak_mib"]
    block = bytearray(64 << 20)
    assert peak_memory()["peak_mib"] > before + 60
    del block
    reset_peak()
    assert peak_memory()["peak_mib"] < before + 30
