"""The geometry of volumes: which grid a scan is put on, and the interpolation that puts it there.

Convention ("centred"): the grid's centre is the centre of the scan's field of view, and grid index ``i``
of ``N`` falls on scan index ``(i - (N - 1) / 2) * target_mm / scan_mm + (n - 1) / 2`` of ``n``, after the
scan's axes are flipped and permuted to [Z, Y, X] = [superior, posterior, left]. Points outside the field
of view become ``pad_hu``; in its outermost half voxel the edge value holds. There is no smoothing before
shrinking.

Only element-wise arithmetic in a fixed order is used, no matrix product, so that the bytes are the same on
every machine.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from typing import Any, Self, cast

import numpy as np

from photon.errors import PhotonError

PATCH = 14
"""Edge of a patch in voxels; in plane two patches are merged, so Y and X are multiples of 28."""

ALIGNED_WITHIN_DEG = 0.25
"""Scans tilted less than this are read along their own axes, at most 0.8 mm off 180 mm from the centre."""

CANONICAL_TO_RAS = ((2, 1), (1, -1), (0, -1))
"""For grid axis Z, Y, X: the world (RAS) axis it runs along and its sign there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeSpec:
    """What every preprocessed volume looks like.

    Args:
        spacing_mm: edge of a voxel, one number or (Z, Y, X); None stretches the scan's whole field of view
            onto the grid, whatever its size.
        shape: voxels (Z, Y, X); Z a multiple of 14, Y and X of 28.
        window_hu: (low, high), values outside are clipped.
        pad_hu: value outside the scan, before clipping.
    """

    spacing_mm: float | tuple[float, float, float] | None
    shape: tuple[int, int, int]
    window_hu: tuple[int, int]
    pad_hu: int = -1000

    def __post_init__(self) -> None:
        spacing = (1.0,) if self.spacing_mm is None else self._spacing()
        problems = {
            "spacing_mm must be positive millimetres": all(math.isfinite(s) and s > 0 for s in spacing),
            f"shape must be multiples of ({PATCH}, {2 * PATCH}, {2 * PATCH})": len(self.shape) == 3
            and min(self.shape) > 0
            and all(n % m == 0 for n, m in zip(self.shape, (PATCH, 2 * PATCH, 2 * PATCH), strict=True)),
            "window_hu must be (low, high) within int16": -32768 <= self.window_hu[0] < self.window_hu[1] <= 32767,
        }
        for rule, is_met in problems.items():
            if not is_met:
                raise PhotonError("SPEC_INVALID", "volume spec", f"{self.as_dict()}: {rule}.", "Mend the spec.")

    def _spacing(self) -> tuple[float, ...]:
        spacing = self.spacing_mm
        return tuple(spacing) if isinstance(spacing, tuple) else (float(spacing or 0.0),) * 3

    def spacing_for(self, field_of_view_mm: tuple[float, ...]) -> tuple[float, ...]:
        """Voxel edge in mm along (Z, Y, X) for a scan with this field of view along the same axes."""
        if self.spacing_mm is None:
            return tuple(extent / n for extent, n in zip(field_of_view_mm, self.shape, strict=True))
        return self._spacing()

    def as_dict(self) -> dict[str, Any]:
        """The spec as JSON values."""
        content = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in content.items()}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The spec that :meth:`as_dict` wrote."""
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
        return cls(**cast(Any, values))

    def digest(self) -> str:
        """Twelve hex digits that name this spec."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]


