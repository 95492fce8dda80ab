"""Selection: which rows go on and where they land, both implementations, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from photon.errors import PhotonError
from photon.ops.layout import Layout
from photon.ops.selection.op import Selection, select_rows
from photon.ops.selection.reference import Places
from photon.testing import poisoned_memory, ragged_layouts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
WIDTHS = (1, 3, 7, 12, 32, 33, 63, 64, 1000)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def flags(layout: Layout, kept: str, seed: int = 0) -> Tensor | None:
    """Keep flags [S, N], True in padding, where nobody should look."""
    if not layout.num_pairs:
        return None
    shape = (layout.num_pairs, layout.num_columns)
    some = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    column = torch.arange(layout.num_columns)
    keep = {"all": torch.ones_like(some), "none": torch.zeros_like(some), "some": some, "one": column == 0}[kept]
    return keep | (column >= layout.pair_lengths[:, None])


def walked(layout: Layout, keep: Tensor | None) -> SimpleNamespace:
    """The rows that go on, by walking through every branch's entries."""
    num_context_rows = layout.context_slots.shape[0]
    rows, slots, positions, lengths, starts, branch_rows = [], [], [], [], [], []
    for b in range(layout.num_branches):
        before = len(rows)
        starts.append(len(positions))
        for row in range(int(layout.context_starts[b]), int(layout.context_starts[b] + layout.context_lengths[b])):
            within = int(layout.context_slots[row])
            slot = int(layout.first_pairs[b]) * layout.num_columns + within if within >= 0 else -1
            stays = slot < 0 or keep is None or bool(keep.flatten()[slot])
            positions.append(len(rows) if stays else -1)
            if stays:
                rows.append(row)
                slots.append(slot)
        for own in range(int(layout.own_starts[b]), int(layout.own_starts[b] + layout.own_lengths[b])):
            positions.append(len(rows))
            branch_rows.append(len(rows))
            rows.append(num_context_rows + own)
            slots.append(-1)
        lengths.append(len(rows) - before)
    return SimpleNamespace(
        rows=rows, slots=slots, positions=positions, lengths=lengths, entry_starts=starts, branch_rows=branch_rows
    )


