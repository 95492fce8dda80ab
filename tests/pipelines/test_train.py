"""The train stage: what it writes, and that a killed run ends where an unbroken one does."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.checkpoint import WEIGHTS, load_tensors, read_config, read_model
from photon.errors import PhotonError
from photon.training.loop import Trainer
from photon.training.pretrain import NamingConfig
from photon.training.stages import StageSchedule
from pipelines.files import lock_output
from pipelines.results import TrainRecord
from pipelines.text import TOKENIZER, Prompter
from pipelines.tracking import MemoryTracker
from pipelines.train import PROVENANCE, train
from pipelines.train_spec import TrainSpec

SMOKE = TrainSpec.preset("smoke")
MICRO = dataclasses.replace(
    SMOKE,
    schedule=StageSchedule(alignment=1, warm_up=2, soft=1, hard=2, flip_after=1),
    draw=dataclasses.replace(SMOKE.draw, scans_per_step=2, questions_per_scan=2),
    pruned_draw=dataclasses.replace(SMOKE.pruned_draw, scans_per_step=1, questions_per_scan=2),
    blind_steps=2,
    naming=NamingConfig(num_steps=2),
    naming_scans_per_step=2,
    validate_every=3,
    save_every=2,
)


class Killed(BaseException):
    """Not caught by anything on the way."""


def history(folder: Path) -> list[dict[str, object]]:
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "elapsed_s"} for row in rows]


def weights_equal(first: Path, second: Path) -> bool:
    ours, theirs = load_tensors(first / WEIGHTS), load_tensors(second / WEIGHTS)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def whole(smoke_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainRecord, MemoryTracker]:
    """A run nobody interrupted."""
    folder, tracker = tmp_path_factory.mktemp("whole"), MemoryTracker()
    return folder, train(MICRO, smoke_data, folder, data_version="v1", tracker=tracker), tracker


def test_what_a_run_leaves(whole: tuple[Path, TrainRecord, MemoryTracker]) -> None:
    folder, record, _ = whole
    rows = history(folder)
    assert [row["step"] for row in rows] == list(range(6))
    assert [row["stage"] for row in rows] == ["alignment", "warm-up", "warm-up", "soft", "hard", "hard"]
    assert [("validation_accuracy" in row) for row in rows] == [False, False, True, False, False, True]
    assert all(row["kept_fraction"] == 1.0 for row in rows[:3])
    assert all(0.0 < float(str(row["kept_fraction"])) < 1.0 for row in rows[3:])
    assert TrainRecord.read(folder / "record.json") == record
    assert record.final_loss == rows[-1]["answer_loss"] and record.num_steps == 6
    for name, path in (("checkpoint", record.checkpoint), ("blind", record.blind_checkpoint)):
        assert path == str(folder / name)
        assert read_config(Path(path)).digest() == record.config_digest
        assert Prompter.read(Path(path) / TOKENIZER).vocab_size == read_config(Path(path)).vocab_size
        assert json.loads((Path(path) / PROVENANCE).read_text())["data_version"] == "v1"
        assert all(bool(torch.isfinite(p).all()) for p in read_model(Path(path)).parameters())
    assert not weights_equal(folder / "checkpoint", folder / "blind")


def test_what_is_tracked(whole: tuple[Path, TrainRecord, MemoryTracker]) -> None:
    content = json.dumps(vars(whole[2]), default=str)
    for name in (
        "naming_loss",
        "answer_loss",
        "kept_fraction",
        "tokens_per_sample",
        "validation_accuracy",
        "data_version",
    ):
        assert name in content


@pytest.mark.parametrize("last", [1, 2, 4, 6, 8, 10])
def test_a_killed_run_ends_where_an_unbroken_one_does(
    smoke_data: Path, tmp_path: Path, whole: tuple[Path, TrainRecord, MemoryTracker], last: int
) -> None:
    """Killed in pretraining, alignment, warm-up, hard and in the text-only baseline, with steps since the last save."""

    def kill(done: int, total: int, label: str) -> None:
        assert total == 2 + 6 + 2
        if done == last:
            raise Killed

    with pytest.raises(Killed):
        train(MICRO, smoke_data, tmp_path, data_version="v1", on_progress=kill)
    assert not (tmp_path / "record.json").exists()
    record = train(MICRO, smoke_data, tmp_path, data_version="v1")
    for name in ("checkpoint", "blind"):
        assert weights_equal(tmp_path / name, whole[0] / name), name
    assert history(tmp_path) == history(whole[0])
    assert record.final_loss == whole[1].final_loss


def test_a_line_cut_short_by_the_kill_is_written_again(
    smoke_data: Path, tmp_path: Path, whole: tuple[Path, TrainRecord, MemoryTracker]
) -> None:
    def kill(done: int, total: int, label: str) -> None:
        if done == 2 + 4:
            raise Killed

    with pytest.raises(Killed):
        train(MICRO, smoke_data, tmp_path, data_version="v1", on_progress=kill)
    path = tmp_path / "history.jsonl"
    path.write_text(path.read_text()[:-9])
    train(MICRO, smoke_data, tmp_path, data_version="v1")
    assert history(tmp_path) == history(whole[0])


def test_a_finished_run_does_nothing_again(smoke_data: Path, whole: tuple[Path, TrainRecord, MemoryTracker]) -> None:
    def fail(done: int, total: int, label: str) -> None:
        pytest.fail(f"step {done} was done again")

    before = (whole[0] / "checkpoint" / WEIGHTS).read_bytes()
    record = train(MICRO, smoke_data, whole[0], data_version="v1", on_progress=fail)
    assert record.final_loss == whole[1].final_loss
    assert (whole[0] / "checkpoint" / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize("change", ["seed", "data"])
def test_another_run_in_the_same_folder_is_refused(
    smoke_data: Path, whole: tuple[Path, TrainRecord, MemoryTracker], change: str
) -> None:
    spec = dataclasses.replace(MICRO, seed=1) if change == "seed" else MICRO
    before = {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()}
    with pytest.raises(PhotonError) as caught:
        train(spec, smoke_data, whole[0], data_version="v2" if change == "data" else "v1")
    assert caught.value.code == "CHECKPOINT_MISMATCH"
    assert {path: path.read_bytes() for path in whole[0].rglob("*") if path.is_file()} == before


def test_without_label_maps_there_is_no_pretraining(smoke_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "volumes").symlink_to(smoke_data / "volumes")
    (data / "questions.jsonl").symlink_to(smoke_data / "questions.jsonl")
    labels: list[str] = []
    train(MICRO, data, tmp_path / "run", data_version="v1", on_progress=lambda done, total, label: labels.append(label))
    assert len(labels) == 6 + 2 and not any("pretraining" in label for label in labels)


def test_presets() -> None:
    assert TrainSpec.preset("demo").digest() != SMOKE.digest() != TrainSpec.preset("smoke", seed=1).digest()
    assert TrainSpec.preset("smoke").digest() == SMOKE.digest()
    with pytest.raises(PhotonError, match="demo, smoke") as caught:
        TrainSpec.preset("huge")
    assert caught.value.code == "PRESET_UNKNOWN"


def test_an_output_that_cannot_be_written_is_refused(smoke_data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PhotonError) as caught:
        train(MICRO, smoke_data, tmp_path / "file", data_version="v1")
    assert caught.value.code == "OUTPUT_UNWRITABLE"


def test_a_gpu_that_is_not_there_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(PhotonError) as caught:
        train(MICRO, tmp_path / "nothing", tmp_path / "out", data_version="v1", device="cuda")
    assert caught.value.code == "GPU_UNAVAILABLE"
    assert not (tmp_path / "out").exists()


def test_bfloat16_is_another_run(
    smoke_data: Path, whole: tuple[Path, TrainRecord, MemoryTracker], tmp_path: Path
) -> None:
    spec = dataclasses.replace(MICRO, optimiser=dataclasses.replace(MICRO.optimiser, precision="bfloat16"))
    assert spec.digest() != MICRO.digest()
    record = train(spec, smoke_data, tmp_path, data_version="v1")
    held = load_tensors(Path(record.checkpoint) / WEIGHTS)
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in held.values())
    assert history(tmp_path)[0]["loss"] == pytest.approx(history(whole[0])[0]["loss"], rel=0.05)
    assert not weights_equal(Path(record.checkpoint), Path(whole[1].checkpoint))


def test_recomputed_activations_give_the_same_run(
    smoke_data: Path,
    whole: tuple[Path, TrainRecord, MemoryTracker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[bool] = []
    run = Trainer.run

    def spy(trainer: Trainer, *arguments: Any, **options: Any) -> None:
        seen.append(trainer.model.checkpoint_activations)
        run(trainer, *arguments, **options)

    monkeypatch.setattr(Trainer, "run", spy)
    record = train(MICRO, smoke_data, tmp_path, data_version="v1", checkpoint_activations=True)
    assert seen == [True, True]
    assert history(tmp_path) == history(whole[0])
    for ours, theirs in (
        (record.checkpoint, whole[1].checkpoint),
        (record.blind_checkpoint, whole[1].blind_checkpoint),
    ):
        assert weights_equal(Path(ours), Path(theirs))
    train(MICRO, smoke_data, tmp_path, data_version="v1")
    assert seen[2:] == [False, False], "off by default, and the folder of either goes on"


def test_sizes_of_batches_and_precision_of_a_preset() -> None:
    spec = TrainSpec.preset("demo", precision="bfloat16", scans_per_step=1, questions_per_scan=3)
    for draw in (spec.draw, spec.pruned_draw):
        assert (draw.scans_per_step, draw.questions_per_scan) == (1, 3)
    assert spec.naming_scans_per_step == 1 and spec.optimiser.precision == "bfloat16"
    plain = TrainSpec.preset("demo")
    assert spec.pruned_draw.robust_probability == plain.pruned_draw.robust_probability
    assert (plain.draw.questions_per_scan, plain.pruned_draw.questions_per_scan) == (24, 12)
    assert plain.optimiser.precision == "float32" and plain.naming_scans_per_step == 8
    with pytest.raises(PhotonError) as caught:
        TrainSpec.preset("demo", precision="float16")  # type: ignore[arg-type]
    assert caught.value.code == "PRECISION_UNKNOWN"


def test_two_runs_in_one_folder_are_refused(smoke_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "train"
    output.mkdir()
    with lock_output(output), pytest.raises(PhotonError) as caught:
        train(MICRO, smoke_data, output, data_version="v1")
    assert caught.value.code == "OUTPUT_BUSY"
    assert [path.name for path in output.iterdir()] == [".lock"]


def test_a_run_inside_a_locked_folder_leaves_no_lock_in_its_checkpoints(smoke_data: Path, tmp_path: Path) -> None:
    with lock_output(tmp_path):
        record = train(MICRO, smoke_data, tmp_path / "train", data_version="v1")
    for folder in (record.checkpoint, record.blind_checkpoint):
        assert not list(Path(folder).rglob(".lock"))
