"""Keep flags to the list of rows that go on: each branch's entries without its dropped visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from photon.ops import backend as backends
from photon.ops.layout import Layout
from photon.ops.selection import reference
from photon.ops.selection.reference import Buffers, Places


@dataclass(frozen=True)
class Selection:
    """Rows after pruning, branch after branch: text of the context, kept visual tokens, the branch's own rows.

    Letters as in :mod:`photon.ops.layout`; R rows remain.

    Attributes:
        rows: int64 [R] row of the context rows followed by the branch rows that each output row takes.
        slots: int64 [R] flattened [S, N] index of the row's visual token, -1 for text.
        positions: int64 [M] output row of every entry, -1 for a dropped one.
        lengths: int64 [B] output rows of each branch. host_lengths: the same numbers.
        entry_starts: int64 [B] first entry of each branch.
        branch_rows: int64 [Tb] output row of each of the branches' own rows.
    """

    rows: Tensor
    slots: Tensor
    positions: Tensor
    lengths: Tensor
    host_lengths: tuple[int, ...]
    entry_starts: Tensor
    branch_rows: Tensor


def select_rows(keep: Tensor | None, layout: Layout, *, backend: str = "auto") -> Selection:
    """Lay out the rows of every branch after pruning. Text and a branch's own rows always stay.

    Args:
        keep: bool [S, N] visual tokens kept, padding is not read; None when there is no visual token anywhere.
        layout: on the device of ``keep``.
        backend: "auto", "reference" or "triton".

    Raises:
        PhotonError: ``BACKEND_UNKNOWN`` or ``BACKEND_UNAVAILABLE``.
    """
    places = [getattr(layout, name) for name in Places._fields]
    implementation = backends.resolve(backend, layout.own_lengths.device)
    rows, slots, positions, table, branch_rows = torch.ops.photon.select_rows(
        keep, places, layout.num_entries, implementation
    )
    # The one synchronisation of the pruning step: how many rows remain is the size of everything that follows, and
    # the lengths are the bounds of the next layers' attention.
    host_lengths, own_lengths, _ = table.tolist()
    return Selection(
        rows=rows[: sum(host_lengths)],
        slots=slots[: sum(host_lengths)],
        positions=positions,
        lengths=table[0],
        host_lengths=tuple(host_lengths),
        entry_starts=table[2],
        branch_rows=branch_rows[: sum(own_lengths)],
    )


@torch.library.custom_op("photon::select_rows", mutates_args=())
def _select_rows(
    keep: Tensor | None, places: Sequence[Tensor], num_entries: int, implementation: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Buffers as long as if nothing were dropped, so that their size needs no look at the device.

    ``places`` are those of :class:`Places`, in order.

    Returns:
        rows [M] with 0 behind the R rows that remain, slots [M] with -1 behind them, positions [M], a table [3, B] of
        each branch's output rows, own rows and first entry, and branch_rows [M] with 0 behind the Tb own rows.
    """
    if implementation == "triton":
        from photon.ops.selection import kernels

        return kernels.select_rows(keep, Places(*places), num_entries)
    return reference.select_rows(keep, Places(*places), num_entries)


@_select_rows.register_fake
def _(keep: Tensor | None, places: Sequence[Tensor], num_entries: int, implementation: str) -> Buffers:
    own_starts = Places(*places).own_starts
    rows, slots, positions, branch_rows = (own_starts.new_empty(num_entries) for _ in range(4))
    return rows, slots, positions, own_starts.new_empty(3, own_starts.shape[0]), branch_rows
