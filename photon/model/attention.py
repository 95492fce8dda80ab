"""Attention over packed rows: no padding tokens in the model, any mix of lengths in a batch.

A layout says which key rows each segment of query rows may see. Layers do not know which one they are given:

* :class:`RaggedAttention` - segments of any length; each sees one or two ranges of key rows, causally or not.
* :class:`BlockAttention` - blocks of equal length under an explicit mask; decoding, and the form that exports to ONNX.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Attention(Protocol):
    """Maps rotated queries [Tq, H, d] and keys, values [Tk, G, d] to outputs [Tq, H, d]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def starts_of(lengths: Tensor) -> Tensor:
    """First row of each segment when segments of these lengths lie one after another."""
    return lengths.cumsum(0) - lengths


def padded_rows(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Row indices [S, Lmax] of segments, and which of them are real; the others point at row 0."""
    span = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=lengths.device)
    valid = span < lengths[:, None]
    return torch.where(valid, starts[:, None] + span, 0), valid


@dataclass(frozen=True)
class RaggedAttention:
    """Segments of query rows over ranges of key rows, exact for any lengths.

    Inside the attention call alone, segments are laid side by side in a padded block; the padding carries no
    token and reaches no output.

    Attributes:
        q_rows, q_valid: [S, Lq] query rows of each segment and which entries are real.
        k_rows, k_valid: [S, Lk] the same for key rows.
        mask: bool [S, 1, Lq, Lk], True where a query may look; None when every entry may.
        out_rows: positions of the real entries of q_rows, flattened, in packed order.
    """

    q_rows: Tensor
    k_rows: Tensor
    mask: Tensor | None
    out_rows: Tensor

    @classmethod
    def build(
        cls,
        q_lengths: Tensor,
        *,
        k_starts: Tensor,
        k_lengths: Tensor,
        shared_starts: Tensor | None = None,
        shared_lengths: Tensor | None = None,
        is_causal: bool,
    ) -> RaggedAttention:
        """Describe segments whose query rows lie one after another.

        Args:
            q_lengths: [S] query rows of each segment.
            k_starts, k_lengths: [S] the segment's own range of key rows.
            shared_starts, shared_lengths: [S] an optional range of key rows before it (a shared scan prefix).
            is_causal: whether the last query sees every key, the one before it one key less, and so on.
        """
        q_rows, q_valid = padded_rows(starts_of(q_lengths), q_lengths)
        if shared_starts is None or shared_lengths is None:
            shared_starts = shared_lengths = torch.zeros_like(k_starts)
        total = shared_lengths + k_lengths
        span = torch.arange(int(total.max()), device=total.device)
        in_shared = span < shared_lengths[:, None]
        k_valid = span < total[:, None]
        own = k_starts[:, None] + span - shared_lengths[:, None]
        k_rows = torch.where(k_valid, torch.where(in_shared, shared_starts[:, None] + span, own), 0)

        is_uniform = bool(q_valid.all()) and bool(k_valid.all())
        mask = None
        if is_causal or not is_uniform:
            mask = k_valid[:, None, :].expand(-1, q_rows.shape[1], -1)
            if is_causal:
                last = torch.arange(q_rows.shape[1], device=total.device) + (total - q_lengths)[:, None]
                mask = mask & (span <= last[:, :, None])
            # A padded query may look at everything: its output is discarded, and a softmax over nothing is NaN.
            mask = (mask | ~q_valid[:, :, None])[:, None]
        return cls(q_rows, k_rows, mask, q_valid.flatten().nonzero().flatten())

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q_block = q[self.q_rows].transpose(1, 2)
        k_block = k[self.k_rows].transpose(1, 2)
        v_block = v[self.k_rows].transpose(1, 2)
        is_grouped = k.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q_block, k_block, v_block, self.mask, enable_gqa=is_grouped)
        return out.transpose(1, 2).flatten(0, 1)[self.out_rows]


@dataclass(frozen=True)
class BlockAttention:
    """Blocks of equally many rows under one explicit mask, with key rows computed earlier put in front.

    Attributes:
        mask: bool [B, Lq, Lp + Lq], True where a query may look.
        past_k, past_v: [B, Lp, G, d] keys and values of earlier rows, or None.
    """

    mask: Tensor
    past_k: Tensor | None = None
    past_v: Tensor | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape = (self.mask.shape[0], self.mask.shape[1])
        share = q.shape[1] // k.shape[1]
        q, k, v = q.unflatten(0, shape), k.unflatten(0, shape), v.unflatten(0, shape)
        if self.past_k is not None and self.past_v is not None:
            k, v = torch.cat([self.past_k, k], dim=1), torch.cat([self.past_v, v], dim=1)
        # Heads are repeated by hand: the grouped form of the call has no ONNX counterpart.
        k, v = k.repeat_interleave(share, dim=2), v.repeat_interleave(share, dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:, None])
        return out.transpose(1, 2).flatten(0, 1)
