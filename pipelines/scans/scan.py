"""What a scan file holds, and the one function that reads any."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Literal

import numpy as np

from photon.errors import PhotonError
from pipelines.scans.checks import MAX_VOXELS, Trust, column_length, orientation_of, unsupported

Format = Literal["nifti", "metaimage", "nrrd", "dicom"]

FORMAT_OF_ENDING: dict[str, Format] = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".mha": "metaimage",
    ".mhd": "metaimage",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
}
"""Endings of files that hold one scan each."""

DICOM_ENDINGS = (".dcm", ".dicom", ".ima")
PREAMBLE = 128
_MAX_FIRST_LENGTH = 64

_NIFTI_STARTS = tuple(size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big"))  # type: ignore[arg-type]
_METAIMAGE_START = re.compile(rb"\s*(ObjectType|NDims|Comment)\s*=")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """A scan as it was read.

    Args:
        array: int16 or float32 [i, j, k] in the file's own axes, slope and intercept applied.
        affine: float64 [4, 4], array index to world RAS millimetres.
        sha256: checksum of the file's bytes; of several files, in the order in which they are read.
        spacing_mm: edge of a voxel along (i, j, k).
        orientation: where the array axes point to, e.g. ``RAS``.
        modality: ``ct``, ``mr`` or ``pt`` where the file itself says so, else None.
        notes: what was unusual but acceptable, repaired or assumed.
        extent: lowest and highest value, where the reader knows them.
    """

    array: np.ndarray
    affine: np.ndarray
    path: Path
    sha256: str
    spacing_mm: tuple[float, ...]
    orientation: str
    notes: tuple[str, ...]
    modality: str | None = None
    extent: tuple[float, float] | None = None


def make_scan(
    array: np.ndarray,
    affine: np.ndarray,
    *,
    path: Path,
    sha256: str,
    notes: tuple[str, ...] = (),
    modality: str | None = None,
    extent: tuple[float, float] | None = None,
) -> Scan:
    """A scan whose spacing and orientation are those of its matrix [4, 4], array index to world RAS mm."""
    return Scan(
        array=array,
        affine=affine,
        path=path,
        sha256=sha256,
        spacing_mm=tuple(round(column_length(affine, axis), 6) for axis in range(3)),
        orientation=orientation_of(affine),
        notes=notes,
        modality=modality,
        extent=extent,
    )


def read_scan(
    path: Path,
    *,
    series: str = "",
    max_voxels: int = MAX_VOXELS,
    trust: Trust | None = None,
    is_labels: bool = False,
) -> Scan:
    """Read a scan and prove that it is whole and makes sense.

    What the file holds decides how it is read; its name, where the content is of no known format.

    Args:
        path: NIfTI (``.nii``, ``.nii.gz``), MetaImage (``.mha``, ``.mhd``) or NRRD (``.nrrd``, ``.nhdr``); or a
            folder of DICOM files.
        series: key of the DICOM series that is wanted; needed where the folder holds several.
        max_voxels: a file that declares more is refused before memory is taken.
        trust: for NIfTI whose matrix and voxel spacing differ by more than 1 %: which of them counts; None
            refuses such files.
        is_labels: it is a label map: all its values may be the same.

    Raises:
        PhotonError: ``SCAN_MISSING``, ``FORMAT_UNSUPPORTED``, ``SCAN_UNREADABLE``, ``GZIP_CORRUPT``,
            ``SCAN_TRUNCATED``, ``SCAN_TRAILING_DATA``, ``SCAN_TOO_LARGE``, ``SCAN_NOT_3D``, ``SCAN_RGB``,
            ``SPACING_INVALID``, ``SPACING_CONFLICT``, ``AFFINE_INVALID``, ``SCALING_INVALID``,
            ``VOXELS_NOT_FINITE``, ``SCAN_CONSTANT`` or ``DATA_FILE_OUTSIDE``; for a folder what
            :func:`pipelines.scans.dicom.read_dicom` raises.
    """
    # A format's library is imported when the first file of that format is read.
    if not path.exists():
        raise PhotonError("SCAN_MISSING", path, "the file does not exist.", "Check the path.")
    if path.is_dir():
        from pipelines.scans.dicom import read_dicom

        return read_dicom(path, series, max_voxels=max_voxels)
    if not path.is_file():
        raise unsupported(path, "it is neither a file nor a folder.")
    by_name, by_content = FORMAT_OF_ENDING.get(scan_ending(path)), _format_of_content(path)
    kind = by_content or by_name
    if kind == "nifti":
        from pipelines.scans.nifti import read_nifti

        scan = read_nifti(path, max_voxels=max_voxels, trust=trust, is_labels=is_labels)
    elif kind == "metaimage":
        from pipelines.scans.metaimage import read_metaimage

        scan = read_metaimage(path, max_voxels=max_voxels, is_labels=is_labels)
    elif kind == "nrrd":
        from pipelines.scans.nrrd import read_nrrd

        scan = read_nrrd(path, max_voxels=max_voxels, is_labels=is_labels)
    else:
        raise unsupported(
            path, f"it is a {path.suffix or 'nameless'} file; NIfTI, MetaImage, NRRD and folders of DICOM are."
        )
    if kind == by_name:
        return scan
    return dataclasses.replace(scan, notes=(*scan.notes, f"the file is {kind}, other than its name says"))


def data_file_name(path: Path) -> str | None:
    """The file that the header in ``path`` says its voxels are in; None where they are in ``path`` itself.

    Raises:
        PhotonError: ``SCAN_UNREADABLE`` or ``SCAN_TRUNCATED``.
    """
    kind = _format_of_content(path)
    if kind == "metaimage":
        from pipelines.scans import metaimage

        return metaimage.data_file_name(path)
    if kind == "nrrd":
        from pipelines.scans import nrrd

        return nrrd.data_file_name(path)
    return None


def is_dicom(first: bytes) -> bool:
    """Whether a file that begins with these bytes (132 suffice) is DICOM; old ones lack preamble and magic."""
    if first[PREAMBLE : PREAMBLE + 4] == b"DICM":
        return True
    group, element = first[:2], int.from_bytes(first[2:4], "little")
    is_explicit = first[4:6] in (b"UL", b"UI", b"CS") and first[6:8] < b"\xff"
    is_implicit = int.from_bytes(first[4:8], "little") <= _MAX_FIRST_LENGTH and first[4:8] != bytes(4)
    return group in (b"\x02\0", b"\x08\0") and element <= 0x18 and (is_explicit or is_implicit)


def scan_ending(path: Path) -> str:
    """The ending of a file name in lower case; ``.nii.gz`` counts as one."""
    name = path.name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def _format_of_content(path: Path) -> Format | None:
    try:
        with path.open("rb") as stream:
            start = stream.read(512)
    except OSError as error:
        fact = f"the file cannot be opened ({error.strerror})."
        raise PhotonError("SCAN_UNREADABLE", path, fact, "Check its permissions.") from error
    if start.startswith(_NIFTI_STARTS):
        return "nifti"
    if start.startswith(b"NRRD0"):
        return "nrrd"
    return "metaimage" if _METAIMAGE_START.match(start) else None
