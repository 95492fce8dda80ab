"""Weights in shards and under either generation of names; every fault of a folder told at once; memory."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from photon.checkpoint import (
    CONFIG,
    QWEN_PATCH_EMBEDDING,
    load_tensors,
    read_model,
    read_pretrained,
    restore_weights,
    save_tensors,
    write_model,
)
from photon.errors import PhotonError
from photon.model.network import PATCH_EMBEDDING, Photon
from photon.testing import micro_config, micro_model
from photon.weights import EMBEDDING, HEAD, INDEX, WEIGHTS, plan_shards, public_name

SHARD_BYTES = 20_000
PRUNING = tuple(
    f"model.layers.1.atp.{name}"
    for name in (
        "predictor.mlp.0.weight",
        "predictor.mlp.0.bias",
        "predictor.mlp.2.weight",
        "predictor.mlp.2.bias",
        "pos_proj.weight",
    )
)


def tensors_of(model: Photon) -> dict[str, Tensor]:
    """Parameters by name."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def assert_same(model: Photon, expected: Photon) -> None:
    """Every parameter is exactly the other's."""
    got, wanted = tensors_of(model), tensors_of(expected)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())


def newer_name(name: str) -> str:
    """A public name in the newer generation."""
    if name == HEAD:
        return name
    return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.", 1)


