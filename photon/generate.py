"""Answers: greedy decoding over the pruned cache, any number of branches of any lengths at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from photon.errors import PhotonError
from photon.model.attention import BlockAttention, padded_rows, starts_of
from photon.model.decoder import QueryKeyValue
from photon.model.network import Output, Photon
from photon.model.packing import PackedBatch


@dataclass(frozen=True)
class Cache:
    """Keys and values of the rows each branch kept, side by side.

    Attributes:
        k, v: [layers, B, L, G, d].
        mask: bool [B, L], False where a branch has no row.
    """

    k: Tensor
    v: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Generated:
    """Answer of one branch: its token ids without the end token, and the product of their probabilities."""

    ids: tuple[int, ...]
    confidence: float


def build_cache(layers: tuple[QueryKeyValue, ...], lengths: Tensor) -> Cache:
    """Lay packed keys and values [R, G, d] of every layer out per branch."""
    rows, mask = padded_rows(starts_of(lengths), lengths)
    return Cache(torch.stack([s.k[rows] for s in layers]), torch.stack([s.v[rows] for s in layers]), mask)


def decode_step(model: Photon, ids: Tensor, positions: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """One token further for every branch.

    Args:
        ids: int64 [B] the token just chosen. positions: int64 [B] its rotary position, the same on all axes.

    Returns:
        logits [B, vocabulary] of the next token, and the cache with one more column.
    """
    num_branches = ids.shape[0]
    mask = torch.cat([cache.mask, cache.mask.new_ones(num_branches, 1)], dim=1)
    x = model.model.embed_tokens(ids)
    table = model.model.rotary(positions.expand(3, -1))
    keys, values = [], []
    for index, layer in enumerate(model.model.layers):
        x, state = layer(x, table, BlockAttention(mask[:, None], cache.k[index], cache.v[index]))
        keys.append(state.k)
        values.append(state.v)
    grown = Cache(
        torch.cat([cache.k, torch.stack(keys)[:, :, None]], dim=2),
        torch.cat([cache.v, torch.stack(values)[:, :, None]], dim=2),
        mask,
    )
    return model.logits(x), grown


def last_rows(batch: PackedBatch, output: Output) -> Tensor:
    """Row of `output.hidden` that predicts the first answer token of each branch, int64 [B]."""
    return output.branch_rows[batch.branch_lengths.cumsum(0) - 1]


@torch.no_grad()
def generate(
    model: Photon, batch: PackedBatch, *, keep_all: bool, max_new_tokens: int
) -> tuple[list[Generated], Output]:
    """Greedy answers of every branch.

    Args:
        batch: contexts and branches that end where the answer begins.
        keep_all: use every visual token instead of the scheduled ones.

    Raises:
        PhotonError: ``ANSWER_NOT_FINITE`` when a number on the way to an answer is not finite.
    """
    output = model(batch, "full" if keep_all else "hard", with_layers=True)
    assert output.layers is not None and output.selection is not None
    logits = model.logits(output.hidden[last_rows(batch, output)])
    cache = build_cache(output.layers, output.selection.lengths)
    positions = batch.branch_positions[0, batch.branch_lengths.cumsum(0) - 1]
    decoder = GreedyDecoder(logits.shape[0], model.config.eos_token_id)
    for _ in range(max_new_tokens):
        ids = decoder.choose(logits)
        if decoder.is_done:
            break
        positions = positions + 1
        logits, cache = decode_step(model, ids, positions, cache)
    return decoder.answers(), output


class GreedyDecoder:
    """Chooses tokens and keeps the score until every branch has said its end token."""

    def __init__(self, num_branches: int, eos_token_id: int) -> None:
        self.eos = eos_token_id
        self.ids: list[list[int]] = [[] for _ in range(num_branches)]
        self.log_p = torch.zeros(num_branches, dtype=torch.float64)
        self.ended = torch.zeros(num_branches, dtype=torch.bool)

    @property
    def is_done(self) -> bool:
        """Whether every branch has ended."""
        return bool(self.ended.all())

    def choose(self, logits: Tensor) -> Tensor:
        """Likeliest token of each branch, int64 [B]; branches that have ended repeat the end token."""
        if not bool(torch.isfinite(logits).all()):
            raise PhotonError(
                "ANSWER_NOT_FINITE",
                "answer",
                "a number on the way to it is not finite.",
                "Check the scan for values that are not numbers, and the checkpoint's training log.",
            )
        log_p, ids = logits.double().log_softmax(-1).max(-1)
        ids = torch.where(self.ended.to(ids.device), self.eos, ids)
        self.log_p = torch.where(self.ended, self.log_p, self.log_p + log_p.cpu())
        for answer, token, has_ended in zip(self.ids, ids.tolist(), self.ended.tolist(), strict=True):
            if not has_ended and token != self.eos:
                answer.append(token)
        self.ended = self.ended | (ids.cpu() == self.eos)
        return ids

    def answers(self) -> list[Generated]:
        """What was said so far."""
        return [
            Generated(tuple(ids), confidence)
            for ids, confidence in zip(self.ids, self.log_p.exp().tolist(), strict=True)
        ]
