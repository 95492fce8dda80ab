"""Prompts at the edge: several volumes, none, one token, thousands of them, numbers that are not."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from photon.errors import PhotonError
from photon.generate import generate
from photon.model.packing import Branch, Context, PackedBatch, pack_batch
from photon.ops.selection.op import select_rows
from photon.testing import micro_config, micro_model, random_branch, random_context, training_batch
from photon.training.step import compute_loss

CONFIG = micro_config(pruning={"min_tokens": 2})
END = CONFIG.eos_token_id


def answered(batch: PackedBatch) -> list[tuple[int, ...]]:
    return [said.ids for said in generate(micro_model(CONFIG), batch, keep_all=False, max_new_tokens=3)[0]]


# --- several volumes in one prompt


def longitudinal() -> tuple[Context, Branch]:
    return random_context(CONFIG, [(2, 4, 4), (1, 6, 6)], seed=0), random_branch(CONFIG, 0, num_question=4, seed=1)


def test_each_volume_is_pruned_by_itself() -> None:
    context, branch = longitudinal()
    model = micro_model(CONFIG)
    decision = model(pack_batch([context], [branch], CONFIG), "hard").schedule
    assert decision is not None
    assert decision.branch.tolist() == [0, 0] and decision.valid.sum(1).tolist() == [8, 9]
    for row in range(2):
        inside = decision.valid[row]
        one = model.model.predictor(decision.u[row : row + 1, inside], inside.sum()[None], torch.tensor([0]))
        torch.testing.assert_close(decision.theta[row], one.theta[0])
        assert torch.equal(decision.keep[row, inside], one.keep[0])
        assert float(decision.rho[row, inside].min()) == 0.0
        assert float(decision.rho[row, inside].max()) == pytest.approx(1.0, abs=1e-5)
    first = decision.keep[0].nonzero().flatten().tolist()
    second = [8 + token for token in decision.keep[1].nonzero().flatten().tolist()]
    assert decision.kept_tokens(0).tolist() == first + second


def test_a_bright_volume_does_not_crowd_out_the_other() -> None:
    context, branch = longitudinal()
    model = micro_model(CONFIG)
    with torch.no_grad():
        decision = model(pack_batch([context], [branch], CONFIG), "hard").schedule
        assert decision is not None
        raised = decision.u.clone()
        raised[1] += 1e3
        again = model.model.predictor(raised, decision.valid.sum(1), decision.branch)
    assert torch.equal(again.keep[0], decision.keep[0])
    assert int(again.keep[1].sum()) >= CONFIG.pruning.min_tokens


def test_rows_of_two_volumes_are_laid_out_in_order() -> None:
    """Rows: 3 words, start, 2 visual, end, start, 4 visual, end; then branches on both contexts."""
    two = random_context(CONFIG, [(1, 2, 4), (1, 4, 4)], seed=0)
    one = random_context(CONFIG, [(1, 2, 4)], seed=1)  # 3 words, start, 2 visual, end
    branches = [Branch(1, torch.tensor([1])), Branch(0, torch.tensor([2, 3]))]
    keep = torch.zeros(3, 4, dtype=torch.bool)
    keep[0, 1] = keep[1, 0] = keep[2, 1] = keep[2, 3] = True
    selection = select_rows(keep, pack_batch([two, one], branches, CONFIG).layout)
    assert selection.rows.tolist() == [13, 14, 15, 16, 18, 19, 20] + [0, 1, 2, 3, 4, 6, 7, 9, 11, 12, 21, 22]
    assert selection.slots.tolist() == [-1, -1, -1, -1, 1, -1, -1] + [-1] * 4 + [4, -1, -1, 9, 11, -1, -1, -1]
    assert selection.lengths.tolist() == [7, 12]


def test_a_later_scan_moves_no_earlier_position() -> None:
    """Generation goes on after the largest position of the last volume."""
    context, branch = longitudinal()
    batch = pack_batch([context], [branch], CONFIG)
    alone = pack_batch([random_context(CONFIG, [(2, 4, 4)], seed=0)], [branch], CONFIG)
    shared = alone.context_ids.shape[0]
    assert torch.equal(batch.context_positions[:, :shared], alone.context_positions)
    assert int(batch.branch_positions[0, 0]) == int(batch.context_positions.max()) + 1


# --- numbers that are not


def test_nan_in_one_scan_reaches_no_other() -> None:
    contexts = [random_context(CONFIG, [(1, 4, 6)], seed=seed) for seed in range(3)]
    branches = [random_branch(CONFIG, number, num_question=3 + number, seed=number) for number in range(3)]
    model = micro_model(CONFIG)
    with torch.no_grad():
        good = model(pack_batch(contexts, branches, CONFIG), "hard")
        contexts[0].patches[5, 1] = torch.nan
        bad = model(pack_batch(contexts, branches, CONFIG), "hard")
    assert good.schedule is not None and bad.schedule is not None and bad.selection is not None
    assert torch.equal(good.schedule.keep[1:], bad.schedule.keep[1:])
    num_bad = int(bad.selection.lengths[0])
    assert bool(bad.hidden[:num_bad].isnan().any())
    num_good = sum(good.selection.host_lengths[1:])
    torch.testing.assert_close(bad.hidden[num_bad:], good.hidden[-num_good:])


def test_a_token_scored_nan_is_dropped_and_disturbs_no_kept_row() -> None:
    """What is dropped leaves everything: a number that is not finite there meets no kept row after pruning."""
    context, branch = random_context(CONFIG, [(1, 4, 6)], seed=0), random_branch(CONFIG, 0, num_question=3)
    model, batch = micro_model(CONFIG), pack_batch([context], [branch], CONFIG)
    with torch.no_grad():
        state = model.encode_contexts(batch, CONFIG.pruning.layer + 1)
        plain = model.run_branches(batch, state, "hard")
        assert plain.schedule is not None
        dropped = (~plain.schedule.keep[0]).nonzero()[0, 0]
        hidden = state.hidden.clone()
        hidden[batch.visual_rows[dropped]] = torch.nan
        poisoned = model.run_branches(batch, dataclasses.replace(state, hidden=hidden), "hard")
    assert torch.equal(plain.hidden, poisoned.hidden)


def test_nan_stops_training_and_answers() -> None:
    context = random_context(CONFIG, [(1, 4, 6)], seed=0)
    context.patches[0] = torch.nan
    branch = random_branch(CONFIG, 0, num_question=3, num_answer=2)
    assert bool(compute_loss(micro_model(CONFIG), training_batch([context], [branch], CONFIG), "hard").loss.isnan())
    with pytest.raises(PhotonError, match="ANSWER_NOT_FINITE"):
        answered(pack_batch([context], [random_branch(CONFIG, 0, num_question=3)], CONFIG))


# --- sizes


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_blank_volume_is_answered(value: float) -> None:
    context = random_context(CONFIG, [(2, 4, 4)], seed=0)
    blank = Context(context.input_ids, torch.full_like(context.patches, value), context.grids)
    batch = pack_batch([blank], [random_branch(CONFIG, 0, num_question=3)], CONFIG)
    decision = micro_model(CONFIG)(batch, "hard").schedule
    assert decision is not None and int(decision.keep.sum()) >= 2
    assert len(answered(batch)) == 1


def test_equal_scores_keep_the_minimum() -> None:
    """A question of no tokens scores every token zero."""
    context = random_context(CONFIG, [(2, 4, 4)], seed=0)
    batch = pack_batch([context], [Branch(0, torch.tensor([END, 1, 2]))], CONFIG)
    decision = micro_model(CONFIG)(batch, "hard").schedule
    assert decision is not None
    assert not decision.u.any() and decision.kept_tokens(0).tolist() == [0, 1]
    assert len(answered(batch)) == 1


def test_one_visual_token_is_kept() -> None:
    batch = pack_batch(
        [random_context(CONFIG, [(1, 2, 2)], seed=0)], [random_branch(CONFIG, 0, num_question=2)], CONFIG
    )
    decision = micro_model(CONFIG)(batch, "hard").schedule
    assert decision is not None and decision.kept_tokens(0).tolist() == [0]
    assert len(answered(batch)) == 1


def test_no_volume_means_no_decision() -> None:
    batch = pack_batch([random_context(CONFIG, [], seed=0)], [random_branch(CONFIG, 0, num_question=2)], CONFIG)
    model = micro_model(CONFIG)
    assert model(batch, "hard").schedule is None
    for mode in ("full", "soft", "hard"):
        torch.testing.assert_close(model(batch, mode).hidden, model(batch, "full").hidden)
    assert len(answered(batch)) == 1


def test_a_volume_nobody_asks_about() -> None:
    contexts = [random_context(CONFIG, [(1, 4, 4)], seed=0), random_context(CONFIG, [], seed=1)]
    question = random_branch(CONFIG, 1, num_question=2)
    model = micro_model(CONFIG)
    alone = model(pack_batch(contexts[1:], [Branch(0, question.input_ids)], CONFIG), "hard")
    output = model(pack_batch(contexts, [question], CONFIG), "hard")
    assert output.schedule is None
    torch.testing.assert_close(output.hidden, alone.hidden)


@torch.no_grad()
def test_sixteen_thousand_tokens() -> None:
    """Beside a small scan: kept sets and answers of both are those they have alone."""
    large = random_context(CONFIG, [(40, 40, 40)], seed=0)
    small = random_context(CONFIG, [(1, 4, 4)], seed=1)
    questions = [random_branch(CONFIG, number, num_question=4, seed=number) for number in range(2)]
    model = micro_model(CONFIG)
    both = model(pack_batch([large, small], questions, CONFIG), "hard")
    assert both.schedule is not None and both.selection is not None
    assert both.schedule.valid.sum(1).tolist() == [16_000, 4]
    assert CONFIG.pruning.min_tokens <= both.schedule.kept_tokens(0).numel() < 16_000
    assert bool(torch.isfinite(both.hidden).all())
    alone = model(pack_batch([small], [Branch(0, questions[1].input_ids)], CONFIG), "hard")
    rows: Tensor = both.hidden[-alone.hidden.shape[0] :]
    torch.testing.assert_close(rows, alone.hidden, rtol=1e-5, atol=1e-5)
