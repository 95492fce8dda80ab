"""Scores of visual tokens in plain PyTorch.

Letters: B branches (questions), Q question tokens, H query heads, G key heads, d head width, T rows of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ROWS = 1024
"""Rows of half-precision keys in float32 at a time, on a CPU: they stay in its cache."""
OWN_BLOCK_ROWS = 256
"""Visual tokens that ask at a time, where a scan scores its own."""


class Places(NamedTuple):
    """Where questions and visual tokens lie: the tensors of a layout that saliency needs."""

    own_starts: Tensor
    question_lengths: Tensor
    pair_branch: Tensor
    pair_starts: Tensor
    pair_lengths: Tensor


def question_vector(q: Tensor, k: Tensor, valid: Tensor | None = None) -> Tensor:
    """What a question looks for, as one vector per key head.

    The score of a visual token is linear in the queries, `u_j = sum_g <z_g, k_jg>`, so the question tokens
    collapse to z once; no [Q, T] matrix is needed. Question tokens weigh by centrality: how strongly the others
    answer to them (non-negative scaled products, without themselves).

    Args:
        q: [B, Q, H, d] rotated queries of the question tokens.
        k: [B, Q, G, d] their rotated keys.
        valid: bool [B, Q] real question tokens, None where all are; a question may be empty.

    Returns:
        z: float32 [B, G, d], zero for an empty question.
    """
    num_heads, num_key_heads, head_dim = q.shape[2], k.shape[2], q.shape[3]
    share = num_heads // num_key_heads
    q, k = q.float().unflatten(2, (num_key_heads, share)), k.float()

    def real(x: Tensor) -> Tensor:
        """What lies behind a question may be NaN. Taken out of keys, sums and queries one by one that is cheaper than
        out of the products."""
        return x if valid is None else torch.where(valid.view(*valid.shape, *[1] * (x.ndim - 2)), x, 0.0)

    # [B, G, d, s * Q] with the heads s of a key head side by side: one product of matrices a key head.
    queries = q.permute(0, 2, 3, 1, 4).flatten(2, 3).transpose(2, 3)
    products = (real(k).transpose(1, 2) @ queries).unflatten(3, (share, q.shape[1]))
    others = 1.0 - torch.eye(q.shape[1], device=q.device)
    answered = (products.relu() * others[:, None]).sum((1, 2, 3))
    centrality = real(answered / (num_heads * head_dim**0.5))
    weights = centrality / centrality.sum(-1, keepdim=True).clamp_min(1.0)
    asked = real(q.sum(3).flatten(2))
    z = (weights[:, None] @ asked).squeeze(1).unflatten(1, (num_key_heads, head_dim))
    return z / (num_heads * head_dim**0.5)


@torch.no_grad()
def own_scores(q: Tensor, k: Tensor) -> Tensor:
    """Raw scores float32 [N] of a volume's visual tokens when the tokens themselves ask, instead of a question.

    The formula is that of :func:`question_vector` and :func:`scores`, for a question of N tokens. Their products are
    never there all at once: memory is a block's rows times N. Tokens with a number that is not finite ask nothing.

    Args:
        q: [N, H, d] rotated queries of the visual tokens; k: [N, G, d] their rotated keys.
    """
    num_tokens, num_heads, head_dim = q.shape
    num_key_heads = k.shape[1]
    keys = k.float()
    is_finite = q.isfinite().flatten(1).all(1) & keys.isfinite().flatten(1).all(1)
    asking, answering = (torch.where(is_finite[:, None, None], x.float(), 0.0) for x in (q, keys))
    asking = asking.unflatten(1, (num_key_heads, num_heads // num_key_heads))
    answered = []
    for start in range(0, num_tokens, OWN_BLOCK_ROWS):
        block = asking[start : start + OWN_BLOCK_ROWS]
        place = torch.arange(block.shape[0], device=q.device)
        sums = torch.zeros(block.shape[0], device=q.device)
        for head in range(num_key_heads):
            products = block[:, head].flatten(0, 1) @ answering[:, head].T
            products = products.relu_().unflatten(0, block.shape[:1] + block.shape[2:3])
            products[place, :, start + place] = 0.0  # a token does not answer itself
            sums += products.sum((1, 2))
        answered.append(sums)
    centrality = torch.cat(answered) / (num_heads * head_dim**0.5)
    weights = centrality / centrality.sum().clamp_min(1.0)
    z = (weights @ asking.sum(2).flatten(1)).unflatten(0, (num_key_heads, head_dim))
    return scores(z[None] / (num_heads * head_dim**0.5), k)[0]


def scores(z: Tensor, keys: Tensor) -> Tensor:
    """Raw scores float32 [B, T] of keys [T, G, d] for question vectors [B, G, d]; no copy of the keys per question."""
    columns = z.flatten(1).T
    # float32 needs no copy, a GPU no blocks, and a graph being traced may not know how many rows there will be.
    if keys.dtype == torch.float32 or keys.device.type != "cpu" or torch.compiler.is_compiling():
        return (keys.flatten(1).float() @ columns).T
    return torch.cat([rows.flatten(1).float() @ columns for rows in keys.split(BLOCK_ROWS)]).T


def saliency(q: Tensor, k: Tensor, keys: Tensor, places: Places, num_columns: int, longest_question: int) -> Tensor:
    """Raw scores float32 [S, N] of packed branches; see :func:`photon.ops.saliency.op.saliency`."""
    if q.is_cpu:
        return _by_ranges(q, k, keys, places, num_columns)
    return padded(q, k, keys, places, num_columns, longest_question)


def _by_ranges(q: Tensor, k: Tensor, keys: Tensor, places: Places, num_columns: int) -> Tensor:
    """Question after question and volume after volume: nothing is padded, and nothing read for another scan."""
    own_starts, question_lengths, pair_branch, pair_starts, pair_lengths = (x.tolist() for x in places)
    u = q.new_zeros(len(pair_branch), num_columns, dtype=torch.float32)
    questions = [slice(start, start + length) for start, length in zip(own_starts, question_lengths, strict=True)]
    z = [question_vector(q[None, rows], k[None, rows]) for rows in questions]
    pairs: dict[tuple[int, int], list[int]] = {}
    for pair, volume in enumerate(zip(pair_starts, pair_lengths, strict=True)):
        pairs.setdefault(volume, []).append(pair)
    for (start, length), together in pairs.items():
        found = scores(torch.cat([z[pair_branch[pair]] for pair in together]), keys[start : start + length])
        for pair, row in zip(together, found, strict=True):
            u[pair, :length] = row
    return u


def padded(q: Tensor, k: Tensor, keys: Tensor, places: Places, num_columns: int, longest_question: int) -> Tensor:
    """The same without a look at where ranges are, for which the host would wait for a GPU."""
    own_starts, question_lengths, pair_branch, pair_starts, pair_lengths = places
    # A masked NaN of another branch would still be NaN times zero: padding repeats a row of the question itself.
    rows, asked = _ranges(own_starts, question_lengths, longest_question, q.shape[0])
    questions, answers = (x.index_select(0, rows.flatten()).unflatten(0, rows.shape) for x in (q, k))
    z = question_vector(questions, answers, asked)
    columns, valid = _ranges(pair_starts, pair_lengths, num_columns, keys.shape[0])
    return torch.where(valid, scores(z, keys)[pair_branch[:, None], columns], 0.0)


def _ranges(starts: Tensor, lengths: Tensor, width: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """Rows [.., width] of ranges, filled up with their last row, and which entries are real."""
    place = torch.arange(width, device=starts.device)
    inside = torch.minimum(place, (lengths[:, None] - 1).clamp_min(0))
    # An empty range may start behind the last row.
    return (starts[:, None] + inside).clamp_max(max(num_rows - 1, 0)), place < lengths[:, None]
