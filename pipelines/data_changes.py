"""What changed in the scans between two versions of the data, told by their manifests; recording it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from photon.errors import PhotonError
from pipelines.manifest import MANIFEST_NAME, SCHEMA
from pipelines.old_versions import read_old_file
from pipelines.results import VersionRecord
from pipelines.tracking import Tracker
from pipelines.version_owners import note_versions
from pipelines.versioning import read_version, version_folder

MANIFEST = f"volumes/{MANIFEST_NAME}"
CHANGES = ("added", "removed", "redone", "refused")
COLUMNS = ("scan_id", "change", "status", "message", "source_sha256", "volume_sha256", "volume_sha256_before")


def record_data(data: Path, tracker: Tracker) -> tuple[VersionRecord, pl.DataFrame]:
    """Record the version of a data folder, and log what changed since the last one.

    The tracker gets a table ``changes``, the number of scans of every kind of change, and the data as an input.

    Returns:
        The version, and the table of :func:`compare_manifests`.

    Raises:
        PhotonError: as :func:`version_folder`.
    """
    data = data.resolve()
    pointer = data.with_name(f"{data.name}.dvc")
    before = read_version(pointer) if pointer.exists() else None
    record = version_folder(data)
    note_versions(data, before, record.data_version)
    changes = changes_between(data, before, record.data_version)
    tracker.log_table("changes", changes.to_dict(as_series=False))
    tracker.log_summary({f"scans_{change}": count for change, count in count_changes(changes).items()})
    tracker.log_dataset(data.name, record.data_version, pointer.name)
    return record, changes


def changes_between(data: Path, before: str | None, after: str) -> pl.DataFrame:
    """What changed in the scans between two versions in DVC's cache.

    A version without a manifest, or that the cache no longer has, counts as one without scans.
    """
    return compare_manifests(_manifest_of(data, before), _manifest_of(data, after))


def compare_manifests(before: pl.DataFrame, after: pl.DataFrame) -> pl.DataFrame:
    """A row for every scan that changed, by kind of change and scan id.

    ``added``: usable now, and not there or refused before; ``redone``: its volume is another; ``refused``: refused now,
    and not there, usable or refused for another reason before; ``removed``: no longer there.
    """
    was = {row["scan_id"]: row for row in before.iter_rows(named=True)}
    now = {row["scan_id"]: row for row in after.iter_rows(named=True)}
    rows = []
    for scan_id in sorted(was | now):
        old, new = was.get(scan_id), now.get(scan_id)
        change = _change(old, new)
        if change:
            told = new or old or {}
            row = {name: told.get(name) for name in COLUMNS}
            row |= {"change": change, "volume_sha256_before": old and old["volume_sha256"]}
            rows.append(row if new else row | {"volume_sha256": None, "source_sha256": None})
    table = pl.DataFrame(rows, schema=dict.fromkeys(COLUMNS, pl.String), orient="row")
    return table.sort(pl.col("change").cast(pl.Enum(CHANGES)), "scan_id")


def count_changes(changes: pl.DataFrame) -> dict[str, int]:
    """How many scans were added, removed, redone and refused."""
    return {change: changes.filter(change=change).height for change in CHANGES}


def _change(old: Mapping[str, str] | None, new: Mapping[str, str] | None) -> str | None:
    if new is None:
        return "removed"
    if new["status"] != "ok":
        return "refused" if old is None or old["status"] != new["status"] else None
    if old is None or old["status"] != "ok":
        return "added"
    is_same = all(old[name] == new[name] for name in ("volume_sha256", "spec_digest"))
    return None if is_same else "redone"


def _manifest_of(data: Path, version: str | None) -> pl.DataFrame:
    empty = pl.DataFrame(schema=SCHEMA)
    if version is None:
        return empty
    try:
        content = read_old_file(data, version, MANIFEST)
    except PhotonError:
        return empty
    if content is None:
        return empty
    try:
        table = pl.read_parquet(io.BytesIO(content))
    except pl.exceptions.PolarsError:
        return empty
    # Tables of an older layout lack columns.
    missing = [pl.lit(None, kind).alias(name) for name, kind in SCHEMA.items() if name not in table.columns]
    return table.with_columns(missing).select(list(SCHEMA))
