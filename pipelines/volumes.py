"""Scans put on a grid, and volumes on disk.

A *scan* is what a file holds, in its own axes; a *volume* is int16 [Z, Y, X] on the grid of a `VolumeSpec`
(`pipelines/grids.py`), with Z towards the head, Y towards the back and X towards the patient's left.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save as save_safetensors

from photon.errors import PhotonError
from pipelines.files import write_bytes
from pipelines.grids import (
    ALIGNED_WITHIN_DEG,
    VOLUME_SPECS,
    Frame,
    VolumeSpec,
    body_middle,
    frame_of,
    grid_affine,
    grid_spacing,
    is_aligned,
)
from pipelines.resample import IDENTITY, Mapping, resample_nearest, resample_scan
from pipelines.scans.checks import EXPORT_AGAIN
from pipelines.scans.scan import Scan, read_scan
from pipelines.voxel_codec import pack, unpack

__all__ = ["VOLUME_SPECS", "VolumeSpec"]

DARK_HU = -20
DARK_FRACTION = 0.02
MODALITIES = ("ct", "mr", "pt")
MR_PERCENTILES = (0.5, 99.5)
METADATA_KEY = "photon"
DIGEST_BYTES = 32
BLOCK_VALUES = 1 << 19
MAKE_AGAIN = "Run `photon preprocess` again."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Volume:
    """A scan on the grid of a spec.

    Args:
        voxels: int16 [Z, Y, X], clipped to the spec's window: HU for CT; for MR its percentiles 0.5 to
            99.5 are mapped onto the window.
        affine: float64 [4, 4], grid index (X, Y, Z) to world RAS millimetres.
        metadata: JSON values: source_sha256, shape, spacing_mm and orientation of the scan, modality,
            modality_source (declared, header or inferred), min_hu and max_hu of the scan before clipping, notes.
    """

    voxels: np.ndarray
    affine: np.ndarray
    spec: VolumeSpec
    metadata: dict[str, Any]


def resample(scan: Scan, spec: VolumeSpec, modality: str = "auto") -> Volume:
    """Put a scan on the grid of ``spec``.

    Args:
        modality: ``ct`` (values are HU), ``mr`` or ``pt`` (their 0.5 and 99.5 percentiles are mapped onto the window),
            or ``auto``: what the file says, else :func:`infer_modality`.

    Raises:
        PhotonError: ``MODALITY_UNKNOWN`` for another word, ``SCAN_CONSTANT`` for a scan without contrast.
    """
    if modality not in ("auto", *MODALITIES):
        fact = f"'{modality}' is not auto, {', '.join(MODALITIES)}."
        raise PhotonError("MODALITY_UNKNOWN", scan.path, fact, "Use one of these.")
    source = "declared" if modality != "auto" else "inferred" if scan.modality is None else "header"
    kind = {"declared": modality, "header": scan.modality or ""}.get(source) or infer_modality(scan.array)
    notes = list(scan.notes)
    frame = _frame(scan, spec, kind, notes)
    mapping = IDENTITY if kind == "ct" else _percentile_mapping(scan, spec)
    voxels = resample_scan(scan.array, scan.affine, frame, spec, mapping)
    return Volume(
        voxels=voxels,
        affine=grid_affine(frame, spec),
        spec=spec,
        metadata={
            "source_sha256": scan.sha256,
            "shape": [int(n) for n in scan.array.shape],
            "spacing_mm": list(scan.spacing_mm),
            "orientation": scan.orientation,
            "modality": kind,
            "modality_source": source,
            "min_hu": round(min(float(block.min()) for block in _blocks(scan.array)), 3),
            "max_hu": round(max(float(block.max()) for block in _blocks(scan.array)), 3),
            "notes": notes,
        },
    )


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
    scan = read_scan(path)
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


def voxels_sha256(volume: Volume) -> str:
    """Checksum of the voxels: int16, little endian, X fastest."""
    return hashlib.sha256(np.ascontiguousarray(volume.voxels, dtype="<i2").data).hexdigest()


def write_volume(volume: Volume, path: Path) -> str:
    """Write a volume atomically; the same volume gives the same bytes. Returns the sha256 of the voxels.

    The file is a safetensors file of compressed slabs; its last 32 bytes are the sha256 of all before them.
    """
    with ThreadPoolExecutor(1) as beside:  # neither holds the interpreter's lock
        hashed = beside.submit(voxels_sha256, volume)
        packed = pack(volume.voxels)
    digest = hashed.result()
    # One key alone: safetensors writes several metadata keys in random order.
    text = json.dumps(
        {
            "spec": volume.spec.as_dict(),
            "spec_digest": volume.spec.digest(),
            "affine": volume.affine.tolist(),
            "voxels_sha256": digest,
            "metadata": volume.metadata,
        },
        sort_keys=True,
        allow_nan=False,
    )
    slabs = {f"slab{number:04d}": np.frombuffer(slab, np.uint8) for number, slab in enumerate(packed)}
    # Tensors of one type are laid out by name: this one comes last.
    tensors = {**slabs, "whole_sha256": np.zeros(DIGEST_BYTES, np.uint8)}
    content = memoryview(save_safetensors(tensors, {METADATA_KEY: text}))[:-DIGEST_BYTES]
    write_bytes(path, content, hashlib.sha256(content).digest())
    return digest


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeRecord:
    """What a volume file says about its voxels: fields as of :class:`Volume`, and their checksum."""

    spec: VolumeSpec
    affine: np.ndarray
    metadata: dict[str, Any]
    voxels_sha256: str


def read_volume(path: Path, spec: VolumeSpec | None = None) -> Volume:
    """Read a volume and check its bytes.

    Raises:
        PhotonError: ``VOLUME_MISSING``; ``VOLUME_CORRUPT`` when any byte of the file is not as it was written;
            ``VOLUME_SPEC_MISMATCH`` when ``spec`` is given and the volume has another.
    """
    record, packed = _open_volume(path, spec)
    try:
        voxels = unpack(packed, record.spec.shape)
    except ValueError as error:
        raise PhotonError("VOLUME_CORRUPT", path, f"it is not a volume file ({error}).", MAKE_AGAIN) from error
    return Volume(voxels=voxels, affine=record.affine, spec=record.spec, metadata=record.metadata)


def read_volume_record(path: Path, spec: VolumeSpec | None = None) -> VolumeRecord:
    """Check the bytes of a volume as :func:`read_volume` does, with the same errors, but unpack nothing."""
    return _open_volume(path, spec)[0]


def _open_volume(path: Path, spec: VolumeSpec | None) -> tuple[VolumeRecord, list[memoryview]]:
    """Record and packed slabs of a volume file, every byte of which has been checked."""
    try:
        content = memoryview(path.read_bytes())
        if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
            raise ValueError("its bytes do not have the checksum at its end")
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(bytes(content[8:begin]))
        stored = json.loads(header["__metadata__"][METADATA_KEY])
        ends = [header[name]["data_offsets"] for name in sorted(header) if name.startswith("slab")]
        record = VolumeRecord(
            spec=VolumeSpec.from_dict(stored["spec"]),
            affine=np.array(stored["affine"], np.float64),
            metadata=stored["metadata"],
            voxels_sha256=stored["voxels_sha256"],
        )
    except FileNotFoundError as error:
        raise PhotonError("VOLUME_MISSING", path, "the file does not exist.", MAKE_AGAIN) from error
    except (ValueError, KeyError, TypeError, PhotonError) as error:
        raise PhotonError("VOLUME_CORRUPT", path, f"it is not a whole volume file ({error}).", MAKE_AGAIN) from error
    if spec is not None and spec != record.spec:
        fact = f"it was made for the spec {record.spec.digest()} ({record.spec.as_dict()}), wanted is {spec.digest()}."
        raise PhotonError("VOLUME_SPEC_MISMATCH", path, fact, MAKE_AGAIN)
    return record, [content[begin + first : begin + last] for first, last in ends]


def _percentile_mapping(scan: Scan, spec: VolumeSpec) -> Mapping:
    first, last = percentiles(scan.array)
    if first == last:
        raise PhotonError("SCAN_CONSTANT", scan.path, f"nearly every voxel is {first:g}.", EXPORT_AGAIN)
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


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    """All values of an array, in pieces [n] that stay in the processor's cache while they are worked on."""
    flat = array.reshape(-1, order="A" if array.flags.f_contiguous else "C")
    return (flat[start : start + BLOCK_VALUES] for start in range(0, flat.size, BLOCK_VALUES))
