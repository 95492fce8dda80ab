"""Volumes on disk: what was written comes back, and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from photon.errors import PhotonError
from pipelines import volume_files
from pipelines.files import write_bytes
from pipelines.grids import PATCH, SlabMaker, VolumeSpec
from pipelines.volume_files import (
    Volume,
    read_volume,
    read_volume_record,
    write_slabs,
    write_volume,
)
from pipelines.voxel_codec import pack_slabs, slabs_of, unpack

SPEC = VolumeSpec(spacing_mm=3.0, shape=(28, 28, 28), window_hu=(-1000, 1000))


def make_volume(seed: int = 0) -> Volume:
    random = np.random.default_rng(seed)
    voxels = np.full(SPEC.shape, -1000, np.int16)
    voxels[5:25, 4:20, 8:20] = random.integers(-1000, 1001, (20, 16, 12))
    affine = np.diag([-3.0, -3.0, 3.0, 1.0])
    affine[0, 3] = 0.1 + 0.2
    return Volume(voxels=voxels, affine=affine, spec=SPEC, metadata={"modality": "ct", "notes": ["é"]})


def test_a_volume_comes_back_and_is_written_the_same_twice(tmp_path: Path) -> None:
    volume = make_volume()
    digests = [write_volume(volume, tmp_path / name) for name in ("1", "2")]
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    back, record = read_volume(tmp_path / "1", SPEC), read_volume_record(tmp_path / "1", SPEC)
    assert np.array_equal(back.voxels, volume.voxels) and back.voxels.dtype == np.int16
    for found in (back, record):
        assert np.array_equal(found.affine, volume.affine)
        assert found.metadata == volume.metadata and found.spec == SPEC
    assert digests == [record.slabs_sha256] * 2
    back.voxels[0, 0, 0] = 5  # callers may work on it


def test_the_file_is_safetensors_and_smaller_than_its_voxels(tmp_path: Path) -> None:
    volume = make_volume()
    write_volume(volume, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert sorted(tensors) == ["slab0000", "slab0001", "whole_sha256"]
    assert (tmp_path / "a.safetensors").stat().st_size < volume.voxels.nbytes / 2
    first = unpack([tensors["slab0000"].tobytes()], (PATCH, 28, 28))
    assert np.array_equal(first, volume.voxels[:PATCH])


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_volume(make_volume(), path)
    content = path.read_bytes()
    random = np.random.default_rng(0)
    header = 8 + int.from_bytes(content[:8], "little")
    places = {*range(header), *range(len(content) - 64, len(content))}
    places |= set(random.integers(0, len(content), 500).tolist())
    for place in places:
        for change in (1 << int(random.integers(8)), int(random.integers(1, 256))):
            broken = bytearray(content)
            broken[place] ^= change
            path.write_bytes(broken)
            for read in (read_volume, read_volume_record):
                with pytest.raises(PhotonError, match="VOLUME_CORRUPT"):
                    read(path)


def test_every_truncation_and_every_addition_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_volume(make_volume(), path)
    content = path.read_bytes()
    lengths = [*range(64), *range(0, len(content), len(content) // 50), *range(len(content) - 40, len(content))]
    for changed in [*(content[:length] for length in lengths), content + b"\0", content + content[-32:]]:
        path.write_bytes(changed)
        with pytest.raises(PhotonError, match="VOLUME_CORRUPT"):
            read_volume(path)


def test_a_file_that_is_whole_but_no_volume_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_volume(make_volume(), path)
    content = path.read_bytes()[:-32]
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    stored = json.loads(header["__metadata__"]["photon"])

    def refused(header: object, body: bytes = content[begin:]) -> bool:
        text = json.dumps(header).encode()
        start = len(text).to_bytes(8, "little") + text
        path.write_bytes(start + body + hashlib.sha256(body + start).digest())
        try:
            read_volume(path)
        except PhotonError as error:
            return error.code == "VOLUME_CORRUPT"
        return False

    assert not refused(header)
    assert refused([]) and refused({}) and refused({"__metadata__": {"photon": "no JSON"}})
    other_spec = {"photon": json.dumps(stored | {"spec": {**stored["spec"], "shape": [42, 28, 28]}})}
    assert refused(header | {"__metadata__": other_spec})
    assert refused({name: value for name, value in header.items() if name != "slab0001"})
    swapped = header | {"slab0000": {"data_offsets": [0, 20]}}
    assert refused(swapped)
    assert refused(header, bytes(len(content) - begin))


def test_an_interrupted_write_leaves_the_old_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_volume(make_volume(0), path)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_volume(make_volume(1), path)
    monkeypatch.undo()
    assert np.array_equal(read_volume(path).voxels, make_volume(0).voxels)
    assert [item.name for item in tmp_path.iterdir()] == ["a.safetensors"]


def test_voxels_in_any_order_of_memory_or_bytes_make_the_same_file(tmp_path: Path) -> None:
    volume = make_volume()
    digest = write_volume(volume, tmp_path / "a")
    for voxels in (np.asfortranarray(volume.voxels), volume.voxels.astype(">i2")):
        assert write_volume(dataclasses.replace(volume, voxels=voxels), tmp_path / "b") == digest
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("num_makers", [1, 3])
def test_a_fault_while_slabs_come_leaves_no_file(num_makers: int, tmp_path: Path) -> None:
    def make(number: int) -> np.ndarray:
        if number:
            raise PhotonError("SCAN_CONSTANT", "scan", "a fault.", "None.")
        return make_volume().voxels[:PATCH]

    with pytest.raises(PhotonError, match="SCAN_CONSTANT"):
        write_slabs([make] * num_makers, np.eye(4), SPEC, {}, tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_makers", [1, 2, 5])
def test_threads_make_slabs_in_their_own_memory_and_the_file_is_the_same(num_makers: int, tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, shape=(14 * 9, 28, 28))
    voxels = np.random.default_rng(0).integers(-1000, 1000, spec.shape).astype("<i2")
    volume = dataclasses.replace(make_volume(), voxels=voxels, spec=spec)
    at_once = []

    def maker() -> SlabMaker:
        place, is_busy = np.empty((PATCH, *spec.shape[1:]), "<i2"), threading.Lock()

        def make(number: int) -> np.ndarray:
            assert is_busy.acquire(blocking=False)
            at_once.append(number)
            place[:] = slabs_of(voxels)[number]
            time.sleep(0.002 * (number % 3))
            is_busy.release()
            return place

        return make

    write_slabs([maker() for _ in range(num_makers)], volume.affine, spec, volume.metadata, tmp_path / "a")
    write_volume(volume, tmp_path / "b")
    assert sorted(at_once) == list(range(9))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert np.array_equal(read_volume(tmp_path / "a").voxels, voxels)


def test_the_digest_is_of_the_voxels_alone(tmp_path: Path) -> None:
    volume = make_volume()
    other = dataclasses.replace(volume, metadata={"modality": "mr", "notes": ["x"] * 2000})
    digests = {write_volume(each, tmp_path / "a") for each in (volume, other)}
    assert len(digests) == 1 and read_volume(tmp_path / "a").metadata == other.metadata
    assert write_volume(make_volume(1), tmp_path / "a") not in digests


def test_a_volume_of_an_older_version_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_volume(make_volume(), path)
    whole = path.read_bytes()[:-32]
    path.write_bytes(whole + hashlib.sha256(whole).digest())  # header first, as it used to be
    with pytest.raises(PhotonError, match="older version"):
        read_volume_record(path)


def test_a_volume_of_another_form_is_told_apart_before_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksum is right, so preprocessing would call it usable and training would stumble over it."""
    path = tmp_path / "a.safetensors"
    monkeypatch.setattr(volume_files, "FORM", 2)
    write_volume(make_volume(), path)
    monkeypatch.undo()
    with pytest.raises(PhotonError, match="VOLUME_CORRUPT.*another version"):
        read_volume_record(path)


