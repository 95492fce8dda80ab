"""What any scan must satisfy, whatever its format, and what is done with values that it need not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from photon.errors import PhotonError

MAX_VOXELS = 2**29
"""Scans that declare more are refused before memory is taken (1024 x 1024 x 512)."""

SPACING_RANGE_MM = (0.05, 20.0)
MAX_SPACING_MISMATCH = 0.01
MAX_NUMBER = 1e100
"""Squares of larger ones overflow."""

MIN_INDEPENDENCE = 0.5
"""Smallest volume of the box that the unit vectors of the three axes span: 30 degrees of shear."""

FAR_ORIGIN_MM = 1e4
"""No scanner's frame reaches farther; only a frame of something else does, or a wrong unit."""

MAX_ORIGIN_MM = 1e6
"""Beyond it the steps of float32, in which many programs keep positions, exceed the smallest voxel."""

MAX_SCALE = 1e6
MAX_VALUE = 1e7
CT_RANGE_HU = (-1100, 32767)
FAT_HU = -20
MANY_GREYS = 128
EXPORT_AGAIN = "Export the scan again from its source."
BLANK_SCAN = (
    "Open it in a viewer: if it is empty there too, export it again; if it is a label map, it belongs to "
    "`photon questions --masks`, not among the scans."
)

Trust = Literal["sform", "pixdim"]

_BLOCK = 1 << 18
"""Values that stay in the processor's cache while they are worked on."""


def check_grid(shape: Sequence[int], path: Path, max_voxels: int = MAX_VOXELS) -> None:
    """Prove that a scan is one 3D image of an acceptable size.

    Args:
        shape: every axis that is declared; axes after the third may only be of size 1.

    Raises:
        PhotonError: ``SCAN_UNREADABLE``, ``SCAN_NOT_3D`` or ``SCAN_TOO_LARGE``.
    """
    if min(shape, default=0) < 1:
        raise unreadable(path, f"its header declares the size {tuple(shape)}.")
    if len(shape) < 3 or min(shape[:3]) < 2 or max(shape[3:], default=1) > 1:
        fact = f"it has shape {tuple(shape)}; one 3D image of at least two slices is needed."
        raise PhotonError("SCAN_NOT_3D", path, fact, "Give one frame as a 3D scan.")
    if math.prod(shape) > max_voxels:
        fact = f"its header declares {math.prod(shape)} voxels, more than {max_voxels}."
        raise PhotonError("SCAN_TOO_LARGE", path, fact, "Crop it or reduce its resolution.")


def check_spacing(spacing_mm: Sequence[float], path: Path) -> None:
    """Prove that voxels have a plausible size.

    Raises:
        PhotonError: ``SPACING_INVALID``.
    """
    low, high = SPACING_RANGE_MM
    if not is_spacing(spacing_mm):
        fact = f"its voxel spacing is {shown(spacing_mm)} mm; {low} to {high} is possible."
        raise PhotonError("SPACING_INVALID", path, fact, EXPORT_AGAIN)


def is_spacing(spacing_mm: Sequence[float]) -> bool:
    """Whether voxels may have these edges."""
    return all(SPACING_RANGE_MM[0] <= value <= SPACING_RANGE_MM[1] for value in spacing_mm)


def check_matrix(affine: np.ndarray, path: Path, notes: list[str], *, with_lengths: bool = True) -> None:
    """Prove that a voxel-to-world matrix [4, 4] in mm is finite and spans a volume, at a place that can be.

    Args:
        notes: takes what :func:`check_origin` notes.
        with_lengths: its columns must have plausible lengths, too.

    Raises:
        PhotonError: ``AFFINE_INVALID`` or ``SPACING_INVALID``.
    """
    if not (np.abs(affine) < MAX_NUMBER).all():  # also when it is NaN
        raise bad_affine(path, f"its matrix holds NaN, infinity or numbers beyond {MAX_NUMBER:g}.")
    lengths = [column_length(affine, axis) for axis in range(3)]
    if min(lengths) == 0:
        raise bad_affine(path, f"its matrix is singular: its axes are {shown(lengths)} mm long.")
    if with_lengths:
        check_spacing(lengths, path)
    if abs(float(np.linalg.det(affine[:3, :3] / lengths))) < MIN_INDEPENDENCE:
        raise bad_affine(path, "its matrix is singular or sheared flat.")
    check_origin(affine, path, notes)


