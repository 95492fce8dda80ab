"""The memory of an archive run: its table, one atomic part a scan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipelines.files import atomic_path, file_digest

SCORE_SCHEMA = pl.Schema(
    {
        "scan_id": pl.String(),
        "source": pl.String(),
        "question_id": pl.String(),
        "question": pl.String(),
        "answer": pl.String(),
        "confidence": pl.Float64(),
        "num_tokens": pl.Int64(),
        "num_kept": pl.Int64(),
        "kept": pl.List(pl.Int32()),
        "seconds": pl.Float64(),
        "error": pl.String(),
        "message": pl.String(),
        "model_version": pl.String(),
        "data_version": pl.String(),
    }
)
"""One row a scan and question. `source` is relative to the archive ("" when the scan is not in it). A row
has either an answer, with `confidence` in [0, 1], `num_tokens` before and `num_kept` after pruning and the
indices `kept` of those tokens, or an `error` code with its `message`; what it has not is null.
`seconds` is the only column that differs between two runs over the same archive."""

_ALWAYS = ("scan_id", "source", "question_id", "question", "model_version", "data_version")
_ANSWERED = ("answer", "confidence", "num_tokens", "num_kept", "kept", "seconds")


def score_frame(rows: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    """Rows as a table of `SCORE_SCHEMA`, ordered by question id and checked.

    Raises:
        ValueError: a row breaks a rule of the schema; the text names the rule.
    """
    return validate_scores(pl.DataFrame(rows, schema=SCORE_SCHEMA, strict=True).sort("question_id"))


def validate_scores(frame: pl.DataFrame) -> pl.DataFrame:
    """Check a table of scores and return it.

    Raises:
        ValueError: the columns are not those of `SCORE_SCHEMA`, a scan and question comes twice, or a row is
            neither a full answer nor a coded error.
    """
    if frame.schema != SCORE_SCHEMA:
        raise ValueError(f"score columns are {dict(frame.schema)}, not {dict(SCORE_SCHEMA)}")
    failed = pl.col("error").is_not_null()
    rules = {
        "an identity column is null": pl.any_horizontal(pl.col(_ALWAYS).is_null()),
        "an answer is incomplete": ~failed & pl.any_horizontal(pl.col(_ANSWERED).is_null()),
        "a failed row has an answer": failed & pl.any_horizontal(pl.col(_ANSWERED).is_not_null()),
        "an error has no message": failed != pl.col("message").is_not_null(),
        "a confidence is not in [0, 1]": ~pl.col("confidence").is_between(0, 1),
        "num_kept is not the length of kept": pl.col("num_kept") != pl.col("kept").list.len(),
        "more tokens are kept than there are": pl.col("num_kept") > pl.col("num_tokens"),
        "a scan and question comes twice": pl.struct("scan_id", "question_id").is_duplicated(),
    }
    for rule, is_broken in rules.items():
        if broken := frame.filter(is_broken.fill_null(False)).head(1).to_dicts():
            raise ValueError(f"{rule}: scan {broken[0]['scan_id']}, question {broken[0]['question_id']}")
    return frame


def part_key(**identity: Any) -> str:
    """Digest of all that decides the rows of one scan: equal keys, equal rows (but for `seconds`)."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def folder_digest(folder: Path) -> str:
    """Digest of the names and bytes of all files under `folder`: two models of one size differ in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return part_key(files=[[path.relative_to(folder).as_posix(), file_digest(path)] for path in files])


def read_part(part: Path) -> pl.DataFrame | None:
    """The rows of a finished scan, or None when there is no whole, valid part."""
    try:
        return validate_scores(pl.read_parquet(part, glob=False))
    except (OSError, ValueError, pl.exceptions.PolarsError):
        return None


def write_part(part: Path, frame: pl.DataFrame) -> None:
    """Write the rows of one scan, all or none.

    Raises:
        ValueError: a row breaks the schema; nothing is written.
    """
    with atomic_path(part) as temporary:
        validate_scores(frame).write_parquet(temporary)


def join_parts(parts: Sequence[Path], table: Path) -> Path:
    """Write the rows of `parts`, in their order, as one table, streamed so that memory does not grow."""
    with atomic_path(table) as temporary:
        rows = pl.scan_parquet(list(parts), schema=SCORE_SCHEMA, glob=False)
        rows.sink_parquet(temporary, row_group_size=4096)  # a group is held in memory until it is full
    return table
