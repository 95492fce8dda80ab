"""Both attention layouts against a loop over queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from photon.model import attention
from photon.model.attention import BlockAttention, RaggedAttention, padded_rows, starts_of

CPU = torch.device("cpu")


def looked_at(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query [H, d] over keys and values [L, G, d] it may see: [H, d]."""
    share = q.shape[0] // k.shape[1]
    out = torch.zeros(q.shape)
    for head in range(q.shape[0]):
        weights = torch.softmax(k[:, head // share] @ q[head] / math.sqrt(q.shape[1]), 0)
        out[head] = weights @ v[:, head // share]
    return out


def random_rows(num_queries: int, num_keys: int, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_queries * 31 + num_keys)
    shapes = ((num_queries, heads, 8), (num_keys, groups, 8), (num_keys, groups, 8))
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize("lengths", [[3, 3], [1, 4, 2], [5], [2, 0, 3], [10, 9, 10, 8], [3, 1, 2, 3]])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (4, 1)])
def test_segments_agree_with_a_loop(lengths: list[int], is_causal: bool, heads: int, groups: int) -> None:
    """Lengths also such that all segments fit one block, but not in their order."""
    total = sum(lengths)
    q, k, v = random_rows(total, total, heads, groups)
    attend = segments_of(lengths, is_causal=is_causal)
    expected = torch.zeros(q.shape)
    start = 0
    for length in lengths:
        for row in range(start, start + length):
            end = row + 1 if is_causal else start + length
            expected[row] = looked_at(q[row], k[start:end], v[start:end])
        start += length
    torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-5, atol=1e-6)


def test_shared_prefix_agrees_with_a_loop() -> None:
    """Keys: contexts of 3, 0 and 2 rows, then branches of 2, 1, 3, 1 rows on contexts 2, 0, 1, 0."""
    contexts, branches, owner = [3, 0, 2], [2, 1, 3, 1], [2, 0, 1, 0]
    q, k, v = random_rows(sum(branches), sum(contexts) + sum(branches), 4, 2)
    attend = branches_of(branches, contexts, owner, device=CPU, is_causal=True)
    expected, row = torch.zeros(q.shape), 0
    for length, context in zip(branches, owner, strict=True):
        start = sum(contexts[:context])
        prefix = list(range(start, start + contexts[context]))
        own = [sum(contexts) + row + place for place in range(length)]
        for place in range(length):
            seen = prefix + own[: place + 1]
            expected[row + place] = looked_at(q[row + place], k[seen], v[seen])
        row += length
    torch.testing.assert_close(attend(q, k, v), expected, rtol=1e-5, atol=1e-6)


def test_gradients_stay_inside_a_segment() -> None:
    q, k, v = (x.requires_grad_() for x in random_rows(5, 5, 2, 2))
    attend = segments_of([2, 3], is_causal=True)
    attend(q, k, v)[3].sum().backward()
    assert k.grad is not None
    assert k.grad.abs().sum((1, 2)).bool().tolist() == [False, False, True, True, False]
    assert bool(torch.isfinite(k.grad).all())


def test_blocks_agree_with_a_loop() -> None:
    """Two blocks of three queries; two cached rows in front, of which the second block has one."""
    q, k, v = random_rows(6, 6, 4, 2)
    past_k, past_v = torch.randn(2, 2, 2, 8), torch.randn(2, 2, 2, 8)
    causal = torch.ones(3, 3, dtype=torch.bool).tril().expand(2, -1, -1)
    past = torch.tensor([[True, True], [True, False]])[:, None].expand(-1, 3, -1)
    mask = torch.cat([past, causal], dim=2)
    found = BlockAttention(mask, past_k, past_v)(q, k, v)
    for block in range(2):
        keys = torch.cat([past_k[block], k[3 * block : 3 * block + 3]])
        values = torch.cat([past_v[block], v[3 * block : 3 * block + 3]])
        for place in range(3):
            seen = mask[block, place]
            expected = looked_at(q[3 * block + place], keys[seen], values[seen])
            torch.testing.assert_close(found[3 * block + place], expected, rtol=1e-5, atol=1e-6)


def test_both_layouts_agree() -> None:
    q, k, v = random_rows(8, 8, 4, 2)
    ragged = segments_of([4, 4], is_causal=True)
    blocks = BlockAttention(torch.ones(4, 4, dtype=torch.bool).tril().expand(2, -1, -1))
    torch.testing.assert_close(ragged(q, k, v), blocks(q, k, v), rtol=1e-5, atol=1e-6)


def segments_of(lengths: list[int], *, is_causal: bool) -> RaggedAttention:
    return RaggedAttention.build(lengths, device=CPU, is_causal=is_causal)


def branches_of(
    lengths: list[int], contexts: list[int], owner: list[int], *, device: torch.device, is_causal: bool
) -> RaggedAttention:
    """Branches that see a context each, whose keys come before all of theirs."""
    starts = starts_of(contexts)
    return RaggedAttention.build(
        lengths,
        k_starts=[start + sum(contexts) for start in starts_of(lengths)],
        shared_starts=[starts[context] for context in owner],
        shared_lengths=[contexts[context] for context in owner],
        device=device,
        is_causal=is_causal,
    )


