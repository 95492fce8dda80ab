"""The backward of packing in two launches: a program per source row, then a program per volume and question.

A row's gradients meet in the program that owns the row, in the order of its branches: nothing is added by atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon.ops.backend import is_interpreted
from photon.ops.surrogate import reference
from photon.ops.surrogate.reference import Places

TILE = 16
"""Branches whose output rows are looked up together."""
COLUMNS = 4096
"""Visual tokens of a row of the table that are looked at together."""
SIGMA_FLOOR = tl.constexpr(reference.SIGMA_FLOOR)
STANDARDISED_LIMIT = tl.constexpr(reference.STANDARDISED_LIMIT)
MAGNITUDE_FLOOR = tl.constexpr(reference.MAGNITUDE_FLOOR)
SMALLEST_SHARE = tl.constexpr(reference.MAGNITUDE_RANGE[0])
LARGEST_SHARE = tl.constexpr(reference.MAGNITUDE_RANGE[1])
SLOPE_FLOOR = tl.constexpr(reference.SLOPE_FLOOR)
GAIN = tl.constexpr(reference.GAIN)
ALL = tl.constexpr(tl.PropagateNan.ALL)


def pack_backward(
    grad: Tensor, context: Tensor, branch: Tensor, p: Tensor | None, places: Places, rule: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operator's contract."""
    grad, context = _dense_rows(grad), _dense_rows(context)
    # Triton's interpreter cuts off digits where a GPU rounds to bfloat16: there PyTorch does it.
    dtype = torch.float32 if is_interpreted() and grad.dtype == torch.bfloat16 else grad.dtype
    grad_context, grad_branch = grad.new_empty(context.shape, dtype=dtype), grad.new_empty(branch.shape)
    shape = (0, 0) if p is None else p.shape
    alignment, magnitude, grad_p = (grad.new_empty(shape, dtype=torch.float32) for _ in range(3))
    num_rows, width = context.shape[0] + branch.shape[0], grad.shape[1]
    block = triton.next_power_of_2(width)
    with torch.cuda.device_of(grad):
        if num_rows:
            rows_kernel[(num_rows,)](
                grad,
                context,
                places.positions,
                places.branch_rows,
                places.entry_starts,
                places.context_starts,
                places.first_pairs,
                places.context_slots,
                places.row_context,
                places.branch_bounds,
                places.branches,
                grad_context,
                grad_branch,
                alignment,
                magnitude,
                grad.stride(0),
                context.stride(0),
                context.shape[0],
                width,
                shape[1],
                WITH_P=p is not None,
                EXACT=tl.float64 if grad.dtype == torch.float64 else tl.float32,
                TILE=TILE,
                BLOCK=block,
                num_warps=min(max(block // 512, 1), 16),
            )
        if p is not None and p.numel():
            p = _dense_rows(p)
            block = min(triton.next_power_of_2(p.shape[1]), COLUMNS)
            probability_kernel[(p.shape[0],)](
                alignment,
                magnitude,
                p,
                places.pair_lengths,
                grad_p,
                p.stride(0),
                p.shape[1],
                IS_PAPER=rule == "paper",
                BLOCK=block,
                num_warps=min(max(block // 256, 1), 16),
                enable_fp_fusion=False,
            )
    return grad_context.to(grad.dtype), grad_branch, grad_p


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit(do_not_specialize=["num_context_rows", "num_columns"])
def rows_kernel(
    grad,
    context,
    positions,
    branch_rows,
    entry_starts,
    context_starts,
    first_pairs,
    context_slots,
    row_context,
    branch_bounds,
    branches,
    grad_context,
    grad_branch,
    alignment,
    magnitude,
    grad_stride,
    context_stride,
    num_context_rows,
    width,
    num_columns,
    WITH_P: tl.constexpr,
    EXACT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    if row >= num_context_rows:
        # A branch's own row is in its branch alone, and always stays.
        own = row - num_context_rows
        output = tl.load(branch_rows + own)
        g = tl.load(grad + output * grad_stride + columns, mask=inside)
        tl.store(grad_branch + own * width + columns, g, mask=inside)
    else:
        owner = tl.load(row_context + row)
        first, end = tl.load(branch_bounds + owner), tl.load(branch_bounds + owner + 1)
        slot = tl.load(context_slots + row)
        members = tl.arange(0, TILE)
        total = tl.zeros([BLOCK], EXACT)
        for start in range(first, end, TILE):
            is_member = start + members < end
            branch = tl.load(branches + start + members, mask=is_member, other=0)
            entry = tl.load(entry_starts + branch) + row - tl.load(context_starts + branch)
            outputs = tl.load(positions + entry, mask=is_member, other=-1)
            if WITH_P:
                # Rows that nobody took, and rows of text, are not read.
                wanted = tl.max(tl.where(slot >= 0, outputs, -1), 0)
                num_read = tl.where(wanted >= 0, width, 0)
                x = tl.load(context + row * context_stride + columns, mask=columns < num_read, other=0.0)
                x = x.to(tl.float32)
                alignments = tl.zeros([TILE], tl.float32)
                magnitudes = tl.zeros([TILE], tl.float32)
            for member in range(0, tl.minimum(end - start, TILE)):
                output = tl.sum(tl.where(members == member, outputs, 0), 0)
                if output >= 0:
                    g = tl.load(grad + output * grad_stride + columns, mask=inside, other=0.0)
                    total += g.to(EXACT)
                    if WITH_P:
                        product = x * g.to(tl.float32)
                        alignments = tl.where(members == member, tl.sum(product, 0), alignments)
                        magnitudes = tl.where(members == member, tl.sum(tl.abs(product), 0), magnitudes)
            if WITH_P:
                place = tl.load(first_pairs + branch) * num_columns + slot
                num_written = tl.where(slot >= 0, end - start, 0)
                tl.store(alignment + place, alignments, mask=members < num_written)
                tl.store(magnitude + place, magnitudes, mask=members < num_written)
        tl.store(grad_context + row * width + columns, total, mask=inside)


@triton.jit
def probability_kernel(
    alignment, magnitude, p, pair_lengths, grad_p, p_stride, num_columns, IS_PAPER: tl.constexpr, BLOCK: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64)
    alignment += pair * num_columns
    magnitude += pair * num_columns
    length = tl.load(pair_lengths + pair)
    count = tl.maximum(length, 1).to(tl.float32)
    sign = 1.0 if IS_PAPER else -1.0
    columns = tl.arange(0, BLOCK)

    sums = tl.zeros([BLOCK], tl.float32)
    magnitudes = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        inside = start + columns < length
        sums += tl.load(alignment + start + columns, mask=inside, other=0.0)
        magnitudes += tl.load(magnitude + start + columns, mask=inside, other=0.0)
    mean = sign * tl.sum(sums, 0) / count
    mean_magnitude = tl.maximum(tl.sum(magnitudes, 0) / count, MAGNITUDE_FLOOR, propagate_nan=ALL)

    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        inside = start + columns < length
        centred = sign * tl.load(alignment + start + columns, mask=inside, other=0.0) - mean
        sums += tl.where(inside, centred * centred, 0.0)
    sigma = tl.maximum(tl.sqrt_rn(tl.sum(sums, 0) / count), SIGMA_FLOOR, propagate_nan=ALL)

    mean_direction = 0.0
    if IS_PAPER:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, length, BLOCK):
            inside = start + columns < length
            a = tl.load(alignment + start + columns, mask=inside, other=0.0)
            sums += tl.where(inside, direction_of((a - mean) / sigma), 0.0)
        mean_direction = tl.sum(sums, 0) / count

    for start in range(0, num_columns, BLOCK):
        inside = start + columns < length
        a = tl.load(alignment + start + columns, mask=inside, other=0.0)
        m = tl.load(magnitude + start + columns, mask=inside, other=0.0)
        q = tl.load(p + pair * p_stride + start + columns, mask=inside, other=0.0)
        direction = direction_of((sign * a - mean) / sigma) - mean_direction
        share = tl.clamp(m / mean_magnitude, SMALLEST_SHARE, LARGEST_SHARE, propagate_nan=ALL)
        slope = tl.maximum(q * (1 - q), SLOPE_FLOOR, propagate_nan=ALL)
        value = tl.where(inside, GAIN * direction * share * slope, 0.0)
        tl.store(grad_p + pair * num_columns + start + columns, value, mask=start + columns < num_columns)


@triton.jit
def direction_of(standardised):
    """0.5 - r, from a standardised alignment."""
    z = tl.clamp(standardised, -STANDARDISED_LIMIT, STANDARDISED_LIMIT, propagate_nan=ALL)
    # tanh, of an argument too small to overflow.
    tanh = 1 - 2 / (tl.exp(2 * z) + 1)
    return 0.5 - (0.5 + 0.5 * tanh)
