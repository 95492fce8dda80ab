"""What a NIfTI header may say: each check takes a header (a mapping of NIfTI fields) and refuses nonsense
by code."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from photon.errors import PhotonError
from pipelines.scans.checks import (
    EXPORT_AGAIN,
    MAX_SCALE,
    MAX_SPACING_MISMATCH,
    MAX_VOXELS,
    SPACING_RANGE_MM,
    bad_affine,
    column_length,
    shown,
)

MAX_QFORM_DISTANCE_MM = 1.0
MAX_VOX_OFFSET = 1 << 24

_DTYPES = {
    2: "u1",
    256: "i1",
    4: "i2",
    512: "u2",
    8: "i4",
    768: "u4",
    1024: "i8",
    1280: "u8",
    16: "f4",
    64: "f8",
}
_RGB_CODES = (128, 2304)
_OTHER_CODES = (1, 32, 1536, 1792, 2048)
_UNIT_MM = {1: 1000.0, 3: 0.001}


def declared_grid(header: Any, path: Path, max_voxels: int = MAX_VOXELS) -> tuple[tuple[int, ...], np.dtype]:
    """Array shape (i, j, k) and stored dtype, checked before any voxel is read.

    Raises:
        PhotonError: ``SCAN_UNREADABLE``, ``SCAN_NOT_3D``, ``SCAN_TOO_LARGE``, ``SCAN_RGB`` or
            ``FORMAT_UNSUPPORTED``.
    """
    dims = [int(n) for n in header["dim"]]
    if not 1 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise unreadable(path, f"the dimensions in its header are {dims}.")
    shape = tuple(dims[1 : dims[0] + 1])
    if len(shape) < 3 or min(shape[:3]) < 2 or max(shape[3:], default=1) > 1:
        fact = f"it has shape {shape}; one 3D image of at least two slices is needed."
        raise PhotonError("SCAN_NOT_3D", path, fact, "Give one frame as a 3D scan.")
    if math.prod(shape) > max_voxels:
        fact = f"its header declares {math.prod(shape)} voxels, more than {max_voxels}."
        raise PhotonError("SCAN_TOO_LARGE", path, fact, "Crop it or reduce its resolution.")
    code = int(header["datatype"])
    if code in _RGB_CODES:
        raise PhotonError("SCAN_RGB", path, "its voxels are colours.", "Give the grey scan, not a picture of it.")
    if code in _OTHER_CODES:
        fact = f"its voxels are of NIfTI datatype {code}, which is neither integer nor real."
        raise PhotonError("FORMAT_UNSUPPORTED", path, fact, "Store it as int16 or float32.")
    if code not in _DTYPES:
        raise unreadable(path, f"the datatype in its header is {code}.")
    return shape[:3], np.dtype(header.endianness + _DTYPES[code])


def voxel_offset(header: Any, path: Path) -> int:
    """Byte at which the voxels start.

    Raises:
        PhotonError: ``SCAN_UNREADABLE``.
    """
    offset, first = float(header["vox_offset"]), int(header["sizeof_hdr"]) + 4
    if not first <= offset <= MAX_VOX_OFFSET:
        raise unreadable(path, f"its voxels start at byte {offset:g}, outside {first}..{MAX_VOX_OFFSET}.")
    return int(offset)


def checked_affine(header: Any, best: np.ndarray, qform: np.ndarray | None, path: Path, notes: list[str]) -> np.ndarray:
    """Hold the matrix of a header, its voxel spacing and its second matrix against each other.

    Args:
        best: [4, 4], the matrix to use, in the header's unit of length.
        qform: [4, 4], the other one where the header has both, else None.

    Returns:
        Matrix [4, 4] float64, voxel to world RAS mm.

    Raises:
        PhotonError: ``SPACING_INVALID`` or ``AFFINE_INVALID``.
    """
    unit_mm = _UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    if unit_mm != 1.0:
        notes.append(f"its unit of length is {unit_mm:g} mm")
    pixdim = [float(value) * unit_mm for value in header["pixdim"][1:4]]
    low, high = SPACING_RANGE_MM
    if not all(low <= value <= high for value in pixdim):
        fact = f"its voxel spacing is {shown(pixdim)} mm; {low} to {high} is possible."
        raise PhotonError("SPACING_INVALID", path, fact, EXPORT_AGAIN)
    affine = np.array(best, np.float64)
    affine[:3] *= unit_mm
    if not np.isfinite(affine).all():
        raise bad_affine(path, "its matrix holds NaN or infinity.")
    lengths = [column_length(affine, axis) for axis in range(3)]
    if any(abs(a - b) > MAX_SPACING_MISMATCH * b for a, b in zip(lengths, pixdim, strict=True)):
        raise bad_affine(path, f"its matrix says {shown(lengths)} mm a voxel, its spacing {shown(pixdim)}.")
    if abs(float(np.linalg.det(affine[:3, :3] / lengths))) < 0.5:
        raise bad_affine(path, "its matrix is singular or sheared flat.")
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        notes.append("the header records no orientation: left and right are assumed as in Analyze files (LAS)")
    if qform is not None:
        ends = np.array([[0, 0, 0, 1], [*(int(n) - 1 for n in header["dim"][1:4]), 1]], np.float64)
        distance_mm = float(np.abs((np.array(best) - qform)[:3] @ ends.T).max()) * unit_mm
        if not distance_mm <= MAX_QFORM_DISTANCE_MM:  # also when it is NaN
            notes.append(f"qform and sform differ by up to {distance_mm:.1f} mm: sform is used")
    return affine


def checked_scaling(header: Any, path: Path, notes: list[str]) -> tuple[float, float]:
    """Slope and intercept of the stored values.

    Raises:
        PhotonError: ``SCALING_INVALID``.
    """
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0:
        if intercept != 0:
            notes.append(f"slope is 0: intercept {intercept:g} is not applied, as NIfTI says")
        return 1.0, 0.0
    if not (1 / MAX_SCALE <= abs(slope) <= MAX_SCALE and abs(intercept) <= MAX_SCALE):
        fact = f"its values are scaled by slope {slope:g} and intercept {intercept:g}."
        raise PhotonError("SCALING_INVALID", path, fact, EXPORT_AGAIN)
    return slope, intercept


def unreadable(path: Path, fact: str) -> PhotonError:
    """The refusal of a file that is no NIfTI or a broken one."""
    return PhotonError("SCAN_UNREADABLE", path, fact, "Check that it is a NIfTI file.")
