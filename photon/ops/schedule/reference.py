"""Instruction-conditioned token scheduling (ITS) in plain PyTorch: from scores to the tokens kept.

Every row [N] of scores belongs to one question and one volume and is decided by itself. Functions take a mask of the
real entries; padding enters no statistic. Letters: S rows, N visual tokens, D8 width of the threshold network.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

DESCRIPTOR_SIZE = 12
_EXACT = 2.0**14
LARGEST_SCORE = 1e16
"""Scores of this size and above are treated as not finite: sums of their squares would not be."""


class ThresholdWeights(NamedTuple):
    """Weights of the threshold network, of any float type; it computes in float32.

    Attributes:
        hidden_weight, hidden_bias: [D8, 12], [D8].
        last_weight, last_bias: [1, D8], [1].
    """

    hidden_weight: Tensor
    hidden_bias: Tensor
    last_weight: Tensor
    last_bias: Tensor


class Decision(NamedTuple):
    """What becomes of every visual token.

    Attributes:
        u: float32 [S, N] raw scores; 0 in padding and where the score is not usable (not finite, or huge).
        rho: float32 [S, N] scores scaled to [0, 1] within the volume; 0 where u was not usable.
        theta: float32 [S] thresholds, with gradient to the threshold network.
        p: float32 [S, N] keep probabilities, with gradient to theta; 0 where u was not usable.
        keep: bool [S, N] tokens kept.
    """

    u: Tensor
    rho: Tensor
    theta: Tensor
    p: Tensor
    keep: Tensor


def normalise(u: Tensor, valid: Tensor) -> Tensor:
    """rho = (u - min) / (max - min + 1e-8) over the real entries; 0 elsewhere."""
    low = torch.where(valid, u, torch.inf).min(-1, keepdim=True).values
    high = torch.where(valid, u, -torch.inf).max(-1, keepdim=True).values
    # Both sides of the fraction times 2^14, which is exact: the ONNX exporter takes a plain 1e-8 for zero and drops
    # it, and equal scores would become 0 / 0.
    rho = (u - low) * _EXACT / ((high - low) * _EXACT + 1e-8 * _EXACT)
    return torch.where(valid, rho, 0.0)


def describe(u: Tensor, rho: Tensor, valid: Tensor) -> Tensor:
    """The twelve numbers the threshold network sees, [S, 12] (order of the public code).

    Mean, std (biased), min, max, 0.25- and 0.5-quantile of rho; mean, std, min, max of u; mean and max of
    sign(u) log(1 + |u|).
    """
    signed_log = u.sign() * u.abs().log1p()
    rho_mean, rho_std = _mean_std(rho, valid)
    u_mean, u_std = _mean_std(u, valid)
    log_mean, _ = _mean_std(signed_log, valid)
    ordered = torch.where(valid, rho, torch.inf).sort(-1).values
    columns = [
        rho_mean,
        rho_std,
        *_extremes(rho, valid),
        _quantile(ordered, valid, 0.25),
        _quantile(ordered, valid, 0.5),
        u_mean,
        u_std,
        *_extremes(u, valid),
        log_mean,
        _extremes(signed_log, valid)[1],
    ]
    return torch.stack(columns, dim=-1)


def threshold(descriptor: Tensor, weights: ThresholdWeights, scale: float) -> Tensor:
    """theta = scale * sigmoid(Linear(GELU(Linear(descriptor)))): [S, 12] to [S], in float32."""
    hidden_weight, hidden_bias, last_weight, last_bias = (x.float() for x in weights)
    hidden = F.gelu(F.linear(descriptor, hidden_weight, hidden_bias))
    return scale * torch.sigmoid(F.linear(hidden, last_weight, last_bias).squeeze(-1))


def threshold_gradient(
    grad: Tensor, descriptor: Tensor, theta: Tensor, weights: ThresholdWeights, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four weights, each of its weight's type, from the gradient [S] of theta."""
    hidden_weight, hidden_bias, last_weight, _ = (x.float() for x in weights)
    share = theta / scale
    grad_logit = (grad * scale * share * (1 - share))[:, None]
    hidden = F.linear(descriptor, hidden_weight, hidden_bias)
    grad_hidden = torch.ops.aten.gelu_backward(grad_logit * last_weight, hidden)
    gradients = (grad_hidden.T @ descriptor, grad_hidden.sum(0), grad_logit.T @ F.gelu(hidden), grad_logit.sum(0))
    weight, bias, last, last_bias = (g.to(x.dtype) for g, x in zip(gradients, weights, strict=True))
    return weight, bias, last, last_bias


