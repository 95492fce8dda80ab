"""Which token is chosen: distributions known by hand, edges of every setting, and the score that is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from photon.errors import PhotonError
from photon.sampling import AnswerDecoder, Sampling, draw

P = [0.15, 0.5, 0.05, 0.3]
"""Probabilities of ids 0 to 3: not in order, and no two alike."""
END = 3


def logits_of(probabilities: Sequence[float]) -> Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float() + 7.0  # logits are known up to a constant


def drawn(sampling: Sampling, count: int, *, steps: int = 1, logits: Tensor | None = None) -> Tensor:
    """Tokens [steps, count] that as many branches draw from the same logits, with the seeds 0, 1, ..."""
    logits = (logits_of(P) if logits is None else logits).expand(count, -1)
    decoder = AnswerDecoder(count, end_ids=(), max_new_tokens=steps, sampling=sampling, seeds=range(count))
    return torch.stack([decoder.choose(logits) for _ in range(steps)])


def chi_square(tokens: Tensor, probabilities: Sequence[float]) -> float:
    """Sum of (seen - expected)^2 / expected; tokens of probability 0 must not be seen."""
    expected = torch.tensor(probabilities, dtype=torch.float64) * tokens.numel()
    seen = torch.bincount(tokens.flatten(), minlength=len(probabilities)).double()
    assert float(seen[expected == 0].sum()) == 0
    possible = expected > 0
    return float(((seen - expected).square() / expected)[possible].sum())


SHARES = {
    "all": (Sampling(), P),
    "cold": (Sampling(temperature=0.5), [p * p / 0.365 for p in P]),
    "hot": (Sampling(temperature=2.0), [p**0.5 / sum(q**0.5 for q in P) for p in P]),
    "top_k": (Sampling(top_k=2), [0, 5 / 8, 0, 3 / 8]),
    "top_p below": (Sampling(top_p=0.79), [0, 5 / 8, 0, 3 / 8]),
    "top_p above": (Sampling(top_p=0.81), [0.15 / 0.95, 0.5 / 0.95, 0, 0.3 / 0.95]),
    # Of the three likeliest, the first alone has 0.5 / 0.95 > 0.51.
    "top_p of top_k": (Sampling(top_k=3, top_p=0.51), [0, 1, 0, 0]),
    "top_p after temperature": (Sampling(temperature=0.5, top_p=0.7), [0, 25 / 34, 0, 9 / 34]),
    "k beyond the vocabulary": (Sampling(top_k=100), P),
}


@pytest.mark.parametrize("name", SHARES)
def test_drawn_tokens_have_the_probabilities_computed_by_hand(name: str) -> None:
    """16.3 is the 0.999 quantile for three degrees of freedom."""
    sampling, probabilities = SHARES[name]
    tokens = drawn(sampling, 4000, steps=2)
    for step in tokens:
        assert chi_square(step, probabilities) < 16.3


def test_tokens_of_a_branch_are_independent_of_each_other() -> None:
    """37.7 is the 0.999 quantile for fifteen degrees of freedom."""
    first, second = drawn(Sampling(), 4000, steps=2)
    assert chi_square(first * 4 + second, [p * q for p in P for q in P]) < 37.7


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=1),
        Sampling(top_p=1e-9),
        Sampling(temperature=1e-3),
        Sampling(temperature=1e-300),
        Sampling(temperature=0),
        Sampling(temperature=5.0, top_k=1),
    ],
)
def test_limits_that_leave_one_token_are_greedy(sampling: Sampling) -> None:
    assert drawn(sampling, 50).unique().tolist() == [1]


@pytest.mark.parametrize("sampling", [None, Sampling(top_k=1), Sampling(top_p=1e-9), Sampling(temperature=0)])
def test_of_equal_tokens_the_first(sampling: Sampling | None) -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    decoder = AnswerDecoder(2, end_ids=(), max_new_tokens=1, sampling=sampling)
    assert decoder.choose(logits).tolist() == [1, 0]


def test_equal_tokens_are_drawn_equally_often() -> None:
    tokens = drawn(Sampling(temperature=1e-300), 4000, logits=torch.tensor([5.0, 1.0, 5.0]))
    assert chi_square(tokens, [0.5, 0, 0.5]) < 10.8


def test_a_number_falls_on_the_token_whose_stretch_it_is_in() -> None:
    """Stretches from the likeliest on: id 1 to 0.5, id 3 to 0.8, id 0 to 0.95, id 2 to 1."""
    places = {0.0: 1, 0.499: 1, 0.501: 3, 0.799: 3, 0.801: 0, 0.949: 0, 0.951: 2, 1 - 2**-53: 2}
    uniform = torch.tensor(list(places), dtype=torch.float64)
    logits = logits_of(P).expand(len(places), -1)
    assert draw(logits, uniform, Sampling()).tolist() == list(places.values())


@pytest.mark.parametrize("top_p", [1.0, 0.9999])
def test_the_last_number_falls_on_a_token_that_is_possible(top_p: float) -> None:
    """Sums of a large vocabulary do not end in exactly 1."""
    logits = torch.randn(20, 5000, generator=torch.Generator().manual_seed(0)) * 8
    logits[:, :4000] = -1e4
    uniform = torch.full((20,), 1 - 2**-53, dtype=torch.float64)
    assert int(draw(logits, uniform, Sampling(top_p=top_p)).min()) >= 4000


def test_a_seed_says_the_same_whatever_the_limit_and_the_other_seeds() -> None:
    """The base seed is used by every branch that has none of its own."""
    logits = torch.zeros(3, 1000)

    def said(seeds: list[int] | None, limit: int, base: int = 0) -> list[list[int]]:
        count = 3 if seeds is None else len(seeds)
        sampling = Sampling(seed=base)
        decoder = AnswerDecoder(count, end_ids=(), max_new_tokens=limit, sampling=sampling, seeds=seeds)
        return torch.stack([decoder.choose(logits[:count]) for _ in range(limit)]).T.tolist()

    together = said([5, 6, 2**63 - 1], 20)
    assert len({tuple(each) for each in together}) == 3
    assert said([6], 20) == [together[1]]
    assert said([2**63 - 1, 5], 3) == [together[2][:3], together[0][:3]]
    assert said(None, 20, base=6) == [together[1]] * 3


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 0.5},
    ],
)
def test_settings_out_of_range(changes: dict[str, Any]) -> None:
    with pytest.raises(PhotonError) as caught:
        Sampling(**changes)
    assert caught.value.code == "GENERATION_INVALID"
    assert next(iter(changes)) in caught.value.subject and str(next(iter(changes.values()))) in caught.value.fact


@pytest.mark.parametrize("seeds", [[], [1], [1, 2, 3], [1, -1], [1, 2**64]])
def test_seeds_that_do_not_fit(seeds: list[int]) -> None:
    with pytest.raises(PhotonError, match="seeds") as caught:
        AnswerDecoder(2, end_ids=(), max_new_tokens=1, sampling=Sampling(), seeds=seeds)
    assert caught.value.code == "GENERATION_INVALID"


def test_score_by_hand() -> None:
    """Branch 0 says 1 and ends; branch 1 ends at once; branch 2 never does. Probabilities multiply, the end's too."""
    decoder = AnswerDecoder(3, end_ids={END}, max_new_tokens=3)

    def logits(*chosen: tuple[int, float]) -> Tensor:
        p = torch.tensor([[(1 - probability) / 3] * 4 for _, probability in chosen])
        for row, (token, probability) in enumerate(chosen):
            p[row, token] = probability
        return p.log()

    assert decoder.answers()[0].ids == () and not decoder.is_done
    assert decoder.choose(logits((1, 0.5), (END, 0.8), (2, 0.9))).tolist() == [1, END, 2]
    assert not decoder.is_done
    decoder.choose(logits((END, 0.5), (2, 0.9), (0, 0.5)))
    assert not decoder.is_done
    decoder.choose(logits((1, 0.9), (1, 0.9), (2, 0.4)))
    assert decoder.is_done
    answers = decoder.answers()
    assert [answer.ids for answer in answers] == [(1,), (), (2, 0, 2)]
    assert [answer.confidence for answer in answers] == pytest.approx([0.25, 0.8, 0.18], rel=1e-5)


