"""Training that starts from a checkpoint: a Photon one, or a plain Qwen2.5-VL."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from photon.checkpoint import CONFIG, WEIGHTS, load_tensors, write_model
from photon.config import PhotonConfig, tiny
from photon.errors import PhotonError
from photon.model.network import PATCH_EMBEDDING, Photon
from photon.testing import micro_model
from photon.training.pretrain import NamingConfig
from photon.training.stages import StageSchedule
from pipelines.dataset import read_split
from pipelines.start import start_from_checkpoint, start_from_scratch
from pipelines.text import PROMPT, PUBLIC_SYSTEM_PROMPT, TOKENIZER, Prompter, build_tokenizer
from pipelines.tracking import MemoryTracker
from pipelines.train import train
from pipelines.train_spec import TrainSpec

SMOKE = TrainSpec.preset("smoke", is_pretrained=True)
MICRO = dataclasses.replace(
    SMOKE,
    schedule=StageSchedule(alignment=1, warm_up=1, soft=1, hard=1, flip_after=0),
    draw=dataclasses.replace(SMOKE.draw, scans_per_step=1, questions_per_scan=2),
    pruned_draw=dataclasses.replace(SMOKE.pruned_draw, scans_per_step=1, questions_per_scan=2),
    blind_steps=1,
    validate_every=9,
    save_every=2,
)
STILL = dataclasses.replace(
    MICRO,
    optimiser=dataclasses.replace(
        MICRO.optimiser, learning_rate=0.0, vision_learning_rate=0.0, alignment_learning_rate=0.0
    ),
)
"""Steps that change nothing: what a run ends with is what it started with."""


def texts_of(data: Path) -> list[str]:
    splits = [*read_split(data, "train"), *read_split(data, "val")]
    return [text for scan in splits for q in scan.questions for text in (q.question, q.answer)]


def byte_level() -> Tokenizer:
    """Ids for single bytes and the special tokens of the public checkpoint; it spells every word."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def small(prompter: Prompter) -> PhotonConfig:
    """The tiny preset with the fewest layers, and more ids than the tokenizer has, as public checkpoints have."""
    config = tiny(prompter.vocab_size + 7, special_ids=prompter.special_ids)
    vision = dataclasses.replace(config.vision, depth=1, fullatt_block_indexes=(0,))
    return dataclasses.replace(config, num_hidden_layers=3, vision=vision)


