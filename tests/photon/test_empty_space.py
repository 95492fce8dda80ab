"""Visual tokens that hold only air stay out of the model, and nothing else changes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from photon.config import PhotonConfig
from photon.errors import PhotonError
from photon.grid import Grid, num_visual_tokens, occupied_tokens, patch_coordinates, patch_rows, window_ids
from photon.model.attention import BlockAttention
from photon.model.contexts import without_empty_tokens
from photon.model.packing import Branch, Context, context_positions, pack_batch
from photon.model.pruning import Mode
from photon.testing import micro_config, micro_model, random_branch, random_context, training_batch
from photon.training.stages import Stage
from photon.training.step import compute_loss

OFF = micro_config()  # windows of 4 x 4 patches, 2 x 2 tokens
ON = micro_config(vision={"empty_below": 0.0})
GRIDS: list[Grid] = [(2, 4, 6), (1, 4, 4)]  # 12 tokens in two slabs of 2 x 3, then 4 tokens
AIR = [0, 4, 7, 8, 9, 13]
PRESENT = [1, 2, 3, 5, 6, 10, 11, 12, 14, 15]
STAGES: dict[Mode, Stage] = {"full": "warm-up", "soft": "soft", "hard": "hard"}


def pair(seed: int = 0) -> tuple[Context, Context]:
    """The same two volumes with every token and without the empty ones."""
    whole, less = (random_context(config, GRIDS, seed=seed, air=AIR) for config in (OFF, ON))
    return whole, less


def logits(config: PhotonConfig, context: Context, mode: Mode = "hard") -> Tensor:
    model = micro_model(config)
    branches = [random_branch(config, 0, num_question=n, seed=n) for n in (2, 5)]
    with torch.no_grad():
        return model.logits(model(pack_batch([context], branches, config), mode).hidden)


def test_exactly_the_empty_tokens_leave() -> None:
    whole, less = pair()
    assert whole.present is None and less.present is not None
    assert less.present.tolist() == PRESENT
    assert torch.equal(less.patches, whole.patches[patch_rows(torch.tensor(PRESENT), ON.vision)])
    assert less.grids == whole.grids
    is_visual = whole.input_ids == ON.video_token_id
    dropped = is_visual.nonzero().flatten()[AIR]
    assert torch.equal(less.input_ids, whole.input_ids[~torch.isin(torch.arange(is_visual.numel()), dropped)])
    assert less.grid_tokens(torch.tensor([0, 3, 9])).tolist() == [1, 5, 15]
    assert whole.grid_tokens(torch.tensor([0, 3, 9])).tolist() == [0, 3, 9]


def test_who_stays_keeps_its_position_and_so_does_the_text_after() -> None:
    """Tokens 10, 11 are the last of their volume or not: neither moves what comes after."""
    for air in (AIR, [11, 10, 15, 14, 13]):
        whole, less = (random_context(config, GRIDS, seed=0, air=air) for config in (OFF, ON))
        positions, start = context_positions(whole, OFF)
        stays = torch.ones(whole.input_ids.numel(), dtype=torch.bool)
        stays[(whole.input_ids == OFF.video_token_id).nonzero().flatten()[air]] = False
        found, same_start = context_positions(less, ON)
        assert torch.equal(found, positions[:, stays])
        assert start == same_start


def test_off_and_nothing_empty_change_nothing() -> None:
    whole, _ = pair()
    assert without_empty_tokens(whole, OFF) is whole
    full = random_context(ON, GRIDS, seed=3)
    assert full.present is None and full.input_ids.numel() == whole.input_ids.numel()
    named = dataclasses.replace(full, present=torch.arange(16))
    for mode in STAGES:
        assert torch.equal(logits(ON, full, mode), logits(OFF, full, mode))
        assert torch.equal(logits(ON, named, mode), logits(OFF, full, mode))
    assert not torch.equal(logits(ON, pair()[1]), logits(OFF, whole))


def test_the_tower_is_as_if_empty_patches_could_not_be_seen() -> None:
    """Against attention over every patch under masks that hide the empty ones."""
    whole, less = pair()
    model = micro_model()
    parts = [patch_coordinates(grid, OFF.vision) for grid in GRIDS]
    windows, slabs = (
        torch.cat([numbers(part) + 1000 * n for n, part in enumerate(parts)])
        for numbers in (lambda part: window_ids(part, OFF.vision), lambda part: part[:, 0])
    )
    is_present = torch.zeros(64, dtype=torch.bool)
    is_present[patch_rows(torch.tensor(PRESENT), OFF.vision)] = True
    masks = [(ids[:, None] == ids) & (is_present | ~is_present[:, None]) for ids in (slabs, windows)]
    full, windowed = (BlockAttention(mask[None]) for mask in masks)
    with torch.no_grad():
        encoded = model.visual.encode(whole.patches, torch.cat(parts)[:, 1:], full=full, windowed=windowed)
        expected = model.visual.merger(encoded)[PRESENT]
        found = model.visual(less.patches, less.grids, less.present)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("blocks", "air", "unmoved"),
    [((), [0, 8, 11], [2, 5, 6, 7, 9, 10]), ((1,), [0], [6, 7, 8, 9, 10, 11]), ((1,), [0, 8], [])],
)
def test_what_sees_no_air_is_as_ever(blocks: tuple[int, ...], air: list[int], unmoved: list[int]) -> None:
    """Windows hold tokens {0 1 3 4} and {2 5} of a slab, {6 7 9 10} and {8 11} of the next; blocks see a whole slab."""
    found = []
    for empty_below in (None, 0.0):
        config = micro_config(vision={"fullatt_block_indexes": blocks, "empty_below": empty_below})
        context = random_context(config, GRIDS[:1], seed=1, air=air)
        with torch.no_grad():
            tokens = micro_model(config).visual(context.patches, context.grids, context.present)
        of_all = torch.full((12, tokens.shape[1]), torch.nan)
        of_all[torch.arange(12) if context.present is None else context.present] = tokens
        found.append(of_all)
    is_same = [token for token in range(12) if torch.allclose(*(each[token] for each in found), rtol=1e-5, atol=1e-6)]
    assert is_same == unmoved


@pytest.mark.parametrize("mode", ["full", "soft", "hard"])
def test_a_batch_gives_what_each_branch_gives_alone(mode: Mode) -> None:
    """Contexts with different air, without any, and without a volume."""
    config = micro_config(vision={"empty_below": 0.0}, pruning={"min_tokens": 2})
    model = micro_model(config)
    contexts = [
        random_context(config, GRIDS, seed=0, air=AIR),
        random_context(config, [(2, 4, 4)], seed=1, air=[0, 1, 2, 3, 4, 5, 6]),
        random_context(config, [], seed=2),
        random_context(config, [(1, 4, 6)], seed=3),
    ]
    branches = [
        random_branch(config, context, num_question=asked, num_answer=2, seed=number)
        for number, (context, asked) in enumerate([(1, 3), (0, 5), (2, 4), (3, 2), (0, 1)])
    ]
    whole = training_batch(contexts, branches, config)
    assert whole.batch.layout.pair_lengths.tolist() == [1, 7, 3, 6, 7, 3]
    assert whole.batch.present.tolist() == [*PRESENT, 16 + 7, *range(24, 30)]
    output = model(whole.batch, mode)
    compute_loss(model, whole, STAGES[mode]).loss.backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    lengths = whole.batch.branch_lengths if output.selection is None else output.selection.host_lengths
    for number, (branch, rows) in enumerate(zip(branches, output.hidden.split(lengths), strict=True)):
        alone = [Branch(0, branch.input_ids, branch.labels)]
        single = training_batch([contexts[branch.context]], alone, config)
        one = model(single.batch, mode)
        torch.testing.assert_close(rows, one.hidden, rtol=1e-5, atol=1e-5)
        if one.schedule is not None and output.schedule is not None:
            assert torch.equal(output.schedule.kept_tokens(number), one.schedule.kept_tokens(0))
        (compute_loss(model, single, STAGES[mode]).loss / len(branches)).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            bound = 1e-5 * max(float(parameter.grad.abs().max()), 1e-3)
            torch.testing.assert_close(together[name], parameter.grad, rtol=1e-5, atol=bound, msg=name)
    assert bool(together["visual.vision_patch_embed.proj.weight"].any())


def test_a_blank_volume_keeps_its_tokens_beside_one_that_loses_some() -> None:
    less = random_context(ON, GRIDS, seed=0, air=[*range(12), 14])
    assert less.present is not None and less.present.tolist() == [*range(12), 12, 13, 15]
    blank = random_context(ON, [(1, 4, 4)], seed=0, air=range(4))
    assert blank.present is None
    assert torch.equal(logits(ON, blank), logits(OFF, blank))


def test_one_token_left() -> None:
    less = random_context(ON, GRIDS[:1], seed=0, air=[n for n in range(12) if n != 7])
    assert less.present is not None and less.present.tolist() == [7]
    output = micro_model(ON)(pack_batch([less], [random_branch(ON, 0, num_question=3)], ON), "hard")
    assert output.schedule is not None and output.schedule.kept_tokens(0).tolist() == [0]
    assert bool(torch.isfinite(output.hidden).all())


@pytest.mark.parametrize(
    ("value", "stays"), [(0.25, False), (0.2500001, True), (-3.0, False), (torch.nan, True), (torch.inf, True)]
)
def test_one_voxel_decides(value: float, stays: bool) -> None:
    """At the threshold is empty; what is no number is not."""
    vision = dataclasses.replace(OFF.vision, empty_below=0.25)
    patches = torch.full((16, vision.patch_voxels), 0.1)
    patches[2, 3] = 0.9  # token 0
    patches[11, 7] = value  # token 2
    assert occupied_tokens(patches, vision).tolist() == ([0, 2] if stays else [0])
    assert occupied_tokens(patches, OFF.vision).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "present",
    [[1, 2], [0, 1, 2], [2, 1, 0, 12], [1, 1, 2, 12], [1, 2, 3, 16], [-1, 1, 2, 12], [12, 13, 14, 15], [0, 1, 2, 3]],
)
def test_present_tokens_that_do_not_fit_are_refused(present: list[int]) -> None:
    """Too few for the placeholders, not ascending, twice, outside the grids, or none of a volume."""
    whole, _ = pair()
    video, text = ON.video_token_id, torch.tensor([0])
    ids = torch.cat([text, torch.full((3,), video), text, torch.full((1,), video), text])
    context = Context(ids, whole.patches[:16], whole.grids, torch.tensor(present))
    with pytest.raises(PhotonError) as caught:
        pack_batch([context], [random_branch(ON, 0, num_question=2)], ON)
    assert caught.value.code == "PROMPT_INVALID"


def test_patches_of_other_tokens_are_refused() -> None:
    whole, less = pair()
    for patches, present in ((whole.patches, less.present), (less.patches, None), (less.patches[:-1], less.present)):
        with pytest.raises(PhotonError, match="patches") as caught:
            micro_model().visual(patches, whole.grids, present)
        assert caught.value.code == "PROMPT_INVALID"


@pytest.mark.parametrize("value", [-0.1, 1.0, float("nan"), "0.1"])
def test_a_threshold_that_is_no_voxel_value_is_refused(value: Any) -> None:
    content = OFF.to_hf()
    content["vision_config"]["empty_below"] = value
    with pytest.raises(PhotonError, match="empty_below|malformed") as caught:
        PhotonConfig.from_hf(content)
    assert caught.value.code == "CONFIG_INVALID"


def test_the_threshold_is_part_of_the_configuration() -> None:
    assert PhotonConfig.from_hf(ON.to_hf()) == ON
    content = OFF.to_hf()
    del content["vision_config"]["empty_below"]
    assert PhotonConfig.from_hf(content) == OFF, "public files do not have the key"
    assert ON.digest() != OFF.digest()
    assert num_visual_tokens(GRIDS[0], ON.vision) == 12
