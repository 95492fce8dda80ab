"""What is in a DICOM file: the elements of its header that matter here, and where its pixels lie.

Only the elements named here are read; those about the patient (group 0010), dates and institutions are not.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset, read_file_meta_info
from pydicom.tag import BaseTag, Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian

from photon.errors import PhotonError
from pipelines.scans.scan import PREAMBLE

MAX_INFLATED = 1 << 28
"""Bytes that a file of the deflated transfer syntax may expand to."""

GET_AGAIN = "Export the series again from its source."

FIRST_BYTES = 1024
_PIXEL_DATA = 0x7FE00010
_UNDEFINED = 0xFFFFFFFF
_ENDIAN: dict[str, Literal["little", "big"]] = {"<": "little", ">": "big"}
_LONG_LENGTH = (b"OB", b"OW", b"OF", b"OD", b"UN")
_KEYWORDS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "SeriesNumber",
    "ImageType",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SpacingBetweenSlices",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "PixelPaddingValue",
    "PixelPaddingRangeLimit",
    "RescaleSlope",
    "RescaleIntercept",
    "RescaleType",
    "ModalityLUTSequence",
    "Units",
    "LossyImageCompression",
    "AcquisitionNumber",
    "TemporalPositionIdentifier",
    "EchoTime",
    "InversionTime",
    "TriggerTime",
    "DiffusionBValue",
    "FrameReferenceTime",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
)

_TAGS = {keyword: Tag(keyword) for keyword in _KEYWORDS}

pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE  # what matters is checked here
logging.getLogger("pydicom").setLevel(logging.CRITICAL)  # its warnings quote values of the file


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pixels:
    """How and where a file stores its pixels.

    Args:
        offset: byte at which the value begins, in the file or, where that is deflated, in what it expands to.
        length: bytes of the value; None when the pixels are compressed.
    """

    syntax: str
    offset: int
    length: int | None
    rows: int
    columns: int
    num_frames: int
    samples: int
    photometric: str
    bits_allocated: int
    bits_stored: int
    high_bit: int
    is_signed: bool
    is_big_endian: bool


def inflated_body(content: bytes, path: Path) -> bytes:
    """The data set of a file of the deflated transfer syntax, expanded.

    Raises:
        PhotonError: ``SCAN_TRUNCATED``, ``SCAN_UNREADABLE`` or ``SCAN_TOO_LARGE``.
    """
    meta_length = int.from_bytes(content[PREAMBLE + 12 : PREAMBLE + 16], "little")  # the first element's value
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        body = engine.decompress(content[PREAMBLE + 16 + meta_length :], MAX_INFLATED + 1)
    except zlib.error as error:
        raise PhotonError("SCAN_UNREADABLE", path, f"its deflated data are damaged ({error}).", GET_AGAIN) from error
    if len(body) > MAX_INFLATED:
        fact = f"its deflated data expand to more than {MAX_INFLATED} bytes."
        raise PhotonError("SCAN_TOO_LARGE", path, fact, "Store the series without the deflated transfer syntax.")
    if not engine.eof:
        raise PhotonError("SCAN_TRUNCATED", path, "its deflated data end in the middle.", GET_AGAIN)
    return body


def parsed(stream: BinaryIO, first: bytes, path: Path) -> tuple[Dataset, BinaryIO]:
    """Header and the stream it was read from, which stands where the pixels begin or at its end."""
    stream.seek(0)
    if DeflatedExplicitVRLittleEndian.encode() not in first:
        return pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=list(_TAGS.values())), stream
    # pydicom would expand such a file without a limit.
    body = io.BytesIO(inflated_body(stream.read(), path))
    header = read_dataset(body, False, True, stop_when=_is_pixel_group, specific_tags=list(_TAGS.values()))
    header.file_meta = read_file_meta_info(path)
    return header, body


def located_pixels(header: Dataset, body: BinaryIO, path: Path) -> tuple[Pixels | None, PhotonError | None]:
    """Where the pixels lie, and what is wrong with that."""
    is_implicit, is_little_endian = header.original_encoding
    order = "<" if is_little_endian else ">"
    start, size = body.tell(), body.seek(0, io.SEEK_END)
    body.seek(start)
    element = body.read(12)
    if len(element) < 8:
        fact = "it has no pixel data, or ends before them."
        return None, PhotonError("PIXELS_MISSING", path, fact, "Give the images of the series, complete.")
    tag = (int.from_bytes(element[:2], _ENDIAN[order]) << 16) + int.from_bytes(element[2:4], _ENDIAN[order])
    if tag != _PIXEL_DATA:
        fact = f"its pixels are in the element {tag >> 16:04X},{tag & 0xFFFF:04X}; integers are needed."
        return None, PhotonError("FORMAT_UNSUPPORTED", path, fact, "Convert it to NIfTI.")
    is_long = not is_implicit and element[4:6] in _LONG_LENGTH
    offset = start + (12 if is_long else 8)
    (length,) = struct.unpack(order + "I", element[8:12] if is_long else element[4:8])
    try:
        bits_allocated = _count(header, "BitsAllocated")
        bits_stored = _count(header, "BitsStored", bits_allocated)
        pixels = Pixels(
            syntax=str(header.file_meta.get("TransferSyntaxUID", "")),
            offset=offset,
            length=None if length == _UNDEFINED else length,
            rows=_count(header, "Rows"),
            columns=_count(header, "Columns"),
            num_frames=_count(header, "NumberOfFrames", 1),
            samples=_count(header, "SamplesPerPixel", 1),
            photometric=text(header, "PhotometricInterpretation"),
            bits_allocated=bits_allocated,
            bits_stored=bits_stored,
            high_bit=_count(header, "HighBit", bits_stored - 1),
            is_signed=_count(header, "PixelRepresentation", 0) == 1,
            is_big_endian=not is_little_endian,
        )
    except (TypeError, ValueError) as error:
        fact = f"the description of its pixels is incomplete or damaged ({type(error).__name__})."
        return None, PhotonError("SCAN_UNREADABLE", path, fact, GET_AGAIN)
    fault = None
    if pixels.length is not None and offset + pixels.length > size:
        fact = f"it declares {pixels.length} bytes of pixels and holds {size - offset}."
        fault = PhotonError("SCAN_TRUNCATED", path, fact, GET_AGAIN)
    return pixels, fault


def value_of(dataset: Dataset, keyword: str) -> Any:
    """The value of an element, None when absent."""
    element = dataset.get(_TAGS.get(keyword) or Tag(keyword))  # by tag: much faster than by keyword
    return None if element is None else element.value


def text(dataset: Dataset, keyword: str) -> str:
    """A value as text, ``""`` when absent."""
    value = value_of(dataset, keyword)
    return "" if value is None else str(value).strip(" \0")


def number(dataset: Dataset, keyword: str) -> float | None:
    """A number, None when it is absent, NaN when it is there and is none."""
    values = numbers(dataset, keyword, 1)
    return None if values is None else values[0]


def whole_number(dataset: Dataset, keyword: str) -> int:
    """A whole number that only names something; 0 when it is none."""
    value = number(dataset, keyword)
    return int(value) if value is not None and math.isfinite(value) else 0


def numbers(dataset: Dataset, keyword: str, count: int) -> tuple[float, ...] | None:
    """So many numbers; None when the element is absent or empty, NaN when it holds anything else."""
    try:
        values = listed(value_of(dataset, keyword))
        if not values:
            return None
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        return (math.nan,) * count
    return numbers if len(numbers) == count else (math.nan,) * count


def first_item(dataset: Dataset, sequence: str) -> Dataset:
    """The only item of a sequence, an empty one when it is absent."""
    items = value_of(dataset, sequence) or []
    return items[0] if len(items) else Dataset()


def _count(dataset: Dataset, keyword: str, otherwise: int | None = None) -> int:
    """A whole number; ``otherwise`` when it is absent. Raises TypeError or ValueError when it is none."""
    value = value_of(dataset, keyword)
    return int(otherwise if value is None and otherwise is not None else value)


def _is_pixel_group(tag: BaseTag, vr: str | None, length: int) -> bool:
    return tag >> 16 == 0x7FE0


def listed(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else [value]
