"""Where the slices of one DICOM series lie, and whether they make one regular grid.

Positions decide: not file names, instance numbers or slice thickness. DICOM's patient frame is LPS; what
leaves this module is RAS.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from photon.errors import PhotonError
from pipelines.scans.checks import bad_affine, check_origin, check_spacing
from pipelines.scans.dicom_files import GET_AGAIN
from pipelines.scans.dicom_headers import Slice

SAME_PLACE_MM = 0.01
"""Slices less than this apart along the stack are at the same place."""

MAX_UNEVENNESS = 0.1
"""How far a slice may lie from its place in a regular stack, as a fraction of the slice spacing. Positions
rounded to 0.1 mm in the file stay within it down to a spacing of 0.6 mm."""

NOTED_UNEVENNESS = 0.01
MAX_AXIS_ERROR = 1e-3
NOTED_TILT_DEG = 0.1
MAX_TILT_DEG = 45.0

_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """Slices in order along the stack, towards the cross product of row and column direction.

    Args:
        places: for every place of the stack, the slices that lie there; more than one where slices repeat.
        affine: float64 [4, 4], (column, row, place) to world RAS mm; sheared if the gantry was tilted.
        notes: what was unusual but acceptable.
    """

    places: tuple[tuple[Slice, ...], ...]
    affine: np.ndarray
    notes: tuple[str, ...]


def places_of(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices with valid positions and axes, in order along the stack; those at the same place together."""
    heights = {id(image): height for image, height in zip(slices, heights_of(slices), strict=True)}
    places: list[list[Slice]] = []
    for image in sorted(slices, key=lambda image: (heights[id(image)], image.instance_uid, image.frame)):
        if places and heights[id(image)] - heights[id(places[-1][0])] < SAME_PLACE_MM:
            places[-1].append(image)
        else:
            places.append([image])
    return places


def heights_of(slices: Sequence[Slice]) -> list[float]:
    """Where slices with valid positions and axes lie along the normal of the first, mm."""
    if not slices:
        return []
    heights: list[float] = (np.array([image.position for image in slices]) @ _normal(slices[0])).tolist()
    return heights


def check_plane(image: Slice, subject: Path) -> None:
    """Prove that a slice says where it lies.

    Raises:
        PhotonError: ``AFFINE_INVALID`` or ``SPACING_INVALID``.
    """
    if image.position is None or image.axes is None:
        raise bad_affine(subject, "a slice does not say where it lies (position and orientation of the patient).")
    if not all(map(math.isfinite, (*image.position, *image.axes))):
        raise bad_affine(subject, "position or orientation of a slice are no numbers.")
    row, column = image.axes[:3], image.axes[3:]
    errors = (_dot(row, row) - 1, _dot(column, column) - 1, _dot(row, column))
    if max(map(abs, errors)) > MAX_AXIS_ERROR:
        raise bad_affine(subject, f"the directions of rows and columns are no right angle of unit length {image.axes}.")
    if image.pixel_spacing is None:
        raise PhotonError("SPACING_INVALID", subject, "its pixels have no spacing.", GET_AGAIN)
    check_spacing(image.pixel_spacing, subject)


