"""Settings of a training run: pruning and model, a frozen vision tower, evidence, micro-batches, options as text."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from photon.checkpoint import WEIGHTS, load_tensors, read_config
from photon.errors import PhotonError
from photon.training.pretrain import NamingConfig
from photon.training.stages import StageSchedule, WarmUpSwitch
from pipelines import train_run
from pipelines.dataset import BatchSource, read_split
from pipelines.results import TrainRecord
from pipelines.start import start_from_scratch
from pipelines.train import TRAINING, train
from pipelines.train_options import parse_settings, parse_stages
from pipelines.train_spec import LEARNT, TrainSpec

SMOKE = TrainSpec.preset("smoke")
MICRO = dataclasses.replace(
    SMOKE,
    schedule=StageSchedule(alignment=0, warm_up=4, soft=1, hard=2, flip_after=1),
    draw=dataclasses.replace(SMOKE.draw, scans_per_step=3, questions_per_scan=2),
    pruned_draw=dataclasses.replace(SMOKE.pruned_draw, scans_per_step=3, questions_per_scan=2, robust_probability=0.4),
    blind_steps=2,
    naming=NamingConfig(num_steps=2),
    naming_scans_per_step=2,
    validate_every=2,
    save_every=1,
)


class Killed(BaseException):
    """Not caught by anything on the way."""


def run(data: Path, folder: Path, changes: dict[str, Any], **options: Any) -> TrainRecord:
    options = {"train_blind": False} | options
    return train(dataclasses.replace(MICRO, **changes), data, folder, data_version="v1", **options)


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "elapsed_s"} for line in lines]


def killed_and_resumed(data: Path, folder: Path, changes: dict[str, Any], last: int, **options: Any) -> None:
    def kill(done: int, total: int, label: str) -> None:
        if done == last:
            raise Killed

    with pytest.raises(Killed):
        run(data, folder, changes, on_progress=kill, **options)
    run(data, folder, changes, **options)


def test_settings_are_part_of_the_run_and_presets_stay_what_they_were() -> None:
    published = [TrainSpec.preset(name, method="published").digest() for name in ("smoke", "demo")]
    assert tuple(published) == ("1199233cbf71", "7c6fc9d8c8f9")
    changes: list[dict[str, Any]] = [
        {},
        {"pruning": {"policy": "fixed"}},
        {"pruning": {"policy": "fixed", "keep_ratio": 0.5}},
        {"model": {"hidden_size": 32}},
        {"freeze_vision": True},
        {"switch": WarmUpSwitch()},
        {"switch": WarmUpSwitch(margin=0.1)},
        {"accumulate": 2},
    ]
    digests = [dataclasses.replace(MICRO, **change).digest() for change in changes]
    assert len(set(digests)) == len(changes)
    assert dataclasses.replace(MICRO, pruning={"keep_ratio": 0.5, "policy": "fixed"}).digest() == digests[2]


def test_pruning_and_size_of_the_model(smoke_data: Path, tmp_path: Path) -> None:
    size = {"hidden_size": 32, "num_hidden_layers": 3, "vision": {"depth": 2, "fullatt_block_indexes": [1]}}
    changes = {"pruning": {"policy": "fixed", "keep_ratio": 0.5, "layer": 0}, "model": size}
    record = run(smoke_data, tmp_path / "first", changes)
    config = read_config(Path(record.checkpoint))
    assert (config.hidden_size, config.num_hidden_layers, config.vision.depth) == (32, 3, 2)
    assert (config.vision.out_hidden_size, config.head_dim, config.mrope_section) == (32, 8, (1, 1, 2))
    assert (config.pruning.policy, config.pruning.keep_ratio, config.pruning.layer) == ("fixed", 0.5, 0)
    assert config.pruning.min_tokens == 4, "what is not named stays"
    assert rows(tmp_path / "first")[-1]["kept_fraction"] == pytest.approx(0.5)

    again = {"pruning": {"policy": "photon", "layer": 0}}
    start = Path(record.checkpoint)
    second = run(smoke_data, tmp_path / "second", again, start_from=start)
    assert read_config(Path(second.checkpoint)) == dataclasses.replace(
        config, pruning=dataclasses.replace(config.pruning, policy="photon")
    )
    with pytest.raises(PhotonError) as caught:
        run(smoke_data, tmp_path / "third", {"pruning": {"layer": 1}}, start_from=start)
    assert caught.value.code == "CHECKPOINT_MISMATCH", "its threshold network stands in another layer"
    with pytest.raises(PhotonError) as caught:
        run(smoke_data, tmp_path / "third", {"model": {"hidden_size": 64}}, start_from=start)
    assert caught.value.code == "TRAINING_INVALID"


@pytest.mark.parametrize(
    "changes",
    [
        {"pruning": {"polcy": "fixed"}},
        {"pruning": {"policy": "best"}},
        {"model": {"hidden_sise": 32}},
        {"model": {"hidden_size": 30}},
        {"model": {"vision": {"depht": 2}}},
    ],
)
def test_settings_that_do_not_exist_are_refused(smoke_data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(PhotonError) as caught:
        run(smoke_data, tmp_path, changes)
    assert caught.value.code == "CONFIG_INVALID"


@pytest.mark.parametrize("width, heads, sections", [(128, 4, (4, 6, 6)), (128, 8, (2, 3, 3)), (64, 4, (2, 3, 3))])
def test_what_follows_from_the_width(width: int, heads: int, sections: tuple[int, ...]) -> None:
    config = start_from_scratch(["a b"], {"hidden_size": width, "num_attention_heads": heads}).config
    assert config.mrope_section == sections and config.vision.out_hidden_size == width


def test_settings_that_contradict_each_other_are_refused(smoke_data: Path, tmp_path: Path) -> None:
    aligned = dataclasses.replace(MICRO.schedule, alignment=1)
    for changes in ({"accumulate": 0}, {"freeze_vision": True, "schedule": aligned}):
        with pytest.raises(PhotonError) as caught:
            dataclasses.replace(MICRO, **changes)
        assert caught.value.code == "TRAINING_INVALID"
    with pytest.raises(PhotonError) as caught:
        run(smoke_data, tmp_path / "run", {"switch": WarmUpSwitch()})
    assert caught.value.code == "TRAINING_INVALID" and not (tmp_path / "run").exists()
    assert TrainSpec.preset("demo", freeze_vision=True).schedule.alignment == 0


def test_a_frozen_tower_stays_as_its_pretraining_left_it(
    smoke_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained: list[dict[str, torch.Tensor]] = []
    pretrain = train_run.pretrain_vision

    def spy(tower: torch.nn.Module, *arguments: Any, **options: Any) -> None:
        before = {name: p.detach().clone() for name, p in tower.named_parameters()}
        pretrain(tower, *arguments, **options)  # type: ignore[arg-type]
        pretrained.append({name: p.detach().clone() for name, p in tower.named_parameters()})
        assert all(not torch.equal(before[name], p) for name, p in pretrained[-1].items() if p.ndim > 1)

    monkeypatch.setattr(train_run, "pretrain_vision", spy)
    record = run(smoke_data, tmp_path / "frozen", {"freeze_vision": True})
    weights = load_tensors(Path(record.checkpoint) / WEIGHTS)
    assert all(torch.equal(weights[f"visual.{name}"], value) for name, value in pretrained[0].items())
    assert not any(
        ":" in name and name.startswith("visual.")
        for name in load_tensors(tmp_path / "frozen" / "state" / "optimiser.safetensors")
    )
    free = load_tensors(Path(run(smoke_data, tmp_path / "free", {}).checkpoint) / WEIGHTS)
    assert not any(
        torch.equal(free[f"visual.{name}"], value) for name, value in pretrained[1].items() if value.ndim > 1
    )
    killed_and_resumed(smoke_data, tmp_path / "resumed", {"freeze_vision": True}, 6)
    assert rows(tmp_path / "resumed") == rows(tmp_path / "frozen")


def test_evidence_ends_the_warm_up(smoke_data: Path, tmp_path: Path) -> None:
    changes = {"switch": WarmUpSwitch(margin=0.0, baseline=-1.0)}
    record = run(smoke_data, tmp_path / "whole", changes)
    history = rows(tmp_path / "whole")
    assert [row["stage"] for row in history] == ["warm-up"] * 2 + ["soft"] + ["hard"] * 2
    assert [row.get("evidence") for row in history] == [None, True, None, None, None]
    assert record.num_steps == 5 and "validation_accuracy" in history[-1]
    told = json.loads((Path(record.checkpoint) / TRAINING).read_text())
    assert (told["evidence"], told["switched_at"], told["planned"]["warm_up"]) == (True, 2, 4)
    assert told["schedule"] == {"alignment": 0, "warm_up": 2, "soft": 1, "hard": 2, "flip_after": 1}
    assert told["accuracy"] == history[1]["validation_accuracy"] and told["switch"]["baseline"] == -1.0
    for last in (3, 4, 5):
        killed_and_resumed(smoke_data, tmp_path / str(last), changes, last)
        assert rows(tmp_path / str(last)) == history
        assert (tmp_path / str(last) / "checkpoint" / WEIGHTS).read_bytes() == (
            Path(record.checkpoint) / WEIGHTS
        ).read_bytes()


def test_without_evidence_training_goes_on_and_says_so(
    smoke_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    longer = dataclasses.replace(MICRO.schedule, warm_up=3)
    with caplog.at_level(logging.INFO, logger="photon"):
        record = run(smoke_data, tmp_path, {"switch": WarmUpSwitch(baseline=2.0), "schedule": longer})
    history = rows(tmp_path)
    assert [row["stage"] for row in history] == ["warm-up"] * 3 + ["soft"] + ["hard"] * 2
    assert [row.get("evidence") for row in history] == [None, None, False, None, None, None]
    assert "validation_accuracy" in history[2], "the last chance is taken, whatever validate_every is"
    told = json.loads((Path(record.checkpoint) / TRAINING).read_text())
    assert told["evidence"] is False and told["switched_at"] is None
    assert "without evidence" in caplog.text


def test_the_text_only_model_is_trained_first_and_measured(smoke_data: Path, tmp_path: Path) -> None:
    labels: list[str] = []
    changes = {"switch": WarmUpSwitch(margin=-1.0)}
    options = {"train_blind": True, "on_progress": lambda done, total, label: labels.append(f"{done} {label}")}
    record = run(smoke_data, tmp_path / "whole", changes, **options)
    assert [label.split(",")[0] for label in labels[:5]] == [
        "1 text-only baseline",
        "2 text-only baseline",
        "3 vision pretraining",
        "4 vision pretraining",
        "5 warm-up",
    ]
    told = json.loads((Path(record.checkpoint) / TRAINING).read_text())
    baseline = told["switch"]["baseline"]
    assert 0.0 <= baseline <= 1.0 and told["evidence"] is True
    plain = run(smoke_data, tmp_path / "plain", {}, train_blind=True)
    ours, theirs = (Path(r.blind_checkpoint) / WEIGHTS for r in (record, plain))
    assert ours.read_bytes() == theirs.read_bytes(), "when it is trained makes no difference to it"
    told = json.loads((Path(plain.checkpoint) / TRAINING).read_text())
    assert told["evidence"] is None and told["switch"] is None
    killed_and_resumed(smoke_data, tmp_path / "resumed", changes, 6, train_blind=True)
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")


def test_no_text_only_model(smoke_data: Path, tmp_path: Path) -> None:
    totals: set[int] = set()
    record = run(smoke_data, tmp_path, {}, on_progress=lambda done, total, label: totals.add(total))
    assert record.blind_checkpoint == "" and TrainRecord.read(tmp_path / "record.json") == record
    assert not (tmp_path / "blind").exists() and totals == {2 + 7}
    assert run(smoke_data, tmp_path, {}, train_blind=True).blind_checkpoint, "it can be had later"


def test_micro_batches_are_the_step_dealt_out(smoke_data: Path) -> None:
    scans = read_split(smoke_data, "train")
    start = start_from_scratch([text for scan in scans for q in scan.questions for text in (q.question, q.answer)])
    draw = dataclasses.replace(MICRO.pruned_draw, scans_per_step=5, robust_probability=0.5, flip_probability=0.5)
    source = BatchSource(scans, start.prompter, start.config, draw, seed=3)
    for step in range(4):
        whole = source.batch(step, True)
        for count in (2, 3, 5, 7):
            parts = source.parts(step, True, range(count), count)
            assert len(parts) == min(count, 5)
            assert [part.names for part in parts] == [whole.names[n::count] for n in range(len(parts))]
            assert sum(part.num_branches for part in parts) == whole.num_branches
            by_scan = dict(zip(whole.names, split(whole), strict=True))
            for part in parts:
                for name, own in zip(part.names, split(part), strict=True):
                    assert all(torch.equal(x, y) for x, y in zip(own, by_scan[name], strict=True))
            assert [own.names for own in source.parts(step, True, [1], count)] == [parts[1].names]
        blind = source.blind_batch(step)
        parts = source.blind_parts(step, range(2), 2)
        assert sum(part.num_branches for part in parts) == blind.num_branches
        assert sorted(torch.cat([part.batch.branch_ids for part in parts]).tolist()) == sorted(
            blind.batch.branch_ids.tolist()
        )


def split(item: Any) -> list[tuple[torch.Tensor, ...]]:
    """Patches, branch ids, spoilt and flipped flags of each scan of a batch."""
    owner = torch.tensor(item.batch.branch_context)
    rows = torch.repeat_interleave(owner, torch.tensor(item.batch.branch_lengths))
    patches = item.batch.patches.chunk(len(item.names))
    return [
        (patches[n], item.batch.branch_ids[rows == n], item.is_perturbed[owner == n], item.is_flipped[owner == n])
        for n in range(len(item.names))
    ]


def test_a_run_in_micro_batches(smoke_data: Path, tmp_path: Path) -> None:
    run(smoke_data, tmp_path / "one", {}, train_blind=True)
    run(smoke_data, tmp_path / "three", {"accumulate": 4}, train_blind=True)
    for ours, theirs in zip(rows(tmp_path / "three"), rows(tmp_path / "one"), strict=True):
        for name in ("loss", "answer_loss", "kept_fraction", "tokens_per_sample", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=5e-3), (name, ours["step"])
        assert ours["stage"] == theirs["stage"]
    first = [rows(tmp_path / name)[0]["loss"] for name in ("one", "three")]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


DEFAULT = StageSchedule(alignment=10, warm_up=50, soft=20, hard=20, flip_after=5)


@pytest.mark.parametrize(
    "text, steps, expected",
    [
        (None, None, (10, 50, 20, 20, 5)),
        (None, 1000, (100, 500, 200, 200, 50)),
        ("alignment=1,warm-up=2,soft=3,hard=4,flip-after=2", None, (1, 2, 3, 4, 2)),
        ("warm-up=2, hard=4", 6, (0, 2, 0, 4, 0)),
        ("alignment=0.05,warm-up=0.5,soft=0.2,flip-after=0.05", 2000, (100, 1000, 400, 500, 100)),
        ("warm-up=0.5,soft=.25,hard=0.25", None, (0, 50, 25, 25, 0)),
    ],
)
def test_stages_as_text(text: str | None, steps: int | None, expected: tuple[int, ...]) -> None:
    assert dataclasses.astuple(parse_stages(text, steps, DEFAULT)) == expected


@pytest.mark.parametrize(
    "text, steps",
    [
        ("", None),
        ("warmup=5", None),
        ("warm-up", None),
        ("warm-up=five", None),
        ("warm-up=-5", None),
        ("warm-up=5,warm-up=6", None),
        ("warm-up=5", 6),
        ("warm-up=0.5,soft=0.6", 100),
        ("warm-up=0.5,hard=0.4", 100),
        ("warm-up=0", None),
    ],
)
def test_stages_that_cannot_be_read(text: str, steps: int | None) -> None:
    with pytest.raises(PhotonError) as caught:
        parse_stages(text, steps, DEFAULT)
    assert caught.value.code == "TRAINING_INVALID"


def test_settings_as_text() -> None:
    texts = ["policy=fixed", "keep_ratio=0.35", "keep_band=[0.2, 0.6]", "saliency_gradient=true", "vision.depth=6"]
    assert parse_settings(texts) == {
        "policy": "fixed",
        "keep_ratio": 0.35,
        "keep_band": [0.2, 0.6],
        "saliency_gradient": True,
        "vision": {"depth": 6},
    }
    for bad in ("policy", "=fixed", "policy="):
        with pytest.raises(PhotonError) as caught:
            parse_settings([bad])
        assert caught.value.code == "TRAINING_INVALID"


def test_scores_are_taught_unless_asked_otherwise_or_without_a_threshold() -> None:
    learnt, published = TrainSpec.preset("demo"), TrainSpec.preset("demo", method="published")
    assert learnt.pruning == LEARNT and not published.pruning
    assert (learnt.pruned_draw.flip_probability, learnt.pruned_draw.whole_probability) == (0.0, 0.1)
    assert (published.pruned_draw.flip_probability, published.pruned_draw.whole_probability) == (0.05, 0.0)
    assert dataclasses.replace(learnt, pruning={}, pruned_draw=published.pruned_draw) == published
    assert TrainSpec.preset("demo", pruning={"keep_band": (0.1, 0.2)}).pruning == {**LEARNT, "keep_band": (0.1, 0.2)}
    fixed = {"policy": "fixed"}
    assert TrainSpec.preset("demo", pruning=fixed) == dataclasses.replace(published, pruning=fixed)
    assert TrainSpec.preset("demo", is_pretrained=True).pruned_draw == published.pruned_draw
