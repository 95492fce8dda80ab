"""A packed batch gives what each branch gives alone; pruning at its edges."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from photon.config import PhotonConfig
from photon.errors import PhotonError
from photon.grid import Grid
from photon.model.attention import starts_of
from photon.model.network import Output, Photon
from photon.model.packing import Branch, Context, PackedBatch, context_positions, pack_batch, split_prompt
from photon.model.pruning import Mode
from photon.objectives import answer_targets
from photon.ops.selection.op import select_rows
from photon.testing import micro_config, micro_model, random_branch, random_context, training_batch
from photon.training.stages import Stage
from photon.training.step import compute_loss

CONFIG = micro_config()
STAGES: dict[str, Stage] = {"full": "warm-up", "soft": "soft", "hard": "hard"}
# Windows are 4 x 4 patches: these grids have one patch row, windows cut short, one token, and two volumes.
GRIDS: list[list[Grid]] = [[(2, 4, 4)], [(1, 6, 10)], [(1, 2, 2)], [], [(3, 4, 2), (1, 2, 6)]]


def mixed(config: PhotonConfig = CONFIG) -> tuple[list[Context], list[Branch]]:
    """Five contexts of different sizes, one of them empty, and nine branches in no order of contexts."""
    contexts = [random_context(config, grids, seed=number) for number, grids in enumerate(GRIDS)]
    lengths = [(0, 5, 2), (3, 2, 1), (1, 7, 3), (0, 1, 1), (4, 4, 2), (2, 3, 1), (1, 2, 4), (3, 6, 2), (4, 9, 1)]
    branches = [
        random_branch(config, context, num_question=asked, num_answer=said, seed=number)
        for number, (context, asked, said) in enumerate(lengths)
    ]
    return contexts, branches


def rows_of(output: Output, batch: PackedBatch, branch: int) -> Tensor:
    """Hidden rows that belong to one branch."""
    lengths = batch.branch_lengths if output.selection is None else output.selection.host_lengths
    return output.hidden.split(lengths)[branch]


def assert_same(ours: Tensor, theirs: Tensor, name: str = "") -> None:
    """Equal to float32's rounding: 1e-5 of the largest number."""
    torch.testing.assert_close(
        ours, theirs, rtol=1e-5, atol=1e-5 * max(float(theirs.detach().abs().max()), 1e-3), msg=name or None
    )


def gradients(model: Photon) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("mode", ["full", "soft", "hard"])
@pytest.mark.parametrize("rule", ["paper", "taylor"])
def test_batch_equals_each_branch_alone(mode: Mode, rule: str) -> None:
    config = micro_config(pruning={"sgp_rule": rule, "min_tokens": 2})
    model = micro_model(config)
    contexts, branches = mixed(config)
    # Branches 4 and 6 are disturbed: entropy and (when hard) the inverted mask take part as well.
    whole = training_batch(contexts, branches, config, perturbed=[4], flipped=[6] if mode == "hard" else [])
    flip = whole.is_flipped if mode == "hard" else None
    output = model(whole.batch, mode, flip=flip)
    loss = compute_loss(model, whole, STAGES[mode]).loss
    loss.backward()
    together = gradients(model)

    losses, kept = [], []
    for number, branch in enumerate(branches):
        chosen = [0] if number == 4 else []
        single = training_batch(
            [contexts[branch.context]],
            [Branch(0, branch.input_ids, branch.labels)],
            config,
            perturbed=chosen,
            flipped=[0] if number == 6 and mode == "hard" else [],
        )
        one = model(single.batch, mode, flip=single.is_flipped if mode == "hard" else None)
        rows = rows_of(output, whole.batch, number)
        assert_same(rows, one.hidden)
        assert_same(model.logits(rows), model.logits(one.hidden))
        if one.schedule is not None:
            width = one.schedule.keep.shape[1]
            mine = output.schedule.branch == number
            assert torch.equal(output.schedule.keep[mine, :width], one.schedule.keep)
            assert not output.schedule.keep[mine, width:].any()
            assert_same(output.schedule.p[mine, :width], one.schedule.p)
            assert torch.equal(output.schedule.kept_tokens(number), one.schedule.kept_tokens(0))
            kept.append(float(one.schedule.keep[one.schedule.valid].float().mean()))
        alone_loss = compute_loss(model, single, STAGES[mode]).loss
        (alone_loss / len(branches)).backward()
        losses.append(alone_loss.detach())
    assert 0 < sum(kept) / len(kept) < 1, "the case should prune something"
    assert_same(loss.detach(), torch.stack(losses).mean())
    apart = gradients(model)
    assert together.keys() == apart.keys()
    for name, gradient in apart.items():
        assert_same(together[name], gradient, name)
    assert any(".atp.predictor." in name and bool(g.any()) for name, g in together.items()) == (mode != "full")


