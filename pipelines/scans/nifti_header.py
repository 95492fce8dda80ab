"""What a NIfTI header may say: each check takes a header (a mapping of NIfTI fields) and refuses nonsense
by code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from photon.errors import PhotonError
from pipelines.scans.checks import (
    EXPORT_AGAIN,
    MAX_SPACING_MISMATCH,
    MAX_VOXELS,
    Trust,
    check_grid,
    check_matrix,
    check_scaling,
    check_spacing,
    column_length,
    is_spacing,
    shown,
    unreadable,
    unsupported,
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
_UNIT_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""Units of length by their code; 0 is unknown, which all programs take for millimetres."""


def declared_grid(
    header: Any, path: Path, notes: list[str], max_voxels: int = MAX_VOXELS
) -> tuple[tuple[int, ...], np.dtype]:
    """Array shape (i, j, k) and stored dtype, checked before any voxel is read.

    The size of the file proves the type, so that a ``bitpix`` that says something else is only noted.

    Raises:
        PhotonError: ``SCAN_UNREADABLE``, ``SCAN_NOT_3D``, ``SCAN_TOO_LARGE``, ``SCAN_RGB`` or
            ``FORMAT_UNSUPPORTED``.
    """
    dims = [int(n) for n in header["dim"]]
    if not 1 <= dims[0] <= 7:
        raise unreadable(path, f"the dimensions in its header are {dims}.")
    shape = tuple(dims[1 : dims[0] + 1])
    check_grid(shape, path, max_voxels)
    code = int(header["datatype"])
    if code in _RGB_CODES:
        raise PhotonError("SCAN_RGB", path, "its voxels are colours.", "Give the grey scan, not a picture of it.")
    if code in _OTHER_CODES:
        raise unsupported(path, f"its voxels are of NIfTI datatype {code}, which is neither integer nor real.")
    if code not in _DTYPES:
        raise unreadable(path, f"the datatype in its header is {code}.")
    dtype = np.dtype(header.endianness + _DTYPES[code])
    num_bits = int(header["bitpix"])
    if num_bits != dtype.itemsize * 8:
        notes.append(f"bitpix {num_bits} contradicts datatype {code} of {dtype.itemsize * 8} bits: datatype counts")
    return shape[:3], dtype


def voxel_offset(header: Any, path: Path) -> int:
    """Byte at which the voxels start.

    Raises:
        PhotonError: ``SCAN_UNREADABLE``.
    """
    offset, first = float(header["vox_offset"]), int(header["sizeof_hdr"]) + 4
    if not first <= offset <= MAX_VOX_OFFSET:
        raise unreadable(path, f"its voxels start at byte {offset:g}, outside {first}..{MAX_VOX_OFFSET}.")
    if not offset.is_integer():
        # Rounding it would be a guess at a header that is damaged, and bytes of wrong voxels look like voxels.
        raise unreadable(path, f"its voxels start at byte {offset:.9g}, which is not whole.")
    return int(offset)


