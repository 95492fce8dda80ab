"""The packing operator: rows forward, row gradients and probability gradients backward, both implementations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor

from photon.ops.layout import Layout
from photon.ops.selection.op import Selection, select_rows
from photon.ops.surrogate.op import pack
from photon.ops.surrogate.reference import Places, probability_gradient
from photon.testing import poisoned_memory, ragged_layouts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
RULES = ("paper", "taylor")
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


class Case:
    """A batch with random rows, gradients and probabilities; what must not be read is NaN."""

    def __init__(
        self,
        layout: Layout,
        *,
        dtype: torch.dtype = torch.float32,
        width: int = 5,
        seed: int = 0,
        kept: Literal["nothing", "half", "everything"] = "half",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        num_context, num_branch = layout.context_slots.shape[0], int(layout.own_lengths.sum())
        self.valid = torch.arange(layout.num_columns) < layout.pair_lengths[:, None]
        share = {"nothing": 0.0, "half": 0.5, "everything": 1.0}[kept]
        self.keep = (torch.rand(self.valid.shape, generator=generator) < share) & self.valid
        p = torch.rand(self.valid.shape, generator=generator).masked_fill(~self.valid, torch.nan)
        flags = self.keep.to(DEVICE) if layout.num_pairs else None
        self.layout = layout.to(DEVICE)
        self.selection = select_rows(flags, self.layout, backend="reference")
        x = torch.randn(num_context + num_branch, width, generator=generator).to(dtype)
        is_taken = torch.zeros(len(x), dtype=torch.bool).index_fill(0, self.selection.rows.cpu(), True)
        x[~is_taken] = torch.nan
        self.context = x[:num_context].to(DEVICE).requires_grad_()
        self.branch = x[num_context:].to(DEVICE).requires_grad_()
        self.p = p.to(DEVICE).requires_grad_() if layout.num_pairs else None
        self.grad = torch.randn(self.selection.rows.shape[0], width, generator=generator).to(DEVICE, dtype)

    def pack(self, rule: str, backend: str) -> Tensor:
        return pack(self.context, self.branch, self.p, self.selection, self.layout, rule=rule, backend=backend)

    def gradients(self, rule: str, backend: str) -> tuple[Tensor, ...]:
        inputs = (self.context, self.branch) if self.p is None else (self.context, self.branch, self.p)
        return torch.autograd.grad(self.pack(rule, backend), inputs, self.grad)

    def expected(self, rule: str, exact: torch.dtype = torch.float64) -> list[Tensor]:
        """The gradients row by row in plain loops, on the CPU in ``exact``."""
        selection, grad = self.selection, self.grad.cpu().to(exact)
        x = torch.cat([self.context, self.branch]).detach().cpu().to(exact)
        total = torch.zeros_like(x)
        alignment, magnitude = (torch.zeros(self.valid.shape, dtype=exact) for _ in range(2))
        for out, (row, slot) in enumerate(zip(selection.rows.tolist(), selection.slots.tolist(), strict=True)):
            total[row] += grad[out]
            if slot >= 0:
                alignment.view(-1)[slot] = (x[row] * grad[out]).sum()
                magnitude.view(-1)[slot] = (x[row] * grad[out]).abs().sum()
        rows = [total[: len(self.context)], total[len(self.context) :]]
        if self.p is None:
            return rows
        p = self.p.detach().cpu().to(exact)
        return [*rows, probability_gradient(alignment, magnitude, p, self.valid, rule=rule)]


def far(found: Tensor, expected: Tensor) -> float:
    """Largest distance; a number that is not finite is infinitely far."""
    distance = (found.detach().cpu().double() - expected.double()).abs()
    return float(distance.nan_to_num(nan=torch.inf).max()) if distance.numel() else 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "rule"), zip(ragged_layouts(), RULES * 6, strict=False))
def test_edges(name: str, rule: str, backend: str) -> None:
    """Rows exactly, gradients as loops in double precision give them."""
    case = Case(ragged_layouts()[name])
    rows = torch.cat([case.context, case.branch]).detach()[case.selection.rows]
    assert torch.equal(case.pack(rule, backend), rows)
    for found, expected in zip(case.gradients(rule, backend), case.expected(rule), strict=True):
        assert found.shape == expected.shape and found.device.type == DEVICE
        assert far(found, expected) < 2e-6


@pytest.mark.parametrize(
    ("width", "rule"), [(1, "paper"), (7, "taylor"), (33, "paper"), (64, "taylor"), (600, "paper")]
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_kernel_is_as_near_to_double_precision_as_the_reference(width: int, dtype: torch.dtype, rule: str) -> None:
    """Only the order of the sums differs: at most twice the reference's error and a few roundings."""
    case = Case(ragged_layouts()["two volumes of different sizes"], dtype=dtype, width=width, seed=width)
    reference, kernel = (case.gradients(rule, backend) for backend in BACKENDS)
    for name, ours, theirs, exact in zip(
        ("context", "branch", "p"), kernel, reference, case.expected(rule), strict=True
    ):
        assert ours.dtype == theirs.dtype == (torch.float32 if name == "p" else dtype)
        slack = 8 * torch.finfo(torch.float32).eps * max(float(exact.abs().max()), 1.0)
        assert far(ours, exact) <= 2 * far(theirs, exact) + slack, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_gradients_of_half_precision_rows_add_up_in_float32(dtype: torch.dtype, backend: str) -> None:
    """Twenty questions take the same rows: rounding after each of them would lose digits."""
    case = Case(ragged_layouts()["many questions about one scan"], dtype=dtype)
    total = torch.zeros(len(case.context), 5)
    for out, row in enumerate(case.selection.rows.tolist()):
        if row < len(total):
            total[row] += case.grad[out].cpu().float()
    found, own, _ = case.gradients("taylor", backend)
    assert torch.equal(found.cpu(), total.to(dtype))
    assert torch.equal(own, case.grad[case.selection.branch_rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_gradients_by_finite_differences(backend: str) -> None:
    layout = Layout.build([4], [[(1, 2)]], [1, 2], [1, 1], [0, 0]).to(DEVICE)
    keep = torch.tensor([[True, False], [True, True]], device=DEVICE)
    selection, p = select_rows(keep, layout), torch.rand(2, 2, device=DEVICE)
    rows = [torch.randn(n, 3, dtype=torch.float64, device=DEVICE, requires_grad=True) for n in (4, 3)]
    assert torch.autograd.gradcheck(
        lambda context, branch: pack(context, branch, p, selection, layout, rule="paper", backend=backend), rows
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["rows", "p", "nothing of p", "no p"])
def test_only_what_is_asked_for(wanted: str, backend: str) -> None:
    case = Case(ragged_layouts()["branches in any order of contexts"])
    assert case.p is not None
    full = case.gradients("paper", backend)
    if wanted == "p":
        case.context, case.branch = case.context.detach(), case.branch.detach()
        (found,) = torch.autograd.grad(case.pack("paper", backend), (case.p,), case.grad)
        assert torch.equal(found, full[2])
        return
    if wanted == "nothing of p":
        case.p = case.p.detach()
    if wanted == "no p":
        case.p = None
    y = case.pack("paper", backend)
    assert torch.equal(y, torch.cat([case.context, case.branch])[case.selection.rows])
    found = torch.autograd.grad(y, (case.context, case.branch), case.grad)
    assert all(torch.equal(*pair) for pair in zip(found, full[:2], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_refused(backend: str) -> None:
    case = Case(ragged_layouts()["one question"])
    rows = case.branch
    for branch in (rows.half(), rows[:, :3], rows.to("meta")):
        case.branch = branch
        with pytest.raises(ValueError, match="rows o"):
            case.pack("paper", backend)
    case.branch = rows
    with pytest.raises(ValueError, match="rules"):
        case.pack("Paper", backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["two volumes of different sizes", "branches in any order of contexts"])
@pytest.mark.parametrize("kept", ["nothing", "everything"])
def test_from_nothing_kept_to_everything(kept: Literal["nothing", "everything"], name: str, backend: str) -> None:
    case = Case(ragged_layouts()[name], kept=kept)
    is_visual = case.selection.slots >= 0
    assert int(is_visual.sum()) == (int(case.valid.sum()) if kept == "everything" else 0)
    for found, expected in zip(case.gradients("taylor", backend), case.expected("taylor"), strict=True):
        assert far(found, expected) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    case = Case(ragged_layouts()["branches in any order of contexts"])
    assert case.p is not None
    case.grad = case.grad[:1].expand_as(case.grad)
    expected = case.gradients("taylor", backend)
    wide = torch.cat([case.context, case.context], dim=1).detach()[:, :5].requires_grad_()
    turned = case.branch.detach().t().contiguous().t().requires_grad_()
    tall = case.p.detach().t().contiguous().t().requires_grad_()
    assert not any(x.is_contiguous() for x in (case.grad, wide, turned, tall))
    case.context, case.branch, case.p = wide, turned, tall
    found = case.gradients("taylor", backend)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    columns = case.grad.t().contiguous().t()
    case.grad = columns
    assert all(torch.equal(*pair) for pair in zip(case.gradients("taylor", backend), expected, strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_tiles_of_the_kernels(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More questions about a scan, and more tokens in a row of the table, than are looked at together."""
    from photon.ops.surrogate import kernels

    monkeypatch.setattr(kernels, "TILE", 2)
    monkeypatch.setattr(kernels, "COLUMNS", 2)
    for name in ("many questions about one scan", "two volumes of different sizes"):
        case = Case(ragged_layouts()[name])
        for found, expected in zip(case.gradients(rule, "triton"), case.expected(rule), strict=True):
            assert far(found, expected) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rule", RULES)
def test_a_gradient_that_is_not_finite_is_not_hidden(rule: str, backend: str) -> None:
    """It reaches the probabilities of its own volume and question, where a loss scaler sees it, and no other."""
    case = Case(ragged_layouts()["two volumes of different sizes"])
    place = int((case.selection.slots >= 0).nonzero()[0])
    pair = int(case.selection.slots[place]) // case.layout.num_columns
    case.grad[place, 0] = torch.nan
    found = case.gradients(rule, backend)[2].cpu()
    is_hit = torch.arange(len(found)) == pair
    assert bool(found[is_hit][case.valid[is_hit]].isnan().all())
    assert bool(found[~is_hit].isfinite().all()) and not found[~case.valid].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend: str) -> None:
    case = Case(ragged_layouts()["many questions about one scan"], dtype=torch.bfloat16, width=40)
    first, second = (case.gradients("paper", backend) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def places(selection: Selection, layout: Layout) -> list[Tensor]:
    own = [getattr(selection, name) for name in Places._fields[:4]]
    return own + [getattr(layout, name) for name in Places._fields[4:]]


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("name", ["two volumes of different sizes", "no volume"])
def test_registered_operators(name: str, implementation: str) -> None:
    case = Case(ragged_layouts()[name])
    context, branch = (x.detach().nan_to_num().requires_grad_() for x in (case.context, case.branch))
    p = None if case.p is None else case.p.detach().nan_to_num().requires_grad_()
    where = places(case.selection, case.layout)
    torch.library.opcheck(torch.ops.photon.pack, (context, branch, p, where, "paper", implementation))
    inputs = (case.grad, context.detach(), branch.detach(), None if p is None else p.detach(), where)
    torch.library.opcheck(torch.ops.photon.pack_backward, (*inputs, "taylor", implementation))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_and_exports(backend: str) -> None:
    case = Case(ragged_layouts()["two volumes of different sizes"])

    class Pack(torch.nn.Module):
        def forward(self, context: Tensor, branch: Tensor, p: Tensor) -> Tensor:
            return pack(context, branch, p, case.selection, case.layout, rule="paper", backend=backend)

    assert case.p is not None
    inputs = (case.context, case.branch, case.p)
    y = torch.compile(Pack(), fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(y, case.pack("paper", backend))
    found = torch.autograd.grad(y, inputs, case.grad)
    assert all(torch.equal(*pair) for pair in zip(found, case.gradients("paper", backend), strict=True))
    plain = tuple(x.detach() for x in inputs)
    assert torch.equal(torch.export.export(Pack(), plain).module()(*plain), y)
