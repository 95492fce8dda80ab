"""What answers a question, and the table that answers are kept in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl

from pipelines.parquet import read_table, write_table

if TYPE_CHECKING:
    from pipelines.questions import Question
    from pipelines.volumes import Volume

MAX_ANSWER_TOKENS = 12
"""Where a generated answer is cut off, its end of turn included."""

POLICIES = ("photon", "all_tokens", "blind", "majority")
"""How an answer came about: with pruning, with every visual token, without the scan, without a model."""

QUESTION_SCHEMA: dict[str, Any] = {
    "question_id": pl.String,
    "scan_id": pl.String,
    "patient_id": pl.String,
    "family": pl.String,
    "subtype": pl.String,
    "organ": pl.String,
    "kind": pl.String,
    "question": pl.String,
    "gold": pl.String,
}
"""What a table of answers says of the question; `gold` is its right answer."""

ANSWER_SCHEMA: dict[str, Any] = {
    "policy": pl.String,
    **QUESTION_SCHEMA,
    "predicted": pl.String,
    "score": pl.Float64,
    "is_unparsed": pl.Boolean,
    "confidence": pl.Float64,
    "num_tokens": pl.Int64,
    "num_kept": pl.Int64,
    "kept": pl.List(pl.Int32),
    "organ_tokens": pl.Int64,
    "organ_tokens_kept": pl.Int64,
    "organ_share_unasked": pl.Float64,
    "seconds": pl.Float64,
}
"""One row a policy and question. `kept` is filled for policy photon alone. The organ columns are null where
the organ's place is unknown: no organ asked about, no label map, or no such organ in the scan;
`organ_share_unasked` is the mean share of the organ's tokens kept by the questions about other things in the
same scan."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one question about one scan.

    Args:
        question_id: whose answer it is.
        text: the answer.
        confidence: probability of the answer, 0 to 1.
        num_tokens: visual tokens of the scan's whole grid, those left out as empty included; 0 without a scan.
        kept: indices into that grid of the visual tokens kept, ascending.
        seconds: time this answer took.
    """

    question_id: str
    text: str
    confidence: float
    num_tokens: int
    kept: tuple[int, ...]
    seconds: float


class Answerer(Protocol):
    """Anything that answers questions about one scan."""

    def answer(self, volume: Volume | None, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the order of ``questions``, all of them about ``volume``; None: without looking."""


def question_columns(question: Question) -> dict[str, object]:
    """A row of :data:`QUESTION_SCHEMA`."""
    return {name: getattr(question, name) for name in QUESTION_SCHEMA if name != "gold"} | {"gold": question.answer}


def write_answers(rows: Sequence[dict[str, object]], target: Path) -> pl.DataFrame:
    """Write rows of :data:`ANSWER_SCHEMA` as Parquet, atomically, and return the table."""
    return write_table(rows, ANSWER_SCHEMA, target)


def read_answers(source: Path) -> pl.DataFrame:
    """Read a table written by :func:`write_answers`.

    Raises:
        PhotonError: ``TABLE_UNREADABLE``, see :func:`read_table`.
    """
    return read_table(source, ANSWER_SCHEMA, "Run `photon evaluate` again.")