def decide(
    u: Tensor, valid: Tensor, weights: ThresholdWeights, *, scale: float, temperature: float, min_tokens: int
) -> tuple[Decision, Tensor]:
    """The decision for scores [S, N], N >= 1, with a mask of the real ones, and its descriptor [S, 12].

    See :func:`photon.ops.schedule.op.schedule`; this is the form for graphs, where the mask is known.
    """
    usable = valid & (u.abs() < LARGEST_SCORE)
    # A row without usable tokens would reduce over nothing: let it see zeros, its result is masked anyway.
    counted = usable | ~usable.any(-1, keepdim=True)
    u = torch.where(usable, u, 0.0)
    rho = normalise(u, counted)
    descriptor = describe(u, rho, counted)
    theta = threshold(descriptor, weights, scale)
    delta = torch.where(usable, rho - theta[:, None], -torch.inf)
    p = torch.sigmoid(delta / temperature)
    preference = torch.where(usable, rho, torch.where(valid, -1.0, -2.0))
    keep = valid & ((delta > 0) | highest(preference, min_tokens))
    return Decision(u, rho, theta, p, keep), descriptor


def rank(u: Tensor, valid: Tensor, counts: Tensor) -> Decision:
    """Keep the ``counts`` int64 [S] highest of the scores [S, N], N >= 1, of equal ones the first.

    No threshold network has a say: ``theta`` is the lowest rho kept (0 in a row that keeps nothing) and ``p`` is 1 for
    what is kept and 0 for the rest. What no score can tell (not finite, or huge) comes after all scores, as in
    :func:`decide`. Nothing here has a gradient.
    """
    u = u.detach()
    usable = valid & (u.abs() < LARGEST_SCORE)
    u = torch.where(usable, u, 0.0)
    rho = normalise(u, usable | ~usable.any(-1, keepdim=True))
    preference = torch.where(usable, u, torch.where(valid, -2 * LARGEST_SCORE, -3 * LARGEST_SCORE))
    keep = valid & highest(preference, counts)
    lowest = torch.where(keep, rho, torch.inf).min(-1).values
    return Decision(u, rho, torch.where(keep.any(-1), lowest, 0.0), keep.float(), keep)


def schedule(
    u: Tensor, lengths: Tensor, weights: ThresholdWeights, scale: float, temperature: float, min_tokens: int
) -> tuple[Decision, Tensor]:
    """:func:`decide` for rows whose real entries are the first ``lengths`` [S]."""
    num_columns = u.shape[1]
    if num_columns == 0:  # reductions want an entry
        u = u.new_zeros(u.shape[0], 1)
    # Sums over a row take another order with other strides.
    u = u.contiguous()
    valid = torch.arange(u.shape[1], device=u.device) < lengths[:, None]
    decision, descriptor = decide(u, valid, weights, scale=scale, temperature=temperature, min_tokens=min_tokens)
    tables = (x[:, :num_columns] if x.ndim == 2 else x for x in decision)
    return Decision(*tables), descriptor


def highest(values: Tensor, count: int | Tensor) -> Tensor:
    """The ``count`` highest values of every row [S, N] as a mask; of equal values the first ones.

    Args:
        count: from 1, for all rows or, int64 [S], for each.
    """
    ordered = values.sort(-1, descending=True).values
    place: int | Tensor
    if isinstance(count, Tensor):
        place = count.clamp(1, values.shape[-1])[:, None] - 1
        lowest_taken = ordered.gather(-1, place)
    else:
        place = min(count, values.shape[-1]) - 1
        lowest_taken = ordered[:, place : place + 1]
    above, level = values > lowest_taken, values == lowest_taken
    room = place + 1 - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))


def _count(valid: Tensor) -> Tensor:
    return valid.sum(-1).float()


def _mean_std(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    count = _count(valid)
    mean = torch.where(valid, x, 0.0).sum(-1) / count
    variance = torch.where(valid, (x - mean[:, None]).square(), 0.0).sum(-1) / count
    return mean, variance.sqrt()


def _extremes(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.where(valid, x, torch.inf).min(-1).values
    high = torch.where(valid, x, -torch.inf).max(-1).values
    return low, high


def _quantile(ordered: Tensor, valid: Tensor, fraction: float) -> Tensor:
    """Linear-interpolated quantile of ascending rows whose real entries come first."""
    place = (_count(valid) - 1) * fraction
    below = place.floor()
    low = ordered.gather(-1, below.long()[:, None]).squeeze(-1)
    high = ordered.gather(-1, place.ceil().long()[:, None]).squeeze(-1)
    return low + (high - low) * (place - below)