def test_parts_are_written_one_after_another(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"one", memoryview(b"two"))
    assert (tmp_path / "a").read_bytes() == b"onetwo"


def pack(voxels: np.ndarray) -> list[bytes]:
    slabs = slabs_of(voxels)
    return list(pack_slabs([slabs.__getitem__], len(slabs)))


@pytest.mark.parametrize("planes", [1, 14, 15, 40])
def test_slabs_hold_any_number_of_planes(planes: int) -> None:
    voxels = np.random.default_rng(0).integers(-32768, 32768, (planes, 5, 7)).astype(np.int16)
    packed = pack(voxels)
    assert len(packed) == -(-planes // PATCH)
    assert np.array_equal(unpack(packed, voxels.shape), voxels)
    with pytest.raises(ValueError, match="slab"):
        unpack(packed[:-1], voxels.shape)
    other = pack(voxels[:, 1:].copy())
    cut = [packed[0][:length] for length in (0, 3, 20, len(packed[0]) - 1)]
    # What the header says is believed by the library: 0 voxels, or more bytes than there are.
    lies = [packed[0][:place] + bytes(4) + packed[0][place + 4 :] for place in (4, 12)]
    for first in (*cut, *lies, packed[0] + b"!", other[0]):
        with pytest.raises(ValueError, match="bytes for"):
            unpack([first, *packed[1:]], voxels.shape)


def test_damage_inside_a_slab_never_ends_the_process() -> None:
    """A file's hash finds it before a slab is unpacked; without the hash it may give wrong voxels or an error."""
    voxels = np.random.default_rng(0).integers(0, 300, (14, 40, 40)).astype(np.int16)
    (packed,) = pack(voxels)
    num_refused = 0
    for place in range(len(packed)):
        damaged = bytearray(packed)
        damaged[place] ^= 0xFF
        try:
            unpack([bytes(damaged)], voxels.shape)
        except ValueError:
            num_refused += 1
    assert num_refused > 20
