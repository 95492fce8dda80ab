"""Scans of a dataset into ``raw/images`` of a data folder: linked or copied, mended where need be, and looked through.

Every file is read whole once: for damage, for the checksum by which the same scan under two names is found, and, for
chest CT, for air near -1000 HU.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from photon.errors import PhotonError
from pipelines.datasets.base import ScanFile, printable
from pipelines.datasets.mending import write_mended, write_nominal
from pipelines.files import atomic_path
from pipelines.grids import frame_of
from pipelines.scans.scan import Scan, read_scan

Progress = Callable[[int, int, str], None]

MODES = ("link", "copy", "none")
AIR_HU = (-1150.0, -850.0)
"""Where the second percentile of a chest CT lies, values that only fill the corners of its slices left out."""

SCANS_SCHEMA: dict[str, Any] = {
    "scan_id": pl.String,
    "source": pl.String,
    "image": pl.String,
    "status": pl.String,
    "message": pl.String,
    "voxels_sha256": pl.String,
    "air_hu": pl.Float64,
    "recipe": pl.String,
    "size": pl.Int64,
    "mtime_ns": pl.Int64,
    "notes": pl.List(pl.String),
}
"""One row a scan that has a file. `status` is ``ok`` or an error code; `image` is below ``raw/images``;
`voxels_sha256` is of the values in the patient's axes, whatever the file's order of axes and type of numbers; `recipe`,
`size` and `mtime_ns` tell whether the scan has to be done again."""

_SAVE_EVERY = 100
_PADDING_SHARE = 0.005


def place_scans(
    scans: Sequence[ScanFile],
    images: Path,
    table: Path,
    mode: str,
    on_progress: Progress | None = None,
    num_workers: int | None = None,
) -> pl.DataFrame:
    """Put scans into ``images`` and list them in ``table`` (Parquet); what is there and unchanged is not done again.

    Args:
        mode: ``link`` (symbolic links) or ``copy``; scans whose header is mended are always copies.

    Raises:
        PhotonError: ``OUTPUT_UNWRITABLE``. What is wrong with one scan becomes the ``status`` of its row.
    """
    images.mkdir(parents=True, exist_ok=True)
    earlier = {row["scan_id"]: row for row in _read_table(table)}
    rows: list[dict[str, Any]] = []

    def placed(scan: ScanFile) -> dict[str, Any]:
        return _row(scan, images, mode, earlier.get(scan.scan_id))

    with ThreadPoolExecutor(num_workers or os.cpu_count() or 1) as pool:
        for row in pool.map(placed, scans):
            rows.append(row)
            if len(rows) % _SAVE_EVERY == 0:
                # What an earlier import knows of the scans still to come is not lost with this one.
                _write_table(list({**earlier, **{row["scan_id"]: row for row in rows}}.values()), table)
            if on_progress:
                on_progress(len(rows), len(scans), row["scan_id"])
    return _write_table(rows, table)


def air_hu(array: np.ndarray) -> float:
    """The second percentile of every eighth voxel, without values that only pad the corners of slices.

    Such a value lies below all air, alone, and fills at least half a percent of the scan.
    """
    values, counts = np.unique(array[::2, ::2, ::2], return_counts=True)
    share = counts / counts.sum()
    start = 0
    while start < len(values) - 1 and values[start] < AIR_HU[0] and share[start] >= _PADDING_SHARE:
        start += 1
    cumulative = np.cumsum(counts[start:])
    return float(values[start + int(np.searchsorted(cumulative, 0.02 * cumulative[-1]))])


def _row(scan: ScanFile, images: Path, mode: str, earlier: Mapping[str, Any] | None) -> dict[str, Any]:
    is_made = scan.header is not None or scan.nominal_spacing
    ending = ".nii.gz" if is_made or scan.path.name.lower().endswith(".gz") else ".nii"
    target = images / f"{scan.scan_id}{ending}"
    row: dict[str, Any] = dict.fromkeys(SCANS_SCHEMA) | {
        "scan_id": scan.scan_id,
        "source": printable(str(scan.path)),
        "image": target.name,
        "recipe": _recipe(scan, mode),
        "message": "",
        "notes": [],
    }
    try:
        status = scan.path.stat()
        row |= {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
        if earlier is not None and earlier["status"] == "ok" and target.is_file() and _is_same(earlier, row):
            return dict(earlier)
        found = _placed(scan, target, mode)
        _other_ending(target).unlink(missing_ok=True)
        return row | found | {"status": "ok"}
    except PhotonError as error:
        for path in (target, _other_ending(target)):
            path.unlink(missing_ok=True)
        return row | {"status": error.code, "message": printable(f"{error.fact} {error.remedy}")}
    except OSError as error:
        fact = f"the scan cannot be put there ({error.strerror or error})."
        raise PhotonError("OUTPUT_UNWRITABLE", target, fact, "Free space; what is done is kept.") from error


def _other_ending(target: Path) -> Path:
    """Where an earlier import may have put the same scan."""
    is_gzip = target.name.endswith(".gz")
    return target.with_name(target.name.removesuffix(".gz") if is_gzip else f"{target.name}.gz")


def _placed(scan: ScanFile, target: Path, mode: str) -> dict[str, Any]:
    """Put one scan in its place, if it is good; returns what was found in it."""
    with tempfile.TemporaryDirectory(prefix=".import-", dir=target.parent) as folder:
        made = Path(folder) / target.name
        if scan.header is not None:
            write_mended(scan.path, scan.header, made)
        elif scan.nominal_spacing:
            write_nominal(scan.path, made)
        elif mode == "link":
            made.symlink_to(scan.path.resolve())
        else:
            shutil.copyfile(scan.path, made)
        try:
            found = _looked_through(read_scan(made), scan)
        except PhotonError as error:
            raise PhotonError(error.code, scan.path, error.fact, error.remedy) from error
        if made.is_symlink():
            made.replace(target)
        else:
            with atomic_path(target) as temporary:
                made.replace(temporary)
    return found


def _looked_through(scan: Scan, wanted: ScanFile) -> dict[str, Any]:
    found: dict[str, Any] = {"voxels_sha256": _voxels_sha256(scan), "notes": [*scan.notes, *_notes(wanted)]}
    if wanted.has_lung:
        found["air_hu"] = air_hu(scan.array)
        if not AIR_HU[0] <= found["air_hu"] <= AIR_HU[1]:
            fact = f"the darkest 2 % of this chest CT end at {found['air_hu']:g} HU, where air should be near -1000."
            remedy = "Look whether slope and intercept were applied twice or not at all, and choose --rescale."
            raise PhotonError("HU_IMPLAUSIBLE", wanted.path, fact, remedy)
    return found


def _notes(scan: ScanFile) -> Iterable[str]:
    if scan.nominal_spacing:
        yield "geometry is assumed: 1 mm voxels, axial slices from foot to head; values have no unit"
    if scan.header is not None and scan.header.affine is not None:
        yield f"spacing and orientation from {scan.header.source}"
    if scan.header is not None and scan.header.slope is not None:
        yield f"rescaled by {scan.header.slope:g} and {scan.header.intercept:g} from {scan.header.source}"


def _voxels_sha256(scan: Scan) -> str:
    """The same for a scan and its copy with flipped or exchanged axes, or with numbers of another type."""
    array = frame_of(scan.array.shape, scan.affine).canonical(scan.array)
    digest = hashlib.sha256(f"{array.shape}".encode())
    for part in array:
        digest.update((np.ascontiguousarray(part, "<f4") + np.float32(0.0)).data)  # -0.0 is 0.0
    return digest.hexdigest()


def _recipe(scan: ScanFile, mode: str) -> str:
    """Names what is done with a scan's file."""
    header = None if scan.header is None else dataclasses.asdict(scan.header)
    text = json.dumps([str(scan.path.resolve()), header, scan.has_lung, scan.nominal_spacing, mode], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _is_same(earlier: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    return all(earlier[name] == row[name] for name in ("source", "image", "recipe", "size", "mtime_ns"))


def _read_table(path: Path) -> list[dict[str, Any]]:
    """Rows of an earlier import; none where there is no readable table, so that all is done again."""
    try:
        table = pl.read_parquet(path, memory_map=False)
    except (OSError, pl.exceptions.PolarsError):
        return []
    return table.to_dicts() if table.schema == pl.Schema(SCANS_SCHEMA) else []


def _write_table(rows: Sequence[Mapping[str, Any]], path: Path) -> pl.DataFrame:
    table = pl.DataFrame(rows, schema=SCANS_SCHEMA, orient="row").sort("scan_id")
    with atomic_path(path) as temporary:
        table.write_parquet(temporary, compression="uncompressed", statistics=False)
    return table
