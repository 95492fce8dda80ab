"""One token further for every branch: the pruned cache, and the decoder layers over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from photon.model.attention import Attention, BlockAttention, padded_rows, starts_of
from photon.model.decoder import KeyValue, QueryKeyValue
from photon.model.network import Photon


@dataclass(frozen=True)
class Cache:
    """Keys and values of the rows each branch kept, side by side.

    Attributes:
        k, v: [layers, B, L + room, G, d]; the last columns may be room for tokens still to come.
        mask: bool [B, L], False where a branch has no row.
    """

    k: Tensor
    v: Tensor
    mask: Tensor

    @property
    def num_columns(self) -> int:
        """Columns in use, L."""
        return self.mask.shape[1]

    def used(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, G, d] of a layer, without the room."""
        return self.k[layer, :, : self.num_columns], self.v[layer, :, : self.num_columns]

    def with_room(self, num_tokens: int) -> Cache:
        """The cache with at least this much room; itself when it has it already."""
        missing = self.num_columns + num_tokens - self.k.shape[2]
        if missing <= 0:
            return self
        padding = (0, 0, 0, 0, 0, missing)
        return Cache(F.pad(self.k, padding), F.pad(self.v, padding), self.mask)


def build_cache(layers: Iterable[KeyValue], lengths: Sequence[int], *, room: int = 0) -> Cache:
    """Lay packed keys and values [R, G, d] of every layer out per branch.

    Args:
        layers: keys and values of each layer, rows branch after branch.
        lengths: [B] rows of each branch.
        room: columns to leave free for tokens still to come.
    """
    # Columns without a row repeat one of the same branch: a masked number still meets a weight of zero, so
    # another branch's NaN must not stand there.
    layers = tuple(layers)
    rows, mask = padded_rows(starts_of(lengths), lengths, layers[0].k.device)
    shape = (len(layers), *rows.shape, *layers[0].k.shape[1:])
    k, v = (layers[0].k.new_zeros((*shape[:2], shape[2] + room, *shape[3:])) for _ in range(2))
    for index, state in enumerate(layers):
        k[index, :, : shape[2]] = state.k[rows]
        v[index, :, : shape[2]] = state.v[rows]
    return Cache(k, v, mask)


def run_rows(
    model: Photon, ids: Tensor, positions: Tensor, attends: Iterable[Attention]
) -> tuple[Tensor, list[QueryKeyValue]]:
    """All decoder layers over text tokens, each with its own attention.

    Args:
        ids: int64 [T]. positions: int64 [T] rotary positions, the same on all axes.
        attends: one for each layer.

    Returns:
        rows [T, D] before the final norm, and what each layer attended with.
    """
    x = model.model.embed_tokens(ids)
    table = model.model.rotary(positions.expand(3, -1))
    states = []
    for layer, attend in zip(model.model.layers, attends, strict=True):
        x, state = layer(x, table, attend)
        states.append(state)
    return x, states


def decode_step(model: Photon, ids: Tensor, positions: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """One token further for every branch, written into the room of the cache.

    The columns in use are left as they are, so the cache given may be gone on from again, with other tokens too.

    Args:
        ids: int64 [B] the token just chosen. positions: int64 [B] its rotary position, the same on all axes.
        cache: a cache with room.

    Returns:
        logits [B, vocabulary] of the next token, and the cache with one more column in use.
    """
    mask = _one_more_column(cache.mask)
    end = mask.shape[1]
    attends = [_LastColumnAttention(mask, k[:, :end], v[:, :end]) for k, v in zip(cache.k, cache.v, strict=True)]
    x, _ = run_rows(model, ids, positions, attends)
    return model.logits(x), Cache(cache.k, cache.v, mask)


def decode_step_functional(model: Photon, ids: Tensor, positions: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """:func:`decode_step` for a cache without room: nothing is written in place, which is the form that exports."""
    mask = _one_more_column(cache.mask)
    attends = [BlockAttention(mask[:, None], k, v) for k, v in zip(cache.k, cache.v, strict=True)]
    x, states = run_rows(model, ids, positions, attends)
    k, v = torch.stack([state.k for state in states]), torch.stack([state.v for state in states])
    grown = Cache(torch.cat([cache.k, k[:, :, None]], dim=2), torch.cat([cache.v, v[:, :, None]], dim=2), mask)
    return model.logits(x), grown


@dataclass(frozen=True)
class _LastColumnAttention:
    """One row a branch, written into the last column of keys and values [B, L, G, d], over all columns of its mask."""

    mask: Tensor
    k: Tensor
    v: Tensor

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.k[:, -1], self.v[:, -1] = k, v
        # All heads of a group see the same keys, so they stand side by side as queries and no key is repeated.
        grouped = q.unflatten(1, (k.shape[1], -1))
        keys, values = self.k.transpose(1, 2), self.v.transpose(1, 2)
        out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=self.mask[:, None, None])
        return out.flatten(1, 2)


def _one_more_column(mask: Tensor) -> Tensor:
    return torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
