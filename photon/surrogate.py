"""Surrogate gradient propagation (SGP): packing kept rows, with a gradient for the decision.

Forward moves rows. Backward scatters the row gradients and gives every visual token's keep probability a bounded
gradient built from how the loss reacts to that token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIGMA_FLOOR = 3e-3
STANDARDISED_LIMIT = 1.5
MAGNITUDE_FLOOR = 1e-6
MAGNITUDE_RANGE = (0.5, 2.0)
SLOPE_FLOOR = 5e-3
GAIN = 0.8


def pack(x: Tensor, p: Tensor, rows: Tensor, slots: Tensor, valid: Tensor, *, rule: str) -> Tensor:
    """Gather rows with surrogate gradients for the probabilities that chose them.

    Args:
        x: [T, D] rows before pruning (several branches may gather the same row).
        p: float32 [S, N] keep probabilities of the visual tokens of each branch and volume.
        rows: int64 [R] row of x that each output row takes.
        slots: int64 [R] flattened [S, N] position of the output row's visual token, -1 for text.
        valid: bool [S, N] entries of p that are tokens.
        rule: "paper" or "taylor", see :func:`probability_gradient`.

    Returns:
        [R, D], equal to ``x[rows]``.
    """
    result: Tensor = _Pack.apply(x, p, rows, slots, valid, rule)
    return result


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, rows: Tensor, slots: Tensor, valid: Tensor, rule: str) -> Tensor:
        y = x.index_select(0, rows)
        ctx.save_for_backward(y, p, rows, slots, valid)
        ctx.num_rows, ctx.rule = x.shape[0], rule
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        y, p, rows, slots, valid = ctx.saved_tensors
        grad_x = grad.new_zeros(ctx.num_rows, grad.shape[1]).index_add_(0, rows, grad)
        grad_p = None
        if ctx.needs_input_grad[1]:
            is_visual = slots >= 0
            products = y[is_visual].float() * grad[is_visual].float()
            alignment = p.new_zeros(p.numel()).index_copy_(0, slots[is_visual], products.sum(-1))
            magnitude = p.new_zeros(p.numel()).index_copy_(0, slots[is_visual], products.abs().sum(-1))
            grad_p = probability_gradient(alignment.view_as(p), magnitude.view_as(p), p, valid, rule=ctx.rule)
        return grad_x, grad_p, None, None, None, None


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
