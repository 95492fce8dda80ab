"""The table that a study's answers are kept in: one row a policy, seed, condition and question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipelines.answers import QUESTION_SCHEMA, question_columns
from pipelines.parquet import read_table, write_table
from pipelines.questions import Question

TRAINED = "trained"
"""The condition in which a model answers as it was trained to: with the tokens of its own policy."""

CONDITIONS = (TRAINED, "all tokens", "removed", "none", "swapped", "random", "paraphrase")
"""Which visual tokens an answer was given from. Apart from the first: every token; the complement of the kept ones; no
token; those kept for a question about another place in the same scan; as many as were kept, drawn at random; those kept
for the same question in other words. The weights are the same in all of them, and so are the layers up to the pruning
layer, in which the question's words see the whole scan whatever is kept afterwards: what "none" scores above the model
of the text alone has come through them."""

STUDY_SCHEMA: dict[str, Any] = {
    "variant": pl.String,
    "seed": pl.Int64,
    "condition": pl.String,
    **QUESTION_SCHEMA,
    "num_options": pl.Int64,
    "predicted": pl.String,
    "score": pl.Float64,
    "confidence": pl.Float64,
    "gold_probability": pl.Float64,
    "num_tokens": pl.Int64,
    "num_kept": pl.Int64,
    "kept": pl.List(pl.Int32),
    "seconds": pl.Float64,
    "encode_seconds": pl.Float64,
}
"""`kept` lists the visual tokens that were used, as numbers in the scan's whole grid; it is null where tokens have no
place in it (no scan, pooled tokens). `gold_probability` is the right option's share among the options, null for
questions without options. `seconds` is the question's share of the time of all questions about its scan, the encoding
of the scan left out; `encode_seconds` is that encoding's time, spent once a scan."""


def asked_columns(question: Question) -> dict[str, object]:
    """The columns of :data:`STUDY_SCHEMA` that are the question's."""
    return question_columns(question) | {"num_options": len(question.options)}


def write_study_answers(rows: Sequence[dict[str, object]], target: Path) -> pl.DataFrame:
    """Write rows of :data:`STUDY_SCHEMA` as Parquet, atomically, and return the table."""
    return write_table(rows, STUDY_SCHEMA, target)


def read_study_answers(*sources: Path) -> pl.DataFrame:
    """Read tables written by :func:`write_study_answers`, one after another.

    Raises:
        PhotonError: ``TABLE_UNREADABLE``, see :func:`read_table`.
    """
    tables = [read_table(source, STUDY_SCHEMA, "Run `photon study` again.") for source in sources]
    return pl.concat(tables) if tables else pl.DataFrame(schema=STUDY_SCHEMA)
