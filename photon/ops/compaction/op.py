"""Rows of many tensors moved by one index list: hidden states, positions, keys and values of all earlier layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from photon.ops import backend as backends
from photon.ops.compaction import reference


def compact(
    contexts: Sequence[Tensor], branches: Sequence[Tensor], rows: Tensor, *, backend: str = "auto"
) -> list[Tensor]:
    """``torch.cat([context, branch])[rows]`` of every pair, without building what is concatenated. Bits are kept.

    There is no gradient: backward through the result raises. :func:`photon.ops.surrogate.op.pack` has one.

    Args:
        contexts: [Tc, ...] each, of any dtype. Rows are read in place when a row lies densely in memory; other
            tensors are copied first by the kernel.
        branches: [Tb, ...] each, of the dtype and shape of a row of its context.
        rows: int64 [R] each below Tc + Tb.
        backend: "auto", "reference" or "triton".

    Returns:
        [R, ...] each, contiguous, in the order of the pairs.

    Raises:
        ValueError: when the tensors do not make pairs, differ in Tc or Tb, or are not all on the device of ``rows``.
        PhotonError: ``BACKEND_UNKNOWN`` or ``BACKEND_UNAVAILABLE``.
    """
    check_pairs(contexts, branches, rows)
    if not contexts:
        return []
    implementation = backends.resolve(backend, rows.device)
    result: list[Tensor] = torch.ops.photon.compact(list(contexts), list(branches), rows, implementation)
    return result


def check_pairs(contexts: Sequence[Tensor], branches: Sequence[Tensor], rows: Tensor) -> None:
    """Refuse what a kernel, to which a tensor is an address, would read as something else; see :func:`compact`."""
    for context, branch in zip(contexts, branches, strict=True):
        if context.dtype != branch.dtype or context.shape[1:] != branch.shape[1:]:
            found = f"{context.dtype} {tuple(context.shape)} and {branch.dtype} {tuple(branch.shape)}"
            raise ValueError(f"rows of {found} do not fit in one tensor")
        if context.shape[0] != contexts[0].shape[0] or branch.shape[0] != branches[0].shape[0]:
            raise ValueError("rows are counted through every pair alike: all must have as many")
        if not context.device == branch.device == rows.device:
            raise ValueError(f"rows on {context.device} and {branch.device}, listed on {rows.device}")


@torch.library.custom_op("photon::compact", mutates_args=())
def _compact(contexts: Sequence[Tensor], branches: Sequence[Tensor], rows: Tensor, implementation: str) -> list[Tensor]:
    return move(contexts, branches, rows, implementation)


def move(contexts: Sequence[Tensor], branches: Sequence[Tensor], rows: Tensor, implementation: str) -> list[Tensor]:
    """What :func:`compact` does, for use inside other operators."""
    if implementation == "triton":
        from photon.ops.compaction import kernels

        return kernels.compact(contexts, branches, rows)
    return reference.compact(contexts, branches, rows)


@_compact.register_fake
def _(contexts: Sequence[Tensor], branches: Sequence[Tensor], rows: Tensor, implementation: str) -> list[Tensor]:
    return [context.new_empty(rows.shape[0], *context.shape[1:]) for context in contexts]
