"""Volumes on disk: one file each, every byte of which is checked when it is read.

A file is a safetensors file of compressed slabs with JSON under one key of its header; its last 32 bytes are the sha256
of all before them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from photon.errors import PhotonError
from pipelines.files import write_bytes
from pipelines.grids import VolumeSpec
from pipelines.voxel_codec import pack_slab, slabs_of, unpack

METADATA_KEY = "photon"
DIGEST_BYTES = 32
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class VolumeRecord:
    """What a volume file says about its voxels: fields as of :class:`Volume`, and their checksum."""

    spec: VolumeSpec
    affine: np.ndarray
    metadata: dict[str, Any]
    voxels_sha256: str


def voxels_sha256(volume: Volume) -> str:
    """Checksum of the voxels: int16, little endian, X fastest."""
    return hashlib.sha256(np.ascontiguousarray(volume.voxels, dtype="<i2").data).hexdigest()


def write_volume(volume: Volume, path: Path) -> str:
    """Write a volume atomically; the same volume gives the same bytes. Returns the sha256 of the voxels."""
    slabs = slabs_of(np.ascontiguousarray(volume.voxels, dtype="<i2"))
    return write_slabs(slabs, volume.affine, volume.spec, volume.metadata, path).voxels_sha256


def write_slabs(
    slabs: Iterable[np.ndarray], affine: np.ndarray, spec: VolumeSpec, metadata: dict[str, Any], path: Path
) -> VolumeRecord:
    """As :func:`write_volume` for voxels that come slab by slab (:func:`pipelines.voxel_codec.slabs_of`)."""
    packed, digest = _packed(slabs)
    text = json.dumps(
        {
            "spec": spec.as_dict(),
            "spec_digest": spec.digest(),
            "affine": affine.tolist(),
            "voxels_sha256": digest,
            "metadata": metadata,
        },
        sort_keys=True,
        allow_nan=False,
    )
    write_bytes(path, *_with_digest([_header(packed, text), *packed]))
    return VolumeRecord(spec=spec, affine=affine, metadata=metadata, voxels_sha256=digest)


def _packed(slabs: Iterable[np.ndarray]) -> tuple[list[bytes], str]:
    """Compressed slabs, and the sha256 of all their voxels, which another thread makes meanwhile."""
    packed, digest = [], hashlib.sha256()
    hashed: Future[None] | None = None
    with ThreadPoolExecutor(1) as beside:
        for slab in slabs:
            if hashed:
                hashed.result()  # so that no more than two slabs wait
            hashed = beside.submit(digest.update, slab.data)
            packed.append(pack_slab(slab))
    return packed, digest.hexdigest()


def _header(packed: list[bytes], text: str) -> bytes:
    """The beginning of a safetensors file of these slabs and the checksum: its length and JSON."""
    sizes = {f"slab{number:04d}": len(slab) for number, slab in enumerate(packed)} | {"whole_sha256": DIGEST_BYTES}
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    end = 0
    for name, size in sizes.items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _with_digest(parts: list[bytes]) -> list[bytes]:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return [*parts, digest.digest()]


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
