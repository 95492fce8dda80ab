"""Putting a scan on a grid: linear interpolation, intensity mapping, window and rounding in one pass.

The compiled loops read the scan's own memory and write the finished voxels; nothing else of their size is made.
`resample_plain.py` says the same in numpy, the reference for them and for `resample_torch.py`; all three give the
same bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from pipelines.grids import (
    CANONICAL_TO_RAS,
    PATCH,
    VOLUME_SPECS,
    Frame,
    SlabMaker,
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
    out = np.empty(spec.shape, np.int16)
    _reader(_readable(array), affine, frame, spec, mapping)(0, out)
    return out


def slab_makers(
    array: np.ndarray,
    affine: np.ndarray,
    frame: Frame,
    spec: VolumeSpec,
    mapping: Mapping = IDENTITY,
    *,
    num_makers: int = 1,
) -> list[SlabMaker]:
    """As :func:`resample_scan`, 14 planes at a time, so that the whole volume is never held.

    Returns:
        Functions for as many threads. Each makes any slab, by its number from below, in memory of its own that its
        next call overwrites.
    """
    array = _readable(array)
    return [_slab_maker(_reader(array, affine, frame, spec, mapping), spec) for _ in range(num_makers)]


def _slab_maker(read: Callable[[int, np.ndarray], None], spec: VolumeSpec) -> SlabMaker:
    out = np.empty((PATCH, *spec.shape[1:]), np.int16)

    def make(number: int) -> np.ndarray:
        read(number * PATCH, out)
        return out

    return make


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


def _readable(array: np.ndarray) -> np.ndarray:
    """The values as the compiled loops read them."""
    return array if array.dtype in (np.int16, np.float32) else array.astype(np.float32)


def _reader(
    array: np.ndarray, affine: np.ndarray, frame: Frame, spec: VolumeSpec, mapping: Mapping
) -> Callable[[int, np.ndarray], None]:
    """The function that fills int16 [planes, Y, X] with planes of the grid from a given one on."""
    from pipelines.resample_kernels import linear_points

    flat, steps = memory_of(array)
    low, high = spec.window_hu
    limits = np.array([low, high, min(max(spec.pad_hu, low), high)], np.float32)
    factors = np.array([mapping.subtract, mapping.multiply, mapping.add], np.float32)
    if is_aligned(frame, spec):
        return _AlignedReader(flat, steps[list(frame.axes)], frame, spec, factors, limits)
    x, y, z = point_parts(affine, frame, spec)

    def read(start: int, out: np.ndarray) -> None:
        planes = np.ascontiguousarray(z[:, start : start + len(out)])
        linear_points(flat, steps, np.array(array.shape), x, y, planes, factors, limits, out)

    return read


class _AlignedReader:
    """Reads a scan along its own axes; one whose memory does not run along X is turned some planes at a time."""

    def __init__(
        self,
        flat: np.ndarray,
        steps: np.ndarray,
        frame: Frame,
        spec: VolumeSpec,
        factors: np.ndarray,
        limits: np.ndarray,
    ) -> None:
        """Prepare to read; `steps` are those of Z, Y and X."""
        from pipelines.resample_kernels import SLAB

        taps = zip(aligned_taps(frame, spec), frame.shape, frame.is_flipped, strict=True)
        (self._z, self._z_weight, self._z_range), y, x = (in_array_direction(*tap) for tap in taps)
        self._rest = (*y, np.ascontiguousarray(x[0].T), *x[1:], factors, limits)
        self._flat, self._steps, self._pad = flat, steps, np.int16(limits[2])
        self._slab: np.ndarray | None = None
        if steps[2] != 1:
            self._slab = np.empty((min(SLAB, frame.shape[0]), *frame.shape[1:]), flat.dtype)

    def __call__(self, start: int, out: np.ndarray) -> None:
        """Fill int16 [planes, Y, X] with planes from `start` on."""
        begin, end = (min(max(int(edge), start), start + len(out)) for edge in self._z_range)
        out[: begin - start] = out[end - start :] = self._pad
        if self._slab is None:
            self._read_rows(self._flat, self._steps[:2], 0, begin, end, out[begin - start :])
            return
        while begin < end:
            stop = begin + 1
            while stop < end and np.ptp(self._z[begin : stop + 1]) < len(self._slab):
                stop += 1
            self._read_turned(self._slab, begin, stop, out[begin - start :])
            begin = stop

    def _read_turned(self, slab: np.ndarray, begin: int, end: int, out: np.ndarray) -> None:
        from pipelines.resample_kernels import turn_slab

        first, last = self._z[begin:end].min(), self._z[begin:end].max()
        turn_slab(self._flat, self._steps, first, slab[: last + 1 - first])
        steps = np.array(slab.strides[:2], np.int64) // slab.itemsize
        self._read_rows(slab.reshape(-1), steps, first, begin, end, out)

    def _read_rows(
        self, flat: np.ndarray, steps: np.ndarray, first: int, begin: int, end: int, out: np.ndarray
    ) -> None:
        from pipelines.resample_kernels import linear_rows

        planes = slice(begin, end)
        linear_rows(flat, steps, self._z[planes] - first, self._z_weight[planes], *self._rest, out[: end - begin])


def in_array_direction(taps: Taps, size: int, is_flipped: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Neighbours int64 [N, 2] in the array's own direction, float32 weights [N], and the range inside [2]."""
    pairs = np.stack([taps.low, taps.high], axis=1)
    inside = np.flatnonzero(taps.is_inside)
    ends = (inside[0], inside[-1] + 1) if inside.size else (0, 0)
    return (size - 1 - pairs if is_flipped else pairs), taps.weight, np.array(ends, np.int64)