@pytest.mark.parametrize("is_causal", [True, False])
def test_equal_lengths_need_no_mask(is_causal: bool) -> None:
    blocks, order = segments_of([4, 4], is_causal=is_causal)._blocks
    assert order is None and len(blocks) == 1
    assert blocks[0].mask is None and blocks[0].is_triangle == is_causal


def test_only_similar_lengths_lie_side_by_side() -> None:
    blocks, order = segments_of([100, 7, 90, 8, 99, 300, 301], is_causal=True)._blocks
    assert order is not None
    assert [block.q_rows.shape[0] for block in blocks] == [2, 3, 2]
    assert sum(block.q_rows.numel() for block in blocks) < 1.1 * (100 + 7 + 90 + 8 + 99 + 300 + 301)


def test_long_segments_stand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their mask would be large: 3 x 100 x 100; alone or equal they need none."""
    monkeypatch.setattr(attention, "MAX_MASK_ENTRIES", 25_000)
    blocks, _ = segments_of([98, 99, 100, 100], is_causal=True)._blocks
    assert [block.q_rows.shape[0] for block in blocks] == [2, 2]
    assert [block.mask is None for block in blocks] == [False, True]


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_segment_of_nan_stays_alone_with_it(is_causal: bool) -> None:
    lengths = [4, 5, 4]
    layout = segments_of(lengths, is_causal=is_causal)
    q, k, v = random_rows(sum(lengths), sum(lengths), 4, 2)
    expected = layout(q, k, v)
    for x in (q, k, v):
        x[:4] = torch.nan
    found = layout(q, k, v)
    assert torch.equal(found[4:], expected[4:]) and bool(found[:4].isnan().all())


def test_nothing_to_attend() -> None:
    q = torch.zeros(0, 2, 8)
    assert segments_of([0, 0], is_causal=True)(q, q, q).shape == (0, 2, 8)


def loop_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_bounds: Tensor,
    k_bounds: Tensor,
    q_longest: int,
    k_longest: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What the variable-length kernel computes: the causal diagonal ends in the last query and the last key."""
    assert q_bounds.dtype == k_bounds.dtype == torch.int32 and enable_gqa == (q.shape[1] != k.shape[1])
    out = torch.zeros_like(q)
    for start, end, first, last in zip(q_bounds[:-1], q_bounds[1:], k_bounds[:-1], k_bounds[1:], strict=True):
        assert end - start <= q_longest and last - first <= k_longest
        for row in range(int(start), int(end)):
            seen = int(last) - (int(end) - row - 1 if window_size == (-1, 0) else 0)
            out[row] = looked_at(q[row], k[int(first) : seen], v[int(first) : seen])
    return out


def unflagged_kernel(*arguments: Any, window_size: tuple[int, int]) -> Tensor:
    """As before PyTorch 2.12: grouped heads need no flag, and there is none."""
    is_grouped = arguments[0].shape[1] != arguments[1].shape[1]
    return loop_kernel(*arguments, window_size=window_size, enable_gqa=is_grouped)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kernel", [loop_kernel, unflagged_kernel])
def test_arguments_of_the_fused_kernel(
    monkeypatch: pytest.MonkeyPatch, kernel: Callable[..., Tensor], is_causal: bool
) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    plain = segments_of([3, 0, 5], is_causal=is_causal)
    shared = branches_of([2, 1, 3], [0, 4], [1, 0, 1], device=CPU, is_causal=is_causal)
    for layout, num_queries, num_keys in ((plain, 8, 8), (shared, 6, 10)):
        q, k, v = random_rows(num_queries, num_keys, 4, 2)
        fused = layout._fused.attend(q, k, v, is_causal=is_causal)
        torch.testing.assert_close(fused, layout(q, k, v), rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_kernel_agrees_with_blocks(is_causal: bool, dtype: torch.dtype) -> None:
    layout = branches_of([20, 1, 130], [3, 400], [1, 0, 1], device=torch.device("cuda"), is_causal=is_causal)
    rows = (torch.randn(shape, device="cuda") for shape in ((151, 16, 128), (554, 2, 128), (554, 2, 128)))
    exact = [x.to(dtype).float().requires_grad_() for x in rows]
    half = [x.detach().to(dtype).requires_grad_() for x in exact]
    expected, found = layout(*exact), layout(*half)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found.float() * weight).sum().backward()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 4e-3
    for ours, theirs in [(found, expected), *((h.grad, e.grad) for h, e in zip(half, exact, strict=True))]:
        assert ours is not None and theirs is not None
        assert float((ours.float() - theirs).abs().max() / theirs.abs().max()) < tolerance


def test_padded_rows() -> None:
    lengths = [2, 0, 3]
    rows, valid = padded_rows(starts_of(lengths), lengths, CPU)
    assert rows.tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4]], "filled up with the first row, or row 0"
    assert padded_rows([3, 5], [1, 2], CPU)[0].tolist() == [[3, 3], [5, 6]]
    assert padded_rows([], [], CPU)[0].shape == (0, 0)
    assert valid.long().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
