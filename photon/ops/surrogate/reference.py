"""The backward of packing in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from photon.ops.compaction import reference as compaction

SIGMA_FLOOR = 3e-3
STANDARDISED_LIMIT = 1.5
MAGNITUDE_FLOOR = 1e-6
MAGNITUDE_RANGE = (0.5, 2.0)
SLOPE_FLOOR = 5e-3
GAIN = 0.8


class Places(NamedTuple):
    """Where rows went: the tensors of a selection and of its layout that backward needs."""

    rows: Tensor
    positions: Tensor
    branch_rows: Tensor
    entry_starts: Tensor
    context_starts: Tensor
    first_pairs: Tensor
    pair_branch: Tensor
    pair_starts: Tensor
    pair_lengths: Tensor
    context_slots: Tensor
    row_context: Tensor
    branch_bounds: Tensor
    branches: Tensor


def pack_backward(
    grad: Tensor, context: Tensor, branch: Tensor, p: Tensor | None, places: Places, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operator's contract."""
    grad_context = _context_gradient(grad, context.shape[0], places.rows).to(grad.dtype)
    # A branch's own row is in its branch alone, and always stays.
    grad_branch = grad.index_select(0, places.branch_rows)
    if p is None:
        return grad_context, grad_branch, grad.new_empty(0, 0, dtype=torch.float32)

    (packed,) = compaction.compact([context], [branch], places.rows)
    products = packed.float() * grad.float()
    tokens, valid, is_taken = _outputs_of_tokens(p, places)
    alignment, magnitude = (
        torch.where(is_taken, x.sum(-1)[tokens], 0.0) if len(x) else torch.zeros_like(p)
        for x in (products, products.abs())
    )
    return grad_context, grad_branch, probability_gradient(alignment, magnitude, p, valid, rule=rule)


def _context_gradient(grad: Tensor, num_rows: int, rows: Tensor) -> Tensor:
    """Sum [Tc, D] of the gradients of all output rows that took a context row, in float32 or wider."""
    total = grad.new_zeros(num_rows, grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
    if not num_rows:
        return total
    # Own rows add nothing to the first row: leaving them out would mean waiting for a GPU to count them.
    is_own = rows >= num_rows
    target, values = torch.where(is_own, 0, rows), torch.where(is_own[:, None], 0.0, grad).to(total.dtype)
    if grad.is_cpu:
        return total.index_add_(0, target, values)
    # On a GPU index_add_ adds in whatever order its atomics come; this one sorts first.
    return total.index_put_((target,), values, accumulate=True)


def _outputs_of_tokens(p: Tensor, places: Places) -> tuple[Tensor, Tensor, Tensor]:
    """Output row of each visual token (0 for none), which entries are tokens, and which of these were taken: [S, N]."""
    columns = torch.arange(p.shape[1], device=p.device)
    valid = columns < places.pair_lengths[:, None]
    branch = places.pair_branch
    first = places.entry_starts[branch] + places.pair_starts - places.context_starts[branch]
    tokens = places.positions[torch.where(valid, first[:, None] + columns, 0)]
    is_taken = valid & (tokens >= 0)
    return torch.where(is_taken, tokens, 0), valid, is_taken


def probability_gradient(alignment: Tensor, magnitude: Tensor, p: Tensor, valid: Tensor, *, rule: str) -> Tensor:
    """Gradient on the keep probabilities, float32 [S, N].

    With a_j = <x_j, g_j> standardised over the volume's visual tokens (biased, sigma floor 3e-3), clipped to
    +-1.5 and r = 0.5 + 0.5 tanh(z), the direction is 0.5 - r; its size is the token's share of the mean
    magnitude, within [0.5, 2], times max(p (1 - p), 5e-3) and 0.8.

    Args:
        alignment: [S, N] a_j, zero for dropped tokens.
        magnitude: [S, N] sum_d |x_jd g_jd|, zero for dropped tokens.
        p, valid: [S, N].
        rule: "paper" uses +a and subtracts the mean direction; "taylor" uses -a, the first-order loss increase
            of removing the token.
    """
    count = valid.sum(-1, keepdim=True).clamp_min(1)

    def mean(values: Tensor) -> Tensor:
        return torch.where(valid, values, 0.0).sum(-1, keepdim=True) / count

    signed = alignment if rule == "paper" else -alignment
    centred = signed - mean(signed)
    sigma = mean(centred.square()).sqrt().clamp_min(SIGMA_FLOOR)
    z = (centred / sigma).clamp(-STANDARDISED_LIMIT, STANDARDISED_LIMIT)
    direction = 0.5 - (0.5 + 0.5 * torch.tanh(z))
    if rule == "paper":
        direction = direction - mean(direction)
    share = (magnitude / mean(magnitude).clamp_min(MAGNITUDE_FLOOR)).clamp(*MAGNITUDE_RANGE)
    slope = (p * (1 - p)).clamp_min(SLOPE_FLOOR)
    return torch.where(valid, GAIN * direction * share * slope, 0.0)
