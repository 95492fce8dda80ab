"""What a scan file holds, and the one function that reads any."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from photon.errors import PhotonError
from pipelines.scans.checks import MAX_VOXELS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scan:
    """A scan file as it was read.

    Args:
        array: int16 or float32 [i, j, k] in the file's own axes, slope and intercept applied.
        affine: float64 [4, 4], array index to world RAS millimetres.
        orientation: where the array axes point to, e.g. ``RAS``.
        modality: ``ct``, ``mr`` or ``pt`` where the file itself says so, else None.
        notes: what was unusual but acceptable.
    """

    array: np.ndarray
    affine: np.ndarray
    path: Path
    sha256: str
    spacing_mm: tuple[float, ...]
    orientation: str
    notes: tuple[str, ...]
    modality: str | None = None


def read_scan(path: Path, max_voxels: int = MAX_VOXELS) -> Scan:
    """Read a scan and prove that it is whole and makes sense.

    Raises:
        PhotonError: ``SCAN_MISSING``, ``FORMAT_UNSUPPORTED``, ``SCAN_UNREADABLE``, ``GZIP_CORRUPT``,
            ``SCAN_TRUNCATED``, ``SCAN_TRAILING_DATA``, ``SCAN_TOO_LARGE``, ``SCAN_NOT_3D``, ``SCAN_RGB``,
            ``SPACING_INVALID``, ``AFFINE_INVALID``, ``SCALING_INVALID``, ``VOXELS_NOT_FINITE`` or
            ``SCAN_CONSTANT``.
    """
    # A format's library is imported when the first file of that format is read.
    from pipelines.scans.nifti import is_nifti_name, read_nifti

    if not path.exists():
        raise PhotonError("SCAN_MISSING", path, "the file does not exist.", "Check the path.")
    if path.is_dir() or not is_nifti_name(path):
        kind = "a folder (a DICOM series?)" if path.is_dir() else f"a {path.suffix or 'nameless'} file"
        raise PhotonError(
            "FORMAT_UNSUPPORTED",
            path,
            f"it is {kind}; only NIfTI is read.",
            "Convert it to .nii.gz, e.g. by dcm2niix.",
        )
    return read_nifti(path, max_voxels)
