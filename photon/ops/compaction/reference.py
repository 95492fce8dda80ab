"""Compaction in plain PyTorch: nothing but the rows that are taken is read or written."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def compact(contexts: Sequence[Tensor], branches: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """The registered operator's contract."""
    pairs = list(zip(contexts, branches, strict=True))
    num_context_rows = contexts[0].shape[0]
    if rows.is_cpu:
        runs = _runs(rows, num_context_rows)
        return [_move_runs(*pair, rows.shape[0], runs) for pair in pairs]
    return move_both(pairs, rows, num_context_rows)


def _runs(rows: Tensor, num_context_rows: int) -> list[tuple[slice, bool, Tensor]]:
    """Consecutive rows from one source: where they go, whether from the branch, and which rows of it they are."""
    is_own = rows >= num_context_rows
    bounds = [0, *((is_own[1:] != is_own[:-1]).nonzero().flatten() + 1).tolist(), rows.shape[0]]
    runs = []
    for start, end in pairwise(bounds):
        if start < end:
            own = bool(is_own[start])
            runs.append((slice(start, end), own, rows[start:end] - num_context_rows * own))
    return runs


def _move_runs(context: Tensor, branch: Tensor, num_rows: int, runs: list[tuple[slice, bool, Tensor]]) -> Tensor:
    out = context.new_empty(num_rows, *context.shape[1:])
    for places, own, rows in runs:
        torch.index_select(branch if own else context, 0, rows, out=out[places])
    return out


def move_both(pairs: Sequence[tuple[Tensor, Tensor]], rows: Tensor, num_context_rows: int) -> list[Tensor]:
    """Without waiting for a GPU to tell where the runs are: both sources are read, and one is taken."""
    is_own = rows >= num_context_rows
    context_rows, own_rows = torch.where(is_own, 0, rows), torch.where(is_own, rows - num_context_rows, 0)
    outputs = []
    for context, branch in pairs:
        if not context.shape[0]:
            outputs.append(branch.index_select(0, own_rows))
        elif not branch.shape[0]:
            outputs.append(context.index_select(0, context_rows))
        else:
            chosen = is_own.view(-1, *[1] * (context.dim() - 1))
            outputs.append(torch.where(chosen, branch.index_select(0, own_rows), context.index_select(0, context_rows)))
    return outputs
