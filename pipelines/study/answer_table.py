"""The table that a study's answers are kept in: one row a policy, seed, condition and question."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from photon.errors import PhotonError
from pipelines.files import atomic_path

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
    "question_id": pl.String,
    "scan_id": pl.String,
    "patient_id": pl.String,
    "family": pl.String,
    "subtype": pl.String,
    "organ": pl.String,
    "kind": pl.String,
    "question": pl.String,
    "num_options": pl.Int64,
    "gold": pl.String,
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


def write_study_answers(rows: Sequence[dict[str, object]], target: Path) -> pl.DataFrame:
    """Write rows of :data:`STUDY_SCHEMA` as Parquet, atomically, and return the table."""
    table = pl.DataFrame(rows, schema=STUDY_SCHEMA, orient="row")
    with atomic_path(target) as temporary:
        table.write_parquet(temporary, compression="zstd")
    return table


def read_study_answers(*sources: Path) -> pl.DataFrame:
    """Read tables written by :func:`write_study_answers`, one after another.

    Raises:
        PhotonError: ``TABLE_UNREADABLE`` when a file is missing, is not Parquet or has other columns.
    """
    remedy = "Run `photon study` again."
    tables = []
    for source in sources:
        try:
            table = pl.read_parquet(source)
        except FileNotFoundError as error:
            raise PhotonError("TABLE_UNREADABLE", source, "the file does not exist.", remedy) from error
        except (pl.exceptions.PolarsError, OSError) as error:
            raise PhotonError("TABLE_UNREADABLE", source, f"it is not a Parquet table ({error}).", remedy) from error
        if table.schema != pl.Schema(STUDY_SCHEMA):
            different = sorted({name for name, _ in set(table.schema.items()) ^ set(pl.Schema(STUDY_SCHEMA).items())})
            raise PhotonError("TABLE_UNREADABLE", source, f"its columns differ in {different}.", remedy)
        tables.append(table)
    return pl.concat(tables) if tables else pl.DataFrame(schema=STUDY_SCHEMA)