def check_origin(affine: np.ndarray, path: Path, notes: list[str]) -> None:
    """Prove that the first voxel of a finite matrix [4, 4] in mm lies where its position can be told exactly; what
    lies farther off than scanners reach is noted.

    Raises:
        PhotonError: ``AFFINE_INVALID``.
    """
    distance_mm = math.hypot(*affine[:3, 3])
    if distance_mm > MAX_ORIGIN_MM:
        fact = f"its first voxel lies {distance_mm:.4g} mm from the origin; at most {MAX_ORIGIN_MM:g} is possible."
        raise bad_affine(path, fact)
    if distance_mm > FAR_ORIGIN_MM:
        notes.append(f"its first voxel lies {distance_mm / 1000:.4g} m from the origin: taken as it is")


def check_scaling(slope: float, intercept: float, path: Path) -> None:
    """Prove that slope and intercept are finite, not zero and not vast.

    Raises:
        PhotonError: ``SCALING_INVALID``.
    """
    if not (1 / MAX_SCALE <= abs(slope) <= MAX_SCALE and abs(intercept) <= MAX_SCALE):
        fact = f"its values are scaled by slope {slope:g} and intercept {intercept:g}."
        raise PhotonError("SCALING_INVALID", path, fact, EXPORT_AGAIN)


def scaled(
    raw: np.ndarray, slope: float, intercept: float, path: Path, *, is_labels: bool = False
) -> tuple[np.ndarray, tuple[float, float], tuple[str, ...]]:
    """Stored values -> int16 where slope and intercept leave whole numbers that fit, else float32.

    Beside its argument it takes the memory of its result alone, and none where both are of one type: then the argument
    becomes the result.

    Args:
        raw: [n], numbers in the machine's byte order; overwritten where that saves memory.
        is_labels: the values are labels: they may all be the same.

    Returns:
        Values [n], the lowest and the highest of them, and notes.

    Raises:
        PhotonError: ``VOXELS_NOT_FINITE``, ``SCAN_CONSTANT`` or ``SCALING_INVALID``.
    """
    low, high = _extent(raw, path)
    if low == high and not is_labels:
        fact = f"all its voxels have the value {low:g}: the image is blank."
        raise PhotonError("SCAN_CONSTANT", path, fact, BLANK_SCAN)
    ends = sorted((low * slope + intercept, high * slope + intercept))
    if max(abs(ends[0]), abs(ends[1])) > MAX_VALUE:
        fact = f"its values run from {ends[0]:g} to {ends[1]:g}."
        raise PhotonError("SCALING_INVALID", path, fact, EXPORT_AGAIN)
    notes: tuple[str, ...] = ()
    if raw.itemsize == 1 and not is_labels and _num_8bit_values(raw) < MANY_GREYS:
        notes = ("few 8-bit values: it may be a label map rather than a scan",)
    is_whole = raw.dtype.kind in "iu" and slope == 1.0 and float(intercept).is_integer()
    target = np.dtype(np.int16 if is_whole and ends[0] >= -32768 and ends[1] <= 32767 else np.float32)
    # No step on the way to `target` turns the order of two values, so that its extremes come from those of `raw`.
    extent = (float(target.type(ends[0])), float(target.type(ends[1])))
    is_kept = slope == 1.0 and intercept == 0.0
    if is_kept and raw.dtype == target:
        return raw, extent, notes
    values = raw if raw.dtype == target else np.empty(raw.shape, target)
    for start in range(0, raw.size, _BLOCK):
        block = raw[start : start + _BLOCK]
        if not is_kept:
            is_exact = target == np.int16
            block = (
                block.astype(np.int64) + int(intercept) if is_exact else block.astype(np.float64) * slope + intercept
            )
        values[start : start + _BLOCK] = block
    return values, extent, notes


