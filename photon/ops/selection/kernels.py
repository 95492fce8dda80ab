"""Selection in one launch: each program places a chunk of one branch's entries.

What a program needs to know of the others, how many visual tokens were dropped before its chunk, it counts itself in
the table of keep flags: a byte a token, against another launch for handing counts on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon.ops.selection.reference import Buffers, Places

CHUNK = 1024
COUNTED = 4096
"""Entries that a program places; flags that it counts at once."""


def select_rows(keep: Tensor | None, places: Places, num_entries: int) -> Buffers:
    """The registered operator's contract."""
    own_starts, num_branches = places.own_starts, places.own_starts.shape[0]
    rows, slots, positions, branch_rows = (own_starts.new_empty(num_entries) for _ in range(4))
    table = own_starts.new_empty(3, num_branches)
    if not num_branches:
        return rows, slots, positions, table, branch_rows
    # Without flags nothing counts as visual: a table without columns has no slots.
    flags = torch.empty(0, 0, dtype=torch.bool, device=rows.device) if keep is None else keep.contiguous()
    columns = min(triton.next_power_of_2(max(flags.shape[1], 1)), COUNTED)
    with torch.cuda.device_of(rows):
        select_kernel[(triton.cdiv(num_entries, CHUNK) + num_branches,)](
            flags.view(torch.uint8), *places, rows, slots, positions, table, branch_rows,
            places.context_slots.shape[0], num_entries, num_branches, *flags.shape,
            BRANCHES=triton.next_power_of_2(num_branches), CHUNK=CHUNK, PAIRS=COUNTED // columns, COLUMNS=columns,
            num_warps=8,
        )  # fmt: skip
    return rows, slots, positions, table, branch_rows


# The sizes of a batch are no reason to build the kernel again.
@triton.jit(do_not_specialize=["num_context_rows", "num_entries", "num_branches", "num_pairs", "num_columns"])
def select_kernel(
    keep,
    context_starts,
    context_lengths,
    own_starts,
    own_lengths,
    first_pairs,
    pair_starts,
    pair_lengths,
    context_slots,
    rows,
    slots,
    positions,
    table,
    branch_rows,
    num_context_rows,
    num_entries,
    num_branches,
    num_pairs,
    num_columns,
    BRANCHES: tl.constexpr,
    CHUNK: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Every branch has as many programs as chunks, at least one; those left over find no branch.
    program = tl.program_id(0)
    numbers = tl.arange(0, BRANCHES)
    all_context = tl.load(context_lengths + numbers, mask=numbers < num_branches, other=0).to(tl.int32)
    all_own = tl.load(own_lengths + numbers, mask=numbers < num_branches, other=0).to(tl.int32)
    num_chunks = tl.where(numbers < num_branches, tl.maximum(tl.cdiv(all_context + all_own, CHUNK), 1), 0)
    ends = tl.cumsum(num_chunks, 0)
    branch = tl.sum((ends <= program).to(tl.int32), 0)
    if branch < num_branches:
        is_this, is_earlier = numbers == branch, numbers < branch
        context_length = tl.sum(tl.where(is_this, all_context, 0), 0)
        own_length = tl.sum(tl.where(is_this, all_own, 0), 0)
        context_before = tl.sum(tl.where(is_earlier, all_context, 0), 0)
        own_before = tl.sum(tl.where(is_earlier, all_own, 0), 0)
        last_chunk = tl.sum(tl.where(is_this, num_chunks, 0), 0) - 1
        chunk = program - tl.sum(tl.where(is_earlier, num_chunks, 0), 0)
        first_entry = context_before + own_before
        context_start = tl.load(context_starts + branch).to(tl.int32)
        own_start = tl.load(own_starts + branch).to(tl.int32)
        first_pair = tl.load(first_pairs + branch).to(tl.int32)
        pair_end = tl.load(first_pairs + branch + 1, mask=branch + 1 < num_branches, other=num_pairs).to(tl.int32)

        # Dropped tokens of earlier branches, and of this one in earlier chunks.
        earlier = tl.zeros([PAIRS, COLUMNS], tl.int32)
        this = tl.zeros([PAIRS, COLUMNS], tl.int32)
        for start in range(0, pair_end, PAIRS):
            pair = start + tl.arange(0, PAIRS)
            length = tl.load(pair_lengths + pair, mask=pair < pair_end, other=0).to(tl.int32)
            place = tl.load(pair_starts + pair, mask=pair < pair_end, other=0).to(tl.int32) - context_start
            seen = tl.where(pair < first_pair, length, tl.minimum(length, chunk * CHUNK - place))
            for column in range(0, num_columns, COLUMNS):
                columns = column + tl.arange(0, COLUMNS)
                is_seen = columns[None, :] < seen[:, None]
                flag = tl.load(keep + pair[:, None] * num_columns + columns[None, :], mask=is_seen, other=1)
                is_dropped = (flag == 0).to(tl.int32)
                earlier += tl.where(pair[:, None] < first_pair, is_dropped, 0)
                this += tl.where(pair[:, None] < first_pair, 0, is_dropped)
        dropped_earlier = tl.sum(tl.sum(earlier, 1), 0)
        dropped_this = tl.sum(tl.sum(this, 1), 0)

        place = chunk * CHUNK + tl.arange(0, CHUNK)
        inside, is_own = place < context_length + own_length, place >= context_length
        within = tl.load(context_slots + context_start + place, mask=inside & (place < context_length), other=-1)
        slot = tl.where((within >= 0) & (num_columns > 0), first_pair * num_columns + within, -1)
        is_dropped = tl.load(keep + slot, mask=slot >= 0, other=1) == 0
        num_dropped = dropped_earlier + dropped_this + tl.cumsum(is_dropped.to(tl.int32), 0)
        entry = first_entry + place
        output = entry - num_dropped
        # Dropped entries fill the buffers from the end, so that every place is written once.
        target = tl.where(is_dropped, num_entries - num_dropped, output)
        row = tl.where(is_own, num_context_rows + own_start + place - context_length, context_start + place)
        tl.store(rows + target, tl.where(is_dropped, 0, row), mask=inside)
        tl.store(slots + target, tl.where(is_dropped, -1, slot), mask=inside)
        tl.store(positions + entry, tl.where(is_dropped, -1, output), mask=inside)
        own_target = tl.where(is_own, own_start + place - context_length, num_entries - 1 - context_before - place)
        tl.store(branch_rows + own_target, tl.where(is_own, output, 0), mask=inside)
        if chunk == last_chunk:
            dropped = dropped_this + tl.sum(is_dropped.to(tl.int32), 0)
            tl.store(table + branch, context_length + own_length - dropped)
            tl.store(table + num_branches + branch, own_length)
            tl.store(table + 2 * num_branches + branch, first_entry)
