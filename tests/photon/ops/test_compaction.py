"""Compaction: rows moved by one index list, bit for bit, both implementations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from photon.ops.compaction import reference
from photon.ops.compaction.op import compact
from photon.testing import poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
NUM_CONTEXT, NUM_BRANCH = 9, 4
ROWS = torch.tensor([0, 2, 3, 8, 9, 12, 3, 11, 1])
"""Of both sources, some twice, not in order."""
DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.complex128,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.bool,
]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def noise(shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits: NaNs of every kind among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return (torch.randint(2, tuple(shape), generator=generator) == 1).to(DEVICE)
    numbers = torch.randint(256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return numbers.view(dtype).squeeze(-1).to(DEVICE)


def sources(*tail: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    return noise((NUM_CONTEXT, *tail), dtype, seed), noise((NUM_BRANCH, *tail), dtype, seed + 1)


def bits(x: Tensor) -> list[int]:
    numbers: list[int] = x.contiguous().flatten()[:, None].view(torch.uint8).flatten().tolist()
    return numbers


def by_hand(context: Tensor, branch: Tensor, rows: Tensor) -> list[int]:
    """Bits of the rows, one row after another."""
    picked = [context[r] if r < len(context) else branch[r - len(context)] for r in rows.tolist()]
    return [number for row in picked for number in bits(row)]


def check(pairs: Sequence[tuple[Tensor, Tensor]], backend: str, rows: Tensor = ROWS) -> list[Tensor]:
    contexts, branches = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = compact(contexts, branches, rows.to(DEVICE), backend=backend)
    for out, (context, branch) in zip(found, pairs, strict=True):
        assert out.dtype == context.dtype and out.is_contiguous()
        assert out.shape == (rows.shape[0], *context.shape[1:])
        assert bits(out) == by_hand(context, branch, rows)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_table(backend: str) -> None:
    context = torch.tensor([[1, 2], [3, 4], [5, 6]], device=DEVICE)
    branch = torch.tensor([[7, 8], [9, 10]], device=DEVICE)
    (found,) = compact([context], [branch], torch.tensor([0, 2, 3, 4, 1], device=DEVICE), backend=backend)
    assert found.tolist() == [[1, 2], [5, 6], [7, 8], [9, 10], [3, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_every_type(dtype: torch.dtype, backend: str) -> None:
    check([sources(5, dtype=dtype)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 3, 7, 12, 32, 33, 63, 64, 1000])
def test_widths(width: int, backend: str) -> None:
    check([sources(width, dtype=torch.bfloat16)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_tensors_at_once(backend: str) -> None:
    """Hidden rows, a rotary table, positions, a column of numbers, keys and values, rows without elements."""
    pairs = [
        sources(300),
        sources(8, dtype=torch.float32, seed=2),
        sources(3, dtype=torch.int64, seed=4),
        sources(dtype=torch.float16, seed=6),
        *(sources(2, 16, dtype=torch.bfloat16, seed=seed) for seed in range(8, 16, 2)),
        sources(0),
    ]
    found = check(pairs, backend)
    assert len({x.untyped_storage().data_ptr() for x in found if x.numel()}) == len(pairs) - 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_sources(backend: str) -> None:
    """Rows apart in memory, rows that are no range, a source and its branch with different strides."""
    context, branch = sources(6, 8)
    wide, _ = sources(12, 8, seed=3)
    check([(wide[:, 2:8], branch)], backend)
    check([(context.transpose(1, 2), branch.transpose(1, 2))], backend)
    check([(context[:, :, ::2], branch[:, :, ::2].contiguous())], backend)
    check([(context[:, 1], branch[:, 1]), (context[:, 1, 3], branch[:, 2, 1])], backend)
    check([(context.flatten(1).t().contiguous().t(), branch.flatten(1))], backend)
    check([(context[:1].expand(NUM_CONTEXT, 6, 8), branch)], backend)
    check([(context, branch)], backend, rows=torch.stack([ROWS, ROWS], 1)[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_sources_at_any_address(offset: int, backend: str) -> None:
    """Words are no wider than the start of every tensor allows."""
    flat = noise((NUM_CONTEXT * 16 + 16,), torch.uint8)
    context = flat[offset : offset + NUM_CONTEXT * 16].view(NUM_CONTEXT, 16)
    check([(context, noise((NUM_BRANCH, 16), torch.uint8, seed=1))], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("num_context", "num_branch", "rows"),
    [
        (3, 2, []),
        (3, 0, [2, 0]),
        (0, 3, [1, 2, 2]),
        (0, 0, []),
        (1, 1, [1]),
        (1, 1, [0]),
        (3, 2, [0, 1, 2]),
        (3, 2, [3, 4]),
        (3, 2, [3, 0, 4, 1] * 9),
    ],
)
def test_edges(num_context: int, num_branch: int, rows: list[int], backend: str) -> None:
    pair = noise((num_context, 5), torch.float32), noise((num_branch, 5), torch.float32, seed=1)
    check([pair, pair], backend, rows=torch.tensor(rows, dtype=torch.long))


def test_no_tensors() -> None:
    assert compact([], [], ROWS) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_nobody_takes_are_not_read(backend: str) -> None:
    context = torch.full((NUM_CONTEXT, 3), torch.nan, device=DEVICE)
    branch = torch.full((NUM_BRANCH, 3), torch.nan, device=DEVICE)
    context[2], branch[1] = 5.0, 7.0
    rows = torch.tensor([2, NUM_CONTEXT + 1], device=DEVICE)
    (found,) = compact([context], [branch], rows, backend=backend)
    assert found.tolist() == [[5.0] * 3, [7.0] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@pytest.mark.parametrize(("num_context", "num_branch"), [(9, 4), (0, 4), (9, 0)])
def test_reference_without_a_look_at_the_rows(dtype: torch.dtype, num_context: int, num_branch: int) -> None:
    """The form that a GPU takes, on any device."""
    context, branch = noise((num_context, 2, 3), dtype), noise((num_branch, 2, 3), dtype, seed=1)
    rows = torch.tensor([r for r in ROWS.tolist() if r < num_context + num_branch], device=DEVICE)
    (found,) = reference.move_both([(context, branch)], rows, num_context)
    assert bits(found) == by_hand(context, branch, rows)


def test_kernel_moves_wide_rows_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from photon.ops.compaction import kernels

    monkeypatch.setattr(kernels, "PIECE_BYTES", 32)
    monkeypatch.setattr(kernels, "ROWS", 4)
    check([sources(20), sources(3, 8, seed=2), sources(1, seed=4)], "triton")


def test_pairs_that_do_not_fit_are_refused() -> None:
    context, branch = sources(4)
    with pytest.raises(ValueError, match="do not fit"):
        compact([context], [branch.half()], ROWS)
    with pytest.raises(ValueError, match="do not fit"):
        compact([context], [branch[:, :3]], ROWS)
    with pytest.raises(ValueError, match="as many"):
        compact([context, context[1:]], [branch, branch], ROWS)
    with pytest.raises(ValueError, match="zip"):
        compact([context], [], ROWS)
    with pytest.raises(ValueError, match="listed on"):
        compact([context], [branch.to("meta")], ROWS.to(DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient(backend: str) -> None:
    context = torch.ones(NUM_CONTEXT, 2, device=DEVICE, requires_grad=True)
    (found,) = compact([context], [torch.ones(NUM_BRANCH, 2, device=DEVICE)], ROWS.to(DEVICE), backend=backend)
    with pytest.raises(RuntimeError, match="autograd"):
        found.sum().backward()


@pytest.mark.parametrize("implementation", BACKENDS)
def test_registered_operator(implementation: str) -> None:
    one, other = sources(3, dtype=torch.int32), sources(2, 4, dtype=torch.int64)
    for pairs in ([one], [one, other]):
        lists = [[pair[side] for pair in pairs] for side in (0, 1)]
        torch.library.opcheck(torch.ops.photon.compact, (*lists, ROWS.to(DEVICE), implementation))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_and_exports(backend: str) -> None:
    class Move(torch.nn.Module):
        def forward(self, context: Tensor, branch: Tensor, rows: Tensor) -> list[Tensor]:
            return compact([context, context[:, 0]], [branch, branch[:, 0]], rows, backend=backend)

    context, branch = torch.randn(NUM_CONTEXT, 3, device=DEVICE), torch.randn(NUM_BRANCH, 3, device=DEVICE)
    inputs = (context, branch, ROWS.to(DEVICE))
    expected = Move()(*inputs)
    compiled = torch.compile(Move(), fullgraph=True, backend="aot_eager")(*inputs)
    exported = torch.export.export(Move(), inputs).module()(*inputs)
    for found in (compiled, exported):
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
