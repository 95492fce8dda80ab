"""Selection in plain PyTorch: stream compaction by two running counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Places(NamedTuple):
    """Where rows lie: the tensors of a layout that selection needs (the last but one and two: the kernel alone)."""

    context_starts: Tensor
    context_lengths: Tensor
    own_starts: Tensor
    own_lengths: Tensor
    first_pairs: Tensor
    pair_starts: Tensor
    pair_lengths: Tensor
    context_slots: Tensor


Buffers = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def select_rows(keep: Tensor | None, places: Places, num_entries: int) -> Buffers:
    """The registered operator's contract."""
    context_starts, context_lengths, own_starts, own_lengths, first_pairs, _, _, context_slots = places
    num_branches, num_context_rows = own_starts.shape[0], context_slots.shape[0]
    totals = context_lengths + own_lengths
    entry_starts = totals.cumsum(0) - totals
    entries = torch.arange(num_entries, device=own_starts.device)
    branches = torch.arange(num_branches, device=own_starts.device)
    branch = torch.repeat_interleave(branches, totals, output_size=num_entries)

    place = entries - entry_starts[branch]
    is_own = place >= context_lengths[branch]
    own_row = own_starts[branch] + place - context_lengths[branch]
    context_row = context_starts[branch] + place
    rows = torch.where(is_own, num_context_rows + own_row, context_row)
    slots, stays = torch.full_like(entries, -1), torch.ones_like(is_own)
    if keep is not None and keep.numel() and num_context_rows:
        within = context_slots[torch.where(is_own, 0, context_row)]
        is_visual = (within >= 0) & ~is_own
        slots = torch.where(is_visual, first_pairs[branch] * keep.shape[1] + within, -1)
        stays = ~is_visual | keep.flatten()[slots.clamp_min(0)]

    outputs = _to_front(stays)
    count = torch.cat([stays.new_zeros(1, dtype=torch.long), stays.cumsum(0)])
    lengths = count[entry_starts + totals] - count[entry_starts]
    return (
        torch.empty_like(entries).index_copy_(0, outputs, torch.where(stays, rows, 0)),
        torch.empty_like(entries).index_copy_(0, outputs, torch.where(stays, slots, -1)),
        torch.where(stays, outputs, -1),
        torch.stack([lengths, own_lengths, entry_starts]),
        torch.empty_like(entries).index_copy_(0, _to_front(is_own), torch.where(is_own, outputs, 0)),
    )


def _to_front(chosen: Tensor) -> Tensor:
    """A place for every entry: the chosen ones in order from the first on, the others from the last on backwards.

    A permutation, unlike a bin for all that is dropped: no two entries write to one place.
    """
    return torch.where(chosen, chosen.cumsum(0) - 1, chosen.shape[0] - (~chosen).cumsum(0))
