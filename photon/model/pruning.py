"""The pruning step: from what the pruning layer attended with to the rows that go on.

Nothing here waits for a GPU but :func:`photon.ops.selection.op.select_rows`, once, for how many rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from photon.model.decoder import KeyValue, QueryKeyValue
from photon.model.layers import Rotary
from photon.ops.backend import Backend
from photon.ops.compaction.op import compact
from photon.ops.layout import Layout
from photon.ops.saliency.op import saliency
from photon.ops.selection.op import Selection
from photon.ops.surrogate.op import pack
from photon.scheduling import Schedule, ThresholdPredictor

Mode = Literal["full", "soft", "hard"]


@dataclass(frozen=True)
class EncodedRows:
    """Rows [T, D] as far as the decoder has run them, their rotary table, keys and values of the layers run."""

    hidden: Tensor
    table: Rotary
    layers: tuple[KeyValue, ...]


def decide(
    own: QueryKeyValue, shared: KeyValue, layout: Layout, predictor: ThresholdPredictor, *, backend: Backend
) -> Schedule | None:
    """Score the visual tokens of every question and set its threshold; None when there is no visual token.

    Args:
        own, shared: what branch rows and context rows attended with at the pruning layer.
    """
    if not layout.num_pairs:
        return None
    # Mixed precision would take the products of the scores and of the threshold network for ordinary ones.
    with torch.autocast(own.q.device.type, enabled=False):
        u = saliency(own.q, own.k, shared.k, layout, backend=backend)
        decision: Schedule = predictor(u, layout.pair_lengths, layout.pair_branch, backend=backend)
    return decision


def kept_tokens(decision: Schedule | None, mode: Mode, flip: Tensor | None) -> Tensor | None:
    """Visual tokens [S, N] that go on: all while soft, the kept ones, or for the branches in ``flip`` the others."""
    if decision is None:
        return None
    if mode != "hard":
        return decision.valid
    if flip is None:
        return decision.keep
    return torch.where(flip[decision.branch][:, None], decision.valid & ~decision.keep, decision.keep)


def take_rows(
    context: EncodedRows,
    own: EncodedRows,
    selection: Selection,
    layout: Layout,
    *,
    p: Tensor | None,
    mode: Mode,
    rule: str,
    backend: Backend,
) -> EncodedRows:
    """Rows after pruning, of context rows and branch rows.

    Args:
        p: keep probabilities [S, N] that scale the rows ("soft") or get a surrogate gradient ("hard"); None when there
            is no visual token.
    """
    beside = _beside(context), _beside(own)
    if torch.is_grad_enabled():
        surrogate = p if mode == "hard" else None
        hidden = pack(context.hidden, own.hidden, surrogate, selection, layout, rule=rule, backend=backend)
        moved = compact(*beside, selection.rows, backend=backend)
    else:
        # Without a gradient everything moves in one pass.
        sources = [context.hidden, *beside[0]], [own.hidden, *beside[1]]
        hidden, *moved = compact(*sources, selection.rows, backend=backend)
    if mode == "soft" and p is not None:
        scale = torch.where(selection.slots >= 0, p.flatten()[selection.slots.clamp_min(0)], 1.0)
        hidden = hidden * scale[:, None].to(hidden.dtype)
    cos, sin, *keys_values = moved
    return EncodedRows(hidden, (cos, sin), _layers(keys_values))


def take_layers(
    context: Sequence[KeyValue], own: Sequence[KeyValue], rows: Tensor, *, backend: Backend
) -> tuple[KeyValue, ...]:
    """Keys and values of ``rows`` in the context rows followed by the branch rows, of every layer."""
    return _layers(compact(_flat(context), _flat(own), rows, backend=backend))


def _beside(rows: EncodedRows) -> list[Tensor]:
    """All tensors but the hidden rows."""
    return [*rows.table, *_flat(rows.layers)]


def _flat(layers: Sequence[KeyValue]) -> list[Tensor]:
    return [x for layer in layers for x in layer]


def _layers(tensors: Sequence[Tensor]) -> tuple[KeyValue, ...]:
    return tuple(KeyValue(k, v) for k, v in zip(tensors[::2], tensors[1::2], strict=True))
