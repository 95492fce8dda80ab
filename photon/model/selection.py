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
        slots: int64 [R] flattened [S, N] index of the row's visual token in the schedule, -1 for text.
        lengths: int64 [B] rows of each branch.
        branch_rows: int64 [Tb] output row of each branch token.
    """

    rows: Tensor
    slots: Tensor
    lengths: Tensor
    branch_rows: Tensor


def volumes_of_branches(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Every volume of every branch's prompt, in order: branch int64 [S] and volume of the batch int64 [S]."""
    owner = batch.branch_context
    volumes, real = padded_rows(starts_of(batch.context_volumes)[owner], batch.context_volumes[owner])
    return real.nonzero()[:, 0], volumes[real]


def visual_tokens_of(batch: PackedBatch, volumes: Tensor) -> tuple[Tensor, Tensor]:
    """Context rows [S, N] of the visual tokens of volumes [S], and which entries are real."""
    places, valid = padded_rows(starts_of(batch.volume_counts)[volumes], batch.volume_counts[volumes])
    return batch.visual_rows[places], valid


def _slots_in_context(batch: PackedBatch, width: int) -> Tensor:
    """Place of each context row in its context's table [volumes, width], flattened; -1 for text: int64 [Tc]."""
    device = batch.visual_rows.device
    num_visual = batch.visual_rows.shape[0]
    counts = batch.volume_counts
    volumes = torch.arange(counts.shape[0], device=device)
    first = torch.repeat_interleave(
        starts_of(batch.context_volumes), batch.context_volumes, output_size=counts.shape[0]
    )
    volume = torch.repeat_interleave(volumes, counts, output_size=num_visual)
    place = torch.arange(num_visual, device=device) - starts_of(counts)[volume]
    slots = torch.full((batch.context_ids.shape[0],), -1, dtype=torch.long, device=device)
    return slots.index_copy_(0, batch.visual_rows, (volume - first[volume]) * width + place)


def select_rows(batch: PackedBatch, keep: Tensor | None) -> Selection:
    """Lay out the rows of every branch after pruning.

    Args:
        batch: the batch.
        keep: bool [S, N] visual tokens kept, a row for each of :func:`volumes_of_branches`; None when the batch has
            no visual token.
    """
    num_context_rows = batch.context_ids.shape[0]
    starts, lengths, owner = starts_of(batch.context_lengths), batch.context_lengths, batch.branch_context
    context_rows, in_context = padded_rows(starts[owner], lengths[owner])
    own_rows, in_branch = padded_rows(starts_of(batch.branch_lengths) + num_context_rows, batch.branch_lengths)
    slots = torch.full_like(context_rows, -1)
    if keep is not None and context_rows.numel():
        within = _slots_in_context(batch, keep.shape[1])[context_rows]
        is_visual = (within >= 0) & in_context
        first = starts_of(batch.context_volumes[owner])[:, None] * keep.shape[1]
        slots = torch.where(is_visual, first + within, -1)
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
