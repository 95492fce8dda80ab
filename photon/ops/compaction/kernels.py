"""Compaction in one launch, whatever the number of tensors: a table of addresses says where each of them lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon.device import column

ROWS = 8
PIECE_BYTES = 512
"""A program moves this much of each of so many rows: wide rows are shared between programs."""
WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
VECTOR_BYTES = 16


def compact(contexts: Sequence[Tensor], branches: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """The registered operator's contract."""
    num_rows = rows.shape[0]
    # Outputs of an operator share no memory, hence an allocation each.
    outputs = [context.new_empty(num_rows, *context.shape[1:]) for context in contexts]
    contexts, branches = [_dense_rows(x) for x in contexts], [_dense_rows(x) for x in branches]
    # A line for each piece of a row: three addresses, three distances of rows and the piece's width, in bytes.
    pieces: list[int] = []
    alignment = VECTOR_BYTES
    for context, branch, out in zip(contexts, branches, outputs, strict=True):
        if not out.numel():
            continue
        size = out.itemsize
        strides = context.stride(0) * size, branch.stride(0) * size, out.stride(0) * size
        addresses = context.data_ptr(), branch.data_ptr(), out.data_ptr()
        alignment = math.gcd(alignment, *strides, *addresses)
        width = strides[2]
        for first in range(0, width, PIECE_BYTES):
            pieces += [*(address + first for address in addresses), *strides, min(width - first, PIECE_BYTES)]
    if not pieces:
        return outputs
    # Words, and what a thread takes at once, are as wide as every address and every distance allows.
    word = min(alignment, max(WORDS))
    with torch.cuda.device_of(rows):
        compact_kernel[(triton.cdiv(num_rows, ROWS), len(pieces) // 7)](
            column(pieces, rows.device),
            rows.contiguous(),
            num_rows,
            contexts[0].shape[0],
            ROWS=ROWS,
            NUM_WORDS=PIECE_BYTES // word,
            WORD=WORDS[word],
            WORD_BYTES=word,
            ALIGNMENT=alignment,
            num_warps=4,
        )
    return outputs


def _dense_rows(x: Tensor) -> Tensor:
    """The tensor itself when each of its rows lies densely, else a copy."""
    return x if x.is_contiguous() or x[0].is_contiguous() else x.contiguous()


@triton.jit(do_not_specialize=["num_rows", "num_context_rows"])
def compact_kernel(
    pieces,
    rows,
    num_rows,
    num_context_rows,
    ROWS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WORD: tl.constexpr,
    WORD_BYTES: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    VECTOR: tl.constexpr = ALIGNMENT // WORD_BYTES
    piece = pieces + tl.program_id(1) * 7
    context = tl.multiple_of(tl.load(piece).to(tl.pointer_type(WORD)), ALIGNMENT)
    branch = tl.multiple_of(tl.load(piece + 1).to(tl.pointer_type(WORD)), ALIGNMENT)
    out = tl.multiple_of(tl.load(piece + 2).to(tl.pointer_type(WORD)), ALIGNMENT)
    context_stride = tl.multiple_of(tl.load(piece + 3) // WORD_BYTES, VECTOR)
    branch_stride = tl.multiple_of(tl.load(piece + 4) // WORD_BYTES, VECTOR)
    out_stride = tl.multiple_of(tl.load(piece + 5) // WORD_BYTES, VECTOR)
    width = tl.multiple_of(tl.load(piece + 6) // WORD_BYTES, VECTOR)

    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + place, mask=place < num_rows, other=0)
    is_own = row >= num_context_rows
    own_row = branch + (row - num_context_rows) * branch_stride
    # Both are at a vector's address, which the compiler does not see through the choice.
    source = tl.multiple_of(tl.where(is_own, own_row, context + row * context_stride), ALIGNMENT)
    words = tl.arange(0, NUM_WORDS)
    inside = (place < num_rows)[:, None] & (words < width)[None, :]
    value = tl.load(source[:, None] + words[None, :], mask=inside)
    tl.store((out + place * out_stride)[:, None] + words[None, :], value, mask=inside)
