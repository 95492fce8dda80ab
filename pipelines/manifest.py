"""The table of preprocessed scans: one row a scan, whether it could be read or not.

The only module that declares the table. Its bytes depend on its content alone: rows are sorted, nothing is
compressed, and there is no time and no absolute path in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars

from photon.errors import PhotonError
from pipelines.files import atomic_path

MANIFEST_NAME = "manifest.parquet"

SCHEMA: dict[str, Any] = {
    "scan_id": polars.String,
    "source": polars.String,
    "source_sha256": polars.String,
    "status": polars.String,
    "message": polars.String,
    "volume": polars.String,
    "volume_sha256": polars.String,
    "spec_digest": polars.String,
    "shape": polars.List(polars.Int64),
    "spacing_mm": polars.List(polars.Float64),
    "orientation": polars.String,
    "modality": polars.String,
    "modality_source": polars.String,
    "min_hu": polars.Float64,
    "max_hu": polars.Float64,
    "notes": polars.List(polars.String),
}
"""Column -> type. `source` is relative to the input folder, `volume` to the manifest; `status` is ``ok``
or the error code, with the error's fact and remedy in `message`. Geometry is the source's, in its own
axes. `volume_sha256` is of the packed voxels. A refused scan has nulls where nothing is known."""

_ALWAYS = ("scan_id", "source", "status", "message", "spec_digest")
_WHEN_OK = ("source_sha256", "volume", "volume_sha256", "shape", "spacing_mm", "orientation", "modality")


def write_manifest(rows: Iterable[Mapping[str, Any]], path: Path) -> polars.DataFrame:
    """Validate and write rows, sorted by scan_id; absent columns become null. Returns the table.

    Raises:
        PhotonError: ``MANIFEST_INVALID``.
    """
    filled = [{name: row.get(name) for name in SCHEMA} for row in rows]
    table = polars.DataFrame(filled, schema=SCHEMA, orient="row").sort("scan_id")
    _validate(table, path)
    with atomic_path(path) as temporary:
        table.write_parquet(temporary, compression="uncompressed", statistics=False)
    return table


def read_manifest(path: Path) -> polars.DataFrame:
    """Read and validate a manifest.

    Raises:
        PhotonError: ``MANIFEST_INVALID`` when it is missing, is not Parquet or breaks the schema.
    """
    try:
        table = polars.read_parquet(path, memory_map=False)
    except (OSError, polars.exceptions.PolarsError) as error:
        raise _invalid(path, f"the file cannot be read ({error})") from error
    _validate(table, path)
    return table


def _validate(table: polars.DataFrame, path: Path) -> None:
    if dict(table.schema) != SCHEMA:
        found = {name: str(kind) for name, kind in table.schema.items() if SCHEMA.get(name) != kind}
        missing = sorted(set(SCHEMA) - set(table.columns))
        raise _invalid(path, f"its columns differ (unexpected {found}, missing {missing})")
    if table["scan_id"].is_duplicated().any():
        raise _invalid(path, "a scan_id occurs twice")
    for name in _ALWAYS:
        if table[name].null_count():
            raise _invalid(path, f"column {name} is empty in a row")
    is_ok = table.filter(polars.col("status") == "ok")
    for name in _WHEN_OK:
        if is_ok[name].null_count():
            raise _invalid(path, f"column {name} is empty in a row whose status is ok")


def _invalid(path: Path, fact: str) -> PhotonError:
    return PhotonError("MANIFEST_INVALID", path, f"{fact}.", "Run `photon preprocess` again.")
