"""Resampling in plain numpy: what the compiled and the GPU loops have to give to the last bit. Only tests call it."""

from __future__ import annotations

import numpy as np

from pipelines.grids import Frame, Taps, VolumeSpec, aligned_taps, is_aligned, point_parts, taps_at
from pipelines.resample import Mapping


def resample_plain(
    array: np.ndarray, affine: np.ndarray, frame: Frame, spec: VolumeSpec, mapping: Mapping
) -> np.ndarray:
    """As :func:`pipelines.resample.resample_scan`."""
    read = _read_aligned if is_aligned(frame, spec) else _read_oblique
    values, is_inside = read(array, affine, frame, spec)
    values = (values - np.float32(mapping.subtract)) * np.float32(mapping.multiply) + np.float32(mapping.add)
    values = np.where(is_inside, values, np.float32(spec.pad_hu))
    return np.rint(np.clip(values, *spec.window_hu)).astype(np.int16)


def nearest_plain(array: np.ndarray, affine: np.ndarray, frame: Frame, spec: VolumeSpec) -> np.ndarray:
    """As :func:`pipelines.resample.resample_nearest`."""
    if is_aligned(frame, spec):
        z, y, x = aligned_taps(frame, spec)
        found = frame.canonical(array)[np.ix_(z.nearest, y.nearest, x.nearest)]
        is_inside = z.is_inside[:, None, None] & y.is_inside[:, None] & x.is_inside
        return np.where(is_inside, found, 0).astype(array.dtype)
    out = np.zeros(spec.shape, array.dtype)
    for index, (i, j, k) in enumerate(_planes(array, affine, frame, spec)):
        is_inside = i.is_inside & j.is_inside & k.is_inside
        out[index] = np.where(is_inside, array[i.nearest, j.nearest, k.nearest], 0)
    return out


def _read_aligned(
    array: np.ndarray, affine: np.ndarray, frame: Frame, spec: VolumeSpec
) -> tuple[np.ndarray, np.ndarray]:
    """float32 [Z, Y, X] and which of them lie inside the field of view; the others mean nothing."""
    scan = frame.canonical(array)
    z, y, x = aligned_taps(frame, spec)
    out = np.zeros(spec.shape, np.float32)
    for index in np.flatnonzero(z.is_inside):
        slab = _lerp(scan[z.low[index]], scan[z.high[index]], z.weight[index])
        slab = _lerp(slab[y.low], slab[y.high], y.weight[:, None])
        out[index] = _lerp(slab[:, x.low], slab[:, x.high], x.weight)
    return out, z.is_inside[:, None, None] & y.is_inside[:, None] & x.is_inside


def _read_oblique(
    array: np.ndarray, affine: np.ndarray, frame: Frame, spec: VolumeSpec
) -> tuple[np.ndarray, np.ndarray]:
    out = np.zeros(spec.shape, np.float32)
    is_inside = np.zeros(spec.shape, bool)
    for index, (i, j, k) in enumerate(_planes(array, affine, frame, spec)):
        is_inside[index] = i.is_inside & j.is_inside & k.is_inside
        faces = []
        for a in (i.low, i.high):
            edges = [_lerp(array[a, b, k.low], array[a, b, k.high], k.weight) for b in (j.low, j.high)]
            faces.append(_lerp(edges[0], edges[1], j.weight))
        out[index] = _lerp(faces[0], faces[1], i.weight)
    return out, is_inside


def _planes(array: np.ndarray, affine: np.ndarray, frame: Frame, spec: VolumeSpec) -> list[tuple[Taps, ...]]:
    """Taps [Y, X] along i, j and k of each plane of the grid."""
    x, y, z = point_parts(affine, frame, spec)
    return [
        tuple(taps_at(x[a][None, :] + y[a][:, None] + z[a][plane], array.shape[a]) for a in range(3))
        for plane in range(spec.shape[0])
    ]


def _lerp(low: np.ndarray, high: np.ndarray, weight: np.ndarray | np.float32) -> np.ndarray:
    first = low.astype(np.float32, copy=False)
    return first + (high.astype(np.float32, copy=False) - first) * weight
