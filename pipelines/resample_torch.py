"""Resampling by plain torch, for scans that are wanted on a GPU: the bytes of `resample_plain.py` on every device.

Multiplications and additions are calls of their own, so that no device fuses them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.grids import Frame, VolumeSpec, aligned_taps, is_aligned, point_parts
from pipelines.resample import IDENTITY, Mapping, in_array_direction, memory_of

PLANES = 8
"""Planes of the grid that are worked on at a time."""


def resample_torch(
    array: np.ndarray,
    affine: np.ndarray,
    frame: Frame,
    spec: VolumeSpec,
    mapping: Mapping = IDENTITY,
    device: torch.device | str = "cpu",
) -> Tensor:
    """As :func:`pipelines.resample.resample_scan`, int16 [Z, Y, X] on `device`."""
    flat, steps = memory_of(array)
    values = torch.from_numpy(flat).to(device)
    low, high = spec.window_hu
    out = torch.full(spec.shape, min(max(spec.pad_hu, low), high), dtype=torch.int16, device=device)
    read = _read_aligned if is_aligned(frame, spec) else _read_oblique
    read(values, array.shape, steps, affine, frame, spec, mapping, out)
    return out


def _read_aligned(
    flat: Tensor,
    shape: tuple[int, ...],
    steps: np.ndarray,
    affine: np.ndarray,
    frame: Frame,
    spec: VolumeSpec,
    mapping: Mapping,
    out: Tensor,
) -> None:
    scan = torch.as_strided(flat, shape, steps.tolist()).permute(frame.axes)
    pairs, weights, inside = [], [], []
    for taps, size, flip in zip(aligned_taps(frame, spec), frame.shape, frame.is_flipped, strict=True):
        pair, weight, ends = in_array_direction(taps, size, flip)
        inside.append(slice(*ends.tolist()))
        pairs.append(torch.from_numpy(pair[inside[-1]]).to(flat.device))
        weights.append(torch.from_numpy(weight[inside[-1]]).to(flat.device))
    (z_low, z_high), (y_low, y_high), (x_low, x_high) = (pair.unbind(1) for pair in pairs)
    target = out[inside[0], inside[1], inside[2]]
    for start in range(0, len(target), PLANES):
        planes = slice(start, start + PLANES)
        slab = _lerp(scan[z_low[planes]], scan[z_high[planes]], weights[0][planes, None, None])
        slab = _lerp(slab[:, y_low], slab[:, y_high], weights[1][:, None])
        target[planes] = _finished(_lerp(slab[:, :, x_low], slab[:, :, x_high], weights[2]), spec, mapping)


def _read_oblique(
    flat: Tensor,
    shape: tuple[int, ...],
    steps: np.ndarray,
    affine: np.ndarray,
    frame: Frame,
    spec: VolumeSpec,
    mapping: Mapping,
    out: Tensor,
) -> None:
    x, y, z = (torch.from_numpy(part).to(flat.device) for part in point_parts(affine, frame, spec))
    for start in range(0, len(out), PLANES):
        planes = slice(start, start + PLANES)
        offsets, weights = [], []
        is_inside = torch.ones(out[planes].shape, dtype=torch.bool, device=flat.device)
        for axis, size in enumerate(shape):
            position = x[axis][None, None, :] + y[axis][None, :, None] + z[axis][planes, None, None]
            is_inside &= (position >= -0.5) & (position <= size - 0.5)
            clamped = position.clamp(0.0, size - 1.0)
            low = clamped.floor().long().clamp(max=max(size - 2, 0))
            offsets.append((low * int(steps[axis]), (low + 1).clamp(max=size - 1) * int(steps[axis])))
            weights.append((clamped - low).float())
        faces = []
        for i in offsets[0]:
            k_low, k_high = offsets[2]
            edges = [_lerp(flat[i + j + k_low], flat[i + j + k_high], weights[2]) for j in offsets[1]]
            faces.append(_lerp(edges[0], edges[1], weights[1]))
        values = _finished(_lerp(faces[0], faces[1], weights[0]), spec, mapping)
        out[planes] = torch.where(is_inside, values, out[planes])


def _lerp(low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    first = low.float()
    return first + (high.float() - first) * weight


def _finished(values: Tensor, spec: VolumeSpec, mapping: Mapping) -> Tensor:
    subtract, multiply, add = (
        torch.tensor(value, dtype=torch.float32, device=values.device)
        for value in (mapping.subtract, mapping.multiply, mapping.add)
    )
    return ((values - subtract) * multiply + add).clamp(*spec.window_hu).round().to(torch.int16)
