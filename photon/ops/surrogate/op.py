"""Surrogate gradient propagation (SGP): packing kept rows, with a gradient for the decision.

Forward moves rows. Backward adds up the row gradients and gives every visual token's keep probability a bounded
gradient built from how the loss reacts to that token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from photon.config import SGP_RULES
from photon.ops import backend as backends
from photon.ops.compaction.op import check_pairs, move
from photon.ops.layout import Layout
from photon.ops.selection.op import Selection
from photon.ops.surrogate import reference
from photon.ops.surrogate.reference import Places


def pack(
    context: Tensor,
    branch: Tensor,
    p: Tensor | None,
    selection: Selection,
    layout: Layout,
    *,
    rule: str,
    backend: str = "auto",
) -> Tensor:
    """Gather rows, with surrogate gradients for the probabilities that chose them.

    A context row that several branches take gets the sum of their gradients, added up in float32 in the order of the
    branches; a row that nobody takes gets zero.

    Args:
        context: [Tc, D] rows before pruning. branch: [Tb, D] of the same dtype.
        p: float32 [S, N] keep probability of each visual token, padding is not read; None for a plain gather.
        selection, layout: of the same batch, on the device of the rows.
        rule: "paper" or "taylor", see :func:`photon.ops.surrogate.reference.probability_gradient`.
        backend: "auto", "reference" or "triton".

    Returns:
        [R, D], equal to ``torch.cat([context, branch])[selection.rows]``.

    Raises:
        ValueError: when the rows do not make a pair on the device of the selection, or for another rule.
        PhotonError: ``BACKEND_UNKNOWN`` or ``BACKEND_UNAVAILABLE``.
    """
    check_pairs([context], [branch], selection.rows)
    if rule not in SGP_RULES:
        raise ValueError(f"{rule!r} is not one of the rules {SGP_RULES}")
    shared = (getattr(layout, name) for name in Places._fields[4:])
    places = Places(selection.rows, selection.positions, selection.branch_rows, selection.entry_starts, *shared)
    implementation = backends.resolve(backend, context.device)
    result: Tensor = torch.ops.photon.pack(context, branch, p, list(places), rule, implementation)
    return result


@torch.library.custom_op("photon::pack", mutates_args=())
def _pack(
    context: Tensor, branch: Tensor, p: Tensor | None, places: Sequence[Tensor], rule: str, implementation: str
) -> Tensor:
    """``places`` are those of :class:`Places`, in order."""
    return move([context], [branch], Places(*places).rows, implementation)[0]


@_pack.register_fake
def _(
    context: Tensor, branch: Tensor, p: Tensor | None, places: Sequence[Tensor], rule: str, implementation: str
) -> Tensor:
    return context.new_empty(places[0].shape[0], context.shape[1])


@torch.library.custom_op("photon::pack_backward", mutates_args=())
def _pack_backward(
    grad: Tensor,
    context: Tensor,
    branch: Tensor,
    p: Tensor | None,
    places: Sequence[Tensor],
    rule: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the context rows [Tc, D], the branch rows [Tb, D] and p [S, N]; [0, 0] when ``p`` is None."""
    if implementation == "triton":
        from photon.ops.surrogate import kernels

        return kernels.pack_backward(grad, context, branch, p, Places(*places), rule)
    return reference.pack_backward(grad, context, branch, p, Places(*places), rule)


@_pack_backward.register_fake
def _(
    grad: Tensor,
    context: Tensor,
    branch: Tensor,
    p: Tensor | None,
    places: Sequence[Tensor],
    rule: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_p = grad.new_empty(0, 0, dtype=torch.float32) if p is None else p.new_empty(p.shape)
    return context.new_empty(context.shape), branch.new_empty(branch.shape), grad_p


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    context, branch, p, places, ctx.rule, ctx.implementation = inputs
    # The sources are alive anyway, for the backward of what made them; the output is not saved a second time.
    ctx.save_for_backward(context, branch, p, *places)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    context, branch, p, *places = ctx.saved_tensors
    wants_p = p is not None and ctx.needs_input_grad[2]
    grad_context, grad_branch, grad_p = torch.ops.photon.pack_backward(
        grad, context, branch, p if wants_p else None, places, ctx.rule, ctx.implementation
    )
    return grad_context, grad_branch, grad_p if wants_p else None, [None] * len(places), None, None


torch.library.register_autograd("photon::pack", _backward, setup_context=_setup)
