"""Where the pruning step finds its rows: all that is known of a batch before its scores.

Letters: C contexts, B branches (questions), S pairs of a branch and one of its volumes, N visual tokens of the largest
volume, Tc context rows, Tb branch rows. Tables of scores are [S, N]; the last entries of a shorter row are padding.

A branch's *entries* are the rows of its unpruned sequence: all rows of its context, then its own. Entries are numbered
branch after branch; M is their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Ranges of rows. Tensors are int64; counts are on the host, so that sizes need no look at the device.

    Attributes:
        context_starts, context_lengths: [B] the rows of the branch's context among all context rows.
        own_starts, own_lengths: [B] its own rows among all branch rows.
        question_lengths: [B] how many of its own rows, from the first, are the question.
        first_pairs: [B] its first row in tables [S, N].
        pair_branch: [S] branch of each pair, ascending.
        pair_starts, pair_lengths: [S] context rows that are the visual tokens of the pair's volume.
        context_slots: [Tc] place of a visual token in its own context's part of a table [S, N], flattened; -1 for text.
        row_context: [Tc] context of each row.
        branch_bounds, branches: [C + 1], [B] the branches of each context, ascending.
        num_columns: N. longest_question: most question tokens of a branch. num_entries: M.
    """

    context_starts: Tensor
    context_lengths: Tensor
    own_starts: Tensor
    own_lengths: Tensor
    question_lengths: Tensor
    first_pairs: Tensor
    pair_branch: Tensor
    pair_starts: Tensor
    pair_lengths: Tensor
    context_slots: Tensor
    row_context: Tensor
    branch_bounds: Tensor
    branches: Tensor
    num_columns: int
    longest_question: int
    num_entries: int

    @property
    def num_branches(self) -> int:
        """B."""
        return self.own_lengths.shape[0]

    @property
    def num_pairs(self) -> int:
        """S."""
        return self.pair_branch.shape[0]

    def volumes(self) -> list[tuple[int, int]]:
        """First context row and number of visual tokens of every volume, asked about or not; waits for a GPU."""
        slots = self.context_slots.tolist()
        rows = [row for row, slot in enumerate(slots) if slot >= 0]
        bounds = [place for place, row in enumerate(rows) if slots[row] % self.num_columns == 0]
        ends = [*bounds[1:], len(rows)]
        return [(rows[first], end - first) for first, end in zip(bounds, ends, strict=False)]

    @classmethod
    def build(
        cls,
        context_lengths: Sequence[int],
        volumes: Sequence[Sequence[tuple[int, int]]],
        own_lengths: Sequence[int],
        question_lengths: Sequence[int],
        branch_context: Sequence[int],
    ) -> Layout:
        """Lay out a batch, on the CPU.

        Args:
            context_lengths: [C] rows of each context.
            volumes: for each context, first row (counted within the context) and number of the visual tokens of each
                of its volumes.
            own_lengths, question_lengths: [B] rows of each branch, and how many of them are the question.
            branch_context: [B] context of each branch.
        """
        context_starts = _starts(context_lengths)
        num_columns = max((count for own in volumes for _, count in own), default=0)
        num_volumes = [len(volumes[context]) for context in branch_context]
        pairs = [(branch, *volume) for branch, context in enumerate(branch_context) for volume in volumes[context]]
        grouped = [[b for b, own in enumerate(branch_context) if own == c] for c in range(len(context_lengths))]

        def of_context(values: Sequence[int]) -> Tensor:
            return torch.tensor([values[context] for context in branch_context], dtype=torch.long)

        return cls(
            context_starts=of_context(context_starts),
            context_lengths=of_context(context_lengths),
            own_starts=_column(_starts(own_lengths)),
            own_lengths=_column(own_lengths),
            question_lengths=_column(question_lengths),
            first_pairs=_column(_starts(num_volumes)),
            pair_branch=_column([branch for branch, _, _ in pairs]),
            pair_starts=_column([context_starts[branch_context[branch]] + start for branch, start, _ in pairs]),
            pair_lengths=_column([count for _, _, count in pairs]),
            context_slots=_context_slots(context_lengths, volumes, num_columns),
            row_context=torch.repeat_interleave(torch.arange(len(context_lengths)), _column(context_lengths)),
            branch_bounds=_column([0, *accumulate(len(own) for own in grouped)]),
            branches=_column([branch for own in grouped for branch in own]),
            num_columns=num_columns,
            longest_question=max(question_lengths, default=0),
            num_entries=sum(own_lengths) + sum(context_lengths[context] for context in branch_context),
        )

    def to(self, device: torch.device | str) -> Layout:
        """The layout with every tensor on ``device``."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)}
        return replace(self, **moved)


def _column(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)


def _starts(lengths: Sequence[int]) -> list[int]:
    return [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]


def _context_slots(
    context_lengths: Sequence[int], volumes: Sequence[Sequence[tuple[int, int]]], num_columns: int
) -> Tensor:
    slots = torch.full((sum(context_lengths),), -1, dtype=torch.long)
    for start, own in zip(_starts(context_lengths), volumes, strict=True):
        for number, (first, count) in enumerate(own):
            slots[start + first : start + first + count] = number * num_columns + torch.arange(count)
    return slots
