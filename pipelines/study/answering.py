"""A trained checkpoint that answers questions about a scan, from the tokens it chooses or from given ones.

Closed questions are answered by the likeliest of their options, others by greedy generation.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from photon.checkpoint import read_model
from photon.device import choose_device
from photon.generate import EncodedScan, Prompted, ask, decode, encode_scan
from photon.likelihood import option_log_likelihoods
from pipelines.answers import MAX_ANSWER_TOKENS
from pipelines.dataset import empty_context, scan_context
from pipelines.questions import Question
from pipelines.text import TOKENIZER, Prompter
from pipelines.volumes import Volume

MAX_BRANCHES = 64
"""Questions that run at a time: each holds a copy of the rows it kept."""


@dataclass(frozen=True, kw_only=True)
class Said:
    """One answer.

    Attributes:
        text: the answer.
        confidence: its share among the options; of a generated answer, its probability.
        gold_probability: the right option's share; None without options.
        keep: bool [N] which of the present tokens it was given from; None without a scan.
        seconds: its share of the time of all that were asked together.
    """

    text: str
    confidence: float
    gold_probability: float | None
    keep: Tensor | None
    seconds: float


class StudyAnswerer:
    """A checkpoint that answers questions about a scan from the tokens it chooses, or from given ones."""

    def __init__(self, checkpoint: Path, *, device: str = "cpu", max_branches: int = MAX_BRANCHES) -> None:
        """Open a checkpoint folder; raises what reading weights, configuration and tokenizer raises."""
        self.device = choose_device(device)
        self.model = read_model(checkpoint, device=self.device)
        self.prompter = Prompter.read(checkpoint / TOKENIZER)
        self.max_branches = max_branches

    def encode(self, volume: Volume | None) -> tuple[EncodedScan, float]:
        """A scan, or nothing for a model that does not look, and the seconds that took."""
        started = time.perf_counter()
        config = self.model.config
        context = empty_context(config) if volume is None else scan_context(volume, self.prompter, config)
        scan = encode_scan(self.model, context)
        self._wait()
        return scan, time.perf_counter() - started

    def ask(
        self,
        scan: EncodedScan,
        questions: Sequence[Question],
        *,
        texts: Sequence[str] | None = None,
        keep_all: bool = False,
        keep: Tensor | None = None,
    ) -> list[Said]:
        """Answers in the order of the questions.

        Args:
            texts: what is asked instead of the questions' own words.
            keep_all: answer from every token; keep: bool [Q, N], answer each from these of the present tokens.

        Raises:
            PhotonError: ``QUESTION_NOT_UNDERSTOOD``, ``ANSWER_NOT_FINITE``.
        """
        has_volume = bool(scan.context.grids)
        wordings = texts or [question.question for question in questions]
        branches = [self.prompter.branch_ids(text, has_volume=has_volume) for text in wordings]
        said: dict[int, Said] = {}
        for places, is_compared in _chunks(questions, self.max_branches):
            started = time.perf_counter()
            chosen = None if keep is None else keep[places].to(self.device)
            room = 0 if is_compared else MAX_ANSWER_TOKENS
            asked = [branches[place] for place in places]
            prompted = ask(self.model, scan, asked, keep_all=keep_all, keep=chosen, room=room)
            members = [questions[place] for place in places]
            replies = self._compare(prompted, members) if is_compared else self._generate(prompted)
            self._wait()
            seconds = (time.perf_counter() - started) / len(places)
            used = _used_tokens(prompted, len(places), keep_all, chosen)
            for place, (text, confidence, gold), mask in zip(places, replies, used, strict=True):
                said[place] = Said(text=text, confidence=confidence, gold_probability=gold, keep=mask, seconds=seconds)
        return [said[place] for place in range(len(questions))]

    def _compare(self, prompted: Prompted, questions: Sequence[Question]) -> list[tuple[str, float, float | None]]:
        options = [[self.prompter.answer_ids(option) for option in question.options] for question in questions]
        replies: list[tuple[str, float, float | None]] = []
        for question, sums in zip(questions, option_log_likelihoods(self.model, prompted, options), strict=True):
            shares, best = sums.softmax(0), int(sums.argmax())
            is_listed = question.answer in question.options
            gold = float(shares[question.options.index(question.answer)]) if is_listed else None
            replies.append((question.options[best], float(shares[best]), gold))
        return replies

    def _generate(self, prompted: Prompted) -> list[tuple[str, float, float | None]]:
        answers = decode(self.model, prompted, max_new_tokens=MAX_ANSWER_TOKENS)
        return [(self.prompter.text(answer.ids), answer.confidence, None) for answer in answers]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _chunks(questions: Sequence[Question], size: int) -> Iterator[tuple[list[int], bool]]:
    """Places of questions that run at a time, and whether their options are compared."""
    compared = [question.kind == "closed" and bool(question.options) for question in questions]
    for wanted in (True, False):
        places = [place for place, is_compared in enumerate(compared) if is_compared == wanted]
        for start in range(0, len(places), size):
            yield places[start : start + size], wanted


def _used_tokens(
    prompted: Prompted, num_branches: int, keep_all: bool, chosen: Tensor | None
) -> list[Tensor] | list[None]:
    """Bool [N] on the CPU for each branch: the present tokens that its answer was given from."""
    decision = prompted.output.schedule
    if decision is None:
        return [None] * num_branches
    # One volume a prompt: a branch has one row.
    mask = decision.valid if keep_all else decision.keep if chosen is None else chosen
    return list(mask.cpu())