def test_targets_do_not_cross_branches() -> None:
    contexts, branches = mixed()
    batch = pack_batch(contexts, branches, CONFIG)
    rows, targets, branch = answer_targets(batch)
    starts = starts_of(batch.branch_lengths)
    expected = [
        (int(start) + place - 1, int(b.labels[place]), number)
        for number, (start, b) in enumerate(zip(starts, branches, strict=True))
        if b.labels is not None
        for place in range(1, b.labels.numel())
        if b.labels[place] >= 0
    ]
    assert list(zip(rows.tolist(), targets.tolist(), branch.tolist(), strict=True)) == expected


def test_a_label_on_the_first_token_is_predicted_by_nothing() -> None:
    ids = torch.tensor([3, 4])
    batch = pack_batch([random_context(CONFIG, [], seed=0)], [Branch(0, ids, ids), Branch(0, ids, ids)], CONFIG)
    assert answer_targets(batch)[0].tolist() == [0, 2]


@pytest.mark.parametrize("mode", ["full", "soft", "hard"])
def test_shared_context_equals_a_copy_for_each_branch(mode: Mode) -> None:
    model = micro_model()
    context = random_context(CONFIG, [(2, 4, 6)], seed=3)
    branches = [random_branch(CONFIG, 0, num_question=n, num_answer=2, seed=n) for n in (2, 5, 3)]
    copies = [Branch(number, b.input_ids, b.labels) for number, b in enumerate(branches)]
    shared = training_batch([context], branches, CONFIG)
    separate = training_batch([context] * 3, copies, CONFIG)
    results = []
    for item in (shared, separate):
        loss = compute_loss(model, item, STAGES[mode]).loss
        loss.backward()
        results.append((loss.detach(), model(item.batch, mode).hidden.detach(), gradients(model)))
    (loss, hidden, slopes), (loss_apart, hidden_apart, slopes_apart) = results
    assert_same(loss, loss_apart)
    assert_same(hidden, hidden_apart)
    for name, slope in slopes_apart.items():
        assert_same(slopes[name], slope, name)


def test_branches_of_a_scan_keep_different_tokens() -> None:
    model = micro_model()
    context = random_context(CONFIG, [(2, 6, 6)], seed=1)
    branches = [random_branch(CONFIG, 0, num_question=5, seed=number) for number in range(4)]
    keep = model(pack_batch([context], branches, CONFIG), "hard").schedule.keep
    assert len({tuple(row.tolist()) for row in keep}) > 1


def test_positions_are_kept_when_rows_are_dropped() -> None:
    """The rows after pruning are those before it: a keep mask that drops nothing changes nothing."""
    config = micro_config(pruning={"threshold_bias_init": -100.0, "min_tokens": 18})
    model = micro_model(config)
    contexts = [random_context(config, [(2, 6, 6)], seed=1)]
    batch = pack_batch(contexts, [random_branch(config, 0, num_question=4, num_answer=2, seed=2)], config)
    full, hard = model(batch, "full"), model(batch, "hard")
    assert bool(hard.schedule.keep.all())
    assert_same(hard.hidden[hard.branch_rows], full.hidden)


@pytest.mark.parametrize("num_kept", [1, 3, 100])
def test_blank_volume_keeps_the_configured_minimum(num_kept: int) -> None:
    config = micro_config(pruning={"min_tokens": num_kept})
    model = micro_model(config)
    context = random_context(config, [(2, 4, 4)], seed=0)
    blank = Context(context.input_ids, torch.zeros_like(context.patches), context.grids)
    output = model(pack_batch([blank], [random_branch(config, 0, num_question=4)], config), "hard")
    assert int(output.schedule.keep.sum()) >= min(num_kept, 8)
    assert bool(torch.isfinite(output.hidden).all())


