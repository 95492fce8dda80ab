"""Weights and configurations on disk: exact, whole or refused, never half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from photon.checkpoint import (
    CONFIG,
    WEIGHTS,
    load_tensors,
    read_config,
    read_model,
    read_pretrained,
    replace_folder,
    restore_weights,
    save_tensors,
    settle_folder,
    write_model,
)
from photon.config import PhotonConfig, tiny
from photon.errors import PhotonError
from photon.testing import micro_config, micro_model

SPECIAL_IDS = {"vision_start": 1, "vision_end": 2, "video": 3, "eos": 4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of the micro model."""
    write_model(micro_model(), tmp_path)
    return tmp_path


@pytest.mark.parametrize("is_tied", [True, False])
def test_round_trip_is_exact(tmp_path: Path, is_tied: bool) -> None:
    model = micro_model(micro_config(tie_word_embeddings=is_tied))
    write_model(model, tmp_path)
    back = read_model(tmp_path)
    assert back.config == model.config and back.config.digest() == model.config.digest()
    assert not back.training
    theirs = dict(back.named_parameters())
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in model.named_parameters())
    assert ("lm_head.weight" in load_tensors(tmp_path / WEIGHTS)) == (not is_tied)


def test_names_are_the_public_ones(folder: Path) -> None:
    names = load_tensors(folder / WEIGHTS).keys()
    for name in (
        "visual.vision_patch_embed.proj.weight",
        "visual.blocks.0.attn.qkv.weight",
        "visual.merger.mlp.2.bias",
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.1.atp.predictor.mlp.0.weight",
        "model.layers.1.atp.pos_proj.weight",
        "model.norm.weight",
    ):
        assert name in names


def test_weights_of_another_configuration_are_named(folder: Path) -> None:
    tensors = load_tensors(folder / WEIGHTS)
    tensors["stranger"] = torch.zeros(1)
    del tensors["model.norm.weight"]
    tensors["model.embed_tokens.weight"] = torch.zeros(3, 32)
    save_tensors(tensors, folder / WEIGHTS)
    with pytest.raises(PhotonError) as caught:
        read_model(folder)
    assert caught.value.code == "CHECKPOINT_MISMATCH"
    for part in ("missing model.norm.weight", "extra stranger", "model.embed_tokens.weight is (3, 32), not (40, 32)"):
        assert part in caught.value.fact


def test_a_long_list_of_problems_tells_every_kind_and_changes_no_weight(folder: Path) -> None:
    """61 extra, many missing and one misshapen: the long lists are cut, and neither hides the other kinds."""
    model = micro_model()
    before = [parameter.clone() for parameter in model.parameters()]
    strangers = {f"stranger.{number:02d}": torch.zeros(1) for number in range(61)}
    save_tensors({"model.norm.weight": torch.zeros(3), **strangers}, folder / WEIGHTS)
    with pytest.raises(PhotonError) as caught:
        restore_weights(model, folder)
    fact, num_missing = caught.value.fact, len(before) - 1
    assert num_missing > 50 and fact.count("missing ") == 50 and f"and {num_missing - 50} more missing" in fact
    assert fact.count("extra stranger.") == 50 and "and 11 more extra" in fact
    assert "model.norm.weight is (3,), not (32,)" in fact and "more misshapen" not in fact
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("num_bytes", [0, 5, 2000])
def test_truncated_weights_are_refused(folder: Path, num_bytes: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:num_bytes])
    with pytest.raises(PhotonError) as caught:
        read_model(folder)
    assert caught.value.code == "CHECKPOINT_CORRUPT"
    assert caught.value.subject == str(folder / WEIGHTS)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_missing_files_are_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(PhotonError) as caught:
        read_model(folder)
    assert caught.value.code == "CHECKPOINT_MISSING"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '"text"', "\x00"])
def test_a_configuration_that_is_none_is_refused(folder: Path, content: str) -> None:
    (folder / CONFIG).write_text(content)
    for read in (read_config, read_model, lambda place: read_pretrained(place, seed=0)):
        with pytest.raises(PhotonError) as caught:
            read(folder)
        assert caught.value.code == "CONFIG_INVALID"


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [
        ("hidden_size", 33, "33 is not a multiple of 4 heads"),
        ("num_attention_heads", 0, "num_attention_heads is 0"),
        ("num_key_value_heads", 3, "do not share 3"),
        ("hidden_size", 64, "does not sum to half the head width 16"),
        ("hidden_size", "wide", "hidden_size is 'wide'"),
        ("vocab_size", None, "missing"),
        ("num_hidden_layers", 1, "pruning layer 1 is not one of 1 layers"),
        ("photon", {"layer": 1, "sgp_rule": "guess"}, "'guess' is not one of"),
        ("photon", {"layer": 1, "min_tokens": 0}, "min_tokens is 0"),
        ("photon", {"layer": 1, "unheard_of": 0}, "unheard_of"),
        ("vision_config", {}, "missing"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(key: str, value: object, fact: str) -> None:
    content = micro_config().to_hf() | {key: value}
    if value is None:
        del content[key]
    with pytest.raises(PhotonError) as caught:
        PhotonConfig.from_hf(content)
    assert caught.value.code == "CONFIG_INVALID"
    assert fact in caught.value.fact


def test_configuration_survives_json() -> None:
    for config in (micro_config(), tiny(100, special_ids=SPECIAL_IDS)):
        assert PhotonConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    changed = micro_config(pruning={"min_tokens": 2})
    assert changed.digest() != micro_config().digest()


def test_public_configuration_gets_its_pruning_layer() -> None:
    """Without Photon's key, pruning follows a quarter of the depth: layer 8 of 36."""
    content = micro_config(num_hidden_layers=36).to_hf()
    del content["photon"]
    assert PhotonConfig.from_hf(content).pruning.layer == 8


def write_marker(text: str):  # type: ignore[no-untyped-def]
    def build(folder: Path) -> None:
        (folder / "marker").write_text(text)

    return build


def test_replace_folder(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "state"
    for text in ("first", "second"):
        replace_folder(target, write_marker(text))
        assert (target / "marker").read_text() == text
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_build_keeps_the_old_folder(tmp_path: Path, fault: BaseException) -> None:
    target = tmp_path / "state"
    replace_folder(target, write_marker("old"))

    def build(folder: Path) -> None:
        (folder / "marker").write_text("half")
        raise fault

    with pytest.raises(type(fault)):
        replace_folder(target, build)
    assert (target / "marker").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_kill_between_the_renames_is_undone(tmp_path: Path) -> None:
    target, old = tmp_path / "state", tmp_path / "state.old"
    replace_folder(target, write_marker("old"))
    target.rename(old)
    settle_folder(target)
    assert (target / "marker").read_text() == "old" and not old.exists()


def test_a_kill_after_the_renames_is_finished(tmp_path: Path) -> None:
    target, old = tmp_path / "state", tmp_path / "state.old"
    replace_folder(target, write_marker("new"))
    replace_folder(old, write_marker("old"))
    settle_folder(target)
    assert (target / "marker").read_text() == "new" and not old.exists()
    settle_folder(target)
    assert (target / "marker").read_text() == "new"