def test_done_when_all_have_ended() -> None:
    decoder = AnswerDecoder(2, end_ids={2, END}, max_new_tokens=9)
    decoder.choose(torch.eye(4)[[2, 1]])
    assert not decoder.is_done
    decoder.choose(torch.eye(4)[[0, END]])
    assert decoder.is_done and [answer.ids for answer in decoder.answers()] == [(), (1,)]


@pytest.mark.parametrize("sampling", [None, Sampling(), Sampling(top_k=2, top_p=0.5)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite(sampling: Sampling | None, bad: float) -> None:
    """They matter in branches that have not ended, and no token is told then."""
    told: list[tuple[int, int]] = []
    decoder = AnswerDecoder(
        4, end_ids={END}, max_new_tokens=9, sampling=sampling, on_token=lambda *token: told.append(token)
    )
    decoder.choose(torch.eye(4)[[END, 1, 1, 1]] * 1e4)
    assert told == [(0, END), (1, 1), (2, 1), (3, 1)]
    logits = torch.eye(4)[[1, 1, 2, 1]] * 1e4
    logits[0] = bad
    ids = decoder.choose(logits)
    assert ids[1:].tolist() == [1, 2, 1] and told[4:] == [(1, 1), (2, 2), (3, 1)]
    logits[1, 0] = logits[3, 3] = bad
    with pytest.raises(PhotonError, match="branch 1, 3:") as caught:
        decoder.choose(logits)
    assert caught.value.code == "ANSWER_NOT_FINITE" and len(told) == 7
    assert decoder.answers()[0].ids == () and decoder.answers()[0].confidence == pytest.approx(1.0)
