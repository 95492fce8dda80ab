"""Scores, descriptor and decision against the formulas written out one head and one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from photon.config import PruningConfig
from photon.model.pruning import kept_tokens
from photon.ops.layout import Layout
from photon.ops.saliency.op import differentiable_saliency, saliency
from photon.ops.saliency.reference import question_vector, scores
from photon.ops.schedule.reference import describe, highest, normalise, threshold
from photon.scheduling import Schedule, ThresholdPredictor


def naive_scores(q: Tensor, k: Tensor, k_visual: Tensor) -> Tensor:
    """u [N] for q [Q, H, d], k [Q, G, d] and visual keys [N, G, d]: keys repeated, one query head at a time."""
    num_questions, num_heads, head_dim = q.shape
    share = num_heads // k.shape[1]
    centrality = torch.zeros(num_questions)
    for head in range(num_heads):
        for t in range(num_questions):
            for other in range(num_questions):
                if other != t:
                    product = float(q[t, head] @ k[other, head // share]) / math.sqrt(head_dim)
                    centrality[t] += max(product, 0.0) / num_heads
    weights = centrality / max(float(centrality.sum()), 1.0)
    u = torch.zeros(k_visual.shape[0])
    for head in range(num_heads):
        for t in range(num_questions):
            products = k_visual[:, head // share] @ q[t, head] / math.sqrt(head_dim)
            u += weights[t] * products / num_heads
    return u


def last_bias(network: ThresholdPredictor) -> nn.Parameter:
    last = network.mlp[2]
    assert isinstance(last, nn.Linear)
    return last.bias


def predictor(bias: float = 0.0, **changes: object) -> ThresholdPredictor:
    """Threshold network that ignores its input: theta = 0.9 * sigmoid(bias)."""
    network = ThresholdPredictor(16, PruningConfig(layer=0, **changes))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
        last_bias(network).fill_(bias)
    return network


def decide(u: list[float], bias: float = 0.0, **changes: object) -> Schedule:
    return schedule(torch.tensor([u]), predictor(bias, **changes))


def schedule(u: Tensor, network: ThresholdPredictor, lengths: list[int] | None = None) -> Schedule:
    """Rows [S, N] of scores, of which the first ones are real (all unless said)."""
    sizes = torch.full(u.shape[:1], u.shape[1]) if lengths is None else torch.tensor(lengths)
    decision: Schedule = network(u, sizes, torch.arange(u.shape[0]))
    return decision


def test_scores_by_hand() -> None:
    """Two question tokens, one head of width 1: c = (max(q0 k1, 0), max(q1 k0, 0)), divided by their sum."""
    q, k = torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([[[1.0]], [[4.0]]])
    # c = (8, 3), w = (8/11, 3/11), sum w q = 25/11
    z = question_vector(q[None], k[None], torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(z.flatten(), torch.tensor([25 / 11]))
    u = scores(z, torch.tensor([[[1.0]], [[-2.0]]]))
    torch.testing.assert_close(u, torch.tensor([[25 / 11, -50 / 11]]))


def test_weak_questions_are_not_blown_up() -> None:
    """A centrality below 1 in sum is divided by 1; negative products count as 0."""
    q, k = torch.tensor([[[0.1]], [[-1.0]]]), torch.tensor([[[1.0]], [[1.0]]])
    z = question_vector(q[None], k[None], torch.ones(1, 2, dtype=torch.bool))
    torch.testing.assert_close(z.flatten(), torch.tensor([0.01]))


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_scores_agree_with_the_naive_formula(heads: int, groups: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(heads + groups)
    lengths, num_visual, head_dim = (5, 1, 3, 0), 7, 8
    q = scale * torch.randn(4, 5, heads, head_dim, generator=generator)
    k = scale * torch.randn(4, 5, groups, head_dim, generator=generator)
    visual = torch.randn(4, num_visual, groups, head_dim, generator=generator)
    valid = torch.arange(5) < torch.tensor(lengths)[:, None]
    q[~valid], k[~valid] = torch.nan, torch.nan  # whatever lies behind a question must not matter
    z = question_vector(q, k, valid)
    u = torch.cat([scores(z[row : row + 1], visual[row]) for row in range(4)])
    for row, length in enumerate(lengths):
        expected = naive_scores(q[row, :length], k[row, :length], visual[row])
        torch.testing.assert_close(u[row], expected, rtol=1e-5, atol=1e-6)
    assert not u[3].any(), "an empty question looks for nothing"
    assert not u[1].any(), "a lone question token has no other that answers to it"


def test_a_question_of_no_width_gives_zero() -> None:
    z = question_vector(torch.zeros(2, 0, 4, 8), torch.zeros(2, 0, 2, 8), torch.zeros(2, 0, dtype=torch.bool))
    assert z.shape == (2, 2, 8)
    assert not z.any()


def test_scores_carry_no_gradient() -> None:
    """Of the operator; its formulas have one, for who asks for it (``saliency_gradient``)."""
    q, k = torch.randn(3, 4, 8, requires_grad=True), torch.randn(3, 2, 8, requires_grad=True)
    keys, layout = torch.randn(5, 2, 8, requires_grad=True), Layout.build([5], [[(1, 3)]], [3], [2], [0])
    assert not saliency(q, k, keys, layout).requires_grad
    assert differentiable_saliency(q, k, keys, layout).requires_grad


@pytest.mark.parametrize("counts", [(9, 4, 1), (2, 3, 50)])
def test_descriptor_agrees_with_torch(counts: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    valid = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    u = 5 * torch.randn(valid.shape, generator=generator)
    rho = normalise(u, valid)
    found = describe(u, rho, valid)
    for row, count in enumerate(counts):
        x, r = u[row, :count], rho[row, :count]
        torch.testing.assert_close(r, (x - x.min()) / (x.max() - x.min() + 1e-8))
        signed_log = x.sign() * torch.log(1 + x.abs())
        expected = [
            r.mean(), r.std(unbiased=False), r.min(), r.max(), r.quantile(0.25), r.quantile(0.5),
            x.mean(), x.std(unbiased=False), x.min(), x.max(), signed_log.mean(), signed_log.max(),
        ]  # fmt: skip
        torch.testing.assert_close(found[row], torch.stack(expected), rtol=1e-5, atol=1e-6)
    assert not rho[~valid].any()


@pytest.mark.parametrize("size", [1e-12, 1e-8, 1e-3, 1.0, 1e6])
def test_scaling_is_the_formula_to_the_last_bit(size: float) -> None:
    u = size * torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    low, high = u.min(1, keepdim=True).values, u.max(1, keepdim=True).values
    assert torch.equal(normalise(u, torch.ones_like(u, dtype=torch.bool)), (u - low) / (high - low + 1e-8))


def test_decision_by_hand() -> None:
    """theta = 0.9 sigmoid(0) = 0.45; rho = (0, 0.25, 0.5, 1); p = sigmoid((rho - 0.45) / 0.2)."""
    decision = decide([1.0, 2.0, 3.0, 5.0])
    torch.testing.assert_close(decision.rho, torch.tensor([[0.0, 0.25, 0.5, 1.0]]))
    torch.testing.assert_close(decision.theta, torch.tensor([0.45]))
    expected = [1 / (1 + math.exp(-(rho - 0.45) / 0.2)) for rho in (0.0, 0.25, 0.5, 1.0)]
    torch.testing.assert_close(decision.p, torch.tensor([expected]))
    assert decision.keep.tolist() == [[False, False, True, True]]
    assert torch.equal(decision.keep, decision.p > 0.5)


def test_threshold_network() -> None:
    network = ThresholdPredictor(32, PruningConfig(layer=0, threshold_scale=0.7))
    assert [tuple(p.shape) for p in network.parameters()] == [(4, 12), (4,), (1, 4), (1,)]
    x = torch.randn(3, 12)
    first, last = network.mlp[0], network.mlp[2]
    assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
    hidden = torch.nn.functional.gelu(x @ first.weight.T + first.bias)
    expected = 0.7 * torch.sigmoid(hidden @ last.weight.T + last.bias)[:, 0]
    torch.testing.assert_close(threshold(x, network.weights, 0.7), expected)


def test_gradient_reaches_the_threshold_alone() -> None:
    network = predictor()
    u = torch.tensor([[1.0, 2.0, 5.0]], requires_grad=True)
    schedule(u, network).p.sum().backward()
    assert u.grad is None
    slope = last_bias(network).grad
    assert slope is not None and float(slope) < 0, "a higher threshold keeps less"


@pytest.mark.parametrize("minimum", [1, 2, 4, 9])
def test_equal_scores_keep_the_first_tokens(minimum: int) -> None:
    decision = decide([3.0] * 4, min_tokens=minimum)
    assert decision.keep.tolist() == [[place < minimum for place in range(4)]]
    assert bool(torch.isfinite(decision.p).all()) and not decision.rho.any()


def test_the_minimum_takes_the_highest_scores() -> None:
    """With theta = 0.9 only the best would stay; three are asked for."""
    decision = decide([5.0, 1.0, 4.0, 3.0, 2.0], bias=100.0, min_tokens=3)
    assert decision.keep.tolist() == [[True, False, True, True, False]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_steers_nothing(bad: float) -> None:
    decision, clean = decide([1.0, bad, 3.0, 5.0]), decide([1.0, 3.0, 5.0])
    others = [0, 2, 3]
    assert not bool(decision.keep[0, 1])
    for name in ("rho", "p", "keep"):
        assert torch.equal(getattr(decision, name)[:, others], getattr(clean, name)), name
    assert torch.equal(decision.theta, clean.theta)
    assert bool(torch.isfinite(decision.p).all())


def test_scores_that_are_all_nan_keep_the_minimum() -> None:
    network = predictor(min_tokens=2)
    decision = schedule(torch.full((1, 4), math.nan), network)
    assert decision.keep.tolist() == [[True, True, False, False]]
    assert not decision.p.any()
    decision.p.sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in network.parameters() if p.grad is not None)


def test_nan_is_kept_only_when_nothing_else_is_left() -> None:
    assert decide([math.nan, 1.0, 2.0], min_tokens=2).keep.tolist() == [[False, True, True]]
    assert decide([math.nan, 1.0, math.nan], min_tokens=2).keep.tolist() == [[True, True, False]]


def test_a_branch_without_tokens_decides_nothing_and_disturbs_no_other() -> None:
    network = predictor(min_tokens=2)
    u = torch.tensor([[1.0, 2.0, 5.0], [7.0, 8.0, 9.0]])
    both = schedule(u, network, [3, 0])
    assert not both.keep[1].any() and not both.p[1].any()
    assert torch.equal(both.keep[:1], schedule(u[:1], network).keep)
    both.p.sum().backward()
    slope = last_bias(network).grad
    assert slope is not None and bool(torch.isfinite(slope).all())


def test_highest_takes_the_first_of_equal_values() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    assert highest(values, 2).long().tolist() == [[0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert highest(values, 4).long().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert bool(highest(values, 7).all())


def test_which_tokens_go_on() -> None:
    """All while soft; the kept ones, the others where the mask is flipped, all of a whole question; padding never."""
    decision = schedule(torch.tensor([[1.0, 2.0, 9.0], [9.0, 2.0, 0.0]]), predictor(), [3, 2])
    assert decision.keep.tolist() == [[False, False, True], [True, False, False]]
    flip = torch.tensor([False, True])
    assert kept_tokens(decision, "soft") is decision.valid
    assert kept_tokens(decision, "hard") is decision.keep
    assert kept_tokens(decision, "hard", flip).tolist() == [[False, False, True], [False, True, False]]
    whole = kept_tokens(decision, "hard", flip, whole=~flip)
    assert whole.tolist() == [[True, True, True], [False, True, False]]
    assert kept_tokens(decision, "hard", whole=flip).tolist() == [[False, False, True], [True, True, False]]