def checked_affine(
    header: Any, best: np.ndarray, qform: np.ndarray | None, path: Path, notes: list[str], trust: Trust | None = None
) -> np.ndarray:
    """Hold the matrix of a header, its voxel spacing and its second matrix against each other.

    Args:
        best: [4, 4], the matrix to use, in the header's unit of length (:func:`_unit_mm`).
        qform: [4, 4], the other one where the header has both, else None.
        trust: what counts where matrix and spacing differ by more than 1 %: ``sform`` the matrix alone, ``pixdim``
            the spacing, along the matrix's directions and from its origin. None refuses such files.

    Returns:
        Matrix [4, 4] float64, voxel to world RAS mm.

    Raises:
        PhotonError: ``SPACING_INVALID``, ``SPACING_CONFLICT`` or ``AFFINE_INVALID``.
    """
    code = int(header["xyzt_units"]) & 7
    pixdim = [float(value) for value in header["pixdim"][1:4]]
    columns = [math.hypot(*best[:3, axis]) for axis in range(3)]
    unit_mm = _unit_mm(code, columns if trust == "sform" else pixdim, path, notes)
    pixdim = [value * unit_mm for value in pixdim]
    if trust == "pixdim":  # the matrix, of which directions and origin count, may be in another unit than the spacing
        units = (unit_mm, 1.0, _UNIT_MM.get(code, 1.0))
        unit_mm = next((unit for unit in units if is_spacing([value * unit for value in columns])), unit_mm)
    affine = np.array(best, np.float64)
    affine[:3] *= unit_mm
    if trust != "sform":
        check_spacing(pixdim, path)
    check_matrix(affine, path, notes, with_lengths=trust != "pixdim")
    lengths = [column_length(affine, axis) for axis in range(3)]
    # Written so that what is not finite differs.
    if not all(abs(a - b) <= MAX_SPACING_MISMATCH * a for a, b in zip(lengths, pixdim, strict=True)):
        fact = f"its matrix says {shown(lengths)} mm a voxel, its spacing {shown(pixdim)}"
        if trust is None:
            remedy = "Find out which is right and say so: --trust sform or --trust pixdim."
            raise PhotonError("SPACING_CONFLICT", path, f"{fact}.", remedy)
        notes.append(f"{fact}: {trust} is trusted")
        if trust == "pixdim":
            affine[:3, :3] *= np.array(pixdim) / lengths
    if int(header["sform_code"]) <= 0 and int(header["qform_code"]) <= 0:
        notes.append("the header records no orientation: left and right are assumed as in Analyze files (LAS)")
    if qform is not None:
        ends = np.array([[0, 0, 0, 1], [*(int(n) - 1 for n in header["dim"][1:4]), 1]], np.float64)
        with np.errstate(invalid="ignore"):
            distance_mm = float(np.abs((np.array(best) - qform)[:3] @ ends.T).max()) * unit_mm
        if not distance_mm <= MAX_QFORM_DISTANCE_MM:  # also when it is NaN
            notes.append(f"qform and sform differ by up to {distance_mm:.1f} mm: sform is used")
    return affine


def _unit_mm(code: int, spacing: Sequence[float], path: Path, notes: list[str]) -> float:
    """The header's unit of length in mm: the declared one, unless the spacing can only be in millimetres.

    Many programs never set the unit or leave it wrong. No spacing is possible in two units, as the possible range is
    narrower than the step from one unit to the next.

    Raises:
        PhotonError: ``SPACING_INVALID`` where metres or micrometres are declared and the spacing is possible neither
            so nor in millimetres.
    """
    if code not in _UNIT_MM:
        notes.append(f"its unit of length has the code {code}, which NIfTI does not know: millimetres are assumed")
    unit_mm = _UNIT_MM.get(code, 1.0)
    if unit_mm == 1.0:
        return 1.0
    if is_spacing([value * unit_mm for value in spacing]):
        notes.append(f"its unit of length is {unit_mm:g} mm")
        return unit_mm
    if is_spacing(spacing):
        notes.append(f"its unit of length is {unit_mm:g} mm, in which no scan has its voxel spacing: taken as mm")
        return 1.0
    fact = f"its voxel spacing {shown(spacing)} is possible neither in mm nor in its unit of {unit_mm:g} mm."
    raise PhotonError("SPACING_INVALID", path, fact, EXPORT_AGAIN)


def checked_scaling(header: Any, path: Path, notes: list[str]) -> tuple[float, float]:
    """Slope and intercept of the stored values: none for slope 0, as NIfTI says, whatever the intercept.

    Raises:
        PhotonError: ``SCALING_INVALID``.
    """
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0:
        if intercept != 0:
            notes.append(f"slope is 0: intercept {intercept:g} is not applied, as NIfTI says")
        return 1.0, 0.0
    check_scaling(slope, intercept, path)
    return slope, intercept
