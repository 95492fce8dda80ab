"""The same numbers as the public library's Qwen2.5-VL: its weights read from its own files, nothing pruned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from photon.checkpoint import CONFIG, read_config, read_pretrained, save_tensors, write_model
from photon.config import PhotonConfig, qwen2_5_vl_3b
from photon.grid import Grid
from photon.model.network import PATCH_EMBEDDING, Photon
from photon.model.packing import Branch, Context, PackedBatch, pack_batch, split_prompt
from photon.testing import random_branch, random_context
from photon.weights import EMBEDDING, HEAD, INDEX, WEIGHTS, public_name

TOLERANCE = 1e-4
NUM_WORDS = 44
SHARD_BYTES = 100_000
VOLUMES: dict[str, list[Grid]] = {
    "none": [],
    "whole windows": [(1, 4, 8)],
    "one patch over": [(2, 6, 10)],
    "less than a window": [(3, 2, 2)],
    "two volumes": [(1, 2, 6), (2, 10, 4)],
}


def their_config(
    *, heads: tuple[int, int] = (4, 2), section: Sequence[int] = (2, 3, 3), vision_heads: int = 2, is_tied: bool = True
) -> Qwen2_5_VLConfig:
    """A small configuration in the library's own words, patches 14 deep and of one channel."""
    num_heads, num_key_value_heads = heads
    width = num_heads * 2 * sum(section)
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": NUM_WORDS + 4,
            "hidden_size": width,
            "intermediate_size": 72,
            "num_hidden_layers": 4,
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_key_value_heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": list(section)},
            "tie_word_embeddings": is_tied,
            "eos_token_id": NUM_WORDS + 3,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": vision_heads,
            "in_channels": 1,
            "temporal_patch_size": 14,
            "tokens_per_second": 2,
            "out_hidden_size": width,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
        },
        image_token_id=0,
        vision_start_token_id=NUM_WORDS,
        vision_end_token_id=NUM_WORDS + 1,
        video_token_id=NUM_WORDS + 2,
    )


def their_model(config: Qwen2_5_VLConfig, *, attention: str = "sdpa") -> Qwen2_5_VLForConditionalGeneration:
    """Their model with every parameter drawn, large enough that each layer matters."""
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * drawn if parameter.ndim == 1 else drawn * parameter[0].numel() ** -0.5)
    return model.eval()


def our_model(theirs: Qwen2_5_VLForConditionalGeneration, folder: Path) -> Photon:
    """Their files read by us; the patch embedding, which plain checkpoints have for pictures only, carried over."""
    theirs.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    model, fresh = read_pretrained(folder, seed=0)
    assert fresh[0] == PATCH_EMBEDDING and all(".atp." in name for name in fresh[1:])
    with torch.no_grad():
        model.visual.vision_patch_embed.proj.weight.copy_(theirs.model.visual.patch_embed.proj.weight)
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen2_5_VLForConditionalGeneration, Photon]:
    """Their model and ours."""
    theirs = their_model(their_config())
    return theirs, our_model(theirs, tmp_path_factory.mktemp("checkpoint"))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest of their numbers."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def prompt(config: PhotonConfig, grids: Sequence[Grid], seed: int = 0) -> tuple[Context, Branch]:
    """A prompt as its two parts."""
    branch = random_branch(config, 0, num_question=5, num_answer=2, seed=seed + 100)
    return random_context(config, grids, seed=seed), branch


def positions_of(batch: PackedBatch) -> Tensor:
    """Rotary positions [3, L] of a batch of one context and one branch."""
    return torch.cat([batch.context_positions, batch.branch_positions], dim=1)


@torch.no_grad()
def our_logits(model: Photon, batch: PackedBatch) -> Tensor:
    """Logits of all context rows, then of all branch rows."""
    output = model(batch, "full")
    return model.logits(torch.cat([output.context.hidden, output.hidden[output.branch_rows]]))


