"""DICOM series: which ones a folder holds, and reading one as a scan.

The modules `scans/dicom*.py` are the only ones that know pydicom.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from photon.errors import PhotonError
from pipelines.files import file_digest
from pipelines.scans.checks import MAX_VOXELS, check_grid
from pipelines.scans.dicom_files import GET_AGAIN
from pipelines.scans.dicom_headers import Slice, read_slices
from pipelines.scans.dicom_series import Series, grouped
from pipelines.scans.dicom_voxels import joined_sha256, read_voxels
from pipelines.scans.scan import DICOM_ENDINGS, PREAMBLE, Scan, make_scan

__all__ = ["Series", "list_series", "read_dicom", "read_series", "series_sha256"]


def list_series(folder: Path) -> list[Series]:
    """The series whose files lie in ``folder`` itself, ordered by key; only headers are read.

    Refused ones are listed too, with the reason; files that are not DICOM are passed over. Files that call
    themselves DICOM, by name or content, and cannot be read make one refused entry, ``unreadable``, and a
    note with every other series.

    Raises:
        PhotonError: ``SCAN_UNREADABLE`` when the folder cannot be listed.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        fact = f"the folder cannot be listed ({error.strerror})."
        raise PhotonError("SCAN_UNREADABLE", folder, fact, "Check that it is there, and its permissions.") from error
    images: list[Slice] = []
    broken: list[PhotonError] = []
    for path in paths:
        if path.name.startswith(".") or not path.is_file():
            continue
        try:
            found = read_slices(path)
        except PhotonError as error:
            broken.append(error)
            continue
        images += found or []
        if found is None and _ought_to_be_dicom(path):
            broken.append(PhotonError("SCAN_UNREADABLE", path, "it does not begin as a DICOM file.", GET_AGAIN))
    series = grouped(images, folder)
    if not broken:
        return series
    first = broken[0]
    fact = f"{first.fact} {len(broken)} files of the folder cannot be read." if len(broken) > 1 else first.fact
    refusal = PhotonError(first.code, first.subject, fact, first.remedy)
    note = f"{len(broken)} other files of its folder cannot be read: a slice at an end may be missing"
    return [dataclasses.replace(one, notes=(*one.notes, note)) for one in series] + [
        Series(key="unreadable", folder=folder, modality=None, images=(), stack=None, refusal=refusal)
    ]


def read_dicom(folder: Path, key: str = "", *, max_voxels: int = MAX_VOXELS) -> Scan:
    """Read one series of a folder: the one with this key or, without a key, the only one that is not refused.

    Raises:
        PhotonError: ``SERIES_MISSING``, ``SERIES_AMBIGUOUS``; as :func:`read_series`.
    """
    found = list_series(folder)
    if key:
        chosen = [series for series in found if series.key == key]
    else:
        chosen = [series for series in found if series.refusal is None] or found[:1]
    if not chosen:
        fact = f"it holds no DICOM series {key}." if key else "it holds no DICOM series."
        raise PhotonError("SERIES_MISSING", folder, fact, "Check the folder; its files may have changed.")
    if len(chosen) > 1:
        fact = f"it holds {len(chosen)} DICOM series: {', '.join(series.key for series in chosen[:9])}."
        raise PhotonError("SERIES_AMBIGUOUS", folder, fact, "Name one of them, or preprocess the folder.")
    return read_series(chosen[0], max_voxels)


def read_series(series: Series, max_voxels: int = MAX_VOXELS) -> Scan:
    """Read the pixels of a series. Slices are ordered by position; identical copies are dropped with a note.

    Values are slope * stored + intercept of each slice: HU for CT, the header's unit (noted) for PET, no unit
    for MR. Padding becomes air (-1000 HU) in CT and the lowest other value elsewhere.

    Raises:
        PhotonError: the refusal of the series, if it has one; ``SCAN_NOT_3D``, ``SCAN_TOO_LARGE``, ``SCALING_INVALID``,
            ``SCAN_TRUNCATED``, ``SCAN_TRAILING_DATA``, ``PIXELS_CORRUPT``, ``SLICES_CONFLICT``,
            ``SCAN_CONSTANT``, ``FORMAT_UNSUPPORTED`` or ``SCAN_UNREADABLE``.
    """
    if series.refusal is not None or series.stack is None:
        raise series.refusal or AssertionError("a series has a stack or a refusal")
    check_grid(series.shape, series.subject, max_voxels)
    voxels = read_voxels(series)
    return make_scan(
        voxels.array.transpose(2, 1, 0),
        series.stack.affine,
        path=series.folder,
        sha256=joined_sha256(voxels.digests),
        notes=(*series.notes, *series.stack.notes, *voxels.notes),
        modality=series.modality,
    )


def _ought_to_be_dicom(path: Path) -> bool:
    """Whether a file that does not begin as DICOM has lost its beginning: by its name, or cut off in the preamble."""
    ending = path.suffix.lower()
    if ending in DICOM_ENDINGS:
        return True
    if ending and not ending[1:].isdigit():  # names are often UIDs
        return False
    return path.stat().st_size < PREAMBLE and not any(path.read_bytes())


def series_sha256(series: Series) -> str:
    """Checksum of the files of a series, whatever they are called; that of the scan read from them."""
    return joined_sha256([file_digest(path) for path in series.paths])
