"""The pruning step written straight from its formulas, for `bench_ops.py` to compare with.

It is built as the public implementation is: a matrix of scores for every head over keys repeated to all heads in
float32; a batch axis; rows moved by adding all of them, the dropped ones times zero, into a buffer of zeros.

That form matters on a CPU: without the batch axis and float32 on the way, PyTorch adds 7090 bfloat16 rows of 2048 in
about 8 ms instead of 68, and compaction would be that much less ahead of it.

Letters: Q question tokens, H query heads, G key heads, d head width, N visual tokens, L rows before pruning, R after.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def scores(q: Tensor, k: Tensor, keys: Tensor) -> Tensor:
    """Scores of keys [N, G, d] for one question, queries [Q, H, d] and keys [Q, G, d]: [N], in float32 or wider."""
    exact = torch.promote_types(q.dtype, torch.float32)
    num_heads, head_dim = q.shape[1:]
    repeats = num_heads // k.shape[1]
    queries = q.transpose(0, 1).to(exact)  # [H, Q, d]
    own = k.repeat_interleave(repeats, dim=1).transpose(0, 1).to(exact)
    visual = keys.repeat_interleave(repeats, dim=1).transpose(0, 1).to(exact)  # [H, N, d]
    answered = (queries @ own.transpose(1, 2) / head_dim**0.5).relu()
    answered = answered * (1 - torch.eye(q.shape[0], dtype=exact, device=q.device))
    centrality = answered.sum(-1).mean(0)
    weights = centrality / centrality.sum().clamp_min(1.0)
    logits = queries @ visual.transpose(1, 2) / head_dim**0.5  # [H, Q, N]
    return (weights[:, None] * logits).sum(1).mean(0)


def pack(x: Tensor, stays: Tensor) -> Tensor:
    """Rows [R, D] of x [L, D] that stay, with the gradient that autograd finds."""
    stays, x = stays[None], x[None]
    places = torch.where(stays, stays.cumsum(1) - 1, 0)
    num_rows = int(stays.sum(1).max())
    buffer = x.new_zeros(1, num_rows, x.shape[2])
    return buffer.scatter_add(1, places[..., None].expand(-1, -1, x.shape[2]), x * stays[..., None])[0]


@torch.no_grad()
def compact(sources: list[Tensor], stays: Tensor) -> list[Tensor]:
    """Rows [R, ...] that stay of sources [L, ...], one after the other, each in float32 on the way."""
    return [pack(x.flatten(1).float(), stays).to(x.dtype).unflatten(1, x.shape[1:]) for x in sources]


@torch.no_grad()
def probability_gradient(x: Tensor, grad: Tensor, p: Tensor, keep: Tensor, rows: Tensor) -> Tensor:
    """The "taylor" rule for the tokens [N] of one volume, in float32 or wider.

    Args:
        x: [N, D] rows of the visual tokens. grad: [R, D] gradient of the packed rows.
        p, keep: [N]. rows: [N] packed row of each token, any for a dropped one.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    products = x.to(exact) * (grad.to(exact)[rows] * keep[:, None])
    harm, magnitude = -products.sum(-1), products.abs().sum(-1)
    z = ((harm - harm.mean()) / harm.std(correction=0).clamp_min(3e-3)).clamp(-1.5, 1.5)
    direction = 0.5 - (0.5 + 0.5 * torch.tanh(z))
    share = (magnitude / magnitude.mean().clamp_min(1e-6)).clamp(0.5, 2.0)
    return 0.8 * direction * share * (p * (1 - p)).clamp_min(5e-3)
