"""Compaction in one launch, whatever the number of tensors: a table of addresses says where each of them lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE_BYTES = 512
"""A program moves this much of each of its rows: wide rows are shared between programs."""
ROWS = 8
WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}
VECTOR_BYTES = 16


def compact(contexts: Sequence[Tensor], branches: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """The registered operator's contract."""
    num_rows = rows.shape[0]
    # Outputs of an operator share no memory, hence an allocation each.
    outputs = [context.new_empty(num_rows, *context.shape[1:]) for context in contexts]
    lists = ([_dense_rows(x) for x in tensors] for tensors in (contexts, branches, outputs))
    triples = [triple for triple in zip(*lists, strict=True) if triple[0].shape[1]]
    if not num_rows or not triples:
        return outputs
    # Words as wide as every address, row and stride allows.
    word = alignment = VECTOR_BYTES
    for triple in triples:
        width = triple[0].shape[1] * triple[0].itemsize
        alignment = math.gcd(alignment, width, *(n for x in triple for n in (x.data_ptr(), x.stride(0) * x.itemsize)))
    word = min(alignment, max(WORDS))
    pieces = [piece for triple in triples for piece in _pieces(triple, word)]
    table = torch.tensor(pieces, pin_memory=rows.is_cuda).to(rows.device, non_blocking=True)
    rows = rows.contiguous()
    compact_kernel[(triton.cdiv(num_rows, ROWS), len(pieces))](
        table,
        rows,
        num_rows,
        contexts[0].shape[0],
        ROWS=ROWS,
        NUM_WORDS=PIECE_BYTES // word,
        WORD=WORDS[word],
        # How many words certainly begin together at a vector's address.
        VECTOR=alignment // word,
        num_warps=4,
    )
    return outputs


def _dense_rows(x: Tensor) -> Tensor:
    """As [T, elements] with rows that lie densely: a view when they do, else a copy."""
    x = x.view(-1, 1) if x.dim() == 1 and x.is_contiguous() else x[:, None].flatten(1)
    return x if x.stride(1) == 1 or x.shape[1] < 2 else x.contiguous()


def _pieces(triple: tuple[Tensor, Tensor, Tensor], word: int) -> list[list[int]]:
    """Table rows of one tensor: three addresses, three row strides and the width, in words."""
    context, branch, out = triple
    strides = [x.stride(0) * x.itemsize // word for x in triple]
    width = context.shape[1] * context.itemsize
    return [
        [
            *(x.data_ptr() + first for x in triple),
            *strides,
            min(width - first, PIECE_BYTES) // word,
        ]
        for first in range(0, width, PIECE_BYTES)
    ]


@triton.jit
def compact_kernel(
    table,
    rows,
    num_rows,
    num_context_rows,
    ROWS: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    WORD: tl.constexpr,
    VECTOR: tl.constexpr,
):
    piece = table + tl.program_id(1) * 7
    context = tl.multiple_of(tl.load(piece).to(tl.pointer_type(WORD)), 16 if VECTOR > 1 else 1)
    branch = tl.multiple_of(tl.load(piece + 1).to(tl.pointer_type(WORD)), 16 if VECTOR > 1 else 1)
    out = tl.multiple_of(tl.load(piece + 2).to(tl.pointer_type(WORD)), 16 if VECTOR > 1 else 1)
    context_stride = tl.multiple_of(tl.load(piece + 3), VECTOR)
    branch_stride = tl.multiple_of(tl.load(piece + 4), VECTOR)
    out_stride = tl.multiple_of(tl.load(piece + 5), VECTOR)
    width = tl.multiple_of(tl.load(piece + 6), VECTOR)

    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows + place, mask=place < num_rows, other=0)
    is_own = row >= num_context_rows
    own_row = branch + (row - num_context_rows) * branch_stride
    source = tl.where(is_own, own_row, context + row * context_stride)
    words = tl.arange(0, NUM_WORDS)
    inside = (place < num_rows)[:, None] & (words < width)[None, :]
    value = tl.load(source[:, None] + words[None, :], mask=inside)
    tl.store((out + place * out_stride)[:, None] + words[None, :], value, mask=inside)
