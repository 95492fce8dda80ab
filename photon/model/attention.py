"""Attention over packed rows: no padding tokens in the model, any mix of lengths in a batch.

A layout says which key rows each segment of query rows may see. Layers do not know which one they are given:

* :class:`RaggedAttention` - segments of any length; each sees one or two ranges of key rows, causally or not.
* :class:`BlockAttention` - blocks of equal length under an explicit mask; decoding, and the form that exports to ONNX.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from photon.device import column, to_device

MAX_MASK_ENTRIES = 2**24
"""Segments that need a mask are laid side by side up to this many entries; longer ones stand alone."""
SIMILAR = 1.25
"""Segments share a block when the longest is at most this many times the shortest."""
FUSED_DTYPES = (torch.bfloat16, torch.float16)


class Attention(Protocol):
    """Maps rotated queries [Tq, H, d] and keys, values [Tk, G, d] to outputs [Tq, H, d]."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def starts_of(lengths: Sequence[int]) -> list[int]:
    """First row of each segment when segments of these lengths lie one after another."""
    return [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]


def padded_rows(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row indices [S, Lmax] of segments, and which of them are real.

    The others repeat a segment's first row (row 0 for an empty segment): a masked number still meets a weight of
    zero, and zero times another segment's NaN would be NaN.
    """
    length = column(lengths, device)[:, None]
    first = column([start if length else 0 for start, length in zip(starts, lengths, strict=True)], device)[:, None]
    span = torch.arange(max(lengths, default=0), device=device)
    valid = span < length
    return torch.where(valid, first + span, first), valid


@dataclass(frozen=True)
class Segment:
    """A range of query rows and the ranges of key rows it may see: the shared one, then its own."""

    q_start: int
    q_length: int
    shared_start: int
    shared_length: int
    k_start: int
    k_length: int

    @property
    def num_keys(self) -> int:
        """Key rows in sight."""
        return self.shared_length + self.k_length

    @property
    def shape(self) -> tuple[int, int]:
        """Keys and queries."""
        return self.num_keys, self.q_length

    @property
    def is_square(self) -> bool:
        """Whether there are as many keys as queries."""
        return self.num_keys == self.q_length

    def key_rows(self) -> Tensor:
        """Key rows in the order in which they are seen: int64 [num_keys]."""
        shared = torch.arange(self.shared_start, self.shared_start + self.shared_length)
        return torch.cat([shared, torch.arange(self.k_start, self.k_start + self.k_length)])


class RaggedAttention:
    """Segments of query rows over ranges of key rows, exact for any lengths.

    In half precision on CUDA this is PyTorch's variable-length fused kernel. Elsewhere segments of similar length lie
    side by side in a block; its padding carries no token and reaches no output.
    """

    def __init__(self, segments: Sequence[Segment], device: torch.device, *, is_causal: bool) -> None:
        self.segments = [segment for segment in segments if segment.q_length]
        self.device, self.is_causal = device, is_causal

    @classmethod
    def build(
        cls,
        q_lengths: Sequence[int],
        *,
        k_starts: Sequence[int] | None = None,
        k_lengths: Sequence[int] | None = None,
        shared_starts: Sequence[int] | None = None,
        shared_lengths: Sequence[int] | None = None,
        device: torch.device,
        is_causal: bool,
    ) -> RaggedAttention:
        """Describe segments whose query rows lie one after another.

        Args:
            q_lengths: query rows of each segment.
            k_starts, k_lengths: the segment's own range of key rows; None when it is the range of its query rows.
            shared_starts, shared_lengths: an optional range of key rows before it (a shared scan prefix).
            is_causal: whether the last query sees every key, the one before it one key less, and so on.
        """
        q_starts, none = starts_of(q_lengths), [0] * len(q_lengths)
        columns = (
            *(q_starts, q_lengths, shared_starts or none, shared_lengths or none),
            *(q_starts if k_starts is None else k_starts, q_lengths if k_lengths is None else k_lengths),
        )
        return cls([Segment(*row) for row in zip(*columns, strict=True)], device, is_causal=is_causal)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not self.segments:
            return torch.zeros_like(q)
        if q.is_cuda and q.dtype in FUSED_DTYPES and torch.cuda.get_device_capability(q.device) >= (8, 0):
            return self._fused.attend(q, k, v, is_causal=self.is_causal)
        blocks, order = self._blocks
        out = torch.cat([block.attend(q, k, v) for block in blocks])
        return out if order is None else out[order]

    @functools.cached_property
    def _fused(self) -> _Varlen:
        return _Varlen.build(self.segments, self.device)

    @functools.cached_property
    def _blocks(self) -> tuple[list[_Block], Tensor | None]:
        """Blocks, and the places of the packed rows in their concatenated outputs (None when in order)."""
        groups = list(_similar(self.segments, is_causal=self.is_causal))
        blocks = [_Block.build(group, self.device, is_causal=self.is_causal) for group in groups]
        if [segment for group in groups for segment in group] == self.segments:
            return blocks, None
        rows = torch.cat([block.rows for block in blocks])
        return blocks, torch.empty_like(rows).index_copy_(0, rows, torch.arange(rows.shape[0], device=self.device))


@dataclass(frozen=True)
class _Block:
    """Segments side by side.

    Attributes:
        q_rows [S, Lq], k_rows [S, Lk]: rows of each segment, filled up with a row of its own.
        mask: bool [S, 1, Lq, Lk], True where a query may look; None when every entry may, or those of a triangle.
        is_triangle: queries and keys are the same rows without padding, and causal.
        real: flattened places of q_rows that are rows; rows: which packed rows these are.
    """

    q_rows: Tensor
    k_rows: Tensor
    mask: Tensor | None
    is_triangle: bool
    real: Tensor
    rows: Tensor

    @classmethod
    def build(cls, group: Sequence[Segment], device: torch.device, *, is_causal: bool) -> _Block:
        q_lengths, totals = [s.q_length for s in group], [s.num_keys for s in group]
        q_rows, q_valid = padded_rows([s.q_start for s in group], q_lengths, device)
        rows = torch.cat([torch.arange(s.q_start, s.q_start + s.q_length) for s in group])
        places = torch.cat([torch.arange(s.q_length) + n * q_rows.shape[1] for n, s in enumerate(group)])
        shared_start, shared, k_start, total = (
            column(values, device)[:, None]
            for values in (
                [s.shared_start for s in group],
                [s.shared_length for s in group],
                [s.k_start for s in group],
                totals,
            )
        )
        span = torch.arange(max(totals), device=device)
        k_valid = span < total
        seen = torch.where(span < shared, shared_start, k_start - shared) + span
        k_rows = torch.where(k_valid, seen, seen[:, :1])
        mask = None
        if len({s.shape for s in group}) > 1 or (is_causal and not group[0].is_square):
            mask = k_valid[:, None, :].expand(-1, q_rows.shape[1], -1)
            if is_causal:
                last = torch.arange(q_rows.shape[1], device=device) + total - column(q_lengths, device)[:, None]
                mask = mask & (span <= last[:, :, None])
            # A padded query may look at everything: its output is discarded, and a softmax over nothing is NaN.
            mask = (mask | ~q_valid[:, :, None])[:, None]
        is_triangle = is_causal and mask is None
        return cls(q_rows, k_rows, mask, is_triangle, to_device(places, device), to_device(rows, device))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Output rows of the block's segments, one after another."""
        is_grouped = k.shape[1] != q.shape[1]
        q, k, v = (x[rows].transpose(1, 2) for x, rows in ((q, self.q_rows), (k, self.k_rows), (v, self.k_rows)))
        out = F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.is_triangle, enable_gqa=is_grouped)
        return out.transpose(1, 2).flatten(0, 1)[self.real]


