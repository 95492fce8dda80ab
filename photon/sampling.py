"""Which token comes next: the likeliest one or a drawn one, for every branch until it has ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from photon.errors import PhotonError

OnToken = Callable[[int, int], None]
"""Called with a branch and the token id just chosen for it, its end token included."""

SEED_REMEDY = "Use whole numbers from 0 to 2**63 - 1."


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn: logits over temperature, then the likeliest `top_k`, then of these `top_p`.

    Raises:
        PhotonError: ``GENERATION_INVALID`` when a number is out of its range.
    """

    temperature: float = 1.0
    """Logits are divided by it, 0 or more; 0 takes the likeliest token, as no sampling does."""
    top_k: int | None = None
    """Draw from this many tokens, the likeliest ones; None: from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens, the likeliest ones, that together have this probability (0 to 1, not 0)."""
    seed: int = 0
    """Seed of each branch that is given none of its own."""

    def __post_init__(self) -> None:
        def check(name: str, is_right: bool, remedy: str) -> None:
            require(is_right, f"sampling setting {name}", f"it is {getattr(self, name)}.", remedy)

        check("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "Use 0 or a positive number.")
        check(
            "top_k", self.top_k is None or (isinstance(self.top_k, int) and self.top_k >= 1), "Use 1 or more, or none."
        )
        check("top_p", 0 < self.top_p <= 1, "Use a probability above 0, at most 1.")
        check("seed", _is_seed(self.seed), SEED_REMEDY)


@dataclass(frozen=True)
class Generated:
    """Answer of one branch.

    Attributes:
        ids: its tokens, without the end token.
        confidence: product of the model's probabilities of these and the end token, at temperature 1.
    """

    ids: tuple[int, ...]
    confidence: float


class AnswerDecoder:
    """Chooses tokens and keeps the score until every branch has said an end token or the limit is reached.

    A branch draws from numbers of its own seed, one for each token, made on the CPU in float64 and used up in order:
    its answer depends on its logits and its seed, not on the branches beside it nor on the device. The choice is
    made where the logits are; one transfer a token brings the chosen ids to the host.
    """

    def __init__(
        self,
        num_branches: int,
        *,
        end_ids: Collection[int],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        on_token: OnToken | None = None,
    ) -> None:
        """Start with nothing said.

        Args:
            end_ids: tokens that end an answer.
            max_new_tokens: most tokens a branch, end token included.
            sampling: how to draw; None takes the likeliest token, of equal ones the first id.
            seeds: one for each branch; None gives every branch the sampling's.
            on_token: called for every token of a branch that has not ended, as soon as it is chosen.

        Raises:
            PhotonError: ``GENERATION_INVALID`` when there is no token to choose, or not one seed a branch.
        """
        require(max_new_tokens >= 1, "max_new_tokens", f"it is {max_new_tokens}.", "Use 1 or more.")
        self._sampling = sampling if sampling is not None and sampling.temperature > 0 else None
        self._draws = None
        if sampling is not None and self._sampling is not None:
            seeds = [sampling.seed] * num_branches if seeds is None else seeds
            fact = f"there are {len(seeds)} for {num_branches} branches."
            require(len(seeds) == num_branches, "seeds", fact, "Give one seed a branch.")
            fact = f"they lie from {min(seeds, default=0)} to {max(seeds, default=0)}."
            require(all(_is_seed(seed) for seed in seeds), "seeds", fact, SEED_REMEDY)
            self._draws = _uniform(seeds, max_new_tokens)
        self._end_ids, self._max_new_tokens, self._on_token = frozenset(end_ids), max_new_tokens, on_token
        self._said: list[list[int]] = [[] for _ in range(num_branches)]
        self._num_chosen = [0] * num_branches
        self._running = list(range(num_branches))
        self._log_p: list[Tensor] = []

    @property
    def is_done(self) -> bool:
        """Whether every branch has ended or the limit is reached."""
        return not self._running or len(self._log_p) == self._max_new_tokens

    def choose(self, logits: Tensor) -> Tensor:
        """Next token of each branch, int64 [B]; what branches get that have ended has no meaning.

        Args:
            logits: [B, vocabulary], on any device.

        Raises:
            PhotonError: ``ANSWER_NOT_FINITE`` with the branches whose logits are not, unless they have ended.
        """
        step = len(self._log_p)
        if self._sampling is None or self._draws is None:
            ids = logits.argmax(-1)
        else:
            ids = draw(logits, self._draws[:, step].to(logits.device), self._sampling)
        self._log_p.append(logits.double().log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1))
        is_finite = torch.isfinite(logits).all(-1)
        chosen = torch.where(is_finite, ids, -1).tolist()
        require_finite([branch for branch in self._running if chosen[branch] < 0])
        for branch in self._running:
            self._take(branch, chosen[branch])
        self._running = [branch for branch in self._running if chosen[branch] not in self._end_ids]
        return ids

    def answers(self) -> list[Generated]:
        """What was said so far."""
        if not self._log_p:
            return [Generated((), 1.0) for _ in self._said]
        log_p = torch.stack(self._log_p).cpu()
        return [
            Generated(tuple(ids), math.exp(float(log_p[:count, branch].sum())))
            for branch, (ids, count) in enumerate(zip(self._said, self._num_chosen, strict=True))
        ]

    def _take(self, branch: int, token: int) -> None:
        self._num_chosen[branch] += 1
        if token not in self._end_ids:
            self._said[branch].append(token)
        if self._on_token is not None:
            self._on_token(branch, token)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Draw a token for each branch, int64 [B], from one number each.

    Tokens lie on the unit interval from the likeliest on (equal ones by id), each as long as it is probable; the
    number's place tells the token. Float64 throughout, so devices agree unless a number lies within rounding of
    a border.

    Args:
        logits: [B, vocabulary]; sampling: with a positive temperature.
        uniform: float64 [B] in [0, 1), on the device of the logits.
    """
    ordered, ids = logits.double().sort(dim=-1, descending=True, stable=True)
    p = ((ordered - ordered[:, :1]) / sampling.temperature).softmax(-1)
    if sampling.top_k is not None:
        p = p[:, : sampling.top_k]
        p = p / p.sum(-1, keepdim=True)
    ends = p.cumsum(-1)
    if sampling.top_p < 1:
        starts = F.pad(ends[:, :-1], (1, 0))
        ends = torch.where(starts < sampling.top_p, p, 0.0).cumsum(-1)
    place = torch.searchsorted(ends, uniform[:, None] * ends[:, -1:], right=True)
    return ids.gather(-1, place.clamp_max(p.shape[-1] - 1)).squeeze(-1)


def require(is_right: bool, subject: str, fact: str, remedy: str) -> None:
    """Raise ``GENERATION_INVALID`` unless a setting is right."""
    if not is_right:
        raise PhotonError("GENERATION_INVALID", subject, fact, remedy)


def require_finite(bad: Collection[int]) -> None:
    """Raise ``ANSWER_NOT_FINITE`` with the branches on whose way to an answer a number is not finite, if any."""
    if bad:
        names = ", ".join(str(branch) for branch in bad)
        raise PhotonError(
            "ANSWER_NOT_FINITE",
            f"answer of branch {names}",
            "a number on the way to it is not finite.",
            "Check the scan for values that are not numbers, and the checkpoint's training log.",
        )


def _is_seed(seed: int) -> bool:
    return isinstance(seed, int) and 0 <= seed < 2**63


def _uniform(seeds: Sequence[int], count: int) -> Tensor:
    """Numbers in [0, 1), float64 [seeds, count]; a row depends on its seed alone, and a longer one begins alike."""
    rows = [torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows) if rows else torch.zeros(0, count, dtype=torch.float64)
