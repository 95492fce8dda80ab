"""Batches without padding: contexts (what is shared, usually a scan) and branches (one question each).

A prompt splits after its last visual token's `<|vision_end|>`: what comes before is the same for every question about
the scan, attention is causal, so it is computed once. A text-only prompt is a branch on an empty context.

Rows are packed one after another: first all rows of context 0, then context 1, ...; branches likewise, in
an array of their own.

Visual tokens may be left out (:mod:`photon.model.contexts`). The others, and all text, stay where they were: their
positions, windows and slabs are those of the whole grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from photon.config import PhotonConfig
from photon.errors import PhotonError
from photon.grid import Grid, num_visual_tokens, visual_positions
from photon.ops.layout import Layout

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Context:
    """Tokens shared by several branches.

    Attributes:
        input_ids: int64 [P], a placeholder for each present visual token included; empty for a text-only prompt.
        patches: float [sum P_v, 14*14*14] of the present tokens, volumes in order of their placeholders.
        grids: patch counts (gz, gy, gx) of each whole volume.
        present: int64 [N] visual tokens that are there, ascending, counted through the whole grids of all volumes;
            None when all are.
        pooled: int64, for every token of the whole grids the place (from 0 to below N) of the visual token into whose
            mean it goes; the patches are then those of the whole grids. None where nothing is averaged.
        tokens: float [N, D] what the vision tower made of the patches, of which there are none then; None otherwise.
    """

    input_ids: Tensor
    patches: Tensor
    grids: tuple[Grid, ...]
    present: Tensor | None = None
    pooled: Tensor | None = None
    tokens: Tensor | None = None

    def grid_tokens(self, tokens: Tensor) -> Tensor:
        """Indices through the whole grids of visual tokens int64 [n] counted among the present ones.

        What leaves the model says which of the tokens it was given are kept; boxes and pictures need these.
        """
        return tokens if self.present is None else self.present[tokens.to(self.present.device)]


@dataclass(frozen=True)
class Branch:
    """One question (and in training its answer) about one context.

    Attributes:
        context: index of the context in the batch.
        input_ids: int64 [L].
        labels: int64 [L], -100 where no answer is learned; None outside training.
    """

    context: int
    input_ids: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class PackedBatch:
    """Contexts and branches as packed arrays. C contexts, B branches, V visual tokens.

    Attributes:
        patches: float [P, 14*14*14] of the visual tokens to encode; grids: of every volume.
        present: int64 [P / 4] these tokens, counted through the whole grids of all volumes. As many as V, unless some
            are averaged.
        pooled: int64 [P / 4] visual row (from 0 to below V) whose mean each goes into; None where nothing is averaged.
        tokens: float [V, D] visual tokens that were encoded before; None where the patches are to be.
        context_ids [Tc], context_positions [3, Tc], context_lengths [C]
        visual_rows: int64 [V] context rows that are visual.
        branch_ids [Tb], branch_positions [3, Tb], branch_lengths [B]; branch_context [B].
        labels: int64 [Tb], -100 where nothing is learned.
        layout: what the pruning step reads where.

    Lengths are numbers of the host, so that nobody has to ask a GPU for the size of what comes next.
    """

    patches: Tensor
    grids: tuple[Grid, ...]
    present: Tensor
    context_ids: Tensor
    context_positions: Tensor
    context_lengths: tuple[int, ...]
    visual_rows: Tensor
    branch_ids: Tensor
    branch_positions: Tensor
    branch_lengths: tuple[int, ...]
    branch_context: tuple[int, ...]
    labels: Tensor
    layout: Layout
    pooled: Tensor | None = None
    tokens: Tensor | None = None

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch with every tensor on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor | Layout)}
        return replace(self, **moved)


def pack_batch(contexts: Sequence[Context], branches: Sequence[Branch], config: PhotonConfig) -> PackedBatch:
    """Pack contexts and branches; without branches the batch can be encoded but not asked.

    Raises:
        PhotonError: ``PROMPT_INVALID`` when placeholders and volumes or encoded tokens do not match, only some contexts
            are encoded, or a branch is empty.
    """
    _check_prompts(contexts, branches, config)
    tokens = _encoded_tokens(contexts, config)
    positions, nexts = zip(*(context_positions(context, config) for context in contexts), strict=True)
    is_visual = torch.cat([context.input_ids == config.video_token_id for context in contexts])
    grids = tuple(grid for context in contexts for grid in context.grids)
    volumes = [volumes_of(context, config) for context in contexts]
    none = torch.zeros(0, dtype=torch.long)
    context_lengths = tuple(context.input_ids.numel() for context in contexts)
    branch_lengths = tuple(branch.input_ids.numel() for branch in branches)
    branch_context = tuple(branch.context for branch in branches)
    layout = Layout.build(
        context_lengths,
        [[(volume.first_row, volume.num_tokens) for volume in own] for own in volumes],
        branch_lengths,
        [num_question_tokens(branch.input_ids, config.eos_token_id) for branch in branches],
        branch_context,
    )
    return PackedBatch(
        patches=torch.cat([context.patches for context in contexts]),
        grids=grids,
        present=counted_through(_tokens_to_encode(contexts, volumes, config), grids, config),
        context_ids=torch.cat([context.input_ids for context in contexts]),
        context_positions=torch.cat(positions, dim=1),
        context_lengths=context_lengths,
        visual_rows=is_visual.nonzero().flatten(),
        branch_ids=torch.cat([none, *(branch.input_ids for branch in branches)]),
        branch_positions=torch.cat(
            [none, *(torch.arange(branch.input_ids.numel()) + nexts[branch.context] for branch in branches)]
        ).expand(3, -1),
        branch_lengths=branch_lengths,
        branch_context=branch_context,
        labels=torch.cat([none, *(_labels_of(branch) for branch in branches)]),
        layout=layout,
        pooled=_pooled_rows(contexts, volumes),
        tokens=tokens,
    )


def _check_prompts(contexts: Sequence[Context], branches: Sequence[Branch], config: PhotonConfig) -> None:
    def refuse(fact: str, remedy: str) -> None:
        raise PhotonError("PROMPT_INVALID", "prompt", fact, remedy)

    if not contexts:
        refuse("there is no context.", "Give one, without tokens for a prompt of text alone.")
    for number, branch in enumerate(branches):
        if branch.input_ids.numel() == 0:
            refuse(f"branch {number} has no tokens.", "Give every question a prompt.")
        if not 0 <= branch.context < len(contexts):
            refuse(f"branch {number} is about context {branch.context} of {len(contexts)}.", "Count from 0.")
    for ids in [*(context.input_ids for context in contexts), *(branch.input_ids for branch in branches)]:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < config.vocab_size:
            fact = f"token ids go from {int(ids.min())} to {int(ids.max())} in a vocabulary of {config.vocab_size}."
            refuse(fact, "Use the tokenizer that belongs to the model.")


def _encoded_tokens(contexts: Sequence[Context], config: PhotonConfig) -> Tensor | None:
    """The tokens [V, D] of contexts that were encoded before; None when none was."""
    with_volumes = [context for context in contexts if context.grids]
    encoded = [context.tokens for context in with_volumes if context.tokens is not None]
    if not encoded:
        return None
    counts = [int((context.input_ids == config.video_token_id).sum()) for context in with_volumes]
    found = [tuple(tokens.shape) for tokens in encoded]
    if found != [(count, config.hidden_size) for count in counts] or any(c.patches.numel() for c in with_volumes):
        raise PhotonError(
            "PROMPT_INVALID",
            "prompt",
            f"it has encoded tokens of shapes {found} for {counts} placeholders.",
            f"Encode every context of a batch, without patches, or none: {config.hidden_size} numbers a placeholder.",
        )
    return torch.cat(encoded)


def _tokens_to_encode(
    contexts: Sequence[Context], volumes: Sequence[Sequence[Volume]], config: PhotonConfig
) -> list[Tensor]:
    """Tokens of each volume whose patches are there, counted through its own grid."""
    found = []
    for context, own in zip(contexts, volumes, strict=True):
        for grid, volume in zip(context.grids, own, strict=True):
            is_whole = context.pooled is not None
            found.append(torch.arange(num_visual_tokens(grid, config.vision)) if is_whole else volume.tokens)
    return found


def _pooled_rows(contexts: Sequence[Context], volumes: Sequence[Sequence[Volume]]) -> Tensor | None:
    """Visual row of the batch that each token to encode goes into; None where all stand for themselves."""
    if all(context.pooled is None for context in contexts):
        return None
    parts, start = [], 0
    for context, own in zip(contexts, volumes, strict=True):
        count = sum(volume.num_tokens for volume in own)
        parts.append((torch.arange(count) if context.pooled is None else context.pooled) + start)
        start += count
    return torch.cat(parts)


def num_question_tokens(branch_ids: Tensor, eos_token_id: int) -> int:
    """How many tokens of a branch, from the first, are its question: those before the first end of turn."""
    return int(((branch_ids == eos_token_id).cumsum(0) == 0).sum())


def split_prompt(input_ids: Tensor, config: PhotonConfig) -> int:
    """Length of the part of a prompt that its questions share: up to the last `<|vision_end|>`, 0 without."""
    ends = (input_ids == config.vision_end_token_id).nonzero().flatten()
    return int(ends[-1]) + 1 if ends.numel() else 0


def _labels_of(branch: Branch) -> Tensor:
    if branch.labels is None:
        return torch.full_like(branch.input_ids, IGNORE_INDEX)
    return branch.labels


def context_positions(context: Context, config: PhotonConfig) -> tuple[Tensor, int]:
    """Rotary positions [3, P] of a context, and the position at which its branches start.

    Text after a volume starts after the last position of its whole grid, so that the positions of a question do not
    depend on where there is air.

    Raises:
        PhotonError: ``PROMPT_INVALID`` when placeholders and volumes do not match.
    """
    parts: list[Tensor] = []
    start = place = 0
    for grid, volume in zip(context.grids, volumes_of(context, config), strict=True):
        text = volume.first_row - place
        parts.append((torch.arange(text) + start).expand(3, -1))
        whole = visual_positions(grid, config) + start + text
        parts.append(whole[:, volume.tokens])
        start = int(whole.max()) + 1
        place = volume.first_row + volume.num_tokens
    tail = context.input_ids.numel() - place
    parts.append((torch.arange(tail) + start).expand(3, -1))
    return torch.cat(parts, dim=1), start + tail


@dataclass(frozen=True)
class Volume:
    """Where a volume's visual tokens stand: those present, counted through its own grid, and the row of the first."""

    tokens: Tensor
    first_row: int

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()


