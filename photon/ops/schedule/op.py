"""Contract of the schedule operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from photon.errors import PhotonError
from photon.ops import backend as backends
from photon.ops.schedule import reference
from photon.ops.schedule.reference import DESCRIPTOR_SIZE, Decision, ThresholdWeights

MAX_COLUMNS = 32768
"""Longest row that the kernel, which holds a row in registers, takes."""


def schedule(
    u: Tensor,
    lengths: Tensor,
    weights: ThresholdWeights,
    *,
    scale: float,
    temperature: float,
    min_tokens: int,
    backend: str = "auto",
) -> Decision:
    """Threshold the scores of every question and volume.

    A row of scores is scaled to [0, 1] and described by twelve numbers, from which a small network tells its threshold
    ``theta = scale * sigmoid(MLP(descriptor))``; tokens above it are kept. A score that is not finite, or of
    size :data:`photon.ops.schedule.reference.LARGEST_SCORE` and more, never steers the threshold and is kept only if
    nothing else is left. At least ``min_tokens`` of the highest scores always stay (of equal ones the first), so a
    blank volume keeps some tokens too. A row without tokens gets an empty decision.

    Gradient reaches ``weights`` from ``theta`` and ``p = sigmoid((rho - theta) / temperature)`` alone.

    Args:
        u: float32 [S, N] raw scores; rows may be strided.
        lengths: int64 [S] real scores of each row, the first ones; what lies behind them is never read.
        weights: the threshold network, of any float type; it computes in float32 with mixed precision off.
        scale, temperature, min_tokens: see :class:`photon.config.PruningConfig`.
        backend: see :func:`photon.ops.backend.resolve`. "auto" takes the reference for rows above ``MAX_COLUMNS``.

    Raises:
        PhotonError: ``BACKEND_UNKNOWN``, or ``BACKEND_UNAVAILABLE`` also for "triton" and rows above ``MAX_COLUMNS``.
    """
    implementation = backends.resolve(backend, u.device)
    if implementation == "triton" and u.shape[1] > MAX_COLUMNS:
        if backend == "triton":
            fact = f"a volume has {u.shape[1]} visual tokens, and the schedule kernel takes {MAX_COLUMNS}."
            raise PhotonError("BACKEND_UNAVAILABLE", "triton", fact, "Use the backend auto or reference.")
        implementation = "reference"
    u, rho, theta, p, keep, _ = torch.ops.photon.schedule(
        u.detach(), lengths, *weights, scale, temperature, min_tokens, implementation
    )
    return Decision(u.detach(), rho.detach(), theta, p, keep)


@torch.library.custom_op("photon::schedule", mutates_args=())
def _schedule(
    u: Tensor,
    lengths: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    scale: float,
    temperature: float,
    min_tokens: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = ThresholdWeights(hidden_weight, hidden_bias, last_weight, last_bias)
    if implementation == "triton":
        from photon.ops.schedule import kernels

        decision, descriptor = kernels.schedule(u, lengths, weights, scale, temperature, min_tokens)
    else:
        with torch.autocast(u.device.type, enabled=False):
            decision, descriptor = reference.schedule(u, lengths, weights, scale, temperature, min_tokens)
    return *decision, descriptor


@_schedule.register_fake
def _(
    u: Tensor,
    lengths: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    scale: float,
    temperature: float,
    min_tokens: int,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    table = torch.empty_like(u, memory_format=torch.contiguous_format)
    theta = u.new_empty(u.shape[0])
    keep = torch.empty_like(table, dtype=torch.bool)
    descriptor = u.new_empty(u.shape[0], DESCRIPTOR_SIZE)
    return table, torch.empty_like(table), theta, torch.empty_like(table), keep, descriptor


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, theta, p, _, descriptor = output
    ctx.save_for_backward(descriptor, theta, p, *inputs[2:6])
    ctx.scale, ctx.temperature = inputs[6], inputs[7]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    descriptor, theta, p, *weights = ctx.saved_tensors
    grad_theta, grad_p = grads[2], grads[3]
    total = torch.zeros_like(theta) if grad_theta is None else grad_theta
    if grad_p is not None:
        # p is 0 where there is no token, and whatever came in there must not count.
        total = total - torch.where(p > 0, grad_p * p * (1 - p), 0.0).sum(-1) / ctx.temperature
    with torch.autocast(p.device.type, enabled=False):
        gradients = reference.threshold_gradient(total, descriptor, theta, ThresholdWeights(*weights), ctx.scale)
    return None, None, *gradients, None, None, None, None


_schedule.register_autograd(_backward, setup_context=_save)
