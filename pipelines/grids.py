"""The geometry of volumes: which grid a scan is put on, and where each grid point lies in the scan.

Convention ("centred"): the grid's centre is the centre of the scan's field of view, and grid index ``i``
of ``N`` falls on scan index ``(i - (N - 1) / 2) * target_mm / scan_mm + (n - 1) / 2`` of ``n``, after the
scan's axes are flipped and permuted to [Z, Y, X] = [superior, posterior, left]. With ``crop="body"`` the centre is
that of the body's box instead (:func:`body_middle`). Points outside the field of view become ``pad_hu``; in its
outermost half voxel the edge value holds. There is no smoothing before shrinking.

Only element-wise arithmetic in a fixed order is used, no matrix product and no fused operation, so that the bytes are
the same on every machine. `resample_plain.py` says the same in numpy, the reference for the compiled loops of
`resample_kernels.py` and for `resample_torch.py`; all three give the same bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable
from typing import Any, Self, cast

import numpy as np

from photon.errors import PhotonError

PATCH = 14
"""Edge of a patch in voxels; in plane two patches are merged, so Y and X are multiples of 28."""

SlabMaker = Callable[[int], np.ndarray]
"""Number of a slab of `PATCH` planes of a volume, from below -> its int16 [planes, Y, X]."""

ALIGNED_WITHIN_DEG = 0.25
"""Scans tilted less than this are read along their own axes, at most 0.8 mm off 180 mm from the centre."""

CROPS = ("field of view", "body")
BODY_HU = -500
BODY_SHARE = 0.02

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
        crop: what the grid is centred on, the "field of view" or the "body" (CT: :func:`body_middle`).
    """

    spacing_mm: float | tuple[float, float, float] | None
    shape: tuple[int, int, int]
    window_hu: tuple[int, int]
    pad_hu: int = -1000
    crop: str = "field of view"

    def __post_init__(self) -> None:
        spacing = (1.0,) if self.spacing_mm is None else self._spacing()
        problems = {
            "spacing_mm must be positive millimetres": all(math.isfinite(s) and s > 0 for s in spacing),
            f"shape must be multiples of ({PATCH}, {2 * PATCH}, {2 * PATCH})": len(self.shape) == 3
            and min(self.shape) > 0
            and all(n % m == 0 for n, m in zip(self.shape, (PATCH, 2 * PATCH, 2 * PATCH), strict=True)),
            "window_hu must be (low, high) within int16": -32768 <= self.window_hu[0] < self.window_hu[1] <= 32767,
            f"crop must be one of {CROPS}": self.crop in CROPS,
            "crop 'body' needs spacing_mm": self.crop == CROPS[0] or self.spacing_mm is not None,
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
        if self.crop == CROPS[0]:  # the digests of specs without this choice stay
            del content["crop"]
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
    "vqa-small": VolumeSpec(spacing_mm=(3.0, 2.25, 2.4), shape=(84, 112, 140), window_hu=(-200, 300)),
    "vqa-medium": VolumeSpec(spacing_mm=(2.25, 1.5, 1.5), shape=(112, 168, 224), window_hu=(-200, 300)),
    "vqa-full": VolumeSpec(spacing_mm=(1.8, 1.0, 1.0), shape=(140, 252, 336), window_hu=(-200, 300)),
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
        middle: scan index along (Z, Y, X), flips counted, at which a grid is centred.
        directions: for Z, Y, X the unit vector in the world (RAS) along which that axis runs.
        obliquity_deg: the largest angle between an array axis and its patient axis.
        centre_mm: world (RAS) position of `middle`.
    """

    axes: tuple[int, ...]
    is_flipped: tuple[bool, ...]
    spacing_mm: tuple[float, ...]
    shape: tuple[int, ...]
    middle: tuple[float, ...]
    directions: tuple[tuple[float, ...], ...]
    obliquity_deg: float
    centre_mm: tuple[float, ...]

    def canonical(self, array: np.ndarray) -> np.ndarray:
        """View of a scan's array with axes [Z, Y, X]."""
        steps = tuple(slice(None, None, -1 if flip else 1) for flip in self.is_flipped)
        return array.transpose(self.axes)[steps]


def frame_of(shape: tuple[int, ...], affine: np.ndarray, middle: tuple[float, ...] | None = None) -> Frame:
    """Frame of a scan with this array shape and voxel-to-world (RAS mm) matrix.

    Args:
        middle: array index (i, j, k) to centre grids on, None for the centre of the field of view.
    """
    columns = [[float(affine[row][axis]) for row in range(3)] for axis in range(3)]
    lengths = [math.sqrt(sum(value * value for value in column)) for column in columns]
    cosine = [[value / length for value in column] for column, length in zip(columns, lengths, strict=True)]

    def agreement(axes: tuple[int, ...]) -> float:
        return sum(abs(cosine[axis][world]) for axis, (world, _) in zip(axes, CANONICAL_TO_RAS, strict=True))

    axes = max(itertools.permutations(range(3)), key=agreement)
    along = [cosine[axis][world] * sign for axis, (world, sign) in zip(axes, CANONICAL_TO_RAS, strict=True)]
    middle = middle or tuple((n - 1) / 2 for n in shape)
    is_flipped = tuple(value < 0 for value in along)
    centre = [
        float(affine[row][3]) + sum(float(affine[row][axis]) * middle[axis] for axis in range(3)) for row in range(3)
    ]
    return Frame(
        axes=axes,
        is_flipped=is_flipped,
        spacing_mm=tuple(lengths[axis] for axis in axes),
        shape=tuple(int(shape[axis]) for axis in axes),
        middle=tuple(
            shape[axis] - 1 - middle[axis] if flip else middle[axis]
            for axis, flip in zip(axes, is_flipped, strict=True)
        ),
        directions=tuple(
            tuple((0.0 - value) if flip else (value + 0.0) for value in cosine[axis])  # never -0.0
            for axis, flip in zip(axes, is_flipped, strict=True)
        ),
        obliquity_deg=max(math.degrees(math.acos(min(1.0, abs(value)))) for value in along),
        centre_mm=tuple(centre),
    )


def grid_spacing(frame: Frame, spec: VolumeSpec) -> tuple[float, ...]:
    """Voxel edge in mm along (Z, Y, X) of the grid for a scan in this frame."""
    return spec.spacing_for(tuple(n * s for n, s in zip(frame.shape, frame.spacing_mm, strict=True)))


def is_aligned(frame: Frame, spec: VolumeSpec) -> bool:
    """Whether the grid is read along the scan's own axes."""
    return spec.spacing_mm is None or frame.obliquity_deg <= ALIGNED_WITHIN_DEG


def grid_affine(frame: Frame, spec: VolumeSpec) -> np.ndarray:
    """Matrix [4, 4] float64 from grid index (X, Y, Z) to world RAS millimetres; its inverse leads back.

    The axes are the patient's, or the scan's own where it is read along them.
    """
    spacing = grid_spacing(frame, spec)
    affine = np.eye(4)
    affine[:3, 3] = frame.centre_mm
    for grid_axis, (world, sign) in enumerate(CANONICAL_TO_RAS):
        direction = np.zeros(3)
        direction[world] = sign
        if is_aligned(frame, spec):
            direction = np.array(frame.directions[grid_axis])
        affine[:3, 2 - grid_axis] = direction * spacing[grid_axis]
        affine[:3, 3] -= direction * spacing[grid_axis] * (spec.shape[grid_axis] - 1) / 2
    return affine


def body_middle(array: np.ndarray) -> tuple[float, ...] | None:
    """Array index (i, j, k) of the centre of the body's box in a CT, None where there is no body.

    Along each array axis the box reaches from the first to the last slice in which at least 2 % of the voxels are
    above -500 HU. A couch counts where it fills that much.
    """
    is_body = array > BODY_HU
    middle = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        counts = np.count_nonzero(is_body, axis=others)
        found = np.flatnonzero(counts >= BODY_SHARE * (array.size / array.shape[axis]))
        if not found.size:
            return None
        middle.append((int(found[0]) + int(found[-1])) / 2)
    return tuple(middle)


@dataclasses.dataclass(frozen=True)
class Taps:
    """Where a grid axis reads a scan axis: two neighbours, the weight of the second, and what lies inside."""

    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray
    nearest: np.ndarray
    is_inside: np.ndarray


def taps_at(position: np.ndarray, size: int) -> Taps:
    """Taps for scan indices, float64 of any shape, along a scan axis of this size."""
    is_inside = (position >= -0.5) & (position <= size - 0.5)
    clamped = np.clip(position, 0.0, size - 1.0)
    low = np.minimum(np.floor(clamped).astype(np.int64), max(size - 2, 0))
    nearest = np.minimum(np.floor(clamped + 0.5).astype(np.int64), size - 1)
    weight = (clamped - low).astype(np.float32)
    return Taps(low, np.minimum(low + 1, size - 1), weight, nearest, is_inside)


def aligned_taps(frame: Frame, spec: VolumeSpec) -> list[Taps]:
    """Taps along Z, Y and X, flips counted, for a grid that is read along the scan's own axes."""
    taps = []
    for n_out, n_in, middle, target, spacing in zip(
        spec.shape, frame.shape, frame.middle, grid_spacing(frame, spec), frame.spacing_mm, strict=True
    ):
        index = np.arange(n_out, dtype=np.float64)
        taps.append(taps_at((index - (n_out - 1) / 2) * (target / spacing) + middle, n_in))
    return taps


def point_parts(affine: np.ndarray, frame: Frame, spec: VolumeSpec) -> list[np.ndarray]:
    """What X, Y and Z of the grid add to the scan's indices: float64 [3 (i, j, k), N] for each, summed in this order.

    Args:
        affine: of the scan, whose grid lies along the patient's axes.
    """
    rows = _inverse_3x3(affine)
    grid = grid_affine(frame, spec)
    parts = []
    for axis, size in enumerate(reversed(spec.shape)):
        mm = float(grid[axis, axis]) * np.arange(size) + (float(grid[axis, 3]) - float(affine[axis][3]))
        parts.append(np.stack([row[axis] * mm for row in rows]))
    return parts


def _inverse_3x3(affine: np.ndarray) -> list[list[float]]:
    """Inverse of the upper left 3x3 by cofactors, in plain Python floats."""
    m = [[float(affine[row][column]) for column in range(3)] for row in range(3)]

    def cofactor(r: int, c: int) -> float:
        r1, r2, c1, c2 = (r + 1) % 3, (r + 2) % 3, (c + 1) % 3, (c + 2) % 3
        return m[r1][c1] * m[r2][c2] - m[r1][c2] * m[r2][c1]

    determinant = sum(m[0][c] * cofactor(0, c) for c in range(3))
    return [[cofactor(c, r) / determinant for c in range(3)] for r in range(3)]