@pytest.fixture
def photon_folder(smoke_data: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "photon"
    folder.mkdir()
    prompter = Prompter(build_tokenizer(texts_of(smoke_data)))
    write_model(micro_model(small(prompter), seed=5), folder)
    prompter.write(folder / TOKENIZER)
    return folder


@pytest.fixture
def qwen_folder(tmp_path: Path) -> Path:
    """Pictures of three colours, no pruning, no `photon` key, no prompt.json."""
    folder = tmp_path / "qwen"
    folder.mkdir()
    prompter = Prompter(byte_level())
    config = small(prompter)
    content = config.to_hf()
    content.pop("photon")
    content["vision_config"] |= {"in_chans": 3, "temporal_patch_size": 2}
    (folder / CONFIG).write_text(json.dumps(content))
    held = dict(micro_model(config, seed=6).named_parameters())
    tensors = {name: value.detach().clone() for name, value in held.items() if ".atp." not in name}
    del tensors[PATCH_EMBEDDING]
    tensors["visual.patch_embed.proj.weight"] = torch.ones(config.vision.hidden_size, 3, 2, 14, 14)
    save_file(tensors, folder / WEIGHTS)
    byte_level().save(str(folder / TOKENIZER))
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_tensors(folder / WEIGHTS)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> set[str]:
    return {name for name in ours.keys() & theirs.keys() if torch.equal(ours[name], theirs[name])}


def first_row(run: Path) -> dict[str, object]:
    row: dict[str, object] = json.loads((run / "history.jsonl").read_text().splitlines()[0])
    return row


def test_both_models_start_from_a_photon_checkpoint(smoke_data: Path, photon_folder: Path, tmp_path: Path) -> None:
    record = train(STILL, smoke_data, tmp_path / "run", data_version="v1", start_from=photon_folder)
    start = weights(photon_folder)
    for name in (record.checkpoint, record.blind_checkpoint):
        assert same(weights(Path(name)), start) == start.keys()
        for file in (TOKENIZER, PROMPT, CONFIG):
            assert (Path(name) / file).read_bytes() == (photon_folder / file).read_bytes()
    assert first_row(tmp_path / "run")["initialised"] == ""


def test_training_goes_on_from_there(smoke_data: Path, photon_folder: Path, tmp_path: Path) -> None:
    record = train(MICRO, smoke_data, tmp_path / "run", data_version="v1", start_from=photon_folder)
    start, trained = weights(photon_folder), weights(Path(record.checkpoint))
    moved = start.keys() - same(trained, start)
    assert PATCH_EMBEDDING in moved and "model.embed_tokens.weight" in moved
    assert all(torch.allclose(trained[name], start[name], atol=1e-3) for name in start)


def test_a_plain_qwen_checkpoint_is_completed(smoke_data: Path, qwen_folder: Path, tmp_path: Path) -> None:
    tracker = MemoryTracker()
    record = train(STILL, smoke_data, tmp_path / "run", data_version="v1", start_from=qwen_folder, tracker=tracker)
    start = weights(qwen_folder)
    model, blind = weights(Path(record.checkpoint)), weights(Path(record.blind_checkpoint))
    initialised = str(first_row(tmp_path / "run")["initialised"]).split(", ")
    assert sorted(initialised) == sorted(model.keys() - start.keys())
    assert PATCH_EMBEDDING in initialised and any(name.endswith("atp.predictor.mlp.2.bias") for name in initialised)
    assert same(model, start) == start.keys() - {"visual.patch_embed.proj.weight"}
    assert same(blind, model) == model.keys(), "the twin starts from the same place"
    prompter = Prompter.read(Path(record.checkpoint) / TOKENIZER)
    assert prompter.system == PUBLIC_SYSTEM_PROMPT and not prompter.is_closed
    assert json.loads((Path(record.checkpoint) / PROMPT).read_text()) == {"system": PUBLIC_SYSTEM_PROMPT}
    config = PhotonConfig.from_hf(json.loads((Path(record.checkpoint) / CONFIG).read_text()))
    assert (config.vision.in_channels, config.vision.temporal_patch_size) == (1, 14)
    assert len(str(tracker.hyperparameters["start_digest"])) == 12


class Killed(BaseException):
    """Not caught by anything on the way."""


def test_a_killed_run_ends_where_an_unbroken_one_does(smoke_data: Path, qwen_folder: Path, tmp_path: Path) -> None:
    def kill(done: int, total: int, label: str) -> None:
        if done == 3:
            raise Killed

    whole = train(MICRO, smoke_data, tmp_path / "whole", data_version="v1", start_from=qwen_folder)
    with pytest.raises(Killed):
        train(MICRO, smoke_data, tmp_path / "run", data_version="v1", start_from=qwen_folder, on_progress=kill)
    record = train(MICRO, smoke_data, tmp_path / "run", data_version="v1", start_from=qwen_folder)
    for ours, theirs in ((record.checkpoint, whole.checkpoint), (record.blind_checkpoint, whole.blind_checkpoint)):
        assert same(weights(Path(ours)), weights(Path(theirs))) == weights(Path(theirs)).keys()
    assert first_row(tmp_path / "run")["initialised"] == first_row(tmp_path / "whole")["initialised"]


@pytest.mark.parametrize("changed", [WEIGHTS, CONFIG, TOKENIZER, PROMPT, None])
def test_the_run_is_that_of_the_checkpoints_content(
    smoke_data: Path, photon_folder: Path, tmp_path: Path, changed: str | None
) -> None:
    train(MICRO, smoke_data, tmp_path / "run", data_version="v1", start_from=photon_folder)
    moved = photon_folder.rename(tmp_path / "elsewhere")
    if changed == WEIGHTS:
        tensors = weights(moved)
        tensors["model.norm.weight"][0] += 1e-3
        save_file(tensors, moved / WEIGHTS)
    elif changed == CONFIG:
        content = json.loads((moved / CONFIG).read_text())
        (moved / CONFIG).write_text(json.dumps(content | {"transformers_version": "4"}))
    elif changed == TOKENIZER:
        (moved / TOKENIZER).write_text((moved / TOKENIZER).read_text() + "\n")
    elif changed == PROMPT:
        (moved / PROMPT).unlink()
    if changed is None:
        train(MICRO, smoke_data, tmp_path / "run", data_version="v1", start_from=moved)
        return
    with pytest.raises(PhotonError) as caught:
        train(MICRO, smoke_data, tmp_path / "run", data_version="v1", start_from=moved)
    assert caught.value.code == "CHECKPOINT_MISMATCH"


def test_a_run_from_scratch_is_another_one(smoke_data: Path, photon_folder: Path, tmp_path: Path) -> None:
    train(MICRO, smoke_data, tmp_path / "run", data_version="v1", start_from=photon_folder)
    with pytest.raises(PhotonError) as caught:
        train(MICRO, smoke_data, tmp_path / "run", data_version="v1")
    assert caught.value.code == "CHECKPOINT_MISMATCH"


def test_vision_pretraining_only_when_asked_for(smoke_data: Path, photon_folder: Path, tmp_path: Path) -> None:
    def labels(spec: TrainSpec, folder: str) -> list[str]:
        seen: list[str] = []
        train(
            spec,
            smoke_data,
            tmp_path / folder,
            data_version="v1",
            start_from=photon_folder,
            on_progress=lambda done, total, label: seen.append(label),
        )
        return seen

    assert MICRO.naming.num_steps == 0
    plain = labels(MICRO, "plain")
    asked = labels(dataclasses.replace(MICRO, naming=NamingConfig(num_steps=2)), "asked")
    assert len(plain) == 5 and len(asked) == 7
    assert [("pretraining" in label) for label in asked] == [True, True] + [False] * 5
    assert not any("pretraining" in label for label in plain)


def test_presets_to_start_from_a_checkpoint() -> None:
    scratch, further = TrainSpec.preset("demo"), TrainSpec.preset("demo", is_pretrained=True)
    assert further.optimiser.learning_rate == 1e-5 and further.optimiser.vision_learning_rate == 5e-6
    assert further.naming.num_steps == 0 and further.schedule == scratch.schedule
    assert TrainSpec.preset("demo", is_pretrained=True, naming_steps=7).naming.num_steps == 7
    assert TrainSpec.preset("demo", naming_steps=0) == dataclasses.replace(scratch, naming=further.naming)


def write_other_tokenizer(folder: Path) -> None:
    Prompter(build_tokenizer(["other words"])).write(folder / TOKENIZER)


def write_larger_tokenizer(folder: Path) -> None:
    tokenizer = byte_level()
    tokenizer.add_tokens([f"word{number}" for number in range(20)])
    tokenizer.save(str(folder / TOKENIZER))


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda folder: (folder / TOKENIZER).unlink(), "TOKENIZER_UNREADABLE"),
        (lambda folder: (folder / PROMPT).write_text("none"), "TOKENIZER_UNREADABLE"),
        (lambda folder: (folder / CONFIG).unlink(), "CHECKPOINT_MISSING"),
        (lambda folder: (folder / CONFIG).write_text("[]"), "CONFIG_INVALID"),
        (lambda folder: (folder / WEIGHTS).unlink(), "CHECKPOINT_MISSING"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b"half"), "CHECKPOINT_CORRUPT"),
        (write_other_tokenizer, "CHECKPOINT_MISMATCH"),
        (write_larger_tokenizer, "CHECKPOINT_MISMATCH"),
    ],
)
def test_folders_that_are_no_start_are_refused(qwen_folder: Path, spoil: object, code: str) -> None:
    assert callable(spoil)
    spoil(qwen_folder)
    with pytest.raises(PhotonError) as caught:
        start_from_checkpoint(qwen_folder, ["Is it there?"])
    assert caught.value.code == code


def test_a_closed_vocabulary_has_to_know_the_training_texts(photon_folder: Path) -> None:
    texts = ["Is there a zebra in the liver?", *(f"gnu{letter}" for letter in "abcdefghijklm")]
    with pytest.raises(PhotonError, match=r"lacks 14 words of them: gnua, .*, \.\.\.") as caught:
        start_from_checkpoint(photon_folder, texts)
    assert caught.value.code == "QUESTION_NOT_UNDERSTOOD"


def test_the_start_is_the_model_that_was_written(photon_folder: Path) -> None:
    start = start_from_checkpoint(photon_folder, [])
    model, initialised = start.build_model(seed=0)
    assert isinstance(model, Photon) and initialised == () and model.config == start.config
    assert same(dict(model.named_parameters()), weights(photon_folder)) == weights(photon_folder).keys()


@pytest.mark.parametrize("is_pretrained", [False, True])
def test_weights_go_straight_to_the_device(
    photon_folder: Path, is_pretrained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the whole model was moved")

    monkeypatch.setattr(Photon, "to", refuse)
    start = start_from_checkpoint(photon_folder, []) if is_pretrained else start_from_scratch(["yes"])
    model, _ = start.build_model(seed=0, device="meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
