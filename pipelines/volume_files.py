"""Volumes on disk: one file each, every byte of which is checked when it is read.

A file is a safetensors file of compressed slabs with JSON under one key of its header; its last 32 bytes are the sha256
of the slabs and then the header: so one hash checks every byte, its state behind the slabs names the voxels, and a
file is written as its slabs come, header last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from photon.errors import PhotonError
from pipelines.files import atomic_path
from pipelines.grids import SlabMaker, VolumeSpec
from pipelines.voxel_codec import MAX_PACKED_BYTES, num_slabs_of, pack_slabs, slabs_of, unpack

METADATA_KEY = "photon"
FORM = 3
"""Of the files: another codec or layout is another number, and a file of another one is made again."""
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
    """What a volume file says about its voxels: fields as of :class:`Volume`, and the sha256 of the packed slabs.

    The same voxels have the same one, whatever the metadata, as long as the codec is the same.
    """

    spec: VolumeSpec
    affine: np.ndarray
    metadata: dict[str, Any]
    slabs_sha256: str


def write_volume(volume: Volume, path: Path) -> str:
    """Write a volume atomically; the same volume gives the same bytes. Returns the sha256 of its packed voxels."""
    slabs = slabs_of(np.ascontiguousarray(volume.voxels, dtype="<i2"))
    return write_slabs([slabs.__getitem__], volume.affine, volume.spec, volume.metadata, path).slabs_sha256


def write_slabs(
    makers: Sequence[SlabMaker], affine: np.ndarray, spec: VolumeSpec, metadata: dict[str, Any], path: Path
) -> VolumeRecord:
    """As :func:`write_volume`, from slabs of 14 planes that are made and packed in as many threads as there are
    ``makers`` (:func:`pack_slabs`); neither they nor what they are packed into are held longer than it takes."""
    content = {
        "form": FORM,
        "spec": spec.as_dict(),
        "spec_digest": spec.digest(),
        "affine": affine.tolist(),
        "metadata": metadata,
    }
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    num_slabs = num_slabs_of(spec.shape)
    room = len(_header([MAX_PACKED_BYTES] * num_slabs, text))
    digest, sizes = hashlib.sha256(), []
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        stream.seek(room)
        for packed in pack_slabs(makers, num_slabs):
            digest.update(packed)
            sizes.append(stream.write(packed))
        slabs_sha256 = digest.hexdigest()
        header = _header(sizes, text, room)
        digest.update(header)
        stream.write(digest.digest())
        stream.seek(0)
        stream.write(header)
    return VolumeRecord(spec=spec, affine=affine, metadata=metadata, slabs_sha256=slabs_sha256)


def _header(sizes: Sequence[int], text: str, room: int = 0) -> bytes:
    """The beginning of a safetensors file of slabs of these sizes and the checksum: its length and JSON, which blanks
    extend to `room` bytes."""
    header: dict[str, Any] = {"__metadata__": {METADATA_KEY: text}}
    end = 0
    named = {f"slab{number:04d}": size for number, size in enumerate(sizes)}
    for name, size in (named | {"whole_sha256": DIGEST_BYTES}).items():
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * max(room - 8 - len(content), -len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def read_volume(path: Path, spec: VolumeSpec | None = None) -> Volume:
    """Read a volume and check its bytes.

    Raises:
        PhotonError: ``VOLUME_MISSING``; ``VOLUME_UNREADABLE`` when the system refuses; ``VOLUME_CORRUPT`` when any
            byte of the file is not as it was written; ``VOLUME_SPEC_MISMATCH`` when ``spec`` is given and the volume
            has another.
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


def is_foreign(path: Path) -> bool:
    """Whether a file is a safetensors file that is no volume, such as weights; a damaged header says nothing."""
    try:
        with path.open("rb") as stream:
            header = json.loads(stream.read(min(int.from_bytes(stream.read(8), "little"), path.stat().st_size)))
        return METADATA_KEY not in header.get("__metadata__", {})
    except (OSError, ValueError, AttributeError, TypeError):
        return False


def _open_volume(path: Path, spec: VolumeSpec | None) -> tuple[VolumeRecord, list[memoryview]]:
    """Record and packed slabs of a volume file, every byte of which has been checked."""
    try:
        content = memoryview(path.read_bytes())
        begin = 8 + int.from_bytes(content[:8], "little")
        digest = hashlib.sha256(content[begin:-DIGEST_BYTES])
        slabs_sha256 = digest.hexdigest()
        digest.update(content[:begin])
        if digest.digest() != content[-DIGEST_BYTES:]:
            raise ValueError("its bytes do not have the checksum at its end, or an older version wrote it")
        header = json.loads(bytes(content[8:begin]))
        stored = json.loads(header["__metadata__"][METADATA_KEY])
        if stored.get("form") != FORM:
            raise ValueError("another version wrote it")
        ends = [header[name]["data_offsets"] for name in sorted(header) if name.startswith("slab")]
        record = VolumeRecord(
            spec=VolumeSpec.from_dict(stored["spec"]),
            affine=np.array(stored["affine"], np.float64),
            metadata=stored["metadata"],
            slabs_sha256=slabs_sha256,
        )
    except FileNotFoundError as error:
        raise PhotonError("VOLUME_MISSING", path, "the file does not exist.", MAKE_AGAIN) from error
    except OSError as error:
        fact = f"the file cannot be read ({error.strerror or error})."
        raise PhotonError("VOLUME_UNREADABLE", path, fact, "Check its permissions and the disk.") from error
    except (ValueError, KeyError, TypeError, PhotonError) as error:
        raise PhotonError("VOLUME_CORRUPT", path, f"it is not a whole volume file ({error}).", MAKE_AGAIN) from error
    if spec is not None and spec != record.spec:
        fact = f"it was made for the spec {record.spec.digest()} ({record.spec.as_dict()}), wanted is {spec.digest()}."
        raise PhotonError("VOLUME_SPEC_MISMATCH", path, fact, MAKE_AGAIN)
    return record, [content[begin + first : begin + last] for first, last in ends]
