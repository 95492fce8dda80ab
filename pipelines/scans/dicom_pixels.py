"""The stored values of one DICOM image, native or compressed, cut to the bits that hold them; and their scaling.

DICOM has no checksum: what can be proved is that the pixels are complete and that the compressed stream is of
the size that the header declares.
"""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.encaps import get_frame
from pydicom.pixels import get_decoder
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    RLELossless,
)

from photon.errors import PhotonError
from pipelines.scans.checks import check_scaling
from pipelines.scans.dicom_files import GET_AGAIN, Pixels, inflated_body
from pipelines.scans.dicom_headers import Slice

_ITEM = (0xFFFE, 0xE000)
_END_OF_ITEMS = (0xFFFE, 0xE0DD)
_SIZE_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
"""Markers of a JPEG or JPEG-LS stream that begin its description; DHT, JPG and DAC are none."""


def check_pixels(pixels: Pixels, path: Path) -> None:
    """Prove, from the header alone, that the values are integers that can be read.

    Raises:
        PhotonError: ``FORMAT_UNSUPPORTED``, ``SCAN_UNREADABLE``, ``SCAN_TRUNCATED`` or ``SCAN_TRAILING_DATA``.
    """
    allocated, stored, high = pixels.bits_allocated, pixels.bits_stored, pixels.high_bit
    if allocated not in (8, 16, 32) or (allocated == 8 and pixels.is_big_endian):
        fact = f"its pixels take {allocated} bits{', big-endian' if pixels.is_big_endian else ''}."
        raise PhotonError("FORMAT_UNSUPPORTED", path, fact, "Convert it to NIfTI.")
    if not 1 <= stored <= high + 1 <= allocated or min(pixels.rows, pixels.columns, pixels.num_frames) < 1:
        fact = (
            f"it declares {pixels.num_frames} x {pixels.rows} x {pixels.columns} pixels with {stored} bits up to "
            f"bit {high} of {allocated}."
        )
        raise PhotonError("SCAN_UNREADABLE", path, fact, GET_AGAIN)
    if pixels.length is None:
        _plugin(pixels, path)
        return
    needed = pixels.num_frames * pixels.rows * pixels.columns * allocated // 8
    if pixels.length < needed:
        fact = f"{needed} bytes of pixels are declared, the file holds {pixels.length}."
        raise PhotonError("SCAN_TRUNCATED", path, fact, GET_AGAIN)
    if pixels.length > needed + 1:  # an odd length is padded by one byte
        fact = f"{needed} bytes of pixels are declared, the file holds {pixels.length}."
        raise PhotonError("SCAN_TRAILING_DATA", path, fact, GET_AGAIN)


def pixel_bytes(content: bytes, pixels: Pixels, path: Path) -> bytes | memoryview:
    """The value of the pixel data of a whole file, not copied; compressed, all items of it.

    Raises:
        PhotonError: ``SCAN_TRUNCATED``; as :func:`dicom_files.inflated_body`.
    """
    if pixels.syntax == DeflatedExplicitVRLittleEndian:
        content = inflated_body(content, path)
    if pixels.length is not None:
        value = memoryview(content)[pixels.offset : pixels.offset + pixels.length]
        if len(value) < pixels.length:
            fact = f"it declares {pixels.length} bytes of pixels and holds {len(value)}."
            raise PhotonError("SCAN_TRUNCATED", path, fact, GET_AGAIN)
        return value
    end = pixels.offset
    while True:
        item = content[end : end + 8]
        if len(item) < 8:
            raise PhotonError("SCAN_TRUNCATED", path, "its compressed pixels end in the middle.", GET_AGAIN)
        group, element, length = struct.unpack("<HHI", item)
        end += 8
        if (group, element) == _END_OF_ITEMS:
            return content[pixels.offset : end]
        if (group, element) != _ITEM or end + length > len(content):
            raise PhotonError("SCAN_TRUNCATED", path, "its compressed pixels end in the middle.", GET_AGAIN)
        end += length


