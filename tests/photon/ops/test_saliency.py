"""Saliency: both implementations against the formula one head at a time, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from photon.ops.layout import Layout
from photon.ops.saliency.op import saliency
from photon.ops.saliency.reference import BLOCK_ROWS, Places, padded, scores
from photon.testing import poisoned_memory, ragged_layouts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
HALVES = (torch.bfloat16, torch.float16)
HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 8
WIDTHS = (1, 3, 7, 12, 32, 33, 63, 64, 1000)
QUESTIONS = (1, 2, 0, 31, 32, 33, 5, 70, 6)
MANY = Layout.build(
    [width + 2 for width in WIDTHS],
    [[(1, width)] for width in WIDTHS],
    QUESTIONS,
    QUESTIONS,
    [8, 7, 6, 5, 4, 3, 2, 1, 0],
)
"""Every width and questions of several tiles, branches in the opposite order of their contexts."""
LAYOUTS = {**ragged_layouts(), "many widths": MANY}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    with poisoned_memory():
        yield


def inputs(
    layout: Layout, dtype: torch.dtype = torch.float32, heads: Sequence[int] = (HEADS, KEY_HEADS, HEAD_DIM)
) -> list[Tensor]:
    """Queries, keys and visual keys; what no question and no visual token may touch is NaN."""
    num_heads, num_key_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    num_own, num_rows = int(layout.own_lengths.sum()), layout.context_slots.shape[0]
    shapes = ((num_own, num_heads), (num_own, num_key_heads), (num_rows, num_key_heads))
    q, k, keys = (torch.randn(*shape, head_dim, generator=generator).to(dtype) for shape in shapes)
    asked = torch.zeros(num_own, dtype=torch.bool)
    for start, length in zip(layout.own_starts.tolist(), layout.question_lengths.tolist(), strict=True):
        asked[start : start + length] = True
    q[~asked], k[~asked], keys[layout.context_slots < 0] = torch.nan, torch.nan, torch.nan
    return [x.to(DEVICE) for x in (q, k, keys)]


def run(layout: Layout, tensors: Sequence[Tensor], backend: str) -> Tensor:
    q, k, keys = tensors
    return saliency(q, k, keys, layout.to(DEVICE), backend=backend)


def places_of(layout: Layout) -> list[Tensor]:
    return [getattr(layout, name) for name in Places._fields]


def naive(layout: Layout, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Scores [S, N] in float64, keys repeated, and the sums of the sizes of what is added up in them."""
    q, k, keys = (x.double().cpu() for x in tensors)
    share, root = q.shape[1] // k.shape[1], q.shape[2] ** 0.5
    u = torch.zeros(2, layout.num_pairs, layout.num_columns, dtype=torch.float64)
    for pair, branch in enumerate(layout.pair_branch.tolist()):
        first, num_asked = int(layout.own_starts[branch]), int(layout.question_lengths[branch])
        start, length = int(layout.pair_starts[pair]), int(layout.pair_lengths[pair])
        own = slice(first, first + num_asked)
        centrality = torch.zeros(num_asked, dtype=torch.float64)
        for head in range(q.shape[1]):
            products = (q[own, head] @ k[own, head // share].T / root).clamp_min(0)
            centrality += (products.sum(1) - products.diagonal()) / q.shape[1]
        weights = centrality / centrality.sum().clamp_min(1)
        for head in range(q.shape[1]):
            visual, weighted = keys[start : start + length, head // share], weights[:, None] * q[own, head]
            u[0, pair, :length] += visual @ weighted.sum(0) / root / q.shape[1]
            u[1, pair, :length] += visual.abs() @ weighted.abs().sum(0) / root / q.shape[1]
    return u[0], u[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_by_hand(backend: str, dtype: torch.dtype) -> None:
    """One head of width 1. Centralities (8, 8), so z = (2 + 1) / 2; then (0.25, 0), below 1 in sum: z = 0.25 * 0.5."""
    layout = Layout.build([3, 1], [[(1, 2)], [(0, 1)]], [3, 2], [2, 2], [0, 1])
    q = torch.tensor([2.0, 1.0, torch.nan, 0.5, -1.0], dtype=dtype).view(-1, 1, 1)
    k = torch.tensor([8.0, 4.0, torch.nan, 1.0, 0.5], dtype=dtype).view(-1, 1, 1)
    keys = torch.tensor([torch.nan, 1.0, -2.0, 4.0], dtype=dtype).view(-1, 1, 1)
    found = run(layout, [x.to(DEVICE) for x in (q, k, keys)], backend)
    assert found.dtype == torch.float32
    assert found.tolist() == [[1.5, -3.0], [0.5, 0.0]]


@pytest.mark.parametrize("name", LAYOUTS)
def test_agrees_with_the_formula(name: str) -> None:
    layout = LAYOUTS[name]
    expected, size = naive(layout, inputs(layout))
    errors = []
    for backend in BACKENDS:
        found = run(layout, inputs(layout), backend)
        assert found.shape == (layout.num_pairs, layout.num_columns) and found.dtype == torch.float32
        assert found.is_contiguous() and found.device.type == DEVICE
        found = found.cpu()
        inside = torch.arange(layout.num_columns) < layout.pair_lengths[:, None]
        assert not found[~inside].any()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        errors.append((found - expected).abs())
    # A few roundings of what is added up, beside those that the reference has too.
    ulps = torch.finfo(torch.float32).eps * size
    assert bool((errors[1] <= 2 * errors[0] + 4 * ulps).all())


@pytest.mark.parametrize("name", LAYOUTS)
def test_without_a_look_at_the_ranges(name: str) -> None:
    """What runs on a GPU in plain PyTorch, on any device."""
    layout = LAYOUTS[name].to(DEVICE)
    columns, longest = layout.num_columns, layout.longest_question
    places = Places(*places_of(layout))
    found = padded(*inputs(LAYOUTS[name]), places, columns, longest)
    torch.testing.assert_close(found, run(layout, inputs(LAYOUTS[name]), "reference"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("heads", [(4, 2, 8), (3, 3, 16), (6, 1, 24)])
def test_halves_are_scored_in_float32(dtype: torch.dtype, heads: tuple[int, int, int]) -> None:
    layout = LAYOUTS["branches in any order of contexts"]
    tensors = inputs(layout, dtype, heads)
    expected, size = naive(layout, tensors)
    for backend in BACKENDS:
        error = (run(layout, tensors, backend).cpu() - expected).abs()
        assert bool((error <= 8 * torch.finfo(torch.float32).eps * size).all()), backend


def test_keys_of_many_blocks() -> None:
    keys = torch.randn(2 * BLOCK_ROWS + 7, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    z = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(scores(z, keys), scores(z, keys.float()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    layout = LAYOUTS["two volumes of different sizes"]
    q, k, keys = inputs(layout)
    fused = torch.cat([q, k], dim=1)  # as one projection would give them
    strided = [fused[:, :HEADS], fused[:, HEADS:], keys.permute(1, 2, 0).contiguous().permute(2, 0, 1)]
    assert not any(x.is_contiguous() for x in strided)
    # The matrix products of PyTorch may add in another order then.
    tolerance = {"rtol": 0, "atol": 0 if backend == "triton" else 1e-6}
    torch.testing.assert_close(run(layout, strided, backend), run(layout, [q, k, keys], backend), **tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_question_and_its_scan(backend: str) -> None:
    layout = Layout.build([4, 3], [[(0, 4)], [(0, 3)]], [2, 2, 2], [2, 2, 2], [0, 1, 0])
    clean = run(layout, inputs(layout), backend)
    assert bool(torch.isfinite(clean).all())
    q, k, keys = inputs(layout)
    keys[4:] = torch.nan  # the second scan
    q[4, 0, 0] = torch.nan  # the third question
    found = run(layout, (q, k, keys), backend)
    assert torch.equal(found[0], clean[0])
    assert bool(found[1, :3].isnan().all()) and bool(found[2].isnan().all())
    assert not found[1, 3:].any(), "padding is 0 all the same"
    q, k, keys = inputs(layout)
    keys[1] = torch.nan
    found = run(layout, (q, k, keys), backend)
    assert found.isnan().tolist() == [[False, True, False, False], [False] * 4, [False, True, False, False]]
    q, k, keys = inputs(layout)
    k[3, 1, 0] = torch.nan  # an answer of the second question that is not a number
    found = run(layout, (q, k, keys), backend)
    assert bool(found[1, :3].isnan().all()) and torch.equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_and_lone_questions_look_for_nothing(backend: str) -> None:
    layout = Layout.build([5], [[(0, 5)]], [1, 3, 2], [0, 1, 2], [0, 0, 0])
    found = run(layout, inputs(layout), backend)
    assert not found[:2].any() and bool(found[2].all())


def test_scores_of_the_kernel_do_not_depend_on_the_batch() -> None:
    """The same bits alone, beside others and in another place."""
    questions, widths = (3, 33, 2), (5, 40, 33)
    layout = Layout.build(widths, [[(0, width)] for width in widths], questions, questions, range(3))
    q, k, keys = inputs(layout)
    together = run(layout, (q, k, keys), "triton")
    for pair, width in enumerate(widths):
        own = slice(int(layout.own_starts[pair]), int(layout.own_starts[pair]) + questions[pair])
        start = int(layout.pair_starts[pair])
        alone = Layout.build([width], [[(0, width)]], questions[pair : pair + 1], questions[pair : pair + 1], [0])
        found = run(alone, (q[own], k[own], keys[start : start + width]), "triton")
        assert torch.equal(found[0], together[pair, :width])


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_bits(backend: str) -> None:
    layout = LAYOUTS["branches in any order of contexts"]
    assert torch.equal(run(layout, inputs(layout), backend), run(layout, inputs(layout), backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_precision_and_gradients_do_not_reach_it(backend: str) -> None:
    layout = LAYOUTS["two volumes of different sizes"]
    tensors = [x.requires_grad_() for x in inputs(layout)]
    expected = run(layout, tensors, backend)
    assert not expected.requires_grad
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(run(layout, tensors, backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["two volumes of different sizes", "no volume", "no rows of its own"])
def test_registration(backend: str, name: str) -> None:
    layout = LAYOUTS[name].to(DEVICE)
    arguments = (*inputs(LAYOUTS[name]), places_of(layout), layout.num_columns, layout.longest_question, backend)
    torch.library.opcheck(torch.ops.photon.saliency, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_can_be_traced(backend: str) -> None:
    layout = LAYOUTS["two volumes of different sizes"]
    q, k, keys = inputs(layout)
    placed = layout.to(DEVICE)

    class Scores(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, keys: Tensor) -> Tensor:
            return saliency(q, k, keys, placed, backend=backend) + 1

    expected = Scores()(q, k, keys)
    compiled = torch.compile(Scores(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, keys), expected)
    program = torch.export.export(Scores(), (q, k, keys))
    assert torch.equal(program.module()(q, k, keys), expected)
    assert "photon.saliency" in str(program.graph)
