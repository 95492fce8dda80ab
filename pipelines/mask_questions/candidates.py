"""A question that could be asked, one that is not, and how many of a kind are."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

from pipelines.mask_questions.rules import Reason
from pipelines.questions import QuestionWriter

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A question with its answer.

    Args:
        about: the structures it is about; with the subtype what tells it from others about the scan.
        organ: the structure asked about, the first of two; "" where it is the answer.
        phrasings: the same question in several wordings; none depends on the answer.
        options: the allowed answers of a closed question; empty for a number.
        value, unit: of a number, rounded as it is to be said.
    """

    family: str
    subtype: str
    about: str
    organ: str
    phrasings: tuple[str, ...]
    answer: str = ""
    options: tuple[str, ...] = ()
    value: float | None = None
    unit: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NotAsked:
    """A question that was considered and left out."""

    subtype: str
    about: str
    reason: Reason


def write_candidates(
    writer: QuestionWriter, candidates: Iterable[Candidate], max_per_subtype: int
) -> tuple[dict[str, tuple[str, ...]], list[NotAsked]]:
    """Write the candidates, and of a subtype with too many those that come first by a checksum.

    Returns:
        All wordings of every question written, by its id, and what was left out.
    """
    by_subtype: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        by_subtype[candidate.subtype].append(candidate)
    wordings, left_out = {}, []
    for subtype, found in by_subtype.items():
        drawn = shuffled(found, [f"{writer.scan_id}|{subtype}|{one.about}" for one in found])
        for candidate in drawn[:max_per_subtype]:
            _write(writer, candidate)
            wordings[writer.questions[-1].question_id] = candidate.phrasings
        left_out += [
            NotAsked(subtype=subtype, about=one.about, reason="over the limit") for one in drawn[max_per_subtype:]
        ]
    return wordings, left_out


def shuffled(items: Sequence[T], names: Sequence[str]) -> list[T]:
    """Items in the order of their names' checksums: the same everywhere, and unrelated to what they say."""
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    return [items[place] for place in sorted(range(len(items)), key=lambda place: digests[place])]


def listed(options: Sequence[str]) -> str:
    """Options in a sentence: a prompt holds nothing but the question's words."""
    return f"{', '.join(options[:-1])} or {options[-1]}"


def _write(writer: QuestionWriter, one: Candidate) -> None:
    writer.family = one.family
    if one.value is None:
        writer.add(one.subtype, one.organ, one.phrasings, "closed", one.answer, about=one.about, options=one.options)
    else:
        writer.number(one.subtype, one.organ, one.phrasings, one.value, one.unit, about=one.about)
