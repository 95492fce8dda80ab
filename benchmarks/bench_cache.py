"""How to store preprocessed volumes: size, time to write and to read, whole and a crop, and what the checksum costs.

The volumes are a generated CT, and with --scans the largest .nii.gz of a folder, on the 364 x 364 x 364 grid of 1 mm.
Every format is written to disk and synced, and read back from the memory in which the system keeps files; one thread.
The sha256 of what is stored is timed by itself; a verified read costs both. blosc2's own arrays and zarr are measured
where they are installed (`pip install '.[bench]'`).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import blosc

sys.path.insert(0, str(Path(__file__).parent))
from bench_volumes import real_scans
from common import best_of, write_results
from volume_files import write_generated_scan

from pipelines.grids import PATCH, VOLUME_SPECS
from pipelines.scans.scan import read_scan
from pipelines.volumes import Volume, read_volume, resample, write_volume

CROP = 140
REPEATS = 5
BLOCK_KIB = (128,)
CODECS = {"lz4": (1, 5, 9), "zstd": (1, 3)}
CHUNK, BLOCK = 128, 32
LIBRARIES = ("numcodecs", "blosc2", "zarr")


class Raw:
    """The voxels as they are, in one file of safetensors or numpy."""

    def __init__(self, suffix: str) -> None:
        self.suffix = suffix

    def write(self, voxels: np.ndarray, path: Path) -> None:
        if self.suffix == "npy":
            np.save(path.with_suffix(".npy"), voxels)
            return
        from safetensors.numpy import save_file

        save_file({"voxels": voxels}, path)

    def read(self, path: Path, crop: tuple[slice, ...]) -> np.ndarray:
        if self.suffix == "npy":
            return np.array(np.load(path, mmap_mode="r")[crop])
        from safetensors import safe_open

        with safe_open(path, "numpy") as opened:
            return np.array(opened.get_slice("voxels")[crop])


class Slabs:
    """One compressed piece for every 14 planes, one after another."""

    def __init__(self, codec: str, level: int, filter: str, block_kib: int) -> None:
        blosc.use_threads = False
        self.options = (codec.encode(), level, getattr(blosc, filter.upper()), block_kib << 10)

    def write(self, voxels: np.ndarray, path: Path) -> None:
        packed = [
            blosc.compress(voxels[start : start + PATCH], *self.options) for start in range(0, len(voxels), PATCH)
        ]
        sizes = np.array([len(voxels), *voxels.shape[1:], *map(len, packed)], "<i8")
        path.write_bytes(len(packed).to_bytes(8, "little") + sizes.tobytes() + b"".join(packed))

    def read(self, path: Path, crop: tuple[slice, ...]) -> np.ndarray:
        content = memoryview(path.read_bytes())
        count = int.from_bytes(content[:8], "little")
        depth, height, width, *lengths = np.frombuffer(content[8 : 32 + 8 * count], "<i8").tolist()
        begin, end, _ = crop[0].indices(depth)
        first, last = begin // PATCH, -(-end // PATCH)
        offset = 32 + 8 * count + sum(lengths[:first])
        voxels = np.empty(((last - first) * PATCH, height, width), np.int16)
        for number in range(first, last):
            place = voxels[(number - first) * PATCH :][:PATCH]
            blosc.decompress(content[offset : offset + lengths[number]], place)
            offset += lengths[number]
        return voxels[begin - first * PATCH : end - first * PATCH][(slice(None), *crop[1:])]


class Blosc2Array:
    """blosc2's own file, in chunks and blocks of cubes."""

    def write(self, voxels: np.ndarray, path: Path) -> None:
        import blosc2

        options = {"codec": blosc2.Codec.LZ4, "clevel": 5, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}
        blosc2.asarray(voxels, urlpath=str(path), mode="w", cparams=options, chunks=(CHUNK,) * 3, blocks=(BLOCK,) * 3)

    def read(self, path: Path, crop: tuple[slice, ...]) -> np.ndarray:
        import blosc2

        return blosc2.open(str(path), mode="r", dparams={"nthreads": 1})[crop]


