"""Compiled loops that read a scan where it lies and write the finished volume in one pass: numba's only module.

Every loop does the arithmetic of `resample_plain.py` number by number, in float32 and in the same order; fast math
is off and nothing is fused, so the voxels are the same to the last bit, on every processor. Compiled code is kept
beside this file, or in the user's cache folder where that cannot be written. All loops release the GIL.

A scan comes as its memory in one row (`flat`) with the steps, in values, of its axes; flipped axes are read through
their taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

SLAB = 32
"""Planes of a scan that are turned at a time when its memory does not run along the grid's X."""

_TILE = 16


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    options: dict[str, Any] = {"nogil": True, "fastmath": False, "error_model": "numpy", "boundscheck": False}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder for compiled code can be written
        return njit(**options)(function)


@_compiled
def linear_rows(
    flat: np.ndarray,
    steps: np.ndarray,
    z: np.ndarray,
    z_weight: np.ndarray,
    y: np.ndarray,
    y_weight: np.ndarray,
    y_range: np.ndarray,
    x: np.ndarray,
    x_weight: np.ndarray,
    x_range: np.ndarray,
    mapping: np.ndarray,
    limits: np.ndarray,
    out: np.ndarray,
) -> None:
    """Planes of a volume from a scan whose memory runs along X.

    Args:
        flat: int16 or float32 [values].
        steps: int64 [2], of Z and Y.
        z: int64 [planes, 2], the two scan planes of each plane of `out`.
        z_weight: float32 [planes], weight of the second one.
        y: int64 [N, 2]; x: int64 [2, N]; with float32 [N] weights as for Z.
        y_range: int64 [2], from where up to where the grid is inside the scan; also `x_range`.
        mapping: float32 [3]: values become (value - mapping[0]) * mapping[1] + mapping[2].
        limits: float32 [3]: lowest and highest value, and what stands outside the scan.
        out: int16 [planes, Y, X].
    """
    low, high, pad = limits[0], limits[1], np.int16(limits[2])
    first, scale, add = mapping[0], mapping[1], mapping[2]
    begin, end = x_range[0], x_range[1]
    if begin >= end or y_range[0] >= y_range[1]:
        out[:] = pad
        return
    left, right = x[0, begin:end], x[1, begin:end]
    x_weight = x_weight[begin:end]
    start = min(left.min(), right.min())
    size = max(left.max(), right.max()) + 1 - start
    # Indices without a sign need no test for negative ones, and short ones come eight at a time.
    left, right = (left - start).astype(np.uint32), (right - start).astype(np.uint32)
    read = np.empty(end - begin, np.float32)
    lines = np.empty((2, size), np.float32)
    line = np.empty(size, np.float32)
    held = np.empty(2, np.int64)
    for plane in range(out.shape[0]):
        below, above, weight = z[plane, 0] * steps[0] + start, z[plane, 1] * steps[0] + start, z_weight[plane]
        held[:] = -1
        out[plane, : y_range[0]] = pad
        out[plane, y_range[1] :] = pad
        for row in range(y_range[0], y_range[1]):
            # Neighbours differ by one, so that each has a place of its own and waits there for the next row.
            for side in range(2):
                index = y[row, side]
                if held[index & 1] != index:
                    held[index & 1] = index
                    near = flat[below + index * steps[1] : below + index * steps[1] + size]
                    far = flat[above + index * steps[1] : above + index * steps[1] + size]
                    target = lines[index & 1]
                    for n in range(size):
                        value = np.float32(near[n])
                        target[n] = value + (np.float32(far[n]) - value) * weight
            near_line, far_line, row_weight = lines[y[row, 0] & 1], lines[y[row, 1] & 1], y_weight[row]
            for n in range(size):
                line[n] = near_line[n] + (far_line[n] - near_line[n]) * row_weight
            target_row = out[plane, row]
            target_row[:begin] = pad
            target_row[end:] = pad
            for n in range(end - begin):
                value = line[left[n]]
                read[n] = value + (line[right[n]] - value) * x_weight[n]
            inside = target_row[begin:end]
            for n in range(end - begin):
                value = (read[n] - first) * scale + add
                value = min(max(value, low), high)
                inside[n] = np.int16(np.int32(np.rint(value)))


@_compiled
def turn_slab(flat: np.ndarray, steps: np.ndarray, start: int, out: np.ndarray) -> None:
    """Copy planes of a scan into `out` [planes, Y, X], tile by tile, so that each line of memory is fetched once.

    Args:
        flat: [values].
        steps: int64 [3], of Z, Y and X.
        start: the first plane.
    """
    for y_tile in range(0, out.shape[1], _TILE):
        y_end = min(y_tile + _TILE, out.shape[1])
        for x_tile in range(0, out.shape[2], _TILE):
            x_end = min(x_tile + _TILE, out.shape[2])
            for z in range(out.shape[0]):
                for y in range(y_tile, y_end):
                    base = (start + z) * steps[0] + y * steps[1]
                    for x in range(x_tile, x_end):
                        out[z, y, x] = flat[base + x * steps[2]]


