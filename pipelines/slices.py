"""Slices of a volume as colour pixels: windowing, kept tokens, organ outlines. Pure numpy.

Planes follow the radiological convention: an axial slice is seen from the feet with the front up, so the
patient's left is on the right of the image; coronal is seen from the front, sagittal from the patient's left,
heads up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.regions import BoolArray, voxel_mask

DISPLAY_WINDOW_HU = (-250.0, 350.0)
TINT = np.array([1.0, 0.78, 0.25], dtype=np.float32)
KEPT_EDGE = np.array([1.0, 0.72, 0.1], dtype=np.float32)
ORGAN_EDGE = np.array([0.25, 0.9, 0.95], dtype=np.float32)
DROPPED_BRIGHTNESS = 0.42
TINT_STRENGTH = 0.14
EDGE_PIXELS = 2
PIXELS_PER_PLANE = 330
"""Planes are enlarged by a whole factor to about this many pixels, so that outlines are thin lines."""

Pixels = NDArray[np.float32]
Index = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One slice ready to be shown.

    Args:
        name: axial, coronal or sagittal.
        pixels: RGB [H, W, 3] in [0, 1], first row at the top.
        height_mm: extent from top to bottom.
        width_mm: extent from left to right.
        sides: patient directions at the top, bottom, left and right edge.
    """

    name: str
    pixels: Pixels
    height_mm: float
    width_mm: float
    sides: tuple[str, str, str, str]


def make_planes(
    voxels: NDArray[np.integer],
    *,
    centre: Index,
    spacing_mm: Sequence[float],
    kept: BoolArray | None = None,
    organ: BoolArray | None = None,
    window_hu: tuple[float, float] | None = None,
    pixels_per_plane: int = PIXELS_PER_PLANE,
) -> list[Plane]:
    """Axial, coronal and sagittal slices through one voxel.

    Args:
        voxels: volume [Z, Y, X].
        centre: voxel (z, y, x) that the three slices meet in.
        spacing_mm: voxel size along z, y and x.
        kept: bool [N]; kept tokens are tinted and outlined, the others dimmed. None: all are shown alike.
        organ: bool [Z, Y, X] to outline in a second colour.
        window_hu: values shown as black and as white; default :func:`display_window`.
        pixels_per_plane: planes are enlarged by a whole factor to about this many pixels.

    Raises:
        PhotonError: ``GRID_INVALID`` when tokens are given and the volume is not a whole number of token
        boxes.
    """
    shown = None if kept is None else voxel_mask(kept, voxels.shape)
    low, high = window_hu or display_window(voxels)
    z, y, x = centre
    dz, dy, dx = spacing_mm
    cuts: list[tuple[str, Any, tuple[float, float], tuple[str, str, str, str]]] = [
        ("axial", np.s_[z, :, :], (dy, dx), ("A", "P", "R", "L")),
        ("coronal", np.s_[::-1, y, :], (dz, dx), ("S", "I", "R", "L")),
        ("sagittal", np.s_[::-1, :, x], (dz, dy), ("S", "I", "A", "P")),
    ]
    planes = []
    for name, cut, (row_mm, column_mm), sides in cuts:
        grey = np.clip((voxels[cut].astype(np.float32) - low) / (high - low), 0, 1)
        factor = max(1, round(pixels_per_plane / max(grey.shape)))
        pixels = _paint(grey, factor, None if shown is None else shown[cut], None if organ is None else organ[cut])
        height, width = grey.shape
        planes.append(
            Plane(name=name, pixels=pixels, height_mm=height * row_mm, width_mm=width * column_mm, sides=sides)
        )
    return planes


def display_window(voxels: NDArray[np.integer]) -> tuple[float, float]:
    """Values to show as black and as white: a soft-tissue window cut to the range of the volume, or that
    range where the two do not meet; never of no width."""
    darkest, brightest = (float(value) for value in np.percentile(voxels, [0.5, 99.5]))
    low, high = max(darkest, DISPLAY_WINDOW_HU[0]), min(brightest, DISPLAY_WINDOW_HU[1])
    if high - low >= 1:
        return low, high
    return darkest - 0.5, brightest + 0.5


def middle_of(mask: BoolArray) -> Index:
    """The voxel in the middle of a mask [Z, Y, X] along each axis (median); the grid's middle for an empty
    mask."""
    found = np.nonzero(mask)
    if not found[0].size:
        return (mask.shape[0] // 2, mask.shape[1] // 2, mask.shape[2] // 2)
    z, y, x = (int(np.median(axis)) for axis in found)
    return (z, y, x)


def _paint(grey: Pixels, factor: int, kept: BoolArray | None, organ: BoolArray | None) -> Pixels:
    """Grey [H, W] enlarged to RGB with kept boxes tinted and outlined and the organ outlined."""
    large = _enlarge(grey, factor)
    pixels = np.repeat(large[..., None], 3, axis=2)
    if kept is not None:
        is_kept = _enlarge(kept, factor)
        tinted = pixels * (1 - TINT_STRENGTH) + TINT * TINT_STRENGTH
        pixels = np.where(is_kept[..., None], tinted, pixels * DROPPED_BRIGHTNESS)
        pixels[_edge(is_kept)] = KEPT_EDGE
    if organ is not None:
        pixels[_edge(_enlarge(organ, factor))] = ORGAN_EDGE
    return pixels.astype(np.float32)


def _enlarge(image: np.ndarray, factor: int) -> np.ndarray:
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def _edge(mask: BoolArray) -> BoolArray:
    """The two outermost pixels of a mask [H, W]; the border of the image counts as outside."""
    inner = mask
    for _ in range(EDGE_PIXELS):
        padded = np.pad(inner, 1)
        inner = inner & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edge: BoolArray = mask & ~inner
    return edge