def volumes_of(context: Context, config: PhotonConfig) -> list[Volume]:
    """The volumes of a context; refuses a prompt that does not fit them."""
    whole = [num_visual_tokens(grid, config.vision) for grid in context.grids]
    present = torch.arange(sum(whole)) if context.present is None else context.present
    tokens, start = [], 0
    for count in whole:
        tokens.append(present[(present >= start) & (present < start + count)] - start)
        start += count
    found = [own.numel() for own in tokens]
    rows = (context.input_ids == config.video_token_id).nonzero().flatten()
    is_ordered = bool((present.diff() > 0).all())
    if rows.numel() != present.numel() or sum(found) != present.numel() or 0 in found or not is_ordered:
        raise PhotonError(
            "PROMPT_INVALID",
            "prompt",
            f"it has {rows.numel()} visual placeholders for volumes of {found} tokens.",
            "Write one placeholder per visual token, and name each present token once, in ascending order.",
        )
    of_volumes = rows.split(found)
    if any(int(own[-1] - own[0]) + 1 != own.numel() for own in of_volumes):
        fact = "text stands between the placeholders of one volume."
        raise PhotonError("PROMPT_INVALID", "prompt", fact, "Write the placeholders of a volume in one piece.")
    return [Volume(own, int(places[0])) for own, places in zip(tokens, of_volumes, strict=True)]


def counted_through(tokens: Sequence[Tensor], grids: Sequence[Grid], config: PhotonConfig) -> Tensor:
    """Tokens of each volume's grid, counted through all volumes: int64."""
    parts, start = [torch.zeros(0, dtype=torch.long)], 0
    for own, grid in zip(tokens, grids, strict=True):
        parts.append(own + start)
        start += num_visual_tokens(grid, config.vision)
    return torch.cat(parts)
