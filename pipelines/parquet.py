"""Tables of known columns as Parquet files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from photon.errors import PhotonError
from pipelines.files import atomic_path


def write_table(rows: Sequence[Mapping[str, object]], schema: Mapping[str, Any], target: Path) -> pl.DataFrame:
    """Write rows with these columns, atomically, and return the table."""
    table = pl.DataFrame(rows, schema=dict(schema), orient="row")
    with atomic_path(target) as temporary:
        table.write_parquet(temporary, compression="zstd")
    return table


def read_table(source: Path, schema: Mapping[str, Any], remedy: str) -> pl.DataFrame:
    """Read a table written by :func:`write_table`.

    Raises:
        PhotonError: ``TABLE_UNREADABLE`` when the file is missing, is not Parquet or has other columns.
    """
    try:
        table = pl.read_parquet(source, glob=False)
    except FileNotFoundError as error:
        raise PhotonError("TABLE_UNREADABLE", source, "the file does not exist.", remedy) from error
    except (pl.exceptions.PolarsError, OSError) as error:
        raise PhotonError("TABLE_UNREADABLE", source, f"it is not a Parquet table ({error}).", remedy) from error
    if dict(table.schema) != dict(schema):
        different = sorted({name for name in {*table.schema, *schema} if table.schema.get(name) != schema.get(name)})
        raise PhotonError("TABLE_UNREADABLE", source, f"its columns differ in {', '.join(different)}.", remedy)
    return table.select(list(schema))