@dataclass(frozen=True)
class _Varlen:
    """Arguments of the variable-length kernel.

    Attributes:
        q_bounds, k_bounds: int32 [S + 1] first rows of the segments, and the end of the last one.
        k_rows: key rows in segment order; None when they already lie so.
        q_longest, k_longest: rows of the longest segment.
    """

    q_bounds: Tensor
    k_bounds: Tensor
    k_rows: Tensor | None
    q_longest: int
    k_longest: int

    @classmethod
    def build(cls, segments: Sequence[Segment], device: torch.device) -> _Varlen:
        def bounds(lengths: list[int]) -> Tensor:
            return column([0, *accumulate(lengths)], device, torch.int32)

        q_lengths, k_lengths = [s.q_length for s in segments], [s.num_keys for s in segments]
        own = all(s.shared_length == 0 and s.k_start == s.q_start and s.k_length == s.q_length for s in segments)
        rows = None if own else to_device(torch.cat([s.key_rows() for s in segments]), device)
        return cls(bounds(q_lengths), bounds(k_lengths), rows, max(q_lengths), max(k_lengths))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        if self.k_rows is not None:
            k, v = k.index_select(0, self.k_rows), v.index_select(0, self.k_rows)
        is_grouped = k.shape[1] != q.shape[1]
        flags: dict[str, Any] = {"enable_gqa": True} if is_grouped and _wants_grouping_flag(varlen_attn) else {}
        out = varlen_attn(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            self.q_bounds,
            self.k_bounds,
            self.q_longest,
            self.k_longest,
            # Nothing right of the diagonal that ends in the last query and the last key.
            window_size=(-1, 0) if is_causal else (-1, -1),
            **flags,
        )
        assert isinstance(out, Tensor)
        return out


@functools.cache
def _wants_grouping_flag(kernel: Callable[..., object]) -> bool:
    """Grouped heads always work in the kernel; from PyTorch 2.12 on they have to be asked for."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def _similar(segments: Sequence[Segment], *, is_causal: bool) -> Iterator[list[Segment]]:
    """Groups of segments to lay side by side: equal ones that need no mask, similar ones while it stays small."""
    group: list[Segment] = []
    shortest = longest = 0
    for segment in sorted(segments, key=lambda s: s.shape):
        shortest, longest = min(shortest, segment.q_length), max(longest, segment.q_length)
        is_plain = group and group[0].shape == segment.shape and (segment.is_square or not is_causal)
        is_similar = group and segment.num_keys <= SIMILAR * group[0].num_keys and longest <= SIMILAR * shortest
        is_small = (len(group) + 1) * longest * segment.num_keys <= MAX_MASK_ENTRIES
        if group and not is_plain and not (is_similar and is_small):
            yield group
            group = []
        if not group:
            shortest = longest = segment.q_length
        group.append(segment)
    if group:
        yield group


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
