"""Answers from the pruned cache: a scan encoded once, any number of questions about it, or a batch of mixed scans.

`encode_scan`, then `ask` (questions up to where their answers begin), then `decode`; `answer` is the last two. A batch
of mixed scans takes `ask_batch`, then `decode`; `generate` is both. For the likelihoods of given answers see
:mod:`photon.likelihood`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

import torch
from torch import Tensor

from photon.decoding import Cache, build_cache, decode_step
from photon.errors import PhotonError
from photon.model.network import Output, Photon
from photon.model.packing import Branch, Context, PackedBatch, pack_batch
from photon.model.pruning import EncodedRows
from photon.sampling import AnswerDecoder, Generated, OnToken, Sampling


@dataclass(frozen=True)
class EncodedScan:
    """What all questions about a scan share.

    Attributes:
        context: token ids and grids; patches or encoded tokens, no longer needed, are gone.
        state: output rows [P, D] of the pruning layer, rotary table, keys and values [P, G, d] of the layers up to it.
    """

    context: Context
    state: EncodedRows


@dataclass(frozen=True)
class Prompted:
    """Questions that have been read; their answers come next.

    Attributes:
        logits: [B, vocabulary] of the first answer token.
        cache: the rows each branch kept.
        positions: int64 [B] rotary position of each branch's last row; what follows counts on from there, as if
            nothing had been pruned.
        output: the forward pass, with the pruning decision.
    """

    logits: Tensor
    cache: Cache
    positions: Tensor
    output: Output


@torch.no_grad()
def encode_scan(model: Photon, context: Context) -> EncodedScan:
    """Run the vision tower and the layers up to the pruning layer over a context, empty for text-only prompts.

    Raises:
        PhotonError: ``PROMPT_INVALID`` when placeholders and volumes do not match.
    """
    batch = pack_batch([context], [], model.config).to(_device(model))
    state = model.encode_contexts(batch, _num_shared_layers(model))
    bare = dataclasses.replace(context, patches=context.patches[:0].clone(), pooled=None, tokens=None)
    return EncodedScan(bare, state)


@torch.no_grad()
def ask(
    model: Photon,
    scan: EncodedScan,
    branches: Sequence[Tensor],
    *,
    keep_all: bool = False,
    keep: Tensor | None = None,
    room: int = 0,
) -> Prompted:
    """Read questions about an encoded scan, up to where their answers begin.

    Args:
        branches: int64 [L] token ids of each question, at least one question.
        keep_all: use every visual token instead of those that the configured policy chooses.
        keep: bool [B, N] which of the scan's present tokens each question gets, counted through its volumes, instead of
            that choice: tokens removed, swapped between questions, or drawn at random. A question may get none.
        room: answer tokens to leave room for; more can be decoded at the price of a copy of the cache.

    Raises:
        PhotonError: ``PROMPT_INVALID`` when there is no question, one without tokens, or keep flags of another type or
            number; ``GENERATION_INVALID`` for keep flags and `keep_all` together.
    """
    if not branches:
        raise PhotonError("PROMPT_INVALID", "prompt", "there is no question.", "Ask at least one.")
    batch = pack_batch([scan.context], [Branch(0, ids) for ids in branches], model.config).to(_device(model))
    return _read(model, batch, scan.state, keep_all=keep_all, keep=keep, room=room)


@torch.no_grad()
def ask_batch(model: Photon, batch: PackedBatch, *, keep_all: bool, room: int = 0) -> Prompted:
    """Encode the scans of a batch and read its questions; arguments as in :func:`ask`."""
    batch = batch.to(_device(model))
    return _read(model, batch, model.encode_contexts(batch, _num_shared_layers(model)), keep_all=keep_all, room=room)


class Choice(TypedDict, total=False):
    """How tokens are chosen; all may be left out.

    Attributes:
        sampling: how to draw tokens; None always takes the likeliest one, of equal ones the first id.
        seeds: one for each branch; None gives every branch the sampling's.
        stop_ids: tokens that end an answer besides the configuration's end of turn.
        on_token: called with branch and token id as soon as a token is chosen, an end token included; never for a
            branch that has ended.
    """

    sampling: Sampling | None
    seeds: Sequence[int] | None
    stop_ids: Collection[int]
    on_token: OnToken | None


@torch.no_grad()
def decode(model: Photon, prompted: Prompted, *, max_new_tokens: int, **choice: Unpack[Choice]) -> list[Generated]:
    """Answers to questions that have been read; the same `prompted` may be decoded again.

    Any batch gives what each branch gives alone, drawn answers included: every branch draws from its own seed.

    Args:
        max_new_tokens: most tokens an answer, its end token included.
        choice: see :class:`Choice`.

    Raises:
        PhotonError: ``GENERATION_INVALID`` when `max_new_tokens` or the seeds make no sense, ``ANSWER_NOT_FINITE``
            with the branches concerned when a number on the way to an answer is not finite.
    """
    decoder = AnswerDecoder(
        prompted.logits.shape[0],
        end_ids={model.config.eos_token_id, *choice.get("stop_ids", ())},
        max_new_tokens=max_new_tokens,
        sampling=choice.get("sampling"),
        seeds=choice.get("seeds"),
        on_token=choice.get("on_token"),
    )
    cache, positions = prompted.cache.with_room(max_new_tokens - 1), prompted.positions
    ids = decoder.choose(prompted.logits)
    while not decoder.is_done:
        positions = positions + 1
        logits, cache = decode_step(model, ids, positions, cache)
        ids = decoder.choose(logits)
    return decoder.answers()


def answer(
    model: Photon,
    scan: EncodedScan,
    branches: Sequence[Tensor],
    *,
    keep_all: bool = False,
    max_new_tokens: int,
    **choice: Unpack[Choice],
) -> list[Generated]:
    """Answers to any number of questions about an encoded scan: :func:`ask`, then :func:`decode`; none to none."""
    if not branches:
        return []
    prompted = ask(model, scan, branches, keep_all=keep_all, room=max_new_tokens)
    return decode(model, prompted, max_new_tokens=max_new_tokens, **choice)


def generate(
    model: Photon, batch: PackedBatch, *, keep_all: bool, max_new_tokens: int, **choice: Unpack[Choice]
) -> tuple[list[Generated], Output]:
    """Answers to every branch of a batch of any scans, and the forward pass; otherwise as :func:`answer`.

    Args:
        batch: contexts and branches that end where the answer begins.
    """
    prompted = ask_batch(model, batch, keep_all=keep_all, room=max_new_tokens)
    return decode(model, prompted, max_new_tokens=max_new_tokens, **choice), prompted.output


def last_rows(batch: PackedBatch, output: Output) -> Tensor:
    """Row of `output.hidden` that predicts the first answer token of each branch, int64 [B]."""
    return output.branch_rows[_ends(batch)]


def _read(
    model: Photon, batch: PackedBatch, state: EncodedRows, *, keep_all: bool, keep: Tensor | None = None, room: int
) -> Prompted:
    keep = None if keep is None else keep.to(_device(model))
    output = model.run_branches(batch, state, "full" if keep_all else "hard", keep=keep, with_layers=True)
    assert output.layers is not None and output.layer_lengths is not None
    return Prompted(
        logits=model.logits(output.hidden[last_rows(batch, output)]),
        # The last token needs no column of its own.
        cache=build_cache(output.layers, output.layer_lengths, room=max(room - 1, 0)),
        positions=batch.branch_positions[0, _ends(batch)],
        # The cache has the layers, and a scan that was run through all of them need not be held twice.
        output=dataclasses.replace(output, layers=None, context=state),
    )


def _ends(batch: PackedBatch) -> Tensor:
    """Last row of each branch among all branch rows, int64 [B]."""
    return batch.layout.own_starts + batch.layout.own_lengths - 1


def _num_shared_layers(model: Photon) -> int:
    return model.config.pruning.layer + 1


def _device(model: Photon) -> torch.device:
    return model.model.embed_tokens.weight.device
