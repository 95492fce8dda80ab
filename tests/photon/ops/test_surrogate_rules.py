"""The surrogate gradient by hand: both rules, written out in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from photon.ops.layout import Layout
from photon.ops.selection.op import select_rows
from photon.ops.surrogate.op import pack
from photon.ops.surrogate.reference import probability_gradient


def by_hand(alignment: list[float], magnitude: list[float], p: list[float], rule: str) -> list[float]:
    """The rule written out in plain Python for one branch."""
    count = len(alignment)
    signed = alignment if rule == "paper" else [-a for a in alignment]
    mean = sum(signed) / count
    sigma = max(math.sqrt(sum((a - mean) ** 2 for a in signed) / count), 3e-3)
    clipped = [min(max((a - mean) / sigma, -1.5), 1.5) for a in signed]
    direction = [0.5 - (0.5 + 0.5 * math.tanh(z)) for z in clipped]
    if rule == "paper":
        average = sum(direction) / count
        direction = [d - average for d in direction]
    mean_magnitude = max(sum(magnitude) / count, 1e-6)
    share = [min(max(m / mean_magnitude, 0.5), 2.0) for m in magnitude]
    slope = [max(q * (1 - q), 5e-3) for q in p]
    return [0.8 * d * s * w for d, s, w in zip(direction, share, slope, strict=True)]


@pytest.mark.parametrize("rule", ["paper", "taylor"])
@pytest.mark.parametrize(
    ("alignment", "magnitude"),
    [
        ([1.0, -1.0, 0.0], [1.0, 1.0, 0.0]),
        ([9.0, 0.0, 0.1, -0.2, 0.0], [9.0, 0.0, 0.3, 0.2, 0.0]),  # beyond the clip on one side, shares at both ends
        ([1e-4, -1e-4, 2e-4], [1e-4, 1e-4, 2e-4]),  # below the sigma floor
        ([0.0, 0.0], [0.0, 0.0]),  # below the magnitude floor
        ([0.7], [0.9]),
    ],
)
def test_rules_by_hand(rule: str, alignment: list[float], magnitude: list[float]) -> None:
    p = [0.5, 0.999, 0.2, 0.001, 0.7][: len(alignment)]
    a, m, q = (torch.tensor([values]) for values in (alignment, magnitude, p))
    found = probability_gradient(a, m, q, torch.ones_like(a, dtype=torch.bool), rule=rule)
    torch.testing.assert_close(found, torch.tensor([by_hand(alignment, magnitude, p, rule)]), rtol=1e-5, atol=1e-7)


def test_rules_push_in_opposite_directions() -> None:
    """Descending the loss: "taylor" keeps the token whose removal raises it (a < 0), "paper" the other."""
    a, m, p = torch.tensor([[2.0, -2.0]]), torch.tensor([[2.0, 2.0]]), torch.tensor([[0.5, 0.5]])
    valid = torch.ones(1, 2, dtype=torch.bool)
    taylor = probability_gradient(a, m, p, valid, rule="taylor")
    torch.testing.assert_close(taylor, -probability_gradient(a, m, p, valid, rule="paper"))
    assert float(taylor[0, 1]) < 0 < float(taylor[0, 0])


@pytest.mark.parametrize("rule", ["paper", "taylor"])
def test_padding_changes_nothing(rule: str) -> None:
    a, m, p = torch.randn(1, 4), torch.rand(1, 4), torch.rand(1, 4)
    alone = probability_gradient(a, m, p, torch.ones(1, 4, dtype=torch.bool), rule=rule)
    wide_a, wide_m, wide_p = (torch.cat([x, torch.full((1, 3), 77.0)], dim=1).expand(2, -1) for x in (a, m, p))
    valid = torch.tensor([[True] * 4 + [False] * 3, [False] * 7])
    found = probability_gradient(wide_a, wide_m, wide_p, valid, rule=rule)
    torch.testing.assert_close(found[0, :4], alone[0])
    assert not found[0, 4:].any() and not found[1].any()


KEEP = torch.tensor([[True, False, True, False], [False, False, False, True]])
LAYOUT = Layout.build([6], [[(1, 4)]], [0, 0], [0, 0], [0, 0])
"""Two branches over 6 rows of which 1..4 are visual; both take the text rows 0 and 5."""


def packed(x: Tensor, p: Tensor | None, *, rule: str) -> Tensor:
    """Rows 0, 1, 3, 5, then 0, 4, 5 of x [6, D]."""
    return pack(x, x.new_zeros(0, x.shape[1]), p, select_rows(KEEP, LAYOUT), LAYOUT, rule=rule)


def test_nan_in_a_dropped_row_stays_behind() -> None:
    x = torch.randn(6, 3)
    x[2] = torch.nan  # visual row that neither branch keeps
    x.requires_grad_()
    p = torch.rand(2, 4, requires_grad=True)
    y = packed(x, p, rule="paper")
    y.square().sum().backward()
    assert bool(torch.isfinite(y).all())
    assert x.grad is not None and p.grad is not None
    assert bool(torch.isfinite(x.grad).all()) and bool(torch.isfinite(p.grad).all())


@pytest.mark.parametrize("rule", ["paper", "taylor"])
def test_probability_gradient_uses_the_kept_rows(rule: str) -> None:
    x = torch.randn(6, 3, requires_grad=True)
    p = torch.rand(2, 4, requires_grad=True)
    g = torch.randn(7, 3)
    packed(x, p, rule=rule).backward(g)
    products = [torch.zeros(4, 3), torch.zeros(4, 3)]
    products[0][0], products[0][2] = x.detach()[1] * g[1], x.detach()[3] * g[2]
    products[1][3] = x.detach()[4] * g[5]
    assert p.grad is not None
    for row, product in enumerate(products):
        expected = by_hand(product.sum(1).tolist(), product.abs().sum(1).tolist(), p.detach()[row].tolist(), rule)
        torch.testing.assert_close(p.grad[row], torch.tensor(expected), rtol=1e-4, atol=1e-6)