def test_all_tokens_dropped_by_the_flip_still_gives_a_finite_loss() -> None:
    config = micro_config(pruning={"min_tokens": 100})
    model = micro_model(config)
    item = training_batch(
        [random_context(config, [(1, 4, 4)], seed=0)],
        [random_branch(config, 0, num_question=3, num_answer=1)],
        config,
        flipped=[0],
    )
    result = compute_loss(model, item, "hard")
    result.loss.backward()
    output = model(item.batch, "hard", flip=item.is_flipped)
    assert int((output.selection.slots >= 0).sum()) == 0
    assert bool(torch.isfinite(result.loss))
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_flip_inverts_only_the_branches_named() -> None:
    model = micro_model()
    contexts, branches = mixed()
    batch = pack_batch(contexts, branches, CONFIG)
    flip = torch.zeros(len(branches), dtype=torch.bool)
    flip[[0, 5]] = True
    plain, flipped = model(batch, "hard"), model(batch, "hard", flip=flip)
    keep, width = plain.schedule.keep, plain.schedule.keep.shape[1]
    taken = torch.zeros(keep.numel(), dtype=torch.bool)
    taken[flipped.selection.slots[flipped.selection.slots >= 0]] = True
    expected = torch.where(flip[plain.schedule.branch][:, None], plain.schedule.valid & ~keep, keep)
    assert torch.equal(taken.view(-1, width), expected)
    assert torch.equal(flipped.schedule.keep, keep), "the decision itself is the plain one"


def test_detached_branches_give_the_threshold_network_nothing() -> None:
    model = micro_model()
    contexts, branches = mixed()
    batch = pack_batch(contexts, branches, CONFIG)
    for mode in ("soft", "hard"):
        output = model(batch, mode, detach=torch.ones(len(branches), dtype=torch.bool))
        output.hidden.square().sum().backward()
        found = gradients(model)
        predictor = [g for name, g in found.items() if ".atp.predictor." in name]
        assert not any(bool(g.any()) for g in predictor)
        assert bool(found["visual.vision_patch_embed.proj.weight"].any())


def test_select_rows_lays_out_text_kept_tokens_and_the_branch() -> None:
    context = random_context(CONFIG, [(1, 2, 4)], seed=0)  # 3 words, start, 2 visual tokens, end
    branches = [Branch(0, torch.tensor([1, 2])), Branch(0, torch.tensor([3]))]
    batch = pack_batch([context], branches, CONFIG)
    selection = select_rows(torch.tensor([[False, True], [True, False]]), batch.layout)
    assert selection.rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8] + [0, 1, 2, 3, 4, 6, 9]
    assert selection.slots.tolist() == [-1, -1, -1, -1, 1, -1, -1, -1] + [-1, -1, -1, -1, 2, -1, -1]
    assert selection.lengths.tolist() == [8, 7]
    assert selection.branch_rows.tolist() == [6, 7, 14]


def test_positions_of_a_prompt() -> None:
    """Text counts up; visual tokens add depth (step 2), row, column; text goes on after the largest."""
    context = random_context(CONFIG, [(2, 2, 4)], seed=0)
    positions, following = context_positions(context, CONFIG)
    expected = [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3]]
    expected += [[4 + 2 * z, 4, 4 + x] for z in range(2) for x in range(2)]
    assert positions.T.tolist() == [*expected, [7, 7, 7]]
    assert following == 8
    batch = pack_batch([context], [Branch(0, torch.tensor([1, 2]))], CONFIG)
    assert batch.branch_positions.T.tolist() == [[8, 8, 8], [9, 9, 9]]


def test_prompt_splits_after_the_last_volume() -> None:
    context = random_context(CONFIG, [(1, 2, 2), (1, 2, 4)], seed=0)
    ids = torch.cat([context.input_ids, torch.tensor([1, 2])])
    assert split_prompt(ids, CONFIG) == context.input_ids.numel()
    assert split_prompt(torch.tensor([1, 2]), CONFIG) == 0


@pytest.mark.parametrize("change", [-1, 1])
def test_placeholders_that_do_not_match_are_refused(change: int) -> None:
    context = random_context(CONFIG, [(1, 2, 4)], seed=0)
    video = CONFIG.video_token_id
    ids = context.input_ids[context.input_ids != video]
    wrong = torch.cat([ids[:4], torch.full((2 + change,), video), ids[4:]])
    with pytest.raises(PhotonError, match=rf"{2 + change} visual placeholders .* \[2\]") as caught:
        pack_batch([Context(wrong, context.patches, context.grids)], [Branch(0, torch.tensor([1]))], CONFIG)
    assert caught.value.code == "PROMPT_INVALID"


def test_text_inside_a_volume_is_refused() -> None:
    """The text's positions would lie among those of the volume."""
    context = random_context(CONFIG, [(1, 2, 4)], seed=0)  # 3 words, start, 2 visual, end
    torn = dataclasses.replace(context, input_ids=context.input_ids[[0, 1, 4, 2, 3, 5, 6]])
    with pytest.raises(PhotonError, match="text stands between") as caught:
        pack_batch([torn], [Branch(0, torch.tensor([1]))], CONFIG)
    assert caught.value.code == "PROMPT_INVALID"


