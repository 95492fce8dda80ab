"""Scans of CT-RATE, which 3D-RAD asks about too: their names, where their files lie, and headers from its table.

The original files have blank headers: neither spacing nor orientation nor rescaling. All three are in the dataset's
``*_metadata.csv``. A corrected copy of the files lies in folders whose name ends in ``_fixed``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipelines.datasets.base import ImportOptions, KnownHeader, Place, Refusal, RowError, ScanFile
from pipelines.datasets.tables import Row, csv_rows, files_below, header_of, is_of_masks

FIXED = "_fixed"
_NAME = re.compile(r"(train|valid|test)_(\d+)_([a-z]+)_(\d+)(?:\.nii)?(?:\.gz)?")
_MAX_NUMBER = 1e6
_NEEDED = {"volumename", "xyspacing", "zspacing", "imageorientationpatient", "imagepositionpatient"}


def scan_name(volume_name: str) -> tuple[str, str, str]:
    """Scan id, patient id and visit letter of a volume name such as ``valid_12_a_1.nii.gz``.

    3D-RAD writes ``test`` where CT-RATE writes ``valid``; the ids are those of CT-RATE.

    Raises:
        RowError: it is no such name.
    """
    found = _NAME.fullmatch(volume_name)
    if found is None:
        raise RowError("the volume name is not one of CT-RATE", repr(volume_name))
    split = "train" if found[1] == "train" else "valid"
    return f"{split}_{found[2]}_{found[3]}_{found[4]}", f"{split}_{found[2]}", found[3]


def split_of_name(scan_id: str) -> str:
    """The split of a scan: CT-RATE's valid is our test."""
    return "train" if scan_id.startswith("train_") else "test"


def find_ct_rate_scans(folder: Path, wanted: frozenset[str], options: ImportOptions) -> Iterator[ScanFile | Refusal]:
    """The files of the wanted scans, the corrected copy where both are there, and what is known about their headers.

    A scan whose header has to come from the table and that the table does not describe is refused.
    """
    images = options.images or folder
    paths = _scan_paths(images, wanted)
    original = {scan_id for scan_id, path in paths.items() if not _is_fixed(path, images)}
    from_table = set(paths) if options.rescale == "csv" else original
    known: dict[str, Row | Refusal] = {}
    for base in dict.fromkeys((folder, images)):
        known |= _metadata(base, from_table)
    for scan_id, path in sorted(paths.items()):
        if scan_id not in from_table:
            yield ScanFile(scan_id=scan_id, path=path, has_lung=True)
            continue
        place = Place(file=path.relative_to(images).as_posix(), row=0)
        found = known.get(scan_id)
        if found is None:
            detail = "no *_metadata.csv below the folders describes it, and its own header is blank"
            yield Refusal(place=place, reason="the scan has no row in the metadata table", detail=detail)
            continue
        if isinstance(found, Refusal):
            yield found
            continue
        try:
            header = _known_header(found, scan_id in original, options)
        except RowError as error:
            yield Refusal(place=found.place, reason=error.reason, detail=error.detail)
            continue
        yield ScanFile(scan_id=scan_id, path=path, header=header, has_lung=True)


def _scan_paths(images: Path, wanted: frozenset[str]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for path in files_below(images, ".nii", ".nii.gz"):
        try:
            scan_id = scan_name(path.name)[0]
        except RowError:
            continue
        if is_of_masks(path, images):
            continue  # CT-RATE's segmentations have the names of their scans
        if scan_id in wanted and (scan_id not in paths or _is_fixed(path, images)):
            paths[scan_id] = path
    return paths


def _is_fixed(path: Path, images: Path) -> bool:
    """Whether the file is of the corrected copy, by the folders below ``images`` and that folder's own name."""
    return any(part.endswith(FIXED) for part in (images.name, *path.relative_to(images).parts[:-1]))


def _metadata(folder: Path, wanted: set[str]) -> dict[str, Row | Refusal]:
    """Rows of the metadata tables below a folder about the wanted scans; two that differ are refused."""
    rows: dict[str, Row | Refusal] = {}
    if not wanted:
        return rows
    for path in files_below(folder, ".csv"):
        if not set(header_of(path)) >= _NEEDED:
            continue
        for row in csv_rows(path, folder):
            if isinstance(row, Refusal):
                continue  # whatever scan it was about has no row, which is told where that scan is
            try:
                scan_id = scan_name(row.text("volumename"))[0]
            except RowError:
                continue
            if scan_id not in wanted:
                continue
            earlier = rows.get(scan_id)
            if isinstance(earlier, Row) and earlier.content != row.content:
                rows[scan_id] = Refusal(place=row.place, reason="two metadata rows of a scan differ", detail=scan_id)
            elif earlier is None:
                rows[scan_id] = row
    return rows


def _known_header(row: Row, is_blank: bool, options: ImportOptions) -> KnownHeader:
    is_rescaled = options.rescale == "csv" or (is_blank and options.rescale == "auto")
    slope = intercept = None
    if is_rescaled:
        slope, intercept = _numbers(row, "rescaleslope", 1)[0], _numbers(row, "rescaleintercept", 1)[0]
    return KnownHeader(
        affine=_affine(row) if is_blank else None,
        slope=slope,
        intercept=intercept,
        shape=_shape(row),
        source=row.place.file,
    )


def _affine(row: Row) -> tuple[tuple[float, ...], ...]:
    """Array index (column, row, slice) to world RAS millimetres.

    The table has DICOM's terms: the first direction is that of the column index, and of two spacings the first is the
    one between rows. Slices are taken to follow each other along the cross product of the two directions.
    """
    between_rows, between_columns = _numbers(row, "xyspacing", 2)
    (between_slices,) = _numbers(row, "zspacing", 1)
    if not all(0.05 <= spacing <= 50 for spacing in (between_rows, between_columns, between_slices)):
        raise RowError("the spacing in the metadata table is impossible", row.optional("volumename"))
    directions = np.array(_numbers(row, "imageorientationpatient", 6)).reshape(2, 3)
    if not np.allclose(directions @ directions.T, np.eye(2), atol=1e-3):
        raise RowError("the orientation in the metadata table is no pair of directions", row.optional("volumename"))
    affine = np.eye(4)
    affine[:3, 0] = directions[0] * between_columns
    affine[:3, 1] = directions[1] * between_rows
    affine[:3, 2] = np.cross(*directions) * between_slices
    affine[:3, 3] = _numbers(row, "imagepositionpatient", 3)
    affine[:2] *= -1  # DICOM's world is LPS
    return tuple(tuple(float(value) for value in line) for line in affine)


def _shape(row: Row) -> tuple[int, int, int] | None:
    texts = [row.optional(name) for name in ("columns", "rows", "numberofslices")]
    if not all(texts):
        return None
    try:
        columns, rows, slices = (int(float(text)) for text in texts)
    except (ValueError, OverflowError) as error:
        raise RowError("the size in the metadata table is no number", row.optional("volumename")) from error
    return columns, rows, slices


def _numbers(row: Row, column: str, count: int) -> tuple[float, ...]:
    """Numbers of a cell such as ``0.7`` or ``[0.7, 0.7]``."""
    text = row.text(column)
    try:
        values = json.loads(text if text.startswith("[") else f"[{text}]")
        numbers = tuple(float(value) for value in values)
    except (ValueError, TypeError, OverflowError, RecursionError):
        numbers = ()
    if len(numbers) != count or not all(abs(number) <= _MAX_NUMBER for number in numbers):
        raise RowError("a value in the metadata table is no number", f"{column}: {text[:80]!r}")
    return numbers