class Zarr:
    """zarr 3, a folder of one file a chunk."""

    def write(self, voxels: np.ndarray, path: Path) -> None:
        import zarr
        from zarr.codecs import BloscCodec

        codec = BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=2)
        array = zarr.create_array(
            str(path), shape=voxels.shape, dtype="int16", chunks=(64,) * 3, compressors=[codec], overwrite=True
        )
        array[:] = voxels

    def read(self, path: Path, crop: tuple[slice, ...]) -> np.ndarray:
        import zarr

        return np.asarray(zarr.open_array(str(path), mode="r")[crop])


def main() -> None:
    """Measure what the arguments ask for and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=Path, help="folder with real scans")
    parser.add_argument("--max-scans", type=int, default=3, help="how many of them, the largest first")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        generated = Path(folder) / "generated.nii.gz"
        write_generated_scan(generated)
        scans = [generated, *(real_scans(arguments.scans, arguments.max_scans) if arguments.scans else [])]
        content = {"libraries": {name: version(name) for name in LIBRARIES if importlib.util.find_spec(name)}}
        content["volumes"] = [measure_scan(path, Path(folder)) for path in scans]  # type: ignore[assignment]
    write_results("cache", content)


def formats() -> dict[str, Any]:
    """All formats by name."""
    found: dict[str, Any] = {"safetensors": Raw("safetensors"), "npy": Raw("npy")}
    for codec, levels in CODECS.items():
        for level in levels:
            for filter in ("shuffle", "bitshuffle"):
                for block in BLOCK_KIB:
                    found[f"slabs {codec}-{level} {filter} {block} KiB"] = Slabs(codec, level, filter, block)
    if importlib.util.find_spec("blosc2"):
        found["b2nd lz4-5 bitshuffle"] = Blosc2Array()
    if importlib.util.find_spec("zarr"):
        found["zarr lz4-5 bitshuffle"] = Zarr()
    return found


def measure_scan(path: Path, folder: Path) -> dict[str, Any]:
    """One volume in every format, and in the file that the project writes."""
    volume = resample(read_scan(path), VOLUME_SPECS["iso1mm"], "ct")
    rows = {name: measure_format(each, volume.voxels, folder) for name, each in formats().items()}
    rows["this project"] = measure_ours(volume, folder / "ours.safetensors")
    return {
        "scan": path.name,
        "voxels_mb": volume.voxels.nbytes / 1e6,
        "voxels_sha256_ms": 1000 * best_of(lambda: hashlib.sha256(volume.voxels.data).digest(), REPEATS),
        "formats": rows,
    }


def measure_format(form: Any, voxels: np.ndarray, folder: Path) -> dict[str, float]:
    """Megabytes and milliseconds of a format."""
    path = folder / (f"volume.{form.suffix}" if isinstance(form, Raw) else "volume")

    def write() -> None:
        remove(path)
        form.write(voxels, path)
        for part in files(path):
            sync(part)

    def verify() -> None:
        for part in files(path):
            hashlib.sha256(part.read_bytes()).digest()

    whole, corner = (slice(None),) * 3, tuple(slice((n - CROP) // 2, (n + CROP) // 2) for n in voxels.shape)
    write()
    for crop in (whole, corner):
        if not np.array_equal(form.read(path, crop), voxels[crop]):
            raise RuntimeError(f"{form}: other voxels came back")
    row = {
        "mb": sum(part.stat().st_size for part in files(path)) / 1e6,
        "write_ms": milliseconds(write),
        "checksum_ms": milliseconds(verify),
        "read_ms": milliseconds(lambda: form.read(path, whole)),
        "crop_ms": milliseconds(lambda: form.read(path, corner)),
    }
    remove(path)
    return row


def measure_ours(volume: Volume, path: Path) -> dict[str, float]:
    """The file of this project as it is: its write includes both checksums, its read verifies."""
    write_volume(volume, path)
    return {
        "mb": path.stat().st_size / 1e6,
        "write_ms": milliseconds(lambda: write_volume(volume, path)),
        "verified_read_ms": milliseconds(lambda: read_volume(path)),
    }


def milliseconds(function: Callable[[], object]) -> float:
    """Shortest of some runs."""
    return 1000 * best_of(function, REPEATS)


def files(path: Path) -> list[Path]:
    """The files of what was stored at a path."""
    return [part for part in path.rglob("*") if part.is_file()] if path.is_dir() else [path]


def remove(path: Path) -> None:
    """Make room for another."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


if __name__ == "__main__":
    main()