def range_notes(low: float, high: float, modality: str) -> tuple[str, ...]:
    """Notes about values, low to high after scaling, that a scan of this modality should not have.

    CT has no tissue outside -1100 to 32767 HU: what lies there is padding or metal, kept as it is and clipped by the
    window of a volume. Without anything as dark as fat it may be no HU at all, as when the scanner's offset was left
    in. MR and PET have no unit or no bound.
    """
    if modality == "ct" and low > FAT_HU:
        return (f"values from {low:g} to {high:g}: air and fat of a CT lie below {FAT_HU} HU; are these HU?",)
    if modality == "ct" and not (CT_RANGE_HU[0] <= low and high <= CT_RANGE_HU[1]):
        return (f"values from {low:g} to {high:g}: CT lies within {CT_RANGE_HU[0]} to {CT_RANGE_HU[1]} HU",)
    return ()


def column_length(affine: np.ndarray, axis: int) -> float:
    """Length in mm of one step along an array axis."""
    return math.sqrt(sum(float(affine[row, axis]) ** 2 for row in range(3)))


def orientation_of(affine: np.ndarray) -> str:
    """Where the array axes point to, as three letters such as ``RAS``; each patient axis is named once."""
    cosine = affine[:3, :3] / [column_length(affine, axis) for axis in range(3)]
    rows = max(
        itertools.permutations(range(3)),
        key=lambda order: sum(abs(cosine[row, axis]) for axis, row in enumerate(order)),
    )
    return "".join("RAS"[row] if cosine[row, axis] > 0 else "LPI"[row] for axis, row in enumerate(rows))


def unreadable(path: Path, fact: str) -> PhotonError:
    """The refusal of a file whose header is broken or of another format."""
    return PhotonError("SCAN_UNREADABLE", path, fact, "Check that the file is of the format that its name says.")


def unsupported(path: Path, fact: str) -> PhotonError:
    """The refusal of a variant of a format that is not read."""
    return PhotonError("FORMAT_UNSUPPORTED", path, fact, "Convert it to .nii.gz with int16 or float32 voxels.")


def bad_affine(path: Path, fact: str) -> PhotonError:
    """The refusal of a scan that does not say where its voxels lie."""
    return PhotonError("AFFINE_INVALID", path, fact, EXPORT_AGAIN)


def shown(values: Sequence[float]) -> tuple[float, ...]:
    """Numbers for a message: four digits."""
    return tuple(float(f"{value:.4g}") for value in values)


def _num_8bit_values(raw: np.ndarray) -> int:
    counts = np.zeros(256, np.int64)
    for start in range(0, raw.size, _BLOCK):
        counts += np.bincount(raw[start : start + _BLOCK].view(np.uint8), minlength=256)
    return int(np.count_nonzero(counts))


def _extent(raw: np.ndarray, path: Path) -> tuple[float, float]:
    """Lowest and highest value; both are finite."""
    blocks = [raw[start : start + _BLOCK] for start in range(0, raw.size, _BLOCK)]
    # Infinities are extremes, and the extremes of a block with a NaN are NaN: no other look at the values is needed.
    extremes = np.array([(block.min(), block.max()) for block in blocks], np.float64)
    if not np.isfinite(extremes).all():
        num_bad = sum(block.size - int(np.count_nonzero(np.isfinite(block))) for block in blocks)
        fact = f"{num_bad} of {raw.size} voxels are NaN or infinite."
        raise PhotonError("VOXELS_NOT_FINITE", path, fact, EXPORT_AGAIN)
    return float(extremes[:, 0].min()), float(extremes[:, 1].max())
