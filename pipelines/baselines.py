"""The answer that needs no model: what the training answers to the same question would have scored best
with."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelines.answers import Answer
from pipelines.metrics import MRA_THRESHOLDS, fold_text, parse_number

if TYPE_CHECKING:
    from pipelines.questions import Question
    from pipelines.volumes import Volume


class MajorityAnswerer:
    """Answers with the training answer that scores best on the training questions of exactly the same text,
    else on those of the same subtype, else of the same kind.

    For closed and free-text questions that is the most frequent answer; for numbers the one with the highest
    mean thresholded relative accuracy. Ties go to the alphabetically first. The confidence is that training
    score.
    """

    def __init__(self, training: Sequence[Question]) -> None:
        groups: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
        for question in training:
            for key in _keys(question):
                groups[key].append(question.answer)
        self._best = {key: _best_answer(answers, is_number=key[0] == "number") for key, answers in groups.items()}

    def answer(self, volume: Volume | None, questions: Sequence[Question]) -> list[Answer]:
        """One answer a question; the empty text when training held none of its kind. ``volume`` is not looked
        at."""
        answers = []
        for question in questions:
            found = (self._best[key] for key in _keys(question) if key in self._best)
            text, confidence = next(found, ("", 0.0))
            answers.append(
                Answer(
                    question_id=question.question_id,
                    text=text,
                    confidence=confidence,
                    num_tokens=0,
                    kept=(),
                    seconds=0.0,
                )
            )
        return answers


def _keys(question: Question) -> list[tuple[str, ...]]:
    kind = question.kind
    return [
        (kind, "question", fold_text(question.question)),
        (kind, "subtype", question.subtype),
        (kind, "kind"),
    ]


def _best_answer(answers: Sequence[str], *, is_number: bool) -> tuple[str, float]:
    counts = Counter(answers)
    texts = sorted(counts)
    frequency = np.array([counts[text] for text in texts], dtype=np.float64) / len(answers)
    scores = _number_scores(texts, frequency) if is_number else frequency
    best = int(np.argmax(scores))
    return texts[best], float(scores[best])


def _number_scores(texts: Sequence[str], frequency: np.ndarray) -> np.ndarray:
    """Mean :func:`pipelines.metrics.mra_threshold_photon` of every text against all, by frequency:
    [len(texts)]."""
    numbers = [parse_number(text) for text in texts]
    values = np.array([np.nan if number is None else number for number in numbers])
    errors = np.abs(values[:, None] - values) / np.maximum(np.abs(values), 1e-6)
    num_met = np.zeros_like(errors)
    for threshold in MRA_THRESHOLDS:
        num_met += errors < 1 - float(threshold)  # NaN, a text without a number, meets nothing
    scores: np.ndarray = num_met @ frequency / len(MRA_THRESHOLDS)
    return scores