VOLUME_SPECS = {
    "demo": VolumeSpec(spacing_mm=3.0, shape=(84, 112, 112), window_hu=(-200, 300)),
    "smoke": VolumeSpec(spacing_mm=6.0, shape=(42, 56, 56), window_hu=(-200, 300)),
    "iso1mm": VolumeSpec(spacing_mm=1.0, shape=(364, 364, 364), window_hu=(-1000, 1000)),
    "photon": VolumeSpec(spacing_mm=None, shape=(140, 280, 280), window_hu=(-1000, 1000)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frame:
    """How a scan's array lies in the patient.

    Args:
        axes: for Z, Y, X the array axis nearest to it.
        is_flipped: for Z, Y, X whether that array axis runs the other way.
        spacing_mm: voxel edge along (Z, Y, X).
        shape: scan voxels along (Z, Y, X).
        obliquity_deg: the largest angle between an array axis and its patient axis.
        centre_mm: world (RAS) position of the centre of the field of view.
    """

    axes: tuple[int, ...]
    is_flipped: tuple[bool, ...]
    spacing_mm: tuple[float, ...]
    shape: tuple[int, ...]
    obliquity_deg: float
    centre_mm: tuple[float, ...]

    def canonical(self, array: np.ndarray) -> np.ndarray:
        """View of a scan's array with axes [Z, Y, X]."""
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in self.is_flipped)
        return array.transpose(self.axes)[steps]


def frame_of(shape: tuple[int, ...], affine: np.ndarray) -> Frame:
    """Frame of a scan with this array shape and voxel-to-world (RAS mm) matrix."""
    columns = [[float(affine[row][axis]) for row in range(3)] for axis in range(3)]
    lengths = [math.sqrt(sum(value * value for value in column)) for column in columns]
    cosine = [[value / length for value in column] for column, length in zip(columns, lengths, strict=True)]

    def agreement(axes: tuple[int, ...]) -> float:
        return sum(abs(cosine[axis][world]) for axis, (world, _) in zip(axes, CANONICAL_TO_RAS, strict=True))

    axes = max(itertools.permutations(range(3)), key=agreement)
    along = [cosine[axis][world] * sign for axis, (world, sign) in zip(axes, CANONICAL_TO_RAS, strict=True)]
    middle = [(n - 1) / 2 for n in shape]
    centre = [
        float(affine[row][3]) + sum(float(affine[row][axis]) * middle[axis] for axis in range(3)) for row in range(3)
    ]
    return Frame(
        axes=axes,
        is_flipped=tuple(value < 0 for value in along),
        spacing_mm=tuple(lengths[axis] for axis in axes),
        shape=tuple(int(shape[axis]) for axis in axes),
        obliquity_deg=max(math.degrees(math.acos(min(1.0, abs(value)))) for value in along),
        centre_mm=tuple(centre),
    )


def grid_spacing(frame: Frame, spec: VolumeSpec) -> tuple[float, ...]:
    """Voxel edge in mm along (Z, Y, X) of the grid for a scan in this frame."""
    return spec.spacing_for(tuple(n * s for n, s in zip(frame.shape, frame.spacing_mm, strict=True)))


def grid_affine(frame: Frame, spec: VolumeSpec) -> np.ndarray:
    """Matrix [4, 4] float64 from grid index (X, Y, Z) to world RAS millimetres."""
    spacing = grid_spacing(frame, spec)
    affine = np.eye(4)
    for grid_axis, (world, sign) in enumerate(CANONICAL_TO_RAS):
        column = 2 - grid_axis
        affine[world, :3] = 0.0
        affine[world, column] = sign * spacing[grid_axis]
        affine[world, 3] = frame.centre_mm[world] - sign * spacing[grid_axis] * (spec.shape[grid_axis] - 1) / 2
    return affine


@dataclasses.dataclass(frozen=True)
class _Taps:
    """Where a grid axis reads a scan axis: two neighbours, the weight of the second, and what lies inside."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray
    nearest: np.ndarray
    is_inside: np.ndarray


def _taps(position: np.ndarray, size: int) -> _Taps:
    is_inside = (position >= -0.5) & (position <= size - 0.5)
    clamped = np.clip(position, 0.0, size - 1.0)
    low = np.minimum(np.floor(clamped).astype(np.int64), max(size - 2, 0))
    nearest = np.minimum(np.floor(clamped + 0.5).astype(np.int64), size - 1)
    weight = (clamped - low).astype(np.float32)
    return _Taps(low, np.minimum(low + 1, size - 1), weight, nearest, is_inside)


def _aligned_taps(frame: Frame, spec: VolumeSpec) -> list[_Taps]:
    taps = []
    for n_out, n_in, target, spacing in zip(
        spec.shape, frame.shape, grid_spacing(frame, spec), frame.spacing_mm, strict=True
    ):
        index = np.arange(n_out, dtype=np.float64)
        taps.append(_taps((index - (n_out - 1) / 2) * (target / spacing) + (n_in - 1) / 2, n_in))
    return taps


def is_aligned(frame: Frame, spec: VolumeSpec) -> bool:
    """Whether the grid is read along the scan's own axes."""
    return spec.spacing_mm is None or frame.obliquity_deg <= ALIGNED_WITHIN_DEG


def resample_linear(array: np.ndarray, affine: np.ndarray, spec: VolumeSpec) -> tuple[np.ndarray, np.ndarray]:
    """Interpolate a scan linearly onto the grid.

    Args:
        array: numeric [i, j, k] in the file's own axes.
        affine: [4, 4], array index to world RAS millimetres.

    Returns:
        float32 [Z, Y, X], unclipped, and bool [Z, Y, X]: True inside the scan's field of view. Outside it the
        values mean nothing.
    """
    frame = frame_of(array.shape, affine)
    if not is_aligned(frame, spec):
        return _resample_oblique(array, affine, frame, spec, is_nearest=False)
    scan = frame.canonical(array)
    z, y, x = _aligned_taps(frame, spec)
    out = np.empty(spec.shape, np.float32)
    for index in np.flatnonzero(z.is_inside):
        slab = _lerp(scan[z.low[index]], scan[z.high[index]], z.weight[index])
        slab = _lerp(slab[y.low], slab[y.high], y.weight[:, None])
        out[index] = _lerp(slab[:, x.low], slab[:, x.high], x.weight)
    out[~z.is_inside] = 0.0
    is_inside = z.is_inside[:, None, None] & y.is_inside[:, None] & x.is_inside
    return out, is_inside


def resample_nearest(array: np.ndarray, affine: np.ndarray, spec: VolumeSpec) -> np.ndarray:
    """Label map [Z, Y, X], same dtype, on the grid of :func:`resample_linear`: nearest neighbour, 0
    outside."""
    frame = frame_of(array.shape, affine)
    if not is_aligned(frame, spec):
        out, is_inside = _resample_oblique(array, affine, frame, spec, is_nearest=True)
    else:
        z, y, x = _aligned_taps(frame, spec)
        out = frame.canonical(array)[np.ix_(z.nearest, y.nearest, x.nearest)]
        is_inside = z.is_inside[:, None, None] & y.is_inside[:, None] & x.is_inside
    return np.where(is_inside, out, 0).astype(array.dtype)


def _lerp(low: np.ndarray, high: np.ndarray, weight: np.ndarray | np.float32) -> np.ndarray:
    first = low.astype(np.float32, copy=False)
    return first + (high.astype(np.float32, copy=False) - first) * weight


def _resample_oblique(
    array: np.ndarray, affine: np.ndarray, frame: Frame, spec: VolumeSpec, *, is_nearest: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Trilinear (or nearest) reading at every grid point of a tilted scan, one Z slice at a time."""
    inverse = _inverse_3x3(affine)
    grid = grid_affine(frame, spec)
    out = np.zeros(spec.shape, array.dtype if is_nearest else np.float32)
    is_inside = np.zeros(spec.shape, bool)
    y_mm = (grid[1, 1] * np.arange(spec.shape[1]) + (grid[1, 3] - float(affine[1][3])))[:, None]
    x_mm = (grid[0, 0] * np.arange(spec.shape[2]) + (grid[0, 3] - float(affine[0][3])))[None, :]
    for index in range(spec.shape[0]):
        z_mm = float(grid[2, 2]) * index + (float(grid[2, 3]) - float(affine[2][3]))
        i, j, k = (
            _taps(row[0] * x_mm + row[1] * y_mm + row[2] * z_mm, size)
            for row, size in zip(inverse, array.shape, strict=True)
        )
        is_inside[index] = i.is_inside & j.is_inside & k.is_inside
        if is_nearest:
            out[index] = array[i.nearest, j.nearest, k.nearest]
            continue
        faces = []
        for a in (i.low, i.high):
            edges = [_lerp(array[a, b, k.low], array[a, b, k.high], k.weight) for b in (j.low, j.high)]
            faces.append(_lerp(edges[0], edges[1], j.weight))
        out[index] = _lerp(faces[0], faces[1], i.weight)
    return out, is_inside


def _inverse_3x3(affine: np.ndarray) -> list[list[float]]:
    """Inverse of the upper left 3x3 by cofactors, in plain Python floats."""
    m = [[float(affine[row][column]) for column in range(3)] for row in range(3)]

    def cofactor(r: int, c: int) -> float:
        r1, r2, c1, c2 = (r + 1) % 3, (r + 2) % 3, (c + 1) % 3, (c + 2) % 3
        return m[r1][c1] * m[r2][c2] - m[r1][c2] * m[r2][c1]

    determinant = sum(m[0][c] * cofactor(0, c) for c in range(3))
    return [[cofactor(c, r) / determinant for c in range(3)] for r in range(3)]