def check(found: Selection, expected: SimpleNamespace) -> None:
    for name, values in vars(expected).items():
        tensor = getattr(found, name)
        assert tensor.dtype == torch.long and tensor.device.type == DEVICE, name
        assert tensor.tolist() == values, name
    assert found.host_lengths == tuple(expected.lengths)


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend: str) -> None:
    """Two scans; the second question is about the first of them, which has two volumes."""
    layout = Layout.build([3, 6], [[(1, 2)], [(1, 2), (4, 1)]], [2, 1], [2, 1], [1, 0])
    keep = torch.tensor([[False, True], [False, False], [True, False]])
    found = select_rows(keep.to(DEVICE), layout.to(DEVICE), backend=backend)
    expected = SimpleNamespace(
        rows=[3, 5, 6, 8, 9, 10, 0, 1, 11],
        slots=[-1, 1, -1, -1, -1, -1, -1, 4, -1],
        positions=[0, -1, 1, 2, -1, 3, 4, 5, 6, 7, -1, 8],
        lengths=[6, 3],
        entry_starts=[0, 8],
        branch_rows=[4, 5, 8],
    )
    check(found, expected)
    assert found.host_lengths == (6, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kept", ["all", "none", "some", "one"])
@pytest.mark.parametrize("name", ragged_layouts())
def test_walk_through_the_entries(name: str, kept: str, backend: str) -> None:
    layout = ragged_layouts()[name]
    keep = flags(layout, kept)
    found = select_rows(None if keep is None else keep.to(DEVICE), layout.to(DEVICE), backend=backend)
    check(found, walked(layout, keep))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_widths(width: int, backend: str) -> None:
    layout = Layout.build([width + 2], [[(1, width)]], [3, 1], [2, 1], [0, 0])
    keep = flags(layout, "some", seed=width)
    assert keep is not None
    check(select_rows(keep.to(DEVICE), layout.to(DEVICE), backend=backend), walked(layout, keep))


@pytest.mark.parametrize("chunk", [4, 8, 32])
@pytest.mark.parametrize("name", ["two volumes of different sizes", "branches in any order of contexts"])
def test_chunks_of_the_kernel(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Branches longer than what a program places, tables wider than what it counts at once."""
    from photon.ops.selection import kernels

    monkeypatch.setattr(kernels, "CHUNK", chunk)
    monkeypatch.setattr(kernels, "COUNTED", chunk)
    layout = ragged_layouts()[name]
    for seed in range(3):
        keep = flags(layout, "some", seed)
        assert keep is not None
        check(select_rows(keep.to(DEVICE), layout.to(DEVICE), backend="triton"), walked(layout, keep))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_flags_nothing_is_visual(backend: str) -> None:
    layout = ragged_layouts()["two volumes of different sizes"]
    found = select_rows(None, layout.to(DEVICE), backend=backend)
    assert found.rows.tolist() == [*range(12), 12, 13, *range(12), 14]
    assert found.slots.tolist() == [-1] * 27


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_flags(backend: str) -> None:
    layout = ragged_layouts()["branches in any order of contexts"]
    keep = flags(layout, "some")
    assert keep is not None
    strided = keep.t().contiguous().t().to(DEVICE)
    assert not strided.is_contiguous()
    check(select_rows(strided, layout.to(DEVICE), backend=backend), walked(layout, keep))


def buffers(layout: Layout, keep: Tensor | None, implementation: str) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = torch.ops.photon.select_rows(*arguments(layout, keep), implementation)
    return result


def arguments(layout: Layout, keep: Tensor | None) -> tuple[object, ...]:
    layout = layout.to(DEVICE)
    places = [getattr(layout, name) for name in Places._fields]
    return None if keep is None else keep.to(DEVICE), places, layout.num_entries


@pytest.mark.parametrize("name", ragged_layouts())
def test_buffers_are_written_to_the_end(name: str) -> None:
    """What lies behind the rows that remain is 0, and -1 for slots: the same in both, and in every run."""
    layout = ragged_layouts()[name]
    keep = flags(layout, "some")
    num_rows, num_own = len(walked(layout, keep).rows), int(layout.own_lengths.sum())
    for implementation in BACKENDS:
        rows, slots, _, _, branch_rows = found = buffers(layout, keep, implementation)
        assert not rows[num_rows:].any() and not branch_rows[num_own:].any()
        assert bool((slots[num_rows:] == -1).all())
        again = buffers(layout, keep, implementation)
        assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", ["branches in any order of contexts", "no volume", "no branch"])
def test_registered_operator(name: str, implementation: str) -> None:
    layout = ragged_layouts()[name]
    torch.library.opcheck(torch.ops.photon.select_rows, (*arguments(layout, flags(layout, "some")), implementation))


@pytest.mark.parametrize("implementation", BACKENDS)
def test_compiles_and_exports(implementation: str) -> None:
    layout = ragged_layouts()["branches in any order of contexts"]
    keep = flags(layout, "some")
    assert keep is not None

    class Select(torch.nn.Module):
        def forward(self, keep: Tensor) -> tuple[Tensor, ...]:
            return buffers(layout, keep, implementation)

    expected = Select()(keep.to(DEVICE))
    compiled = torch.compile(Select(), fullgraph=True, backend="aot_eager")(keep.to(DEVICE))
    exported = torch.export.export(Select(), (keep.to(DEVICE),)).module()(keep.to(DEVICE))
    for found in (compiled, exported):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_unknown_backend() -> None:
    layout = ragged_layouts()["no volume"]
    with pytest.raises(PhotonError) as caught:
        select_rows(None, layout, backend="cuda")
    assert caught.value.code == "BACKEND_UNKNOWN"