def stored_values(value: bytes | memoryview, pixels: Pixels, frame: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The values of one frame.

    Returns:
        Two integer arrays [rows, columns]: the values as they lie in the file, and as the bits that hold them
        say. They differ where other bits are set, e.g. by padding values that need more bits.

    Raises:
        PhotonError: ``PIXELS_CORRUPT``, ``SCAN_TRUNCATED`` or ``FORMAT_UNSUPPORTED``.
    """
    high = pixels.high_bit
    if pixels.length is None:
        whole = _decompressed(bytes(value), pixels, frame, path)
        if pixels.syntax in (*JPEG2000TransferSyntaxes, *JPEGLSTransferSyntaxes):
            return whole, whole  # the stream itself says how many bits hold its values
        if pixels.syntax != RLELossless:
            high = pixels.bits_stored - 1  # JPEG stores numbers, RLE the words that hold them
    else:
        kind = f"{'>' if pixels.is_big_endian else '<'}{'i' if pixels.is_signed else 'u'}{pixels.bits_allocated // 8}"
        size = pixels.rows * pixels.columns
        whole = np.frombuffer(value, kind, size, frame * size * pixels.bits_allocated // 8)
        whole = whole.reshape(pixels.rows, pixels.columns)
    num_bits = 8 * whole.itemsize
    if pixels.bits_stored >= num_bits:
        return whole, whole
    whole = whole.astype(whole.dtype.newbyteorder("="))
    return whole, whole << (num_bits - 1 - high) >> (num_bits - pixels.bits_stored)


def stored_range(pixels: Pixels) -> tuple[int, int]:
    """Lowest and highest value that the bits of a pixel can hold."""
    low = -(1 << (pixels.bits_stored - 1)) if pixels.is_signed else 0
    return low, low + (1 << pixels.bits_stored) - 1


def scaling_of(image: Slice, subject: Path) -> tuple[float, float]:
    """Slope and intercept; 1 and 0 where MR has none, which CT and PET must have.

    Raises:
        PhotonError: ``SCALING_INVALID``.
    """
    slope, intercept = image.slope, image.intercept
    if slope is None and intercept is None and image.modality == "MR":
        return 1.0, 0.0
    if slope is None or intercept is None:
        fact = "slope or intercept is absent: what its values mean is not known."
        raise PhotonError("SCALING_INVALID", subject, fact, GET_AGAIN)
    check_scaling(slope, intercept, subject)
    return slope, intercept


def _decompressed(value: bytes, pixels: Pixels, frame: int, path: Path) -> np.ndarray:
    plugin = _plugin(pixels, path)
    description: dict[str, Any] = {
        "rows": pixels.rows,
        "columns": pixels.columns,
        "number_of_frames": pixels.num_frames,
        "samples_per_pixel": 1,
        "photometric_interpretation": pixels.photometric,
        "bits_allocated": pixels.bits_allocated,
        "bits_stored": pixels.bits_stored,
        "pixel_representation": int(pixels.is_signed),
        "pixel_keyword": "PixelData",
        "correct_unused_bits": False,  # padding may need them
    }
    try:
        if pixels.syntax != RLELossless:
            _check_stream(get_frame(value, frame, number_of_frames=pixels.num_frames), pixels, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            decoder = get_decoder(UID(pixels.syntax))
            values, _ = decoder.as_array(value, index=frame, raw=True, decoding_plugin=plugin, **description)
    except PhotonError:
        raise
    except Exception as error:  # every plugin raises its own
        fact = f"its compressed pixels cannot be decoded ({type(error).__name__})."
        raise PhotonError("PIXELS_CORRUPT", path, fact, GET_AGAIN) from error
    return values


def _plugin(pixels: Pixels, path: Path) -> str:
    """Name of the decoder to use."""
    syntax = UID(pixels.syntax)
    try:
        available = get_decoder(syntax).available_plugins
    except NotImplementedError:
        available = ()
    for name in ("pylibjpeg", "pydicom"):
        if name in available:
            return name
    fact = f"there is no decoder for its transfer syntax {syntax.name[:60]}."
    remedy = "Install the extra `jpeg` (pip install 'photon-volumes[jpeg]'), or store the series uncompressed."
    raise PhotonError("FORMAT_UNSUPPORTED", path, fact, remedy)


def _check_stream(stream: bytes, pixels: Pixels, path: Path) -> None:
    """Prove, before memory is taken for it, that a JPEG stream is complete, grey and of the declared size."""
    if not stream.rstrip(b"\0").endswith(b"\xff\xd9"):
        raise PhotonError("SCAN_TRUNCATED", path, "its compressed pixels end in the middle.", GET_AGAIN)
    *size, num_channels = _stream_size(stream)
    if num_channels > 1:
        fact = f"its compressed pixels have {num_channels} channels, its header says one."
        raise PhotonError("PIXELS_CORRUPT", path, fact, GET_AGAIN)
    if size != [pixels.rows, pixels.columns]:
        fact = f"its compressed pixels are {size[0]} x {size[1]}, its header says {pixels.rows} x {pixels.columns}."
        raise PhotonError("PIXELS_CORRUPT", path, fact, GET_AGAIN)


def _stream_size(stream: bytes) -> tuple[int, int, int]:
    """Rows, columns and channels that a JPEG, JPEG-LS or JPEG 2000 stream declares; zeros when it does not."""
    if stream[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000: the size comes first
        right, bottom, left, top, num_channels = struct.unpack_from(">4I16xH", stream, 8)
        return bottom - top, right - left, num_channels
    start = 2
    while start + 10 <= len(stream) and stream[start] == 0xFF:
        marker, length = stream[start + 1], int.from_bytes(stream[start + 2 : start + 4], "big")
        if marker in _SIZE_MARKERS:
            rows, columns, num_channels = struct.unpack_from(">HHB", stream, start + 5)
            return rows, columns, num_channels
        start += 2 + length
    return 0, 0, 0
