"""Batches without padding: contexts (what is shared, usually a scan) and branches (one question each).

A prompt splits after its last visual token's `<|vision_end|>`: what comes before is the same for every question about
the scan, attention is causal, so it is computed once. A text-only prompt is a branch on an empty context.

Rows are packed one after another: first all rows of context 0, then context 1, ...; branches likewise, in
an array of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from photon.config import PhotonConfig
from photon.errors import PhotonError
from photon.grid import Grid, num_visual_tokens, visual_positions

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Context:
    """Tokens shared by several branches.

    Attributes:
        input_ids: int64 [P], visual placeholders included; empty for a text-only prompt.
        patches: float [sum P_v, 14*14*14] of the volumes in order of their placeholders.
        grids: patch counts (gz, gy, gx) of each volume.
    """

    input_ids: Tensor
    patches: Tensor
    grids: tuple[Grid, ...]


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
        patches: float [P, 14*14*14]; grids: of every volume.
        context_ids [Tc], context_positions [3, Tc], context_lengths [C]
        visual_rows: int64 [V] context rows that are visual; visual_counts: [C] how many per context.
        volume_counts: int64 [volumes] visual tokens of each volume; context_volumes: [C] volumes of each context.
        branch_ids [Tb], branch_positions [3, Tb], branch_lengths [B]; branch_context [B].
        question: bool [Tb] question (instruction) tokens.
        labels: int64 [Tb], -100 where nothing is learned.
    """

    patches: Tensor
    grids: tuple[Grid, ...]
    context_ids: Tensor
    context_positions: Tensor
    context_lengths: Tensor
    visual_rows: Tensor
    visual_counts: Tensor
    volume_counts: Tensor
    context_volumes: Tensor
    branch_ids: Tensor
    branch_positions: Tensor
    branch_lengths: Tensor
    branch_context: Tensor
    question: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch with every tensor on ``device``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "grids"}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def pack_batch(contexts: Sequence[Context], branches: Sequence[Branch], config: PhotonConfig) -> PackedBatch:
    """Pack contexts and branches.

    Raises:
        PhotonError: ``PROMPT_INVALID`` when placeholders and volumes do not match or a branch is empty.
    """
    if any(branch.input_ids.numel() == 0 for branch in branches):
        raise PhotonError("PROMPT_INVALID", "prompt", "a branch has no tokens.", "Give every question a prompt.")
    positions, nexts = zip(*(context_positions(context, config) for context in contexts), strict=True)
    is_visual = torch.cat([context.input_ids == config.video_token_id for context in contexts])
    lengths = torch.tensor([context.input_ids.numel() for context in contexts])
    visual_counts = torch.tensor([int((c.input_ids == config.video_token_id).sum()) for c in contexts])
    grids = tuple(grid for context in contexts for grid in context.grids)
    ids = torch.cat([branch.input_ids for branch in branches])
    return PackedBatch(
        patches=torch.cat([context.patches for context in contexts]),
        grids=grids,
        context_ids=torch.cat([context.input_ids for context in contexts]),
        context_positions=torch.cat(positions, dim=1),
        context_lengths=lengths,
        visual_rows=is_visual.nonzero().flatten(),
        visual_counts=visual_counts,
        volume_counts=torch.tensor([num_visual_tokens(grid, config.vision) for grid in grids], dtype=torch.long),
        context_volumes=torch.tensor([len(context.grids) for context in contexts]),
        branch_ids=ids,
        branch_positions=torch.cat(
            [(torch.arange(b.input_ids.numel()) + nexts[b.context]).expand(3, -1) for b in branches], dim=1
        ),
        branch_lengths=torch.tensor([branch.input_ids.numel() for branch in branches]),
        branch_context=torch.tensor([branch.context for branch in branches]),
        question=torch.cat([question_mask(branch.input_ids, config.eos_token_id) for branch in branches]),
        labels=torch.cat([_labels_of(branch) for branch in branches]),
    )


def question_mask(branch_ids: Tensor, eos_token_id: int) -> Tensor:
    """Question tokens of a branch, bool [L]: those before the first end of turn."""
    return (branch_ids == eos_token_id).cumsum(0) == 0


def split_prompt(input_ids: Tensor, config: PhotonConfig) -> int:
    """Length of the part of a prompt that its questions share: up to the last `<|vision_end|>`, 0 without."""
    ends = (input_ids == config.vision_end_token_id).nonzero().flatten()
    return int(ends[-1]) + 1 if ends.numel() else 0


def _labels_of(branch: Branch) -> Tensor:
    if branch.labels is None:
        return torch.full_like(branch.input_ids, IGNORE_INDEX)
    return branch.labels


def context_positions(context: Context, config: PhotonConfig) -> tuple[Tensor, int]:
    """Rotary positions [3, P] of a context, and the position at which its branches start."""
    expected = [num_visual_tokens(grid, config.vision) for grid in context.grids]
    is_visual = context.input_ids == config.video_token_id
    if int(is_visual.sum()) != sum(expected):
        raise PhotonError(
            "PROMPT_INVALID",
            "prompt",
            f"it has {int(is_visual.sum())} visual placeholders for volumes of {expected} tokens.",
            "Write one placeholder per visual token.",
        )
    parts: list[Tensor] = []
    start = place = 0
    for grid, count in zip(context.grids, expected, strict=True):
        text = int(is_visual[place:].nonzero()[0])
        parts.append((torch.arange(text) + start).expand(3, -1))
        parts.append(visual_positions(grid, config) + start + text)
        start = int(parts[-1].max()) + 1
        place += text + count
    tail = context.input_ids.numel() - place
    parts.append((torch.arange(tail) + start).expand(3, -1))
    return torch.cat(parts, dim=1), start + tail
