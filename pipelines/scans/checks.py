"""What any scan must satisfy, whatever its format."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from photon.errors import PhotonError

MAX_VOXELS = 2**29
"""Scans that declare more are refused before memory is taken (1024 x 1024 x 512)."""

SPACING_RANGE_MM = (0.05, 20.0)
MAX_SPACING_MISMATCH = 0.01
MAX_SCALE = 1e6
MAX_VALUE = 1e7
EXPORT_AGAIN = "Export the scan again from its source."


def scaled(raw: np.ndarray, slope: float, intercept: float, path: Path) -> np.ndarray:
    """Stored values -> int16 where slope and intercept leave whole numbers that fit, else float32; same
    shape.

    Raises:
        PhotonError: ``VOXELS_NOT_FINITE``, ``SCAN_CONSTANT`` or ``SCALING_INVALID``.
    """
    if raw.dtype.kind == "f" and not np.isfinite(raw).all():
        num_bad = raw.size - int(np.count_nonzero(np.isfinite(raw)))
        fact = f"{num_bad} of {raw.size} voxels are NaN or infinite."
        raise PhotonError("VOXELS_NOT_FINITE", path, fact, EXPORT_AGAIN)
    low, high = float(raw.min()), float(raw.max())
    if low == high:
        raise PhotonError("SCAN_CONSTANT", path, f"every voxel is {low:g}.", EXPORT_AGAIN)
    ends = sorted((low * slope + intercept, high * slope + intercept))
    if max(abs(ends[0]), abs(ends[1])) > MAX_VALUE:
        fact = f"its values run from {ends[0]:g} to {ends[1]:g}."
        raise PhotonError("SCALING_INVALID", path, fact, EXPORT_AGAIN)
    is_whole = raw.dtype.kind in "iu" and slope == 1.0 and intercept.is_integer()
    if is_whole and ends[0] >= -32768 and ends[1] <= 32767:
        if intercept == 0:
            return raw.astype(np.int16, copy=False)
        return (raw.astype(np.int64) + int(intercept)).astype(np.int16)
    if slope == 1.0 and intercept == 0.0:
        return raw.astype(np.float32, copy=False)
    return (raw.astype(np.float64) * slope + intercept).astype(np.float32)


def column_length(affine: np.ndarray, axis: int) -> float:
    """Length in mm of one step along an array axis."""
    return math.sqrt(sum(float(affine[row, axis]) ** 2 for row in range(3)))


def bad_affine(path: Path, fact: str) -> PhotonError:
    """The refusal of a scan that does not say where its voxels lie."""
    return PhotonError("AFFINE_INVALID", path, fact, EXPORT_AGAIN)


def shown(values: list[float]) -> tuple[float, ...]:
    """Numbers for a message: four digits."""
    return tuple(float(f"{value:.4g}") for value in values)
