"""Both attention layouts against a loop over queries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from photon.model.attention import BlockAttention, RaggedAttention, padded_rows, starts_of


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


@pytest.mark.parametrize("lengths", [[3, 3], [1, 4, 2], [5], [2, 0, 3]])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2), (4, 1)])
def test_segments_agree_with_a_loop(lengths: list[int], is_causal: bool, heads: int, groups: int) -> None:
    total = sum(lengths)
    q, k, v = random_rows(total, total, heads, groups)
    sizes = torch.tensor(lengths)
    attend = RaggedAttention.build(sizes, k_starts=starts_of(sizes), k_lengths=sizes, is_causal=is_causal)
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
    sizes, chosen = torch.tensor(branches), torch.tensor(owner)
    attend = RaggedAttention.build(
        sizes,
        k_starts=starts_of(sizes) + sum(contexts),
        k_lengths=sizes,
        shared_starts=starts_of(torch.tensor(contexts))[chosen],
        shared_lengths=torch.tensor(contexts)[chosen],
        is_causal=True,
    )
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
    sizes = torch.tensor([2, 3])
    q, k, v = (x.requires_grad_() for x in random_rows(5, 5, 2, 2))
    attend = RaggedAttention.build(sizes, k_starts=starts_of(sizes), k_lengths=sizes, is_causal=True)
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
    sizes = torch.tensor([4, 4])
    q, k, v = random_rows(8, 8, 4, 2)
    ragged = RaggedAttention.build(sizes, k_starts=starts_of(sizes), k_lengths=sizes, is_causal=True)
    blocks = BlockAttention(torch.ones(4, 4, dtype=torch.bool).tril().expand(2, -1, -1))
    torch.testing.assert_close(ragged(q, k, v), blocks(q, k, v), rtol=1e-5, atol=1e-6)


def test_equal_lengths_need_no_mask() -> None:
    sizes = torch.tensor([4, 4])
    layout = RaggedAttention.build(sizes, k_starts=starts_of(sizes), k_lengths=sizes, is_causal=False)
    assert layout.mask is None


def test_padded_rows() -> None:
    lengths = torch.tensor([2, 0, 3])
    rows, valid = padded_rows(starts_of(lengths), lengths)
    assert rows.tolist() == [[0, 1, 0], [0, 0, 0], [2, 3, 4]]
    assert valid.long().tolist() == [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
