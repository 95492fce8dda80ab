"""Contract of the saliency operator."""

from __future__ import annotations

import torch
from torch import Tensor

from photon.ops import backend as backends
from photon.ops.layout import Layout
from photon.ops.saliency import reference


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
        layout.own_starts,
        layout.question_lengths,
        layout.pair_branch,
        layout.pair_starts,
        layout.pair_lengths,
        layout.num_columns,
        layout.longest_question,
        backends.resolve(backend, q.device),
    )
    return result


@torch.library.custom_op("photon::saliency", mutates_args=())
def _saliency(
    q: Tensor,
    k: Tensor,
    keys: Tensor,
    own_starts: Tensor,
    question_lengths: Tensor,
    pair_branch: Tensor,
    pair_starts: Tensor,
    pair_lengths: Tensor,
    num_columns: int,
    longest_question: int,
    implementation: str,
) -> Tensor:
    places = (own_starts, question_lengths, pair_branch, pair_starts, pair_lengths, num_columns, longest_question)
    if implementation == "triton":
        from photon.ops.saliency import kernels

        return kernels.saliency(q, k, keys, *places)
    with torch.autocast(q.device.type, enabled=False):
        return reference.saliency(q, k, keys, *places)


@_saliency.register_fake
def _(
    q: Tensor,
    k: Tensor,
    keys: Tensor,
    own_starts: Tensor,
    question_lengths: Tensor,
    pair_branch: Tensor,
    pair_starts: Tensor,
    pair_lengths: Tensor,
    num_columns: int,
    longest_question: int,
    implementation: str,
) -> Tensor:
    return keys.new_empty((pair_branch.shape[0], num_columns), dtype=torch.float32)
