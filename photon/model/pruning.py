"""The pruning step: from what the pruning layer attended with to the rows that go on.

Nothing here waits for a GPU but :func:`photon.ops.selection.op.select_rows`, once, for how many rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from photon.config import PruningConfig
from photon.errors import PhotonError
from photon.model.decoder import KeyValue, QueryKeyValue
from photon.model.layers import Rotary
from photon.ops.backend import Backend
from photon.ops.compaction.op import compact
from photon.ops.layout import Layout
from photon.ops.saliency.op import differentiable_saliency, saliency
from photon.ops.saliency.reference import own_scores
from photon.ops.selection.op import Selection
from photon.ops.surrogate.op import pack
from photon.scheduling import Schedule, ThresholdPredictor, ranked

Mode = Literal["full", "soft", "hard"]


@dataclass(frozen=True)
class EncodedRows:
    """Rows [T, D] as far as the decoder has run them, their rotary table, keys and values of the layers run.

    Attributes:
        own_scores: float32 [T] scores by :func:`blind_scores`; None unless the policy is "fixed-blind".
    """

    hidden: Tensor
    table: Rotary
    layers: tuple[KeyValue, ...]
    own_scores: Tensor | None = None


def effective_mode(mode: Mode, config: PruningConfig) -> Mode:
    """What a mode means under a policy: soft is hard where nothing is scaled, all are full where nothing is dropped.

    The keep probabilities of the ranked policies are 0 and 1 and learn nothing, so there is nothing to be soft about.
    """
    if not config.prunes:
        return "full"
    return "hard" if mode == "soft" and config.is_ranked else mode


@torch.no_grad()
def blind_scores(state: QueryKeyValue, layout: Layout) -> Tensor:
    """Scores float32 [Tc] of context rows when each volume's own tokens ask; 0 for text.

    Once per scan, from nothing but the volume itself; see :func:`photon.ops.saliency.reference.own_scores`.

    Args:
        state: what the context rows attended with at the pruning layer.
    """
    u = torch.zeros(state.q.shape[0], device=state.q.device)
    with torch.autocast(state.q.device.type, enabled=False):
        for start, count in layout.volumes():
            rows = slice(start, start + count)
            u[rows] = own_scores(state.q[rows], state.k[rows])
    return u


def decide(
    own: QueryKeyValue,
    shared: KeyValue,
    layout: Layout,
    predictor: ThresholdPredictor,
    mode: Mode,
    *,
    blind: Tensor | None = None,
    with_gradient: bool = False,
    backend: Backend,
) -> Schedule | None:
    """Score the visual tokens of every question and decide by the policy; None when there is no visual token.

    Args:
        own, shared: what branch rows and context rows attended with at the pruning layer.
        mode: what the decision is for; only in "soft" p has a gradient to the scores (``saliency_gradient``). The
            surrogate gradient of "hard" is standardised to a direction, which moves one threshold well and many scores
            badly.
        blind: float32 [Tc] scores of the context rows that replace those by the question.
        with_gradient: whether the schedule's scores u have a gradient, in any mode.

    Raises:
        PhotonError: ``BACKEND_UNAVAILABLE`` for the backend "triton" when a gradient of the scores is wanted
            (``saliency_gradient``, ``distillation_weight``), which "auto" computes without kernels.
    """
    if not layout.num_pairs:
        return None
    # Mixed precision would take the products of the scores and of the threshold network for ordinary ones.
    with torch.autocast(own.q.device.type, enabled=False):
        lengths, branch = layout.pair_lengths, layout.pair_branch
        reaches_scores = predictor.config.saliency_gradient and mode == "soft"
        if (reaches_scores or with_gradient) and torch.is_grad_enabled():
            _refuse_kernels(backend)
            u = differentiable_saliency(own.q, own.k, shared.k, layout)
            decision = replace(predictor(u, lengths, branch, backend=backend), u=u)
            return decision.with_saliency_gradient(u, predictor.config) if reaches_scores else decision
        if blind is None:
            u = saliency(own.q, own.k, shared.k, layout, backend=backend)
        else:
            u = _of_pairs(blind, layout)
        if predictor.config.policy != "photon":
            return ranked(u, lengths, branch, predictor.config)
        decided: Schedule = predictor(u, lengths, branch, backend=backend)
    return decided


def _refuse_kernels(backend: Backend) -> None:
    if backend == "triton":
        fact = (
            "saliency_gradient or distillation_weight asks for a gradient that the kernels of the scores do not have."
        )
        raise PhotonError("BACKEND_UNAVAILABLE", "triton", fact, "Use the backend auto or reference.")


def forced(decision: Schedule | None, keep: Tensor, layout: Layout) -> Schedule | None:
    """The decision with other keep flags; scores, threshold and probabilities stay those of the policy.

    Args:
        keep: bool [B, N], N the visual tokens of the branch with most, counted through all volumes of its prompt; of a
            branch with fewer the rest is not read. A branch may keep nothing.

    Raises:
        PhotonError: ``PROMPT_INVALID`` when they are of another type or number.
    """
    counts = torch.zeros_like(layout.own_lengths).index_add(0, layout.pair_branch, layout.pair_lengths)
    shape = (layout.num_branches, int(counts.max()) if layout.num_branches else 0)
    if keep.dtype != torch.bool or tuple(keep.shape) != shape:
        fact = f"they are {keep.dtype} {list(keep.shape)}, not bool {list(shape)} for these questions and their tokens."
        raise PhotonError("PROMPT_INVALID", "keep flags", fact, "Give a row a question and a column a visual token.")
    if decision is None:
        return None
    before = layout.pair_lengths.cumsum(0) - layout.pair_lengths
    first = before - before[layout.first_pairs[layout.pair_branch]]
    columns = torch.where(decision.valid, first[:, None] + torch.arange(layout.num_columns, device=keep.device), 0)
    return replace(decision, keep=decision.valid & keep[layout.pair_branch[:, None], columns])


def _of_pairs(scores: Tensor, layout: Layout) -> Tensor:
    """Scores [Tc] of context rows as a table [S, N], 0 in padding."""
    columns = torch.arange(layout.num_columns, device=scores.device)
    valid = columns < layout.pair_lengths[:, None]
    return torch.where(valid, scores[torch.where(valid, layout.pair_starts[:, None] + columns, 0)], 0.0)


def kept_tokens(decision: Schedule, mode: Mode, flip: Tensor | None = None, whole: Tensor | None = None) -> Tensor:
    """Visual tokens [S, N] that go on: all while soft, else the kept ones; for the branches in ``flip`` the others, for
    those in ``whole`` all."""
    if mode != "hard":
        return decision.valid
    keep = decision.keep
    if flip is not None:
        keep = torch.where(flip[decision.branch][:, None], decision.valid & ~keep, keep)
    if whole is not None:
        keep = torch.where(whole[decision.branch][:, None], decision.valid, keep)
    return keep


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
