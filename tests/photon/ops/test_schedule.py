"""Schedule: decisions by hand, both implementations against each other and against float64, and the gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from photon.errors import PhotonError
from photon.ops.schedule import op
from photon.ops.schedule.op import schedule
from photon.ops.schedule.reference import Decision, ThresholdWeights, decide
from photon.testing import poisoned_memory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
SETTINGS: dict[str, Any] = {"scale": 0.9, "temperature": 0.2, "min_tokens": 1}
WIDTHS = (1, 3, 7, 12, 32, 33, 63, 64, 1000)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def network(bias: float = 0.0, *, is_random: bool = False, dtype: torch.dtype = torch.float32) -> ThresholdWeights:
    """Weights of a threshold network; without random numbers theta = 0.9 * sigmoid(bias) whatever the scores."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 12), (6,), (1, 6), (1,))
    weights = [torch.randn(shape, generator=generator) * (0.5 if is_random else 0.0) for shape in shapes]
    weights[3] += bias
    return ThresholdWeights(*(x.to(DEVICE, dtype).requires_grad_() for x in weights))


def table(rows: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """Scores [S, N] and lengths [S]; padding is NaN."""
    width = max(map(len, rows), default=0)
    u = torch.tensor([[*row, *[math.nan] * (width - len(row))] for row in rows])
    return u.view(len(rows), width).to(DEVICE), torch.tensor([len(row) for row in rows], device=DEVICE)


def run(rows: Sequence[Sequence[float]], backend: str, bias: float = 0.0, **changes: Any) -> Decision:
    return schedule(*table(rows), network(bias), **{**SETTINGS, **changes}, backend=backend)


def descriptor(u: Tensor, lengths: Tensor, backend: str, weights: ThresholdWeights | None = None) -> Tensor:
    return torch.ops.photon.schedule(u, lengths, *(weights or network()), *SETTINGS.values(), backend)[-1]


def mixed_rows(width: int) -> tuple[Tensor, Tensor]:
    """Ordinary rows and every unusual kind: short, empty, equal, tied, with scores that are no numbers, none at all."""
    u = 3 * torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    u[1] = 1.5
    u[2] = u[2].round()
    u[3, ::3], u[3, 1::5] = math.nan, math.inf
    u[4] = math.nan
    u[5] *= 1e-6
    u[6] *= 1e4
    lengths = torch.tensor([width, width, width, width, width, width, width, (width + 1) // 2, 0])
    u[torch.arange(width) >= lengths[:, None]] = math.nan
    return u.to(DEVICE), lengths.to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decision_by_hand(backend: str) -> None:
    """theta = 0.9 sigmoid(0) = 0.45; rho = (0, 0.25, 0.5, 1); the second row is shorter, the third empty."""
    found = run([[1.0, 2.0, 3.0, 5.0], [-4.0, -2.0], []], backend)
    assert found.u.tolist() == [[1.0, 2.0, 3.0, 5.0], [-4.0, -2.0, 0.0, 0.0], [0.0] * 4]
    assert found.rho.tolist() == [[0.0, 0.25, 0.5, 1.0], [0.0, 1.0, 0.0, 0.0], [0.0] * 4]
    torch.testing.assert_close(found.theta, torch.full((3,), 0.45, device=DEVICE))
    expected = [1 / (1 + math.exp(-(rho - 0.45) / 0.2)) for rho in (0.0, 0.25, 0.5, 1.0)]
    wanted = torch.tensor([expected, [expected[0], expected[3], 0.0, 0.0], [0.0] * 4], device=DEVICE)
    torch.testing.assert_close(found.p, wanted, rtol=1e-6, atol=1e-7)
    assert found.keep.tolist() == [[False, False, True, True], [False, True, False, False], [False] * 4]
    assert [x.dtype for x in found] == [torch.float32] * 4 + [torch.bool]
    assert all(x.device.type == DEVICE for x in found)


@pytest.mark.parametrize("backend", BACKENDS)
def test_descriptor_by_hand(backend: str) -> None:
    """The quantiles of four scores lie between two of them; a row of nothing is described by zeros."""
    found = descriptor(*table([[0.0, 1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 4.0], [], [math.nan, 7.0]]), backend)
    log, root = math.log1p, math.sqrt
    spread = root(sum((x - 0.4375) ** 2 for x in (0, 0.25, 0.5, 1)) / 4)
    five = [0.5, root(0.125), 0.0, 1.0, 0.25, 0.5, 2.0, root(2.0), 0.0, 4.0]
    four = [0.4375, spread, 0.0, 1.0, 0.1875, 0.375, 1.75, 4 * spread, 0.0, 4.0]
    lone = [0.0] * 6 + [7.0, 0.0, 7.0, 7.0]
    logs = [[sum(map(log, range(5))) / 5, log(4)], [(log(1) + log(2) + log(4)) / 4, log(4)], [log(7), log(7)]]
    expected = torch.tensor([five + logs[0], four + logs[1], [0.0] * 12, lone + logs[2]], device=DEVICE)
    torch.testing.assert_close(found, expected, rtol=4 * EPS, atol=0)
    assert torch.equal(found[:, 2:6], expected[:, 2:6]), "order statistics are exact"


@pytest.mark.parametrize(("width", "minimum"), zip(WIDTHS, itertools.cycle((1, 2, 5, 40, 2000)), strict=False))
def test_implementations_agree(width: int, minimum: int) -> None:
    u, lengths = mixed_rows(width)
    settings = (SETTINGS["scale"], SETTINGS["temperature"], minimum)
    weights = network(is_random=True)
    (*first, described), (*second, triton) = (
        torch.ops.photon.schedule(u, lengths, *weights, *settings, backend) for backend in BACKENDS
    )
    one, other = Decision(*first), Decision(*second)
    for name in ("u", "rho", "keep"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    # theta passes through sums over the row and a network, p through a division by 0.2.
    torch.testing.assert_close(one.theta, other.theta, rtol=0, atol=16 * EPS)
    torch.testing.assert_close(one.p, other.p, rtol=0, atol=32 * EPS)
    num_kept = other.keep.sum(-1)
    assert bool((num_kept >= lengths.clamp_max(minimum)).all()) and bool((num_kept <= lengths).all())
    assert torch.equal(described[:, 2:6], triton[:, 2:6]), "order statistics are exact"
    for row, length in enumerate(lengths.tolist()):
        exact, size = described_exactly(u[row, :length].cpu().double())
        errors = [(x[row].cpu() - exact).abs() for x in (described, triton)]
        assert bool((errors[1] <= 2 * errors[0] + 4 * EPS * size).all()), row


def described_exactly(x: Tensor) -> tuple[Tensor, Tensor]:
    """The descriptor of a row in float64, and the sizes of what each of its numbers is made of."""
    x = x[x.isfinite()]
    if not len(x):
        return torch.zeros(12, dtype=torch.double), torch.zeros(12)
    rho = (x - x.min()) / (x.max() - x.min() + 1e-8)
    log = x.sign() * x.abs().log1p()
    quantiles = torch.quantile(rho, torch.tensor([0.25, 0.5], dtype=torch.double)).unbind()
    numbers = (rho.mean(), rho.std(correction=0), rho.min(), rho.max(), *quantiles)
    numbers += (x.mean(), x.std(correction=0), x.min(), x.max(), log.mean(), log.max())
    sizes = [1.0] * 6 + [float(x.abs().max())] * 4 + [float(log.abs().max())] * 2
    return torch.stack(numbers), torch.tensor(sizes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_minimum(backend: str) -> None:
    """With theta = 2 nothing would stay; of equal scores the first ones do."""
    rows = [[5.0, 1.0, 4.0, 3.0, 2.0], [1.0, 3.0, 3.0, 2.0, 3.0], [2.0] * 5, [1.0, 2.0]]
    found = run(rows, backend, scale=2.0, bias=100.0, min_tokens=3).keep.int().tolist()
    assert found == [[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    found = run(rows, backend, scale=2.0, bias=100.0, min_tokens=2).keep.int().tolist()
    assert found == [[1, 0, 1, 0, 0], [0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert run(rows, backend, bias=-100.0).keep.int().tolist()[0] == [1, 0, 1, 1, 1], "theta is 0, and so is the lowest"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38, -1e20])
def test_a_score_that_is_not_usable_steers_nothing(backend: str, bad: float) -> None:
    found, clean = run([[1.0, bad, 3.0, 5.0]], backend), run([[1.0, 3.0, 5.0]], backend)
    others = [0, 2, 3]
    assert not bool(found.keep[0, 1]) and not bool(found.p[0, 1]) and not bool(found.u[0, 1])
    for name in ("u", "rho", "p", "keep"):
        assert torch.equal(getattr(found, name)[:, others], getattr(clean, name)), name
    assert torch.equal(found.theta, clean.theta)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sums_over_huge_scores_stay_finite(backend: str) -> None:
    found = run([[9e15, -9e15, 0.0], [3e38, -3e38, 1e30]], backend, min_tokens=2)
    assert all(bool(x.isfinite().all()) for x in found)
    assert found.keep.tolist() == [[True, False, True], [True, True, False]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_finite_is_kept_when_nothing_else_is_left(backend: str) -> None:
    bad = math.nan
    rows = [[bad] * 4, [bad, 1.0, 2.0, bad], [bad, 1.0, bad], [bad]]
    assert run(rows, backend, min_tokens=2).keep.int().tolist() == [
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [1, 1, 0, 0],
        [1, 0, 0, 0],
    ]
    assert run(rows, backend, min_tokens=3).keep.int().tolist() == [
        [1, 1, 1, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 0],
        [1, 0, 0, 0],
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradient_is_the_one_of_the_formula(backend: str, dtype: torch.dtype) -> None:
    u, lengths = mixed_rows(33)
    weights = network(is_random=True, dtype=dtype)
    found = schedule(u, lengths, weights, **SETTINGS, backend=backend)
    assert [x.requires_grad for x in found] == [False, False, True, True, False]
    exact = ThresholdWeights(*(x.detach().float().requires_grad_() for x in weights))
    valid = torch.arange(33, device=DEVICE) < lengths[:, None]
    expected, _ = decide(u, valid, exact, **SETTINGS)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(DEVICE) for x in (expected.theta, expected.p)]
    wanted = torch.autograd.grad([expected.theta, expected.p], exact, grads)
    grads[1] = torch.where(valid, grads[1], math.nan)  # nobody answers for padding
    with torch.autocast(DEVICE, torch.bfloat16):
        gradients = torch.autograd.grad([found.theta, found.p], weights, grads)
    for x, y in zip(gradients, wanted, strict=True):
        assert x.dtype == dtype and bool(y.any())
        torch.testing.assert_close(x.float(), y, rtol=max(torch.finfo(dtype).eps, 1e-5), atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_type_of_the_weights_and_mixed_precision_do_not_matter(backend: str) -> None:
    u, lengths = mixed_rows(12)
    halves = network(is_random=True, dtype=torch.bfloat16)
    expected = schedule(u, lengths, ThresholdWeights(*(x.float() for x in halves)), **SETTINGS, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = schedule(u.requires_grad_(), lengths, halves, **SETTINGS, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    u, lengths = mixed_rows(12)
    weights = network(is_random=True)
    wide = torch.cat([torch.full_like(u, math.nan), u], dim=1)
    strided = ThresholdWeights(weights[0].T.contiguous().T, *weights[1:])
    expected = schedule(u, lengths, weights, **SETTINGS, backend=backend)
    for view in (wide[:, 12:], u.T.contiguous().T):
        assert not view.is_contiguous()
        found = schedule(view, lengths, strided, **SETTINGS, backend=backend)
        assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in ("u", "rho", "keep"))
        # The matrix products of PyTorch may add in another order then.
        tolerance = {"rtol": 0, "atol": 0 if backend == "triton" else 16 * EPS}
        torch.testing.assert_close((found.theta, found.p), (expected.theta, expected.p), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (2, 0)])
def test_nothing_to_decide(backend: str, shape: tuple[int, int]) -> None:
    weights = network(is_random=True)
    lengths = torch.zeros(shape[0], dtype=torch.long, device=DEVICE)
    found = schedule(torch.empty(shape, device=DEVICE), lengths, weights, **SETTINGS, backend=backend)
    assert all(x.shape == shape for x in (found.u, found.rho, found.p, found.keep))
    assert found.theta.shape == shape[:1] and bool(found.theta.isfinite().all())
    gradients = torch.autograd.grad([found.theta.sum() + found.p.sum()], weights)
    assert all(bool(x.isfinite().all()) for x in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_bits_and_each_row_by_itself(backend: str) -> None:
    u, lengths = mixed_rows(64)
    weights = network(is_random=True)
    first, second = (schedule(u, lengths, weights, **SETTINGS, backend=backend) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    alone = schedule(u[3:4], lengths[3:4], weights, **SETTINGS, backend=backend)
    assert torch.equal(alone.keep, first.keep[3:4]) and torch.equal(alone.rho, first.rho[3:4])
    if backend == "triton":
        assert torch.equal(alone.theta, first.theta[3:4]) and torch.equal(alone.p, first.p[3:4])


def test_rows_longer_than_the_kernel_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    u, lengths = mixed_rows(12)
    expected = schedule(u, lengths, network(), **SETTINGS, backend="reference")
    monkeypatch.setattr(op, "MAX_COLUMNS", 8)
    with pytest.raises(PhotonError, match="12 visual tokens") as error:
        schedule(u, lengths, network(), **SETTINGS, backend="triton")
    assert error.value.code == "BACKEND_UNAVAILABLE"
    monkeypatch.setattr(op.backends, "resolve", lambda backend, device: "triton")
    found = schedule(u, lengths, network(), **SETTINGS)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [0, 7])
def test_registration(backend: str, width: int) -> None:
    u, lengths = (x[3:5] for x in mixed_rows(7))
    arguments = (u[:, :width], lengths.clamp_max(width), *network(is_random=True), *SETTINGS.values(), backend)
    torch.library.opcheck(torch.ops.photon.schedule, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_can_be_traced(backend: str) -> None:
    u, lengths = mixed_rows(7)

    class Threshold(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList(network(is_random=True))

        def forward(self, u: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            found = schedule(u, lengths, ThresholdWeights(*self.weights), **SETTINGS, backend=backend)
            return found.p, found.keep

    module = Threshold()
    p, keep = module(u, lengths)
    p.sum().backward()
    expected = [x.grad for x in module.weights]
    module.zero_grad()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = compiled(u, lengths)
    assert torch.equal(found[0], p) and torch.equal(found[1], keep)
    found[0].sum().backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(module.weights, expected, strict=True))
    program = torch.export.export(module, (u, lengths))
    assert torch.equal(program.module()(u, lengths)[1], keep)
    assert "photon.schedule" in str(program.graph)