@_compiled
def _face(
    flat: np.ndarray, at: int, j_step: int, k_step: int, j_weight: np.float32, k_weight: np.float32
) -> np.float32:
    """Between four values, the last axis first."""
    near, far = np.float32(flat[np.uint64(at)]), np.float32(flat[np.uint64(at + j_step)])
    near = near + (np.float32(flat[np.uint64(at + k_step)]) - near) * k_weight
    far = far + (np.float32(flat[np.uint64(at + j_step + k_step)]) - far) * k_weight
    return near + (far - near) * j_weight


@_compiled
def linear_points(
    flat: np.ndarray,
    steps: np.ndarray,
    shape: np.ndarray,
    x_part: np.ndarray,
    y_part: np.ndarray,
    z_part: np.ndarray,
    mapping: np.ndarray,
    limits: np.ndarray,
    out: np.ndarray,
) -> None:
    """A volume from a scan in any position.

    Args:
        flat: int16 or float32 [values].
        steps: int64 [3], of the scan's axes i, j, k; also `shape`.
        x_part: float64 [3, X]: what the grid's X adds to the scan's indices i, j, k; also `y_part`, `z_part`.
        mapping: as for :func:`linear_rows`; also `limits`.
        out: int16 [Z, Y, X].
    """
    low, high, pad = limits[0], limits[1], np.int16(limits[2])
    first, scale, add = mapping[0], mapping[1], mapping[2]
    last_i, last_j, last_k = shape[0] - 1, shape[1] - 1, shape[2] - 1
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            target = out[z, y]
            for x in range(out.shape[2]):
                i = (x_part[0, x] + y_part[0, y]) + z_part[0, z]
                j = (x_part[1, x] + y_part[1, y]) + z_part[1, z]
                k = (x_part[2, x] + y_part[2, y]) + z_part[2, z]
                if not (
                    i >= -0.5
                    and i <= last_i + 0.5
                    and j >= -0.5
                    and j <= last_j + 0.5
                    and k >= -0.5
                    and k <= last_k + 0.5
                ):
                    target[x] = pad
                    continue
                i, j, k = min(max(i, 0.0), last_i), min(max(j, 0.0), last_j), min(max(k, 0.0), last_k)
                i_low = min(np.int64(i), max(last_i - 1, 0))
                j_low = min(np.int64(j), max(last_j - 1, 0))
                k_low = min(np.int64(k), max(last_k - 1, 0))
                i_weight, j_weight, k_weight = np.float32(i - i_low), np.float32(j - j_low), np.float32(k - k_low)
                i_step = steps[0] if i_low < last_i else 0
                j_step = steps[1] if j_low < last_j else 0
                k_step = steps[2] if k_low < last_k else 0
                at = i_low * steps[0] + j_low * steps[1] + k_low * steps[2]
                face = _face(flat, at, j_step, k_step, j_weight, k_weight)
                value = face + (_face(flat, at + i_step, j_step, k_step, j_weight, k_weight) - face) * i_weight
                value = (value - first) * scale + add
                value = min(max(value, low), high)
                target[x] = np.int16(np.int32(np.rint(value)))


@_compiled
def nearest_rows(
    flat: np.ndarray, steps: np.ndarray, z: np.ndarray, y: np.ndarray, x: np.ndarray, out: np.ndarray
) -> None:
    """Labels read along the scan's own axes.

    Args:
        flat: [values].
        steps: int64 [3], of Z, Y and X.
        z: int64 [Z], the scan's plane for each plane of the grid, -1 outside; also `y`, `x`.
        out: [Z, Y, X], 0 where nothing is written.
    """
    for plane in range(out.shape[0]):
        for row in range(out.shape[1]):
            if z[plane] < 0 or y[row] < 0:
                continue
            base = z[plane] * steps[0] + y[row] * steps[1]
            for column in range(out.shape[2]):
                if x[column] >= 0:
                    out[plane, row, column] = flat[base + x[column] * steps[2]]


@_compiled
def nearest_points(
    flat: np.ndarray,
    steps: np.ndarray,
    shape: np.ndarray,
    x_part: np.ndarray,
    y_part: np.ndarray,
    z_part: np.ndarray,
    out: np.ndarray,
) -> None:
    """Labels from a scan in any position; arguments as for :func:`linear_points`, `out` as for
    :func:`nearest_rows`."""
    for z in range(out.shape[0]):
        for y in range(out.shape[1]):
            for x in range(out.shape[2]):
                offset = 0
                is_inside = True
                for axis in range(3):
                    position = (x_part[axis, x] + y_part[axis, y]) + z_part[axis, z]
                    size = shape[axis]
                    if not (position >= -0.5 and position <= size - 0.5):
                        is_inside = False
                        break
                    clamped = min(max(position, 0.0), size - 1.0)
                    offset += min(np.int64(clamped + 0.5), size - 1) * steps[axis]
                if is_inside:
                    out[z, y, x] = flat[offset]
