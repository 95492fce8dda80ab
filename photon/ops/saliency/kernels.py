"""Scores of visual tokens in three launches: what answers to each question token, the question as vectors, the scores.

Sums run in float32 and in an order that depends on no other program, so the same input gives the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from photon.ops.backend import is_interpreted
from photon.ops.saliency.reference import Places

BLOCK_QUESTION = 32
"""Question tokens of a tile: tiles of a usual question are spread over the processors of a GPU."""
BLOCK_COLUMNS = 32
"""Visual tokens of a program."""


@triton.jit
def centrality_kernel(
    q,
    k,
    answered,
    starts,
    lengths,
    q_row,
    q_head,
    q_dim,
    k_row,
    k_head,
    k_dim,
    longest,
    SHARE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WIDENED: tl.constexpr,
):
    """answered [B, H, longest]: sum over the other question tokens of relu(<q, k>), one tile of one head."""
    branch = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_DIM)
    start = tl.load(starts + branch)
    length = tl.load(lengths + branch).to(tl.int32)
    if tl.program_id(2) * BLOCK < length:
        in_head = dim < HEAD_DIM
        places = (start + token)[:, None] * q_row + head * q_head + dim[None, :] * q_dim
        queries = tl.load(q + places, mask=(token < length)[:, None] & in_head[None, :], other=0.0)
        if IS_WIDENED:
            queries = queries.to(tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, length, BLOCK):
            other = first + tl.arange(0, BLOCK)
            offsets = (start + other)[None, :] * k_row + (head // SHARE) * k_head + dim[:, None] * k_dim
            keys = tl.load(k + offsets, mask=(other < length)[None, :] & in_head[:, None], other=0.0)
            if IS_WIDENED:
                keys = keys.to(tl.float32)
            products = tl.dot(queries, keys, input_precision="ieee")
            is_counted = (token[:, None] != other[None, :]) & (other < length)[None, :]
            # Not a maximum: that would hide a NaN.
            total += tl.sum(tl.where((products < 0) | (is_counted == 0), 0.0, products), axis=1)
        place = (branch * tl.num_programs(1) + head).to(tl.int64) * longest
        tl.store(answered + place + token, total, mask=token < length)


@triton.jit
def question_kernel(
    q,
    answered,
    z,
    starts,
    lengths,
    q_row,
    q_head,
    q_dim,
    longest,
    scale,
    NUM_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """z [B, H, d]: queries of one head summed with the question's weights; ``scale`` is 1 / (H sqrt d)."""
    branch = tl.program_id(0)
    head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_DIM)
    heads = tl.arange(0, BLOCK_HEADS)
    start = tl.load(starts + branch)
    length = tl.load(lengths + branch).to(tl.int32)
    centrality = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK_DIM], tl.float32)
    for first in range(0, length, BLOCK):
        token = first + tl.arange(0, BLOCK)
        asked = token < length
        places = (branch * NUM_HEADS + heads).to(tl.int64)[:, None] * longest + token[None, :]
        parts = tl.load(answered + places, mask=(heads < NUM_HEADS)[:, None] & asked[None, :], other=0.0)
        weights = tl.sum(parts, axis=0) * scale
        centrality += weights
        offsets = (start + token)[:, None] * q_row + head * q_head + dim[None, :] * q_dim
        queries = tl.load(q + offsets, mask=asked[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
        weighted += tl.sum(weights[:, None] * queries.to(tl.float32), axis=0)
    total = tl.sum(centrality, axis=0)
    total = tl.where(total < 1.0, 1.0, total)
    tl.store(z + (branch * NUM_HEADS + head) * HEAD_DIM + dim, weighted / total * scale, mask=dim < HEAD_DIM)


@triton.jit
def score_kernel(
    z,
    keys,
    u,
    pair_branch,
    pair_starts,
    pair_lengths,
    key_row,
    key_head,
    key_dim,
    num_columns,
    NUM_KEY_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    BLOCK_SHARE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """u [S, N]: <z, key> summed over the key heads, for one block of visual tokens of one pair."""
    pair = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, BLOCK_DIM)
    shared = tl.arange(0, BLOCK_SHARE)
    branch = tl.load(pair_branch + pair)
    start = tl.load(pair_starts + pair)
    is_token = column < tl.load(pair_lengths + pair)
    in_head = dim < HEAD_DIM
    total = tl.zeros([BLOCK], tl.float32)
    for group in tl.static_range(NUM_KEY_HEADS):
        head = (branch * NUM_KEY_HEADS + group) * SHARE + shared
        parts = tl.load(
            z + head[:, None] * HEAD_DIM + dim[None, :], mask=(shared < SHARE)[:, None] & in_head[None, :], other=0.0
        )
        offsets = (start + column)[:, None] * key_row + group * key_head + dim[None, :] * key_dim
        block = tl.load(keys + offsets, mask=is_token[:, None] & in_head[None, :], other=0.0)
        total += tl.sum(block.to(tl.float32) * tl.sum(parts, axis=0)[None, :], axis=1)
    place = pair.to(tl.int64) * num_columns + column
    tl.store(u + place, tl.where(is_token, total, 0.0), mask=column < num_columns)


def saliency(q: Tensor, k: Tensor, keys: Tensor, places: Places, num_columns: int, longest_question: int) -> Tensor:
    """Launch the kernels; arguments and result of :func:`photon.ops.saliency.reference.saliency`."""
    own_starts, question_lengths, pair_branch, pair_starts, pair_lengths = places
    num_branches, num_pairs = own_starts.shape[0], pair_branch.shape[0]
    num_heads, head_dim, num_key_heads = q.shape[1], q.shape[2], k.shape[1]
    share = num_heads // num_key_heads
    u = torch.empty(num_pairs, num_columns, dtype=torch.float32, device=q.device)
    if not u.numel():
        return u
    answered = torch.empty(num_branches, num_heads, longest_question, dtype=torch.float32, device=q.device)
    z = torch.empty(num_branches, num_heads, head_dim, dtype=torch.float32, device=q.device)
    dims = {"HEAD_DIM": head_dim, "BLOCK_DIM": max(triton.next_power_of_2(head_dim), 16)}
    with torch.cuda.device_of(q):
        if longest_question:
            # Products of halves are exact in the tensor cores' float32; the interpreter has no such product.
            is_widened = q.dtype.itemsize > 2 or is_interpreted()
            centrality_kernel[(num_branches, num_heads, triton.cdiv(longest_question, BLOCK_QUESTION))](
                q, k, answered, own_starts, question_lengths, *q.stride(), *k.stride(), longest_question,
                SHARE=share, BLOCK=BLOCK_QUESTION, IS_WIDENED=is_widened, enable_fp_fusion=True, **dims,
            )  # fmt: skip
        question_kernel[(num_branches, num_heads)](
            q, answered, z, own_starts, question_lengths, *q.stride(), longest_question,
            1 / (num_heads * head_dim**0.5), NUM_HEADS=num_heads, BLOCK_HEADS=triton.next_power_of_2(num_heads),
            BLOCK=BLOCK_QUESTION, enable_fp_fusion=True, **dims,
        )  # fmt: skip
        score_kernel[(num_pairs, triton.cdiv(num_columns, BLOCK_COLUMNS))](
            z, keys, u, pair_branch, pair_starts, pair_lengths, *keys.stride(), num_columns,
            NUM_KEY_HEADS=num_key_heads, SHARE=share, BLOCK_SHARE=triton.next_power_of_2(share), BLOCK=BLOCK_COLUMNS,
            enable_fp_fusion=True, **dims,
        )  # fmt: skip
    return u