@torch.no_grad()
def their_logits(
    model: Qwen2_5_VLForConditionalGeneration, context: Context, branch: Branch, positions: Tensor
) -> Tensor:
    """Logits [L, vocabulary] of one prompt."""
    grids = torch.tensor(context.grids)
    volumes = {"pixel_values_videos": context.patches, "video_grid_thw": grids} if context.grids else {}
    ids = torch.cat([context.input_ids, branch.input_ids])
    result = model(input_ids=ids[None], position_ids=positions[:, None], use_cache=False, **volumes)
    return result.logits[0]


@pytest.mark.parametrize("volumes", VOLUMES)
def test_logits_of_every_row(pair: tuple[Qwen2_5_VLForConditionalGeneration, Photon], volumes: str) -> None:
    theirs, ours = pair
    context, branch = prompt(ours.config, VOLUMES[volumes])
    batch = pack_batch([context], [branch], ours.config)
    expected = their_logits(theirs, context, branch, positions_of(batch))
    assert distance(our_logits(ours, batch), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("heads", "section", "vision_heads", "attention"),
    [
        ((4, 4), (1, 1, 2), 1, "eager"),
        ((6, 2), (2, 1, 1), 4, "sdpa"),
        ((5, 1), (1, 2, 3), 2, "sdpa"),
        ((2, 1), (4, 6, 6), 8, "eager"),
    ],
)
def test_heads_and_groups(
    tmp_path: Path, heads: tuple[int, int], section: tuple[int, int, int], vision_heads: int, attention: str
) -> None:
    config = their_config(heads=heads, section=section, vision_heads=vision_heads, is_tied=heads[1] > 1)
    theirs = their_model(config, attention=attention)
    ours = our_model(theirs, tmp_path)
    context, branch = prompt(ours.config, [(2, 6, 10)])
    batch = pack_batch([context], [branch], ours.config)
    assert distance(our_logits(ours, batch), their_logits(theirs, context, branch, positions_of(batch))) < TOLERANCE


def test_a_packed_batch_gives_what_they_give_one_by_one(
    pair: tuple[Qwen2_5_VLForConditionalGeneration, Photon],
) -> None:
    theirs, ours = pair
    prompts = [prompt(ours.config, grids, seed) for seed, grids in enumerate(VOLUMES.values())]
    contexts = [context for context, _ in prompts]
    branches = [Branch(index, branch.input_ids) for index, (_, branch) in enumerate(prompts)]
    batch = pack_batch(contexts, branches, ours.config)
    with torch.no_grad():
        output = ours(batch, "full")
        logits = ours.logits(output.hidden[output.branch_rows]).split(batch.branch_lengths)
    for got, (context, branch) in zip(logits, prompts, strict=True):
        positions = positions_of(pack_batch([context], [branch], ours.config))
        expected = their_logits(theirs, context, branch, positions)[-len(got) :]
        assert distance(got, expected) < TOLERANCE


