"""Contract of the saliency operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from photon.ops import backend as backends
from photon.ops.layout import Layout
from photon.ops.saliency import reference
from photon.ops.saliency.reference import Places


def saliency(q: Tensor, k: Tensor, keys: Tensor, layout: Layout, *, backend: str = "auto") -> Tensor:
    """Score every visual token for every question about its scan.

    ``u_j = sum_g <z_g, k_gj>`` with ``z_g`` the queries of the question's tokens, summed over the heads of a key
    head and weighted by centrality (see :func:`photon.ops.saliency.reference.question_vector`). Computed in float32
    whatever the type of the inputs, with mixed precision off; the inputs may be strided. No gradient flows.

    Args:
        q: [Tb, H, d] rotated queries of all branch rows, float32, bfloat16 or float16.
        k: [Tb, G, d] their rotated keys.
        keys: [Tc, G, d] rotated keys of all context rows. No row is read for a scan it does not belong to.
        layout: where questions and visual tokens lie, on the device of the tensors.
        backend: see :func:`photon.ops.backend.resolve`.

    Returns:
        u: float32 [S, N], zero in padding and for an empty question.

    Raises:
        PhotonError: ``BACKEND_UNKNOWN`` or ``BACKEND_UNAVAILABLE``.
    """
    result: Tensor = torch.ops.photon.saliency(
        q.detach(),
        k.detach(),
        keys.detach(),
        [getattr(layout, name) for name in Places._fields],
        layout.num_columns,
        layout.longest_question,
        backends.resolve(backend, q.device),
    )
    return result


def differentiable_saliency(q: Tensor, k: Tensor, keys: Tensor, layout: Layout) -> Tensor:
    """:func:`saliency` in plain PyTorch on any device, with gradient to all three: also through the centrality."""
    places = Places(*(getattr(layout, name) for name in Places._fields))
    with torch.autocast(q.device.type, enabled=False):
        return reference.saliency(q, k, keys, places, layout.num_columns, layout.longest_question)


@torch.library.custom_op("photon::saliency", mutates_args=())
def _saliency(
    q: Tensor,
    k: Tensor,
    keys: Tensor,
    places: Sequence[Tensor],
    num_columns: int,
    longest_question: int,
    implementation: str,
) -> Tensor:
    """``places`` are those of :class:`Places`, in order."""
    arguments = (q, k, keys, Places(*places), num_columns, longest_question)
    if implementation == "triton":
        from photon.ops.saliency import kernels

        return kernels.saliency(*arguments)
    with torch.autocast(q.device.type, enabled=False):
        return reference.saliency(*arguments)


@_saliency.register_fake
def _(
    q: Tensor,
    k: Tensor,
    keys: Tensor,
    places: Sequence[Tensor],
    num_columns: int,
    longest_question: int,
    implementation: str,
) -> Tensor:
    return keys.new_empty((Places(*places).pair_branch.shape[0], num_columns), dtype=torch.float32)