def stacked(slices: Sequence[Slice], subject: Path) -> Stack:
    """Fit one regular grid to the slices of a series, which all have the same size, axes and pixel spacing.

    Raises:
        PhotonError: ``SCAN_NOT_3D`` for fewer than two places; ``SLICES_MISSING`` when the stack has gaps;
            ``SLICES_UNEVEN`` when slices are not evenly spaced along a line; as :func:`check_plane`.
    """
    for image in slices:
        check_plane(image, subject)
    places = places_of(slices)
    if len(places) < 2:
        fact = "its slices all lie at one place; at least two places are needed."
        raise PhotonError("SCAN_NOT_3D", subject, fact, "Give the whole series.")
    positions = np.array([place[0].position for place in places])
    index = np.arange(len(places)) - (len(places) - 1) / 2
    step = index @ positions / (index @ index)  # least squares: rounded positions then err least
    fitted = positions.mean(axis=0) + index[:, None] * step
    spacing = float(np.linalg.norm(step))
    unevenness = float(np.linalg.norm(positions - fitted, axis=1).max()) / spacing
    if unevenness > MAX_UNEVENNESS:
        raise _uneven(positions, subject)
    first = places[0][0]
    rows, columns = first.pixel_spacing or ()
    check_spacing((rows, columns, spacing), subject)
    notes = _stack_notes(first, unevenness, step, len(places), subject)
    affine = np.eye(4)
    affine[:3, 0] = _unit(first.axes[:3]) * columns  # type: ignore[index]
    affine[:3, 1] = _unit(first.axes[3:]) * rows  # type: ignore[index]
    affine[:3, 2] = step
    affine[:3, 3] = fitted[0]
    check_origin(affine, subject, notes)
    return Stack(places=tuple(map(tuple, places)), affine=_LPS_TO_RAS @ affine, notes=tuple(notes))


def _stack_notes(first: Slice, unevenness: float, step: np.ndarray, num_places: int, subject: Path) -> list[str]:
    notes = []
    spacing = float(np.linalg.norm(step))
    if unevenness > NOTED_UNEVENNESS:
        notes.append(f"slices lie up to {unevenness * spacing:.2f} mm from even spacing: taken as even")
    tilt_deg = math.degrees(math.acos(min(1.0, float(_normal(first) @ step) / spacing)))
    if tilt_deg > MAX_TILT_DEG:
        raise bad_affine(subject, f"the stack leans by {tilt_deg:.0f} degrees against its slices.")
    if tilt_deg > NOTED_TILT_DEG:
        notes.append(f"gantry tilt of {tilt_deg:.1f} degrees: the voxel grid is sheared")
    declared = first.slice_spacing
    if declared is not None and not abs(abs(declared) - spacing) <= NOTED_UNEVENNESS * spacing:
        notes.append(f"it declares slices {declared:g} mm apart; their positions, {spacing:g} mm apart, are used")
    return notes


def _uneven(positions: np.ndarray, subject: Path) -> PhotonError:
    """Say what is wrong with a stack that is not regular: off its line, with gaps, or uneven."""
    steps = np.diff(positions, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    usual = float(np.median(lengths))
    line = steps[int(np.argmin(np.abs(lengths - usual)))]
    line = line / np.linalg.norm(line)
    aside = np.linalg.norm(steps - (steps @ line)[:, None] * line, axis=1)
    if float(aside.max()) > MAX_UNEVENNESS * usual:
        where = int(np.argmax(aside))
        fact = f"slice {where + 2} lies {aside[where]:.2f} mm beside the line of the others."
        return PhotonError("SLICES_UNEVEN", subject, fact, GET_AGAIN)
    for unit in (usual, float(lengths.min())):
        num_steps = np.rint(lengths / unit)
        if num_steps.max() > 1 and (np.abs(lengths / unit - num_steps) <= MAX_UNEVENNESS * num_steps).all():
            num_missing, where = int(num_steps.sum()) - len(lengths), int(np.argmax(num_steps > 1))
            fact = (
                f"{num_missing} of {len(positions) + num_missing} slices are missing, first after slice {where + 1} "
                f"(next slice {lengths[where]:.4g} mm on, usual are {unit:.4g} mm)."
            )
            return PhotonError("SLICES_MISSING", subject, fact, GET_AGAIN)
    fact = f"its slices are {lengths.min():.4g} to {lengths.max():.4g} mm apart."
    return PhotonError("SLICES_UNEVEN", subject, fact, "Reconstruct the series with one slice spacing.")


def _normal(image: Slice) -> np.ndarray:
    axes = image.axes or ()
    return _unit(np.cross(axes[:3], axes[3:]))


def _unit(vector: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(vector, np.float64)
    return array / np.linalg.norm(array)


def _dot(first: Sequence[float], second: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(first, second, strict=True))