def test_an_empty_branch_is_refused() -> None:
    context = random_context(CONFIG, [(1, 2, 4)], seed=0)
    with pytest.raises(PhotonError, match="branch 0 has no tokens") as caught:
        pack_batch([context], [Branch(0, torch.zeros(0, dtype=torch.long))], CONFIG)
    assert caught.value.code == "PROMPT_INVALID"


@pytest.mark.parametrize(
    ("context", "token", "fact"),
    [(1, 0, "context 1 of 1"), (-1, 0, "context -1"), (0, 40, "to 40"), (0, -1, "from -1")],
)
def test_a_branch_that_fits_nothing_is_refused(context: int, token: int, fact: str) -> None:
    with pytest.raises(PhotonError, match=fact) as caught:
        pack_batch([random_context(CONFIG, [], seed=0)], [Branch(context, torch.tensor([token]))], CONFIG)
    assert caught.value.code == "PROMPT_INVALID"


def test_a_batch_without_contexts_is_refused() -> None:
    with pytest.raises(PhotonError, match="no context"):
        pack_batch([], [Branch(0, torch.tensor([1]))], CONFIG)


def test_a_question_of_no_tokens_leaves_the_scores_at_zero() -> None:
    model = micro_model()
    context = random_context(CONFIG, [(1, 4, 4)], seed=0)
    branch = Branch(0, torch.tensor([CONFIG.eos_token_id, 3, 4]))
    other = random_branch(CONFIG, 0, num_question=4)
    for branches in ([branch], [branch, other]):
        output = model(pack_batch([context], branches, CONFIG), "hard")
        assert not output.schedule.u[0].any()
        assert int(output.schedule.keep[0].sum()) == CONFIG.pruning.min_tokens
        assert bool(torch.isfinite(output.hidden).all())


def test_volumes_do_not_see_each_other_in_the_vision_tower() -> None:
    model = micro_model()
    grids: Sequence[Grid] = [(2, 4, 6), (1, 6, 6), (3, 2, 2)]
    parts = [random_context(CONFIG, [grid], seed=n).patches for n, grid in enumerate(grids)]
    together = model.visual(torch.cat(parts), grids)
    apart = torch.cat([model.visual(patches, [grid]) for patches, grid in zip(parts, grids, strict=True)])
    assert_same(together, apart)


def test_windows_and_slabs_bound_what_a_token_sees() -> None:
    """Without full attention a patch changes only tokens of its own window; with it, only its own slab."""
    grid: Grid = (2, 6, 6)  # windows of 4 x 4 patches: 2x2 tokens, cut short at the far sides
    patches = random_context(CONFIG, [grid], seed=5).patches
    changed = patches.clone()
    changed[0] += 1.0  # token (0, 0, 0)
    for blocks, expected in (((), [0, 1, 3, 4]), ((1,), list(range(9)))):
        model = micro_model(micro_config(vision={"fullatt_block_indexes": blocks}))
        moved = (model.visual(patches, [grid]) - model.visual(changed, [grid])).abs().amax(1) > 0
        assert moved.nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("mode", ["full", "soft", "hard"])
def test_checkpointing_changes_memory_and_nothing_else(mode: Mode) -> None:
    contexts, branches = mixed()
    found = []
    for is_on in (False, True):
        model = micro_model()
        model.checkpoint_activations = is_on
        saved = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = compute_loss(model, training_batch(contexts, branches, CONFIG), STAGES[mode]).loss
        loss.backward()
        found.append((saved, loss.detach(), gradients(model)))
    (plain, loss, gradient), (less, same_loss, same) = found
    assert less < 0.5 * plain
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(gradient[name], same[name]) for name in gradient)


def test_untied_head_is_used() -> None:
    config = micro_config(tie_word_embeddings=False)
    model = micro_model(config)
    x = torch.randn(2, config.hidden_size)
    torch.testing.assert_close(model.logits(x), model.lm_head(model.model.norm(x)))


def test_initialise_depends_on_the_seed_alone() -> None:
    def weights(seed: int) -> Tensor:
        return torch.cat([p.flatten() for p in Photon(CONFIG).initialise(seed).parameters()])

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    config = micro_config(pruning={"threshold_bias_init": -5.0})
    model = Photon(config).initialise(0)
    assert dict(model.named_parameters())["model.layers.1.atp.predictor.mlp.2.bias"].item() == -5.0
    filters = model.visual.vision_patch_embed.proj.weight[:8].flatten(1)
    torch.testing.assert_close(filters.sum(1), torch.ones(8))
    torch.testing.assert_close(filters.sum(0), torch.ones(8))