def write_tensors(tensors: dict[str, Tensor], folder: Path, *, num_shards: int = 1) -> None:
    """Write tensors under the names given, in ``num_shards`` files."""
    (folder / WEIGHTS).unlink(missing_ok=True)
    if num_shards == 1:
        save_tensors(tensors, folder / WEIGHTS)
        return
    names = sorted(tensors)
    places = {name: f"part-{place % num_shards}.safetensors" for place, name in enumerate(names)}
    for file in set(places.values()):
        save_tensors({name: tensors[name] for name in names if places[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def edit_index(folder: Path, edit: Callable[[dict[str, str]], None]) -> None:
    """Change the weight map of a folder's index."""
    content = json.loads((folder / INDEX).read_text())
    edit(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def refusal(folder: Path, code: str) -> str:
    """What is said of a folder that is refused."""
    with pytest.raises(PhotonError) as caught:
        read_model(folder)
    assert caught.value.code == code
    return caught.value.fact


@pytest.fixture
def model() -> Photon:
    """The model that was written."""
    return micro_model()


@pytest.fixture
def folder(model: Photon, tmp_path: Path) -> Path:
    """Its checkpoint in shards."""
    write_model(model, tmp_path, max_shard_bytes=SHARD_BYTES)
    return tmp_path


def test_shards_and_their_index(model: Photon, folder: Path) -> None:
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(files)
    assert count > 3 and files == [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    index = json.loads((folder / INDEX).read_text())
    tensors = tensors_of(model)
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for file in files:
        held = load_tensors(folder / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == held.keys()
        assert sum(4 * tensor.numel() for tensor in held.values()) <= SHARD_BYTES
        with safe_open(folder / file, framework="pt") as reader:
            assert reader.metadata() == {"format": "pt"}
    assert_same(read_model(folder), model)


def test_sharing_out() -> None:
    sizes = {"a": 3, "b": 3, "c": 9, "d": 1, "e": 6}
    one, two, three, four = (f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5))
    assert plan_shards(sizes, 6) == {one: ["a", "b"], two: ["c"], three: ["d"], four: ["e"]}
    assert plan_shards(sizes, 22) == {WEIGHTS: list("abcde")}
    assert list(plan_shards(sizes, 21).values()) == [["a", "b", "c", "d"], ["e"]]
    assert [*map(len, plan_shards(sizes, 0).values())] == [1] * 5


def test_writing_again_leaves_nothing_of_the_other_form(model: Photon, folder: Path) -> None:
    (folder / "model-notes.safetensors").touch()
    write_model(model, folder)
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG, "model-notes.safetensors", WEIGHTS]
    write_model(model, folder, max_shard_bytes=SHARD_BYTES)
    assert not (folder / WEIGHTS).exists()
    assert_same(read_model(folder), model)


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_the_newer_names(tmp_path: Path, is_tied: bool, num_shards: int) -> None:
    model = micro_model(micro_config(tie_word_embeddings=is_tied))
    write_model(model, tmp_path)
    renamed = {newer_name(name): tensor for name, tensor in tensors_of(model).items()}
    assert all(public_name(name) in tensors_of(model) for name in renamed)
    write_tensors(renamed, tmp_path, num_shards=num_shards)
    assert_same(read_model(tmp_path), model)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_the_type_is_the_one_asked_for(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    model = micro_model().to(stored)
    write_model(model, tmp_path, max_shard_bytes=SHARD_BYTES)
    assert_same(read_model(tmp_path, dtype=wanted), model.to(wanted))
    assert {p.dtype for p in read_model(tmp_path, dtype=wanted).parameters()} == {wanted}


def test_the_place_is_the_one_asked_for(folder: Path) -> None:
    assert all(p.is_meta for p in read_model(folder, device="meta").parameters())
    model = read_model(folder)
    assert {p.device.type for p in model.parameters()} == {"cpu"} and all(p.requires_grad for p in model.parameters())
    assert not list(model.buffers())


def test_a_model_does_not_hang_on_its_files(model: Photon, folder: Path) -> None:
    back = read_model(folder)
    for path in folder.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.write(b"\xff" * path.stat().st_size)
    assert_same(back, model)


def test_a_tied_head_is_accepted_only_if_it_is_the_embedding(model: Photon, folder: Path) -> None:
    for stale in (folder / INDEX, *folder.glob("*.safetensors")):
        stale.unlink()
    tensors = tensors_of(model)
    write_tensors(tensors | {HEAD: tensors[EMBEDDING].clone()}, folder, num_shards=2)
    assert_same(read_model(folder), model)
    other = tensors[EMBEDDING].clone()
    other[-1, -1] += 1e-3
    for head in (other, tensors[EMBEDDING][:-1], tensors[EMBEDDING].double()):
        write_tensors(tensors | {HEAD: head}, folder, num_shards=2)
        assert f"{HEAD} differs from {EMBEDDING}" in refusal(folder, "CHECKPOINT_MISMATCH")


def test_an_untied_head_has_to_be_there(tmp_path: Path) -> None:
    model = micro_model(micro_config(tie_word_embeddings=False))
    write_model(model, tmp_path)
    save_tensors({name: tensor for name, tensor in tensors_of(model).items() if name != HEAD}, tmp_path / WEIGHTS)
    assert f"missing {HEAD}" in refusal(tmp_path, "CHECKPOINT_MISMATCH")


def test_all_that_does_not_fit_is_listed(model: Photon, tmp_path: Path) -> None:
    write_model(model, tmp_path)
    tensors = tensors_of(model) | {"stranger": torch.zeros(1), "model.language_model.norm.weight": torch.ones(32)}
    del tensors["visual.merger.ln_q.weight"]
    tensors[EMBEDDING] = torch.zeros(3, 32)
    tensors["visual.merger.mlp.0.bias"] = tensors["visual.merger.mlp.0.bias"].to(torch.int8)
    write_tensors(tensors, tmp_path, num_shards=2)
    fact = refusal(tmp_path, "CHECKPOINT_MISMATCH")
    for part in (
        "missing visual.merger.ln_q.weight",
        "extra stranger",
        f"{EMBEDDING} is (3, 32), not (40, 32)",
        "visual.merger.mlp.0.bias is of type I8",
        "model.language_model.norm.weight",
        "are both model.norm.weight",
    ):
        assert part in fact
    assert fact.count("missing") == 1


def test_a_missing_shard(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    files[0].unlink()
    files[2].unlink()
    fact = refusal(folder, "CHECKPOINT_MISSING")
    assert files[0].name in fact and files[2].name in fact
    assert "missing" not in fact, "tensors of a missing file are no further faults"


def test_faults_of_files_and_of_tensors_are_one_error(folder: Path) -> None:
    files = sorted(folder.glob("*.safetensors"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    held = load_tensors(files[2])
    name = next(iter(held))
    save_tensors({n: t for n, t in held.items() if n != name} | {"stranger": torch.zeros(1)}, files[2])
    held = load_tensors(files[3])
    misshapen = next(iter(held))
    save_tensors(held | {misshapen: torch.zeros(5, 5, 5)}, files[3])
    fact = refusal(folder, "CHECKPOINT_MISSING")
    for part in (
        f"{files[0].name}: the file does not exist",
        f"{files[1].name}: it is not a whole safetensors file",
        f"{files[2].name} lacks {name}, which the index promises",
        f"{files[2].name} holds stranger, which the index does not place there",
        f"{misshapen} is (5, 5, 5), not",
    ):
        assert part in fact
    files[0].write_bytes(b"")
    refusal(folder, "CHECKPOINT_CORRUPT")


@pytest.mark.parametrize("is_absolute", [True, False])
def test_an_index_cannot_lead_elsewhere(model: Photon, tmp_path: Path, is_absolute: bool) -> None:
    """The file is there and whole, but not in the folder."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write_model(model, folder, max_shard_bytes=SHARD_BYTES)
    first = sorted(folder.glob("*.safetensors"))[0]
    outside = first.rename(tmp_path / "x.safetensors")
    place = str(outside) if is_absolute else "../x.safetensors"
    edit_index(folder, lambda places: places.update({n: place for n, p in places.items() if p == first.name}))
    fact = refusal(folder, "CHECKPOINT_CORRUPT")
    assert f"{place!r}, which is no file of this folder" in fact and "missing" not in fact


@pytest.mark.parametrize("place", ["", ".", "..", "sub/part.safetensors", "model\0"])
def test_a_place_that_is_no_file(folder: Path, place: str) -> None:
    edit_index(folder, lambda places: places.update({"model.norm.weight": place}))
    with pytest.raises(PhotonError) as caught:
        read_model(folder)
    assert caught.value.code in ("CHECKPOINT_MISSING", "CHECKPOINT_CORRUPT")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "\x00", '{"weight_map": []}', '{"weight_map": {"model.norm.weight": 1}}']
)
def test_an_index_that_is_none(folder: Path, content: str) -> None:
    (folder / INDEX).write_text(content)
    refusal(folder, "CHECKPOINT_CORRUPT")


def test_an_empty_index_lacks_everything(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {}}')
    assert "missing model.embed_tokens.weight" in refusal(folder, "CHECKPOINT_MISMATCH")


def test_two_sets_of_weights(model: Photon, folder: Path) -> None:
    save_tensors(tensors_of(model), folder / WEIGHTS)
    assert "two sets of weights" in refusal(folder, "CHECKPOINT_CORRUPT")


def test_restoring_reads_either_form_and_changes_nothing_when_refused(model: Photon, folder: Path) -> None:
    target = micro_model(seed=5).bfloat16()
    places = {name: parameter.data_ptr() for name, parameter in target.named_parameters()}
    restore_weights(target, folder)
    assert_same(target, micro_model().bfloat16())
    assert places == {name: parameter.data_ptr() for name, parameter in target.named_parameters()}
    before = {name: tensor.clone() for name, tensor in tensors_of(target).items()}
    last = sorted(folder.glob("*.safetensors"))[-1]
    save_tensors({name: torch.zeros(1, 1) for name in load_tensors(last)}, last)
    with pytest.raises(PhotonError, match="CHECKPOINT_MISMATCH"):
        restore_weights(target, folder)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors_of(target).items())


def plain_checkpoint(folder: Path, *, without: tuple[str, ...] = PRUNING) -> Photon:
    """A plain Qwen2.5-VL: three colours, two frames a patch, no pruning. Returns the model of the rest."""
    vision: dict[str, Any] = {"temporal_patch_size": 14}
    vision |= {"intensity_mean": 0.0, "intensity_std": 1.0}
    model = micro_model(micro_config(num_hidden_layers=8, vision=vision))
    content = json.loads(json.dumps(model.config.to_hf()))
    content["vision_config"] |= {"in_chans": 3, "temporal_patch_size": 2}
    del content["photon"]
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(content))
    tensors = {name: t for name, t in tensors_of(model).items() if name not in (PATCH_EMBEDDING, *without)}
    tensors[QWEN_PATCH_EMBEDDING] = torch.randn(16, 3, 2, 2, 2)
    write_tensors({newer_name(name): tensor for name, tensor in tensors.items()}, folder, num_shards=2)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_plain_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture, dtype: torch.dtype) -> None:
    original = plain_checkpoint(tmp_path)
    with caplog.at_level(logging.INFO, "photon"):
        model, fresh = read_pretrained(tmp_path, seed=7, dtype=dtype)
    assert set(fresh) == {PATCH_EMBEDDING, *PRUNING} and len(fresh) == 6
    assert model.config.vision.temporal_patch_size == 14 and model.config.vision.in_channels == 1
    assert {p.dtype for p in model.parameters()} == {dtype} and not model.training
    got, scratch = tensors_of(model), tensors_of(Photon(model.config).initialise(7).to(dtype))
    for name, tensor in tensors_of(original).items():
        if name not in fresh:
            assert torch.equal(got[name], tensor.to(dtype))
    assert torch.equal(got[PATCH_EMBEDDING], scratch[PATCH_EMBEDDING])
    first, first_bias, last, last_bias, _ = (got[name].float() for name in PRUNING)
    assert not first_bias.any() and not last_bias.any()
    assert float(first.std()) == pytest.approx(12**-0.5, rel=0.3) and float(last.std()) > 0
    for name in fresh:
        assert name in caplog.text
    assert f"Ignored in the checkpoint: {QWEN_PATCH_EMBEDDING}." in caplog.text


def test_what_is_fresh_follows_the_seed(tmp_path: Path) -> None:
    plain_checkpoint(tmp_path)
    (one, fresh), (two, _), (again, _) = (read_pretrained(tmp_path, seed=seed) for seed in (1, 2, 1))
    assert_same(one, again)
    changed = {name for name, tensor in tensors_of(one).items() if not torch.equal(tensor, tensors_of(two)[name])}
    assert changed == {name for name in fresh if not name.endswith("bias")}


def test_the_threshold_network_starts_at_its_configured_bias(tmp_path: Path) -> None:
    plain_checkpoint(tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text()) | {"photon": {"layer": 1, "threshold_bias_init": -5.0}}
    (tmp_path / CONFIG).write_text(json.dumps(content))
    model, _ = read_pretrained(tmp_path, seed=0)
    assert float(tensors_of(model)[PRUNING[3]]) == -5.0


def test_a_photon_checkpoint_needs_nothing_fresh(model: Photon, folder: Path) -> None:
    back, fresh = read_pretrained(folder, seed=1)
    assert fresh == ()
    assert_same(back, model)


def test_half_a_threshold_network_is_not_completed(tmp_path: Path) -> None:
    plain_checkpoint(tmp_path, without=PRUNING[:2])
    with pytest.raises(PhotonError) as caught:
        read_pretrained(tmp_path, seed=0)
    assert caught.value.code == "CHECKPOINT_MISMATCH"
    assert all(f"missing {name}" in caught.value.fact for name in PRUNING[:2])


def test_a_plain_checkpoint_lacks_nothing_else(tmp_path: Path) -> None:
    plain_checkpoint(tmp_path, without=(*PRUNING, "visual.merger.ln_q.weight"))
    with pytest.raises(PhotonError) as caught:
        read_pretrained(tmp_path, seed=0)
    assert caught.value.code == "CHECKPOINT_MISMATCH"
    assert caught.value.fact.count("missing") == 1 and "missing visual.merger.ln_q.weight" in caught.value.fact


def test_a_plain_checkpoint_is_no_model_to_answer_with(tmp_path: Path) -> None:
    original = plain_checkpoint(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(original.config.to_hf()))
    fact = refusal(tmp_path, "CHECKPOINT_MISMATCH")
    assert f"missing {PATCH_EMBEDDING}" in fact and f"extra {QWEN_PATCH_EMBEDDING}" in fact


def test_initialising_some_leaves_the_others() -> None:
    model, untouched = micro_model(), micro_model()
    names = {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}
    model.initialise(9, names)
    for name, tensor in tensors_of(untouched).items():
        assert torch.equal(tensors_of(model)[name], tensor) == (name not in names)


MEASURE = """
import sys
from pathlib import Path
import torch
from photon.checkpoint import WEIGHTS, load_tensors, read_config, read_model
from photon.model.network import Photon

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

folder = Path(sys.argv[1])
with torch.device("meta"):
    Photon(read_config(folder))  # what the first model on this device imports is no part of the weights
before = peak()
if sys.argv[2] == "read_model":
    model = read_model(folder)
else:
    model = Photon(read_config(folder))
    model.load_state_dict(load_tensors(folder / WEIGHTS))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak() - before) / weights, weights)
"""


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of about 160 MB."""
    config = micro_config(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=10,
        num_attention_heads=8,
        mrope_section=(8, 12, 12),
        vision={"out_hidden_size": 512},
    )
    target = tmp_path_factory.mktemp("large")
    write_model(Photon(config), target)
    return target


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is told by /proc")
@pytest.mark.parametrize(("way", "low", "high"), [("read_model", 0.9, 1.3), ("two copies", 1.8, 2.5)])
def test_reading_needs_no_second_copy(large_folder: Path, way: str, low: float, high: float) -> None:
    """Peak memory of a process of its own. The second way shows that the measure sees a copy where there is one."""
    command = [sys.executable, "-c", MEASURE, str(large_folder), way]
    ratio, size = map(float, subprocess.run(command, capture_output=True, check=True, text=True).stdout.split())
    assert size > 1e8 and low < ratio < high, ratio
