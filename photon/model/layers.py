"""Parts shared by the vision tower and the decoder: normalisation, gated MLP, rotary rotation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU feed-forward: down(silu(gate(x)) * up(x))."""

    def __init__(self, width: int, inner: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of rows, [T, 1, d] each."""


def rotary_table(angles: Tensor) -> Rotary:
    """Cosine and sine [T, 1, d] for angles [T, d/2]; dimensions i and i + d/2 rotate together."""
    doubled = torch.cat([angles, angles], dim=-1).unsqueeze(-2)
    return doubled.cos(), doubled.sin()


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """Apply a rotary table to [T, heads, d], in float32, returning the input's dtype."""
    cos, sin = table
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def maybe_checkpoint(module: nn.Module, *arguments: Any, is_on: bool) -> Any:
    """Call a module; with ``is_on`` keep only its inputs and compute the rest again in the backward pass."""
    if is_on and torch.is_grad_enabled():
        return checkpoint(module, *arguments, use_reentrant=False)
    return module(*arguments)
