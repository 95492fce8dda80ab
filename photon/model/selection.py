"""Which rows each branch takes along after pruning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from photon.model.attention import padded_rows, starts_of
from photon.model.packing import PackedBatch


@dataclass(frozen=True)
class Selection:
    """Rows after pruning, branch after branch: text of the context, kept visual tokens, the branch's own rows.

    Attributes:
        rows: int64 [R] row of the context rows followed by the branch rows that each output row takes.
        slots: int64 [R] flattened [B, N] index of the row's visual token, -1 for text.
        lengths: int64 [B] rows of each branch.
        branch_rows: int64 [Tb] output row of each branch token.
    """

    rows: Tensor
    slots: Tensor
    lengths: Tensor
    branch_rows: Tensor


def visual_ordinals(num_rows: int, visual_rows: Tensor, context_starts: Tensor, context_lengths: Tensor) -> Tensor:
    """Number of each context row's visual token within its context, -1 for text: int64 [Tc]."""
    is_visual = torch.zeros(num_rows, dtype=torch.long, device=visual_rows.device).index_fill(0, visual_rows, 1)
    seen = is_visual.cumsum(0) - is_visual
    context = torch.repeat_interleave(
        torch.arange(context_lengths.shape[0], device=visual_rows.device),
        context_lengths,
        output_size=num_rows,
    )
    padded = torch.cat([seen, seen[-1:] if num_rows else seen.new_zeros(1)])
    return torch.where(is_visual.bool(), seen - padded[context_starts][context], -1)


def select_rows(batch: PackedBatch, keep: Tensor | None) -> Selection:
    """Lay out the rows of every branch after pruning.

    Args:
        batch: the batch.
        keep: bool [B, N] visual tokens kept by each branch, or None when the batch has none.
    """
    num_context_rows = batch.context_ids.shape[0]
    starts, lengths = starts_of(batch.context_lengths), batch.context_lengths
    context_rows, in_context = padded_rows(starts[batch.branch_context], lengths[batch.branch_context])
    own_rows, in_branch = padded_rows(starts_of(batch.branch_lengths) + num_context_rows, batch.branch_lengths)
    slots = torch.full_like(context_rows, -1)
    if keep is not None and context_rows.numel():
        ordinals = visual_ordinals(num_context_rows, batch.visual_rows, starts, lengths)[context_rows]
        is_visual = (ordinals >= 0) & in_context
        first = torch.arange(keep.shape[0], device=keep.device)[:, None] * keep.shape[1]
        slots = torch.where(is_visual, first + ordinals, -1)
        in_context = in_context & (~is_visual | keep.flatten()[slots.clamp_min(0)])
    taken = torch.cat([in_context, in_branch], dim=1)
    chosen = taken.flatten().nonzero().flatten()
    place = taken.flatten().cumsum(0) - 1
    own_places = place.view_as(taken)[:, context_rows.shape[1] :]
    return Selection(
        rows=torch.cat([context_rows, own_rows], dim=1).flatten()[chosen],
        slots=torch.cat([slots, torch.full_like(own_rows, -1)], dim=1).flatten()[chosen],
        lengths=taken.sum(-1),
        branch_rows=own_places[in_branch],
    )
