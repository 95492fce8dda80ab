"""Putting a scan on a grid: linear interpolation, intensity mapping, window and rounding in one pass.

The compiled loops read the scan's own memory and write the finished voxels; nothing else of their size is made.
`resample_plain.py` says the same in numpy, the reference for them and for `resample_torch.py`; all three give the
same bytes.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from pipelines.grids import (
    CANONICAL_TO_RAS,
    VOLUME_SPECS,
    Frame,
    Taps,
    VolumeSpec,
    aligned_taps,
    frame_of,
    grid_affine,
    grid_spacing,
    is_aligned,
    point_parts,
)

__all__ = ["CANONICAL_TO_RAS", "VOLUME_SPECS", "Frame", "VolumeSpec", "frame_of", "grid_affine", "grid_spacing"]


@dataclasses.dataclass(frozen=True)
class Mapping:
    """What becomes of a value before the window: (value - subtract) * multiply + add, in float32."""

    subtract: float = 0.0
    multiply: float = 1.0
    add: float = 0.0


IDENTITY = Mapping()


def resample_scan(
    array: np.ndarray, affine: np.ndarray, frame: Frame, spec: VolumeSpec, mapping: Mapping = IDENTITY
) -> np.ndarray:
    """Interpolate a scan linearly onto the grid.

    Args:
        array: finite numbers [i, j, k] in the file's own axes; int16 and float32 are read where they lie.
        affine: [4, 4], array index to world RAS millimetres.
        frame: of this array and affine.

    Returns:
        int16 [Z, Y, X], rounded to even, within the spec's window; its padding outside the scan's field of view.
    """
    from pipelines.resample_kernels import linear_points

    if array.dtype not in (np.int16, np.float32):
        array = array.astype(np.float32)
    flat, steps = memory_of(array)
    low, high = spec.window_hu
    limits = np.array([low, high, min(max(spec.pad_hu, low), high)], np.float32)
    factors = np.array([mapping.subtract, mapping.multiply, mapping.add], np.float32)
    out = np.empty(spec.shape, np.int16)
    if is_aligned(frame, spec):
        _along_axes(flat, steps[list(frame.axes)], frame, spec, factors, limits, out)
    else:
        x, y, z = point_parts(affine, frame, spec)
        linear_points(flat, steps, np.array(array.shape), x, y, z, factors, limits, out)
    return out


def resample_nearest(array: np.ndarray, affine: np.ndarray, spec: VolumeSpec, frame: Frame | None = None) -> np.ndarray:
    """Label map [Z, Y, X], same dtype, on the grid of :func:`resample_scan`: nearest neighbour, 0 outside."""
    from pipelines.resample_kernels import nearest_points, nearest_rows

    frame = frame or frame_of(array.shape, affine)
    flat, steps = memory_of(array)
    out = np.zeros(spec.shape, array.dtype)
    if is_aligned(frame, spec):
        taps = aligned_taps(frame, spec)
        indices = [
            np.where(tap.is_inside, size - 1 - tap.nearest if flip else tap.nearest, -1)
            for tap, size, flip in zip(taps, frame.shape, frame.is_flipped, strict=True)
        ]
        nearest_rows(flat, steps[list(frame.axes)], *indices, out)
    else:
        x, y, z = point_parts(affine, frame, spec)
        nearest_points(flat, steps, np.array(array.shape), x, y, z, out)
    return out


def memory_of(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values of a dense array as they lie [values], and the steps of its axes in values."""
    if not (array.flags.f_contiguous or array.flags.c_contiguous):
        array = np.asfortranarray(array)
    steps = np.array(array.strides, np.int64) // array.itemsize
    return array.reshape(-1, order="A"), steps


def _along_axes(
    flat: np.ndarray,
    steps: np.ndarray,
    frame: Frame,
    spec: VolumeSpec,
    factors: np.ndarray,
    limits: np.ndarray,
    out: np.ndarray,
) -> None:
    """Fill `out` plane by plane; scans whose memory does not run along X are turned some planes at a time.

    Args:
        steps: int64 [3], of Z, Y and X.
    """
    from pipelines.resample_kernels import SLAB, linear_rows, turn_slab

    taps = aligned_taps(frame, spec)
    (z, z_weight, z_range), y, x = (
        in_array_direction(tap, size, flip) for tap, size, flip in zip(taps, frame.shape, frame.is_flipped, strict=True)
    )
    x = (np.ascontiguousarray(x[0].T), *x[1:])
    out[: z_range[0]] = out[z_range[1] :] = np.int16(limits[2])
    if steps[2] == 1:
        planes = slice(*z_range)
        linear_rows(flat, steps[:2], z[planes], z_weight[planes], *y, *x, factors, limits, out[planes])
        return
    slab = np.empty((min(SLAB, frame.shape[0]), *frame.shape[1:]), flat.dtype)
    slab_steps = np.array(slab.strides[:2], np.int64) // slab.itemsize
    begin = int(z_range[0])
    while begin < z_range[1]:
        end = begin + 1
        while end < z_range[1] and np.ptp(z[begin : end + 1]) < len(slab):
            end += 1
        first, planes = z[begin:end].min(), slice(begin, end)
        held = slab[: z[planes].max() + 1 - first]
        turn_slab(flat, steps, first, held)
        linear_rows(
            slab.reshape(-1), slab_steps, z[planes] - first, z_weight[planes], *y, *x, factors, limits, out[planes]
        )
        begin = end


def in_array_direction(taps: Taps, size: int, is_flipped: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours int64 [N, 2] in the array's own direction, float32 weights [N], and the range inside [2]."""
    pairs = np.stack([taps.low, taps.high], axis=1)
    inside = np.flatnonzero(taps.is_inside)
    ends = (inside[0], inside[-1] + 1) if inside.size else (0, 0)
    return (size - 1 - pairs if is_flipped else pairs), taps.weight, np.array(ends, np.int64)
