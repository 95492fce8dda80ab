"""What goes wrong in a training run is told with the scans, and leaves something to go on from."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.checkpoint import read_model
from photon.errors import PhotonError
from photon.training import loop
from photon.training.pretrain import NamingConfig
from photon.training.stages import StageSchedule
from photon.training.working import read_note, write_note
from pipelines import dataset
from pipelines.dataset import read_split
from pipelines.train import LAST_GOOD, train
from pipelines.train_spec import TrainSpec

SMOKE = TrainSpec.preset("smoke")
MICRO = dataclasses.replace(
    SMOKE,
    schedule=StageSchedule(alignment=0, warm_up=16, soft=0, hard=0, flip_after=0),
    draw=dataclasses.replace(SMOKE.draw, scans_per_step=3, questions_per_scan=2),
    naming=NamingConfig(num_steps=0),
    save_every=1,
)


def run(data: Path, folder: Path, spec: TrainSpec = MICRO, **options: Any) -> Any:
    return train(spec, data, folder, data_version="v1", train_blind=False, **options)


def scans_of(data: Path, step: int) -> list[str]:
    scans = read_split(data, "train")
    start = dataset.BatchSource.__new__(dataset.BatchSource)
    start.scans, start.draw, start.seed = scans, MICRO.draw, MICRO.seed
    return start.names(step, [0], 1)


@pytest.mark.parametrize(
    "fault, code",
    [
        (PhotonError("GRID_INVALID", "a side", "is bad.", "Mend it."), "GRID_INVALID"),
        (OSError("gone"), "TRAINING_FAILED"),
    ],
)
def test_a_scan_that_cannot_be_read_is_named(
    smoke_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception, code: str
) -> None:
    """The third scan that is cut into patches makes trouble: the last one of the first step."""
    calls: list[int] = []
    patchify = dataset.patchify

    def third(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise fault
        return patchify(*arguments)

    monkeypatch.setattr(dataset, "patchify", third)
    with pytest.raises(PhotonError) as caught:
        run(smoke_data, tmp_path)
    assert caught.value.code == code
    assert f"(scan {scans_of(smoke_data, 0)[2]})" in caught.value.subject
    assert "bad" in caught.value.fact or "OSError: gone" in caught.value.fact


def test_a_step_that_cannot_be_computed_names_its_scans(
    smoke_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = loop.compute_loss
    calls: list[int] = []

    def sixth(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("no memory is left")
        return compute(*arguments)

    monkeypatch.setattr(loop, "compute_loss", sixth)
    with pytest.raises(PhotonError) as caught:
        run(smoke_data, tmp_path, dataclasses.replace(MICRO, accumulate=2))
    names = scans_of(smoke_data, 2)
    assert caught.value.code == "TRAINING_FAILED" and "no memory is left" in caught.value.fact
    assert caught.value.subject == f"step 2 (scan {names[1]})", "the second micro-batch of the third step"
    assert json.loads((tmp_path / "state" / "progress.json").read_text())["num_steps_done"] == 1
    monkeypatch.setattr(loop, "compute_loss", compute)
    run(smoke_data, tmp_path, dataclasses.replace(MICRO, accumulate=2))


def test_what_a_killed_run_was_working_on_is_told_by_the_next(
    smoke_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    notes, seen = tmp_path / "working", []
    write_note(notes, 0, 41, ["ct-1", "ct-2"])
    with caplog.at_level(logging.INFO, logger="photon"):
        run(smoke_data, tmp_path, on_progress=lambda done, total, label: seen.append(read_note(notes, 0)))
    assert "rank 0 ended without a message in step 41, working on scans ct-1, ct-2" in caplog.text
    assert [(note["step"], note["scans"]) for note in seen[:3]] == [
        (step, scans_of(smoke_data, step)) for step in range(3)
    ]
    assert not notes.exists()


def test_an_explosion_leaves_a_checkpoint_to_start_from(
    smoke_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the fourth step the weights are spoilt: the loss is a hundred times a guess, and stays there."""
    watch, steps = loop.LossWatch.see, []

    def explode(self: Any, loss: float, step: int, stage: Any) -> None:
        steps.append(step)
        watch(self, loss if step < 4 else 100.0 * loss, step, stage)

    monkeypatch.setattr(loop.LossWatch, "see", explode)
    with pytest.raises(PhotonError) as caught:
        run(smoke_data, tmp_path / "bad")
    error = caught.value
    assert error.code == "TRAINING_DIVERGED" and steps[-1] == 13
    assert all(name in error.subject for name in scans_of(smoke_data, 13))
    good = tmp_path / "bad" / LAST_GOOD
    assert str(good) in error.remedy and "--start-from" in error.remedy and "--learning-rate" in error.remedy
    assert not (tmp_path / "bad" / "checkpoint").exists() and not (tmp_path / "bad" / "record.json").exists()
    assert all(bool(p.isfinite().all()) for p in read_model(good).parameters())
    assert json.loads((tmp_path / "bad" / "state" / "progress.json").read_text())["num_steps_done"] == 3
    monkeypatch.setattr(loop.LossWatch, "see", watch)
    slower = TrainSpec.preset("smoke", is_pretrained=True, learning_rate=1e-4)
    assert slower.optimiser.learning_rate == 1e-4
    assert slower.optimiser.vision_learning_rate == pytest.approx(5e-5)
    run(smoke_data, tmp_path / "again", slower, start_from=good)
