"""Copies of scans with the header that their dataset's table has for them; the voxels stay, byte for byte."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from photon.errors import PhotonError
from pipelines.datasets.base import KnownHeader
from pipelines.scans.checks import MAX_VOXELS

GZIP_LEVEL = 1
_HEADER_BYTES = 348
_BLOCK = 1 << 22
_MILLIMETRES = 2


def write_mended(source: Path, header: KnownHeader, target: Path) -> None:
    """Copy a NIfTI-1 file to ``target`` (.nii.gz) with what ``header`` knows written into its header.

    Only as many bytes are read as the file's own header declares, and the checksum of a compressed file to its end.
    Whether the result is a good scan is left to :func:`pipelines.scans.scan.read_scan`.

    Raises:
        PhotonError: ``SCAN_UNREADABLE``, ``GZIP_CORRUPT``, ``SCAN_TOO_LARGE``, ``SCAN_TRAILING_DATA``, or
            ``HEADER_MISMATCH`` when the file does not have the size that the table promises.
    """
    again = "Copy the file again from its source."
    try:
        with _opened(source) as stream:
            content = bytearray(stream.read(_HEADER_BYTES))
            num_bytes = _patch(content, header, source) - _HEADER_BYTES
            with target.open("wb") as file, gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as out:
                out.write(content)
                while num_bytes > 0 and (block := stream.read(min(num_bytes, _BLOCK))):
                    out.write(block)
                    num_bytes -= len(block)
            if stream.read(1):
                fact = "the file holds more bytes than its header declares."
                raise PhotonError("SCAN_TRAILING_DATA", source, fact, again)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise PhotonError("GZIP_CORRUPT", source, f"the compressed stream is damaged ({error}).", again) from error


def write_nominal(source: Path, target: Path) -> None:
    """Write an array file (.npy; [depth, height, width], or with a leading 1) as a scan (.nii.gz) of 1 mm voxels.

    Depth is taken to run to the head, height to the back and width to the patient's left.

    Raises:
        PhotonError: ``SCAN_UNREADABLE`` when it is no such array of numbers.
    """
    from pipelines.scans.nifti import write_scan

    remedy = "Make the array again by the dataset's own preparation."
    try:
        array = np.load(source, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PhotonError("SCAN_UNREADABLE", source, f"it is no array file ({error}).", remedy) from error
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3 or array.dtype.kind not in "iuf" or min(array.shape) < 2:
        raise PhotonError("SCAN_UNREADABLE", source, f"it is {array.dtype} {array.shape}, no volume.", remedy)
    kept = np.uint8 if array.dtype == np.uint8 else np.float32
    write_scan(array.transpose(2, 1, 0).astype(kept), np.diag([-1.0, -1.0, 1.0, 1.0]), target)


def _opened(source: Path) -> IO[bytes]:
    try:
        with source.open("rb") as file:
            is_gzip = file.read(2) == b"\x1f\x8b"
        return gzip.open(source) if is_gzip else source.open("rb")  # type: ignore[return-value]
    except OSError as error:
        fact = f"the file cannot be opened ({error.strerror})."
        raise PhotonError("SCAN_UNREADABLE", source, fact, "Check its permissions.") from error


def _patch(content: bytearray, header: KnownHeader, source: Path) -> int:
    """Write what is known into a NIfTI-1 header; returns how many bytes the whole file has by that header."""
    order = {b"\x5c\x01\x00\x00": "<", b"\x00\x00\x01\x5c": ">"}.get(bytes(content[:4]))
    if len(content) < _HEADER_BYTES or order is None:
        raise PhotonError("SCAN_UNREADABLE", source, "it does not begin with a NIfTI-1 header.", "Check the file.")
    dimensions = struct.unpack_from(f"{order}8h", content, 40)
    shape = dimensions[1:4]
    others = dimensions[4 : 1 + max(3, min(dimensions[0], 7))]
    if header.shape is not None and shape != header.shape:
        fact = f"its size is {shape}, {header.source} says (columns, rows, slices) {header.shape}."
        remedy = "Get scan and table from the same release; a transposed scan cannot be given its table's geometry."
        raise PhotonError("HEADER_MISMATCH", source, fact, remedy)
    num_voxels = math.prod(shape) * math.prod(max(count, 1) for count in others)
    if not 0 < num_voxels <= MAX_VOXELS:
        fact = f"its header declares {num_voxels} voxels."
        raise PhotonError("SCAN_TOO_LARGE", source, fact, "Crop it or reduce its resolution.")
    if header.affine is not None:
        affine = np.array(header.affine)
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        struct.pack_into(f"{order}4f", content, 76, 1.0, *spacing)
        content[123] = content[123] & ~7 | _MILLIMETRES
        struct.pack_into(f"{order}2h", content, 252, 0, 1)  # no quaternion; the matrix is in scanner coordinates
        struct.pack_into(f"{order}12f", content, 280, *affine[:3].ravel())
    if header.slope is not None and header.intercept is not None:
        struct.pack_into(f"{order}2f", content, 112, header.slope, header.intercept)
    (bits,) = struct.unpack_from(f"{order}h", content, 72)
    (offset,) = struct.unpack_from(f"{order}f", content, 108)
    if not (math.isfinite(offset) and _HEADER_BYTES <= offset <= 1 << 24 and 0 < bits <= 128):
        fact = f"its header has voxels of {bits} bits at byte {offset:g}."
        raise PhotonError("SCAN_UNREADABLE", source, fact, "Copy the file again from its source.")
    return int(offset) + num_voxels * (bits // 8)
