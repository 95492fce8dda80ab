"""Scans put on a grid.

A *scan* is what a file holds, in its own axes; a *volume* is int16 [Z, Y, X] on the grid of a `VolumeSpec`
(`pipelines/grids.py`), with Z towards the head, Y towards the back and X towards the patient's left.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from photon.errors import PhotonError
from pipelines.grids import (
    ALIGNED_WITHIN_DEG,
    VOLUME_SPECS,
    Frame,
    SlabMaker,
    VolumeSpec,
    body_middle,
    frame_of,
    grid_affine,
    grid_spacing,
    is_aligned,
)
from pipelines.resample import IDENTITY, Mapping, resample_nearest, resample_scan, slab_makers
from pipelines.scans.checks import BLANK_SCAN, range_notes
from pipelines.scans.scan import Scan, read_scan
from pipelines.volume_files import (
    Volume,
    VolumeRecord,
    read_volume,
    read_volume_record,
    write_slabs,
    write_volume,
)
from pipelines.voxel_codec import slabs_of

__all__ = [
    "VOLUME_SPECS",
    "Volume",
    "VolumeRecord",
    "VolumeSpec",
    "read_volume",
    "read_volume_record",
    "write_volume",
]

DARK_HU = -20
DARK_FRACTION = 0.02
MODALITIES = ("ct", "mr", "pt")
MR_PERCENTILES = (0.5, 99.5)
BLOCK_VALUES = 1 << 19


def resample(scan: Scan, spec: VolumeSpec, modality: str = "auto") -> Volume:
    """Put a scan on the grid of ``spec``.

    Args:
        modality: ``ct`` (values are HU), ``mr`` or ``pt`` (their 0.5 and 99.5 percentiles are mapped onto the window),
            or ``auto``: what the file says, else :func:`infer_modality`.

    Raises:
        PhotonError: ``MODALITY_UNKNOWN`` for another word, ``SCAN_CONSTANT`` for a scan without contrast.
    """
    frame, mapping, metadata = _plan(scan, spec, modality)
    voxels = resample_scan(scan.array, scan.affine, frame, spec, mapping)
    return Volume(voxels=voxels, affine=grid_affine(frame, spec), spec=spec, metadata=metadata)


def store_scan(
    scan: Scan,
    spec: VolumeSpec,
    path: Path,
    modality: str = "auto",
    more_metadata: dict[str, Any] | None = None,
    *,
    num_threads: int = 1,
    device: str | None = None,
) -> VolumeRecord:
    """The file that :func:`resample` and :func:`write_volume` make, with their errors, but slab by slab: the volume is
    never held whole, unless torch resamples it on a device. The file depends on neither threads nor device, and where
    the device is full or missing the CPU does it."""
    frame, mapping, metadata = _plan(scan, spec, modality)
    makers = _torch_makers(scan, frame, spec, mapping, device) * num_threads if device else []
    makers = makers or slab_makers(scan.array, scan.affine, frame, spec, mapping, num_makers=num_threads)
    return write_slabs(makers, grid_affine(frame, spec), spec, metadata | (more_metadata or {}), path)


def _torch_makers(scan: Scan, frame: Frame, spec: VolumeSpec, mapping: Mapping, device: str) -> list[SlabMaker]:
    """One maker, of slabs that torch has resampled; none where the device could not."""
    from pipelines.resample_torch import resample_torch

    try:
        voxels = resample_torch(scan.array, scan.affine, frame, spec, mapping, device).cpu().numpy()
    except (RuntimeError, AssertionError):  # out of memory; a PyTorch without CUDA
        return []
    return [slabs_of(voxels).__getitem__]


def _plan(scan: Scan, spec: VolumeSpec, modality: str) -> tuple[Frame, Mapping, dict[str, Any]]:
    """Where the grid lies, what becomes of the values, and the metadata of the volume."""
    if modality not in ("auto", *MODALITIES):
        fact = f"'{modality}' is not auto, {', '.join(MODALITIES)}."
        raise PhotonError("MODALITY_UNKNOWN", scan.path, fact, "Use one of these.")
    source = "declared" if modality != "auto" else "inferred" if scan.modality is None else "header"
    kind = {"declared": modality, "header": scan.modality or ""}.get(source) or infer_modality(scan.array)
    notes = list(scan.notes)
    frame = _frame(scan, spec, kind, notes)
    mapping = IDENTITY if kind == "ct" else _percentile_mapping(scan, spec)
    if source == "inferred" and kind != "ct":
        notes.append("no modality in the file, and hardly a value as dark as fat in HU: taken for MR")
    low, high = scan.extent or _extent(scan.array)
    notes += range_notes(low, high, kind)
    metadata = {
        "source_sha256": scan.sha256,
        "shape": [int(n) for n in scan.array.shape],
        "spacing_mm": list(scan.spacing_mm),
        "orientation": scan.orientation,
        "modality": kind,
        "modality_source": source,
        "min_hu": round(low, 3),
        "max_hu": round(high, 3),
        "notes": notes,
    }
    return frame, mapping, metadata


def _frame(scan: Scan, spec: VolumeSpec, kind: str, notes: list[str]) -> Frame:
    """The frame that a grid of ``spec`` is put into; what is unusual about it is noted."""
    middle = body_middle(scan.array) if spec.crop == "body" and kind == "ct" else None
    frame = frame_of(scan.array.shape, scan.affine, middle)
    if spec.crop == "body" and middle is None:
        notes.append("no body found (only CT is searched): the grid is centred on the field of view")
    if not is_aligned(frame, spec):
        notes.append(f"tilted {frame.obliquity_deg:.1f} degrees: resampled along the patient's axes")
    elif spec.spacing_mm is None and frame.obliquity_deg > ALIGNED_WITHIN_DEG:
        notes.append(f"tilted {frame.obliquity_deg:.1f} degrees: the grid is tilted with it")
    grid_mm = [n * s for n, s in zip(spec.shape, grid_spacing(frame, spec), strict=True)]
    scan_mm = [n * s for n, s in zip(frame.shape, frame.spacing_mm, strict=True)]
    if any(have > room * 1.001 for have, room in zip(scan_mm, grid_mm, strict=True)):
        size = " x ".join(f"{have:.0f}" for have in scan_mm)
        notes.append(f"cropped: the field of view is {size} mm (Z, Y, X)")
    return frame


def infer_modality(array: np.ndarray) -> str:
    """``ct`` when at least 2 % of the values are below -20, as fat and air are in HU, else ``mr``."""
    num_dark = sum(np.count_nonzero(block < DARK_HU) for block in _blocks(array))
    return "ct" if num_dark >= DARK_FRACTION * array.size else "mr"


def resample_labels(path: Path, spec: VolumeSpec, volume_affine: np.ndarray | None = None) -> np.ndarray:
    """Label map file as uint8 [Z, Y, X] on the grid that its scan gets, by nearest neighbour; 0 outside.

    Args:
        volume_affine: of the scan's volume; needed where the spec centres grids on the body, else not used.

    Raises:
        PhotonError: as :func:`read_scan`; ``LABELS_INVALID`` when values are not whole numbers from 0 to 255;
            ``SPEC_INVALID`` when the place of the grid is not known.
    """
    scan = read_scan(path, is_labels=True)
    whole = np.rint(scan.array)
    if scan.array.min() < 0 or scan.array.max() > 255 or not np.array_equal(whole, scan.array):
        raise PhotonError("LABELS_INVALID", path, "its values are not whole numbers 0..255.", "Use a label map.")
    middle = None
    if spec.crop == "body":
        if volume_affine is None:
            fact = "the grid is centred on the scan's body, which a label map does not show."
            raise PhotonError("SPEC_INVALID", path, fact, "Use a spec with crop 'field of view'.")
        centre_mm = volume_affine @ [*((n - 1) / 2 for n in reversed(spec.shape)), 1.0]
        middle = tuple(float(index) for index in (np.linalg.inv(scan.affine) @ centre_mm)[:3])
    frame = frame_of(scan.array.shape, scan.affine, middle)
    return resample_nearest(whole.astype(np.uint8), scan.affine, spec, frame)


def normalise(voxels: np.ndarray, window_hu: tuple[int, int]) -> np.ndarray:
    """int16 voxels of any shape -> float32 from 0 (low end of the window) to 1 (high end)."""
    low, high = window_hu
    return (voxels.astype(np.float32) - np.float32(low)) / np.float32(high - low)


def _percentile_mapping(scan: Scan, spec: VolumeSpec) -> Mapping:
    first, last = percentiles(scan.array)
    if first == last:
        fact = f"99 % or more of its voxels have the value {first:g}: the image is all but blank."
        raise PhotonError("SCAN_CONSTANT", scan.path, fact, BLANK_SCAN)
    low, high = spec.window_hu
    return Mapping(first, (high - low) / (last - first), low)


def percentiles(array: np.ndarray) -> tuple[float, float]:
    """The 0.5 and 99.5 percentiles, as ``np.percentile``; int16 arrays are counted instead of sorted."""
    if array.dtype != np.int16:
        first, last = np.percentile(array, MR_PERCENTILES)
        return float(first), float(last)
    counts = np.zeros(1 << 16, np.int64)
    for block in _blocks(array):
        counts += np.bincount(block.view(np.uint16), minlength=1 << 16)
    below = np.cumsum(np.roll(counts, 1 << 15))  # -32768 first
    found = []
    for percent in MR_PERCENTILES:
        place = (array.size - 1) * (percent / 100)
        low, high = (int(np.searchsorted(below, int(place) + n, side="right")) - (1 << 15) for n in (0, 1))
        share = place - int(place)
        # As numpy interpolates, from the nearer end.
        found.append(low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share))
    return found[0], found[1]


def _extent(array: np.ndarray) -> tuple[float, float]:
    """Lowest and highest value."""
    extremes = [(float(block.min()), float(block.max())) for block in _blocks(array)]
    return min(low for low, _ in extremes), max(high for _, high in extremes)


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """All values of an array, in pieces [n] that stay in the processor's cache while they are worked on."""
    flat = array.reshape(-1, order="A" if array.flags.f_contiguous else "C")
    return (flat[start : start + BLOCK_VALUES] for start in range(0, flat.size, BLOCK_VALUES))
