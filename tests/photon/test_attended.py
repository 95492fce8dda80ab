"""Where rows look, against every row by itself; and what the distillation of it teaches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from photon.config import PhotonConfig
from photon.model.network import Photon
from photon.model.packing import Branch, PackedBatch, pack_batch
from photon.objectives import answer_targets, distillation_loss
from photon.testing import (
    micro_config,
    micro_model,
    ragged_branches,
    ragged_contexts,
    training_batch,
)
from photon.training.stages import Stage
from photon.training.step import compute_loss


def answering(batch: PackedBatch) -> Tensor:
    rows, _, _ = answer_targets(batch)
    return torch.zeros(batch.branch_ids.shape[0], dtype=torch.bool).index_fill_(0, rows, True)


def looked(model: Photon, config: PhotonConfig, batch: PackedBatch, mode: str) -> Tensor:
    """Attention row by row, from the queries and keys of whole sequences."""
    states = []

    def note(layer: torch.nn.Module, _inputs: object, output: tuple[Tensor, tuple[Tensor, Tensor, Tensor]]) -> None:
        states.append(output[1])

    later = model.model.layers[config.pruning.layer + 1 :]
    handles = [layer.register_forward_hook(note) for layer in later]
    with torch.no_grad():
        output = model(batch, mode)  # type: ignore[arg-type]
    for handle in handles:
        handle.remove()
    layout, own = batch.layout, batch.layout.own_lengths.tolist()
    found = torch.zeros(layout.num_pairs, layout.num_columns)
    scale = config.head_dim**-0.5
    share = config.num_attention_heads // config.num_key_value_heads
    for branch in range(layout.num_branches):
        first, pairs = int(layout.own_starts[branch]), (layout.pair_branch == branch).nonzero().flatten().tolist()
        begin, length = int(layout.context_starts[branch]), int(layout.context_lengths[branch])
        rows = torch.arange(first, first + own[branch])
        for number in range(len(later)):
            if mode == "full":
                q, k = (
                    states[len(later) + number][0][rows],
                    torch.cat([states[number][1][begin : begin + length], states[len(later) + number][1][rows]]),
                )
                slots = [-1] * len(k)
                for pair in pairs:
                    start = int(layout.pair_starts[pair]) - begin
                    for column in range(int(layout.pair_lengths[pair])):
                        slots[start + column] = pair * layout.num_columns + column
            else:
                assert output.selection is not None
                lengths = output.selection.host_lengths
                start = sum(lengths[:branch])
                q, k = (x[start : start + lengths[branch]] for x in states[number][:2])
                q = q[-own[branch] :]
                slots = output.selection.slots[start : start + lengths[branch]].tolist()
            k = k.repeat_interleave(share, 1)
            for row in (answering(batch)[first : first + own[branch]]).nonzero().flatten().tolist():
                seen = len(k) - own[branch] + row + 1
                weights = (torch.einsum("hd,khd->hk", q[row], k[:seen]) * scale).softmax(-1).sum(0)
                for place, slot in enumerate(slots[:seen]):
                    if slot >= 0:
                        found.view(-1)[slot] += weights[place]
    return found


@pytest.mark.parametrize("mode", ["full", "soft", "hard"])
def test_attention_of_a_batch_is_that_of_every_row(mode: str) -> None:
    config = micro_config()
    model = micro_model(config)
    batch = pack_batch(ragged_contexts(config), ragged_branches(config), config)
    output = model(batch, mode, looking=answering(batch))  # type: ignore[arg-type]
    expected = looked(model, config, batch, mode)
    assert output.attended is not None and not output.attended.requires_grad
    assert float(expected.max()) > 0.1
    torch.testing.assert_close(output.attended, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(output.hidden, model(batch, mode).hidden)  # type: ignore[arg-type]


def test_the_loss_is_least_where_the_scores_foretell_the_attention() -> None:
    attended = torch.tensor([[0.6, 0.2, 0.2, 7.0], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, torch.nan, 0.0]])
    counted = torch.tensor([[True, True, True, False], [False] * 4, [True, True, True, True]])
    scores = torch.tensor([[0.6, 0.2, 0.2, 0.1], [1.0] * 4, [0.5, 0.5, 1.0, 1e-9]]).log()
    foretold = distillation_loss(scores, attended, counted)
    torch.testing.assert_close(foretold, torch.zeros(3), rtol=0, atol=1e-5)
    other = distillation_loss(scores.flip(1), attended, counted)
    assert float(other[0]) > 0.1 and float(other[1]) == 0
    shifted = distillation_loss(scores + 3.0, attended, counted)
    torch.testing.assert_close(shifted, foretold, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", ["warm-up", "soft", "hard"])
def test_distillation_brings_the_scores_to_the_attention(stage: str) -> None:
    """A few steps on it alone; without it nothing reaches queries of the pruning layer but through attention."""
    config = micro_config(pruning={"distillation_weight": 1.0, "keep_band": (0.0, 1.0)})
    model = micro_model(config)
    item = training_batch(ragged_contexts(config), ragged_branches(config), config)
    optimiser = torch.optim.Adam(model.model.layers[1].self_attn.parameters(), lr=2e-3)

    def apart() -> Tensor:
        mode = {"warm-up": "full"}.get(stage, stage)
        output = model(item.batch, mode, looking=answering(item.batch))  # type: ignore[arg-type]
        assert output.schedule is not None and output.attended is not None
        counted = output.schedule.keep if stage == "hard" else output.schedule.valid
        return distillation_loss(output.schedule.u, output.attended, counted).mean()

    before = float(apart().detach())
    for _ in range(40):
        optimiser.zero_grad()
        apart().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert float(apart().detach()) < 0.6 * before


@pytest.mark.parametrize(
    ("stage", "name"), [("warm-up", "warm_up_distillation_weight"), ("soft", "distillation_weight")]
)
def test_the_step_adds_what_the_weight_says(stage: Stage, name: str) -> None:
    losses = []
    for weight in (0.0, 0.5, 1.0):
        config = micro_config(pruning={name: weight})
        item = training_batch(ragged_contexts(config), ragged_branches(config), config)
        losses.append(float(compute_loss(micro_model(config), item, stage).loss.detach()))
    assert losses[1] > losses[0]
    assert losses[2] - losses[0] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-3)


@pytest.mark.parametrize("stage", ["warm-up", "soft", "hard"])
def test_a_batch_costs_what_its_branches_cost_alone(stage: Stage) -> None:
    config = micro_config(pruning={"distillation_weight": 1.0, "warm_up_distillation_weight": 1.0})
    model = micro_model(config)
    contexts, branches = ragged_contexts(config), ragged_branches(config)
    whole = compute_loss(model, training_batch(contexts, branches, config), stage).loss
    losses = []
    for branch in branches:
        alone = [Branch(0, branch.input_ids, branch.labels)]
        losses.append(compute_loss(model, training_batch([contexts[branch.context]], alone, config), stage).loss)
    torch.testing.assert_close(whole, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_what_is_disturbed_teaches_nothing() -> None:
    losses = []
    for weight in (0.0, 1.0):
        config = micro_config(pruning={"distillation_weight": weight, "band_weight": 0.0})
        item = training_batch(
            ragged_contexts(config), ragged_branches(config), config, perturbed=[0, 1, 2], flipped=[3, 4]
        )
        losses.append(float(compute_loss(micro_model(config), item, "hard").loss.detach()))
    assert losses[0] == losses[1]


def test_questions_that_keep_everything_in_the_hard_stage_are_as_in_warm_up() -> None:
    weights = {"distillation_weight": 1.0, "warm_up_distillation_weight": 1.0}
    config = micro_config(pruning={**weights, "band_weight": 0.0})
    contexts, branches = ragged_contexts(config), ragged_branches(config)
    losses = []
    for stage, whole in (("warm-up", ()), ("hard", range(len(branches))), ("hard", ())):
        model = micro_model(config)
        result = compute_loss(model, training_batch(contexts, branches, config, whole=whole), stage)
        result.loss.backward()  # type: ignore[no-untyped-call]
        gradients = [parameter.grad for parameter in model.model.predictor.parameters()]
        # What was not pruned does not move the threshold.
        moved = any(gradient is not None and bool(gradient.any()) for gradient in gradients)
        assert moved == (stage == "hard" and not whole)
        losses.append(result.loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    assert not torch.isclose(losses[2], losses[0], rtol=1e-4)


def test_a_question_that_keeps_everything_changes_no_other() -> None:
    config = micro_config(pruning={"distillation_weight": 1.0})
    model = micro_model(config)
    contexts, branches = ragged_contexts(config), ragged_branches(config)
    together = compute_loss(model, training_batch(contexts, branches, config, whole=[1, 3]), "hard").loss
    losses = []
    for number, branch in enumerate(branches):
        alone = [Branch(0, branch.input_ids, branch.labels)]
        item = training_batch([contexts[branch.context]], alone, config, whole=[0] if number in (1, 3) else [])
        losses.append(compute_loss(model, item, "hard").loss)
    torch.testing.assert_close(together, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_each_stage_has_its_own_weight() -> None:
    """A weight of the one changes nothing in the others, and none counts while only the patch embedding learns."""

    def loss(stage: Stage, **weights: float) -> float:
        config = micro_config(pruning=weights)
        item = training_batch(ragged_contexts(config), ragged_branches(config), config)
        return float(compute_loss(micro_model(config), item, stage).loss.detach())

    for stage in ("alignment", "warm-up"):
        assert loss(stage, distillation_weight=1.0) == loss(stage)
    for stage in ("alignment", "soft", "hard"):
        assert loss(stage, warm_up_distillation_weight=1.0) == pytest.approx(loss(stage), rel=1e-5)
