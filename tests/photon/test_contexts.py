"""Contexts with fewer tokens by policy, and contexts that a frozen vision tower has encoded."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from photon.config import POLICIES, PhotonConfig, PruningConfig
from photon.errors import PhotonError
from photon.generate import ask, encode_scan
from photon.grid import Grid, patch_rows, visual_positions
from photon.model.contexts import block_counts, encoded, reduced
from photon.model.network import Photon
from photon.model.packing import Branch, Context, PackedBatch, context_positions, pack_batch
from photon.testing import micro_config, micro_model, random_branch, random_context, training_batch
from photon.training.stages import Stage
from photon.training.step import compute_loss

TWO: list[Grid] = [(5, 4, 6), (2, 4, 4)]  # 30 tokens in five slabs of 2 x 3, then 8 in two of 2 x 2
SLABS = [*range(6, 12), *range(18, 24), *range(34, 38)]  # slabs 1 and 3 of five, 1 of two


def config_of(policy: str, ratio: float = 0.4, *, empty_below: float | None = None, **pruning: Any) -> PhotonConfig:
    return micro_config(vision={"empty_below": empty_below}, pruning={"policy": policy, "keep_ratio": ratio, **pruning})


def whole_context(grids: Sequence[Grid] = TWO, seed: int = 0, air: Sequence[int] = ()) -> Context:
    return random_context(config_of("photon"), grids, seed=seed, air=air)


def batch_of(contexts: Sequence[Context], config: PhotonConfig) -> PackedBatch:
    branches = [random_branch(config, n % len(contexts), num_question=2 + n, seed=n) for n in range(4)]
    return pack_batch(contexts, branches, config)


def tokens_of(model: Photon, context: Context) -> Tensor:
    found = encoded(context, model.visual).tokens
    assert found is not None
    return found


# Slices


@pytest.mark.parametrize(
    ("ratio", "depth", "slabs"),
    [
        (0.35, 6, [1, 4]),
        (0.35, 7, [1, 5]),
        (0.5, 4, [1, 3]),
        (0.01, 5, [2]),
        (1.0, 3, [0, 1, 2]),
        (0.35, 10, [1, 3, 6, 8]),
        (0.4, 1, [0]),
    ],
)
def test_slabs_are_evenly_spaced(ratio: float, depth: int, slabs: list[int]) -> None:
    config = config_of("slices", ratio)
    less = random_context(config, [(depth, 4, 6)], seed=0)
    expected = [6 * slab + n for slab in slabs for n in range(6)]
    assert (list(range(6 * depth)) if less.present is None else less.present.tolist()) == expected
    assert int((less.input_ids == config.video_token_id).sum()) == len(expected)


def test_slices_take_tokens_away_and_move_none() -> None:
    config = config_of("slices")
    whole, less = whole_context(), reduced(whole_context(), config)
    assert less.present is not None and less.present.tolist() == SLABS
    assert torch.equal(less.patches, whole.patches[patch_rows(torch.tensor(SLABS), config.vision)])
    positions, start = context_positions(whole, config)
    found, same_start = context_positions(less, config)
    stays = torch.ones(whole.input_ids.numel(), dtype=torch.bool)
    visual = (whole.input_ids == config.video_token_id).nonzero().flatten()
    stays[visual] = torch.isin(torch.arange(38), torch.tensor(SLABS))
    assert torch.equal(found, positions[:, stays]) and start == same_start
    assert less.grid_tokens(torch.tensor([0, 6, 15])).tolist() == [6, 18, 37]


def test_the_tower_sees_the_slabs_alone_and_says_of_them_what_it_always_says() -> None:
    """Attention stays inside a slab, so the others are not missed; and they cannot be missed in secret."""
    config = config_of("slices")
    model = micro_model(config)
    whole = whole_context()
    spoilt = dataclasses.replace(whole, patches=whole.patches.clone())
    others = torch.tensor([n for n in range(38) if n not in SLABS])
    spoilt.patches[patch_rows(others, config.vision)] = torch.nan
    found = tokens_of(model, reduced(spoilt, config))
    torch.testing.assert_close(found, tokens_of(model, whole)[SLABS], rtol=1e-5, atol=1e-5)


def test_empty_tokens_of_the_slabs_leave_too() -> None:
    """Tokens 7, 18 and 35 stand in chosen slabs, 0 in another; a volume whose slabs are all air keeps them."""
    config = config_of("slices", empty_below=0.0)
    less = random_context(config, TWO, seed=0, air=[0, 7, 18, 35])
    assert less.present is not None and less.present.tolist() == [n for n in SLABS if n not in (7, 18, 35)]
    blank = random_context(config, TWO, seed=0, air=[7, *range(34, 38)])
    assert blank.present is not None and blank.present.tolist() == [n for n in SLABS if n != 7]
    output = micro_model(config)(batch_of([less, blank], config), "hard")
    assert bool(output.hidden.isfinite().all())


# Pooled


def test_blocks_are_as_many_as_wanted_and_as_even_as_can_be() -> None:
    grids = [(6, 8, 8), (5, 4, 6), (1, 2, 2), (10, 16, 12), (3, 2, 14)]
    for grid, ratio in itertools.product(grids, (0.05, 0.35, 1.0)):
        sizes = (grid[0], grid[1] // 2, grid[2] // 2)
        counts = block_counts(grid, config_of("pooled", ratio))
        divisions = list(itertools.product(*(range(1, size + 1) for size in sizes)))
        target = ratio * sizes[0] * sizes[1] * sizes[2]
        assert counts in divisions
        best = min(abs(z * y * x - target) for z, y, x in divisions)
        assert abs(counts[0] * counts[1] * counts[2] - target) == best
    assert block_counts((6, 8, 8), config_of("pooled", 0.35)) == (2, 4, 4)
    # Edges in voxels, a token being half as deep as it is wide; of (4, 4, 2), (4, 2, 4) and (2, 4, 4) the first.
    assert block_counts((8, 8, 8), config_of("pooled", 0.25)) == (4, 4, 2)
    assert block_counts((4, 8, 8), config_of("pooled", 1.0)) == (4, 4, 4)


def test_a_pooled_token_is_the_mean_of_its_block_and_stands_in_its_middle() -> None:
    config = config_of("pooled", 0.35)
    grid = (6, 8, 8)
    model = micro_model(config)
    whole = whole_context([grid])
    less = reduced(whole, config)
    assert less.present is not None and less.patches is whole.patches
    tokens = tokens_of(model, whole).view(6, 4, 4, -1)
    expected = tokens.view(2, 3, 4, 4, -1).mean(1).flatten(0, 2)
    torch.testing.assert_close(tokens_of(model, less), expected, rtol=1e-5, atol=1e-6)
    middles = [(z * 4 + y) * 4 + x for z in (1, 4) for y in range(4) for x in range(4)]
    assert less.present.tolist() == middles
    positions, start = context_positions(less, config)
    own, whole_start = context_positions(whole, config)
    visual = less.input_ids == config.video_token_id
    assert torch.equal(positions[:, visual], visual_positions(grid, config)[:, middles] + 4)
    assert start == whole_start and torch.equal(positions[:, -1], own[:, -1])


def test_blocks_of_two_volumes_keep_to_themselves() -> None:
    """30 tokens to 12 and 8 to 3; edges of a block differ by a token at most."""
    config = config_of("pooled", 0.4)
    less = reduced(whole_context(), config)
    counts = [block_counts(grid, config) for grid in TWO]
    num_blocks = [z * y * x for z, y, x in counts]
    assert num_blocks[0] == 12 and less.pooled is not None and less.present is not None
    assert sorted(set(less.pooled[:30].tolist())) == list(range(12))
    assert sorted(set(less.pooled[30:].tolist())) == list(range(12, sum(num_blocks)))
    assert less.present.numel() == sum(num_blocks) and bool((less.present.diff() > 0).all())
    assert torch.equal(less.pooled[less.present], torch.arange(sum(num_blocks))), "a middle is in its own block"


def test_pooling_everything_into_itself_changes_nothing() -> None:
    config = config_of("pooled", 1.0)
    model = micro_model(config)
    contexts = whole_context(), reduced(whole_context(), config)
    assert contexts[1].pooled is not None
    plain, pooled = (model(batch_of([context], config), "full").hidden for context in contexts)
    torch.testing.assert_close(pooled, plain, rtol=1e-5, atol=1e-5)


def test_gradient_reaches_every_patch_through_the_mean() -> None:
    config = config_of("pooled", 0.4)
    model = micro_model(config)
    context = reduced(whole_context(), config)
    context = dataclasses.replace(context, patches=context.patches.clone().requires_grad_())
    model(batch_of([context], config), "hard").hidden.square().sum().backward()
    assert context.patches.grad is not None
    assert bool(context.patches.grad.flatten(1).any(1).all())


def test_pooling_refuses_to_leave_out_air() -> None:
    with pytest.raises(PhotonError, match="empty_below") as caught:
        config_of("pooled", empty_below=0.1)
    assert caught.value.code == "CONFIG_INVALID"


# Both


@pytest.mark.parametrize("policy", ["slices", "pooled"])
@pytest.mark.parametrize("is_encoded", [False, True])
@pytest.mark.parametrize("stage", ["warm-up", "soft", "hard"])
def test_a_batch_gives_what_each_branch_gives_alone(policy: str, is_encoded: bool, stage: Stage) -> None:
    config = config_of(policy)
    model = micro_model(config)
    grids: list[list[Grid]] = [TWO, [(3, 6, 4)], [], [(1, 2, 2)]]
    contexts = [random_context(config, own, seed=n) for n, own in enumerate(grids)]
    if is_encoded:
        contexts = [encoded(context, model.visual) for context in contexts]
    branches = [
        random_branch(config, context, num_question=asked, num_answer=2, seed=number)
        for number, (context, asked) in enumerate([(1, 3), (0, 5), (2, 4), (3, 2), (0, 1)])
    ]
    whole = compute_loss(model, training_batch(contexts, branches, config), stage)
    assert whole.kept_fraction == 1.0 and whole.band_loss == 0.0
    losses = []
    for branch in branches:
        alone = [Branch(0, branch.input_ids, branch.labels)]
        losses.append(compute_loss(model, training_batch([contexts[branch.context]], alone, config), stage).loss)
    torch.testing.assert_close(whole.loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", ["slices", "pooled"])
def test_nothing_is_pruned_a_second_time(policy: str) -> None:
    config = config_of(policy)
    model = micro_model(config)
    context = reduced(whole_context(), config)
    asked = [random_branch(config, 0, num_question=3, seed=n).input_ids for n in range(2)]
    found = ask(model, encode_scan(model, context), asked)
    assert torch.equal(found.logits, ask(model, encode_scan(model, context), asked, keep_all=True).logits)
    assert found.output.schedule is not None and context.present is not None
    kept = found.output.schedule.kept_tokens(0)
    assert context.grid_tokens(kept).tolist() == context.present.tolist()
    keep = torch.zeros(2, context.present.numel(), dtype=torch.bool)
    keep[:, ::2] = True
    assert not torch.equal(found.logits, ask(model, encode_scan(model, context), asked, keep=keep).logits)


def test_other_policies_let_everything_in() -> None:
    whole = whole_context()
    for policy in POLICIES:
        is_same = reduced(whole, config_of(policy)) is whole
        assert is_same == (policy not in ("slices", "pooled"))
    empty = random_context(config_of("pooled"), [], seed=0)
    assert empty.input_ids.numel() == 0 and empty.grids == ()


# Encoded tokens


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("stage", ["warm-up", "soft", "hard"])
def test_encoded_tokens_give_the_losses_of_their_patches_to_the_last_bit(policy: str, stage: Stage) -> None:
    config = config_of(policy)
    model = micro_model(config)
    for grids in (TWO, TWO[:1], []):
        contexts = [random_context(config, grids, seed=3)]
        branches = [random_branch(config, 0, num_question=2 + n, num_answer=2, seed=n) for n in range(3)]
        expected = compute_loss(model, training_batch(contexts, branches, config), stage)
        before = [encoded(context, model.visual) for context in contexts]
        assert all(context.patches.numel() == 0 for context in before)
        found = compute_loss(model, training_batch(before, branches, config), stage)
        assert torch.equal(found.loss, expected.loss)
        assert dataclasses.replace(found, loss=expected.loss) == expected


def test_several_encoded_volumes_agree_with_their_patches() -> None:
    """To rounding: encoded one by one their rows lie in other blocks of the attention."""
    config = config_of("photon")
    model = micro_model(config)
    contexts = [random_context(config, grids, seed=n) for n, grids in enumerate(([(2, 4, 6)], [], [(1, 4, 4)]))]
    patches, tokens = (
        model(batch_of(each, config), "hard").hidden
        for each in (contexts, [encoded(context, model.visual) for context in contexts])
    )
    torch.testing.assert_close(tokens, patches, rtol=1e-5, atol=1e-5)


def test_nothing_is_learnt_by_a_tower_that_is_not_asked() -> None:
    config = config_of("photon")
    model = micro_model(config)
    context = encoded(whole_context(), model.visual)
    assert context.tokens is not None and not context.tokens.requires_grad
    assert encoded(context, model.visual) is context
    branches = [random_branch(config, 0, num_question=3, num_answer=2)]
    compute_loss(model, training_batch([context], branches, config), "hard").loss.backward()
    assert all(p.grad is None for p in model.visual.parameters())
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_an_encoded_scan_can_be_asked() -> None:
    config = config_of("photon")
    model = micro_model(config)
    asked = [random_branch(config, 0, num_question=3).input_ids]
    scans = [encode_scan(model, context) for context in (whole_context(), encoded(whole_context(), model.visual))]
    assert scans[1].context.tokens is None and scans[1].context.patches.numel() == 0
    assert torch.equal(*(ask(model, scan, asked).logits for scan in scans))


@pytest.mark.parametrize("fault", ["too few", "too narrow", "patches too", "one without"])
def test_tokens_that_do_not_fit_are_refused(fault: str) -> None:
    config = config_of("photon")
    whole = whole_context()
    good = encoded(whole, micro_model(config).visual)
    assert good.tokens is not None
    contexts = {
        "too few": [dataclasses.replace(good, tokens=good.tokens[1:])],
        "too narrow": [dataclasses.replace(good, tokens=good.tokens[:, 1:])],
        "patches too": [dataclasses.replace(good, patches=whole.patches)],
        "one without": [good, whole],
    }[fault]
    with pytest.raises(PhotonError, match="encoded tokens") as caught:
        pack_batch(contexts, [random_branch(config, 0, num_question=2)], config)
    assert caught.value.code == "PROMPT_INVALID"


def test_the_policy_s_defaults() -> None:
    plain = PruningConfig(layer=0)
    assert (plain.policy, plain.keep_ratio, plain.prunes, plain.is_ranked) == ("photon", 0.35, True, False)
