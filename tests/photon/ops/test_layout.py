"""Ranges of rows of a batch, by hand."""

from __future__ import annotations

import torch

from photon.ops.layout import Layout


def test_three_contexts_and_four_branches() -> None:
    """Contexts of 5 (two volumes), 0 and 4 rows (one volume); branches 0 and 3 ask the first, 1 the last, 2 none."""
    layout = Layout.build([5, 0, 4], [[(1, 2), (3, 1)], [], [(0, 3)]], [2, 3, 1, 2], [1, 3, 0, 2], [0, 2, 1, 0])
    assert layout.context_starts.tolist() == [0, 5, 5, 0] and layout.context_lengths.tolist() == [5, 4, 0, 5]
    assert layout.own_starts.tolist() == [0, 2, 5, 6] and layout.own_lengths.tolist() == [2, 3, 1, 2]
    assert layout.question_lengths.tolist() == [1, 3, 0, 2] and layout.longest_question == 3
    assert layout.first_pairs.tolist() == [0, 2, 3, 3]
    assert layout.pair_branch.tolist() == [0, 0, 1, 3, 3]
    assert layout.pair_starts.tolist() == [1, 3, 5, 1, 3] and layout.pair_lengths.tolist() == [2, 1, 3, 2, 1]
    assert layout.num_columns == 3 and layout.num_pairs == 5 and layout.num_branches == 4
    assert layout.context_slots.tolist() == [-1, 0, 1, 3, -1, 0, 1, 2, -1]
    assert layout.row_context.tolist() == [0] * 5 + [2] * 4
    assert layout.branch_bounds.tolist() == [0, 2, 3, 4] and layout.branches.tolist() == [0, 3, 2, 1]
    assert layout.num_entries == 7 + 7 + 1 + 7
    assert layout.volumes() == [(1, 2), (3, 1), (5, 3)]


def test_no_volume_and_no_branch() -> None:
    text = Layout.build([0], [[]], [3], [2], [0])
    assert (text.num_pairs, text.num_columns, text.num_entries) == (0, 0, 3)
    nobody = Layout.build([4], [[(1, 2)]], [], [], [])
    assert (nobody.num_pairs, nobody.num_branches, nobody.num_entries, nobody.longest_question) == (0, 0, 0, 0)
    assert nobody.context_slots.tolist() == [-1, 0, 1, -1]
    assert text.volumes() == [] and nobody.volumes() == [(1, 2)]
    assert all(x.dtype == torch.long for x in vars(nobody).values() if isinstance(x, torch.Tensor))


def test_moving_keeps_numbers_and_moves_every_tensor() -> None:
    layout = Layout.build([3], [[(0, 2)]], [1], [1], [0]).to("meta")
    assert all(x.is_meta for x in vars(layout).values() if isinstance(x, torch.Tensor))
    assert (layout.num_columns, layout.num_entries, layout.longest_question) == (2, 4, 1)