def rows_after(blocks: nn.ModuleList, run: Callable[[], Tensor]) -> list[Tensor]:
    """Outputs of every block while ``run`` runs, and its result."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for block in blocks]
    with torch.no_grad():
        result = run()
    for hook in hooks:
        hook.remove()
    return [*seen, result]


@pytest.mark.parametrize("volumes", [name for name, grids in VOLUMES.items() if grids])
def test_vision_tower_block_by_block(pair: tuple[Qwen2_5_VLForConditionalGeneration, Photon], volumes: str) -> None:
    theirs, ours = pair
    context, _ = prompt(ours.config, VOLUMES[volumes])
    expected = rows_after(
        theirs.model.visual.blocks, lambda: theirs.model.visual(context.patches, torch.tensor(context.grids))
    )
    got = rows_after(ours.visual.blocks, lambda: ours.visual(context.patches, context.grids))
    assert len(got) == len(expected) == 5
    for mine, its in zip(got, expected, strict=True):
        assert distance(mine, its) < TOLERANCE


@pytest.mark.parametrize("volumes", VOLUMES)
def test_positions_are_theirs(pair: tuple[Qwen2_5_VLForConditionalGeneration, Photon], volumes: str) -> None:
    theirs, ours = pair
    grids = VOLUMES[volumes]
    context, branch = prompt(ours.config, grids)
    ids = torch.cat([context.input_ids, branch.input_ids])
    assert split_prompt(ids, ours.config) == context.input_ids.numel()
    seconds = torch.full((len(grids),), ours.config.pruning.seconds_per_grid)
    expected, _ = theirs.model.get_rope_index(
        ids[None], video_grid_thw=torch.tensor(grids) if grids else None, second_per_grid_ts=seconds
    )
    assert torch.equal(positions_of(pack_batch([context], [branch], ours.config)), expected[:, 0])


def test_the_comparison_sees_the_volume(pair: tuple[Qwen2_5_VLForConditionalGeneration, Photon]) -> None:
    """Another volume, and the same volume at other positions, move the logits far beyond the tolerance."""
    theirs, ours = pair
    context, branch = prompt(ours.config, [(2, 6, 10)])
    positions = positions_of(pack_batch([context], [branch], ours.config))
    base = their_logits(theirs, context, branch, positions)
    swapped = positions[[0, 2, 1]]
    other = Context(context.input_ids, context.patches.flip(0), context.grids)
    assert distance(their_logits(theirs, other, branch, positions), base) > 100 * TOLERANCE
    assert distance(their_logits(theirs, context, branch, swapped), base) > 100 * TOLERANCE


def test_full_size_has_their_names_and_shapes() -> None:
    """Qwen2.5-VL-3B on the meta device: all but the patch embedding and the pruning parameters."""
    ours = qwen2_5_vl_3b()
    content = ours.to_hf()
    vision = content.pop("vision_config")
    vision |= {"temporal_patch_size": 2, "in_channels": 3, "in_chans": 3}
    with torch.device("meta"):
        plain = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**content, vision_config=vision))
        photon = Photon(ours)
    expected = {public_name(name): parameter.shape for name, parameter in plain.named_parameters()}
    got = {name: parameter.shape for name, parameter in photon.named_parameters()}
    assert sum(shape.numel() for shape in expected.values()) == 3_754_622_976
    assert expected.pop("visual.patch_embed.proj.weight") == (1280, 3, 2, 14, 14)
    assert got.pop(PATCH_EMBEDDING) == (1280, 1, 14, 14, 14)
    pruning = {name: got.pop(name) for name in list(got) if name.startswith("model.layers.8.atp.")}
    assert sum(shape.numel() for shape in pruning.values()) == 12 * 256 + 256 + 256 + 1 + 2048
    assert got == expected


def test_they_read_what_we_write(pair: tuple[Qwen2_5_VLForConditionalGeneration, Photon], tmp_path: Path) -> None:
    """The names we write are those under which the library looks for its own parameters."""
    theirs, ours = pair
    write_model(ours, tmp_path, max_shard_bytes=SHARD_BYTES)
    back, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == ["model.visual.patch_embed.proj.weight"]
    ignored = {name.removeprefix("model.") for name in report["unexpected_keys"]}
    assert all(".atp." in name or name == PATCH_EMBEDDING for name in ignored)
    original = dict(theirs.named_parameters())
    for name, parameter in back.named_parameters():
        if "patch_embed" not in name:
            assert torch.equal(parameter, original[name])


def test_both_generations_of_their_names(
    pair: tuple[Qwen2_5_VLForConditionalGeneration, Photon], tmp_path: Path
) -> None:
    """The library writes the public names; inside it, and in files that others write from there, are the newer ones."""
    theirs, ours = pair
    old, new = tmp_path / "old", tmp_path / "new"
    theirs.save_pretrained(old, max_shard_size=SHARD_BYTES)
    assert EMBEDDING in (old / INDEX).read_text()
    new.mkdir()
    (new / CONFIG).write_bytes((old / CONFIG).read_bytes())
    state = theirs.state_dict()
    assert HEAD in state and all(
        name == HEAD or name.startswith(("model.language_model.", "model.visual.")) for name in state
    )
    save_tensors({name: tensor.clone() for name, tensor in state.items()}, new / WEIGHTS)
    assert read_config(old) == read_config(new) == ours.config
    expected = dict(read_pretrained(old, seed=5)[0].named_parameters())
    got = dict(read_pretrained(new, seed=5)[0].named_parameters())
    assert expected.keys() == got.keys()
    assert all(torch.equal(got[name], parameter) for name, parameter in expected.items())
