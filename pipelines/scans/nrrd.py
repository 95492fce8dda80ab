"""NRRD: ``.nrrd``, and ``.nhdr`` with its data file. The only module that knows pynrrd, which reads the header;
the voxels are read here, since pynrrd takes a compressed file without its checksum."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nrrd
import numpy as np

from photon.errors import PhotonError
from pipelines.scans.checks import (
    EXPORT_AGAIN,
    MAX_SPACING_MISMATCH,
    MAX_VOXELS,
    bad_affine,
    check_grid,
    check_matrix,
    scaled,
    shown,
    unreadable,
    unsupported,
)
from pipelines.scans.detached import data_file
from pipelines.scans.scan import Scan, make_scan
from pipelines.scans.streams import Encoding, ScanStream

MAX_HEADER_LINES = 10_000
MAX_LINE = 1 << 16

_TYPE_NAMES = {
    "i1": "signed char,int8,int8_t",
    "u1": "uchar,unsigned char,uint8,uint8_t",
    "i2": "short,short int,signed short,signed short int,int16,int16_t",
    "u2": "ushort,unsigned short,unsigned short int,uint16,uint16_t",
    "i4": "int,signed int,int32,int32_t",
    "u4": "uint,unsigned int,uint32,uint32_t",
    "i8": "longlong,long long,long long int,signed long long,signed long long int,int64,int64_t",
    "u8": "ulonglong,unsigned long long,unsigned long long int,uint64,uint64_t",
    "f4": "float",
    "f8": "double",
}
_DTYPES = {name: dtype for dtype, names in _TYPE_NAMES.items() for name in names.split(",")}
_ENCODINGS: dict[str, Encoding] = {"raw": "plain", "gzip": "gzip", "gz": "gzip"}
_TO_RAS = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
}
_SPATIAL_KINDS = ("domain", "space", "???", "none")
_UNIT_MM = {"mm": 1.0, "millimeter": 1.0, "millimeters": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "µm": 0.001}


def read_nrrd(path: Path, *, max_voxels: int = MAX_VOXELS, is_labels: bool = False) -> Scan:
    """Read an NRRD file and the data file that it names.

    Raises:
        PhotonError: as :func:`pipelines.scans.scan.read_scan`.
    """
    notes: list[str] = []
    with ScanStream(path) as stream:
        fields = _read_fields(stream)
        shape, dtype = _grid(fields, path, max_voxels)
        affine = _affine(fields, path, notes)
        name = fields.get("data file")
        if name is None:
            raw, sha256 = _read_voxels(stream, fields, dtype, math.prod(shape))
        else:
            voxels_path = data_file(path, name)
            stream.skip(stream.bytes_left())
            with ScanStream(voxels_path, stream.digest) as data:
                raw, sha256 = _read_voxels(data, fields, dtype, math.prod(shape))
    values, extent, value_notes = scaled(raw, 1.0, 0.0, path, is_labels=is_labels)
    array, notes = values.reshape(shape, order="F"), [*notes, *value_notes]
    return make_scan(array, affine, path=path, sha256=sha256, notes=tuple(notes), extent=extent)


def data_file_name(path: Path) -> str | None:
    """The data file that a header names; None where the voxels are in the file itself.

    Raises:
        PhotonError: ``SCAN_UNREADABLE`` or ``SCAN_TRUNCATED``.
    """
    with ScanStream(path) as stream:
        name = _read_fields(stream).get("data file")
    return None if name is None else str(name)


def _read_fields(stream: ScanStream) -> dict[str, Any]:
    """Header fields by lower-case name as pynrrd parses them; the stream stands behind the header's empty line."""
    lines: list[str] = []
    for _ in range(MAX_HEADER_LINES):
        line = stream.read_line(MAX_LINE)
        if not line.rstrip(b"\r\n"):
            break
        if len(line) == MAX_LINE:
            raise unreadable(stream.path, f"a line of its header is longer than {MAX_LINE} bytes.")
        text = line.decode("utf-8", "replace").rstrip()
        name, separator, value = text.partition(":")
        is_field = bool(lines) and not value.startswith("=")
        lines.append(f"{name.lower()}{separator}{value}" if is_field else text)
    else:
        raise unreadable(stream.path, f"its header has more than {MAX_HEADER_LINES} lines.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fields: dict[str, Any] = dict(nrrd.read_header(lines))
    except (nrrd.NRRDError, ValueError, TypeError, KeyError, IndexError, StopIteration) as error:
        raise unreadable(stream.path, f"its header is no NRRD header ({error}).") from error
    for old, new in (("datafile", "data file"), ("lineskip", "line skip"), ("byteskip", "byte skip")):
        if old in fields:
            fields[new] = fields.pop(old)
    missing = [name for name in ("dimension", "type", "encoding", "sizes") if name not in fields]
    if missing:
        raise unreadable(stream.path, f"its header lacks {', '.join(missing)}.")
    return fields


def _grid(fields: Mapping[str, Any], path: Path, max_voxels: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape (i, j, k) and stored dtype."""
    shape = tuple(int(n) for n in fields["sizes"])
    if fields["dimension"] != len(shape):
        raise unreadable(path, f"it declares {fields['dimension']} dimensions and {len(shape)} sizes.")
    kinds = [kind.lower() for kind in fields.get("kinds", ())]
    if any("color" in kind for kind in kinds):
        raise PhotonError("SCAN_RGB", path, "its voxels are colours.", "Give the grey scan, not a picture of it.")
    check_grid(shape, path, max_voxels)
    if len(shape) > 3 or not set(kinds) <= set(_SPATIAL_KINDS):
        fact = f"its {len(shape)} axes are of kind {kinds}; three axes in space are needed."
        raise PhotonError("SCAN_NOT_3D", path, fact, "Give one frame as a 3D scan.")
    if fields["type"] not in _DTYPES:
        raise unsupported(path, f"its voxels are of type {fields['type']}.")
    dtype = np.dtype(_DTYPES[fields["type"]])
    order = fields.get("endian", "little" if dtype.itemsize == 1 else None)
    if order not in ("little", "big"):
        raise unreadable(path, f"its byte order is {order!r}, neither little nor big.")
    return shape, dtype.newbyteorder("<" if order == "little" else ">")


def _affine(fields: Mapping[str, Any], path: Path, notes: list[str]) -> np.ndarray:
    """Matrix [4, 4], voxel to world RAS mm."""
    affine = np.eye(4)
    space = str(fields.get("space", "")).lower()
    signs = _TO_RAS.get(space)
    if signs is None:
        if space.endswith("time"):
            raise unsupported(path, f"its space is {space}.")
        notes.append(f"the header says nothing of the patient's axes (space '{space}'): LPS is assumed")
        signs = _TO_RAS["lps"]
    directions, spacings = fields.get("space directions"), fields.get("spacings")
    unit_mm = _unit_mm(fields, path, notes)
    if directions is not None:
        if np.shape(directions) != (3, 3):
            raise bad_affine(path, f"its space directions are a table of {np.shape(directions)}.")
        affine[:3, :3] = np.array(directions, np.float64).T
        if spacings is not None:
            _check_spacings(spacings, affine, path)
    else:
        affine[:3, :3] = np.diag([1 / unit_mm] * 3 if spacings is None else _spacings(spacings, path, notes))
        if spacings is None:
            notes.append("the header records no voxel spacing: 1 mm is assumed")
        # Even where the space is known, nothing says how the voxels lie in it.
        notes.append("the header records no directions: axes along those of the space are assumed")
    origin = fields.get("space origin")
    if origin is None:
        starts = np.asarray(fields.get("axis mins", 0.0), np.float64)
        if (np.isfinite(starts) & (starts != 0)).any():
            raise bad_affine(path, "its origin is given by axis mins, not in the patient's space.")
        notes.append("the header records no origin: 0 is assumed")
    elif np.shape(origin) != (3,):
        raise bad_affine(path, f"its origin has {np.size(origin)} numbers.")
    else:
        affine[:3, 3] = origin
    affine[:3] *= unit_mm
    affine = np.diag([*signs, 1.0]) @ affine
    check_matrix(affine, path, notes)
    return affine


def _spacings(spacings: Any, path: Path, notes: list[str]) -> list[float]:
    """Three voxel spacings, signed, of a header without directions."""
    values = np.asarray(spacings, np.float64).ravel().tolist()
    if len(values) != 3:
        raise unreadable(path, f"it has {len(values)} spacings for three axes.")
    if not all(0 < abs(value) < math.inf for value in values):  # whether they can be in mm is seen with the unit
        raise PhotonError("SPACING_INVALID", path, f"its voxel spacing is {shown(values)}.", EXPORT_AGAIN)
    if min(values) < 0:
        notes.append(f"its voxel spacing is {shown(values)}: negative ones turn their axes")
    return values


def _check_spacings(spacings: Any, affine: np.ndarray, path: Path) -> None:
    """Where a header has spacings beside directions, which NRRD forbids, they must be the same; NaN is unknown."""
    lengths = np.array([math.hypot(*affine[:3, axis]) for axis in range(3)])
    given = np.asarray(spacings, np.float64)
    if given.shape != lengths.shape or (np.abs(given - lengths) > MAX_SPACING_MISMATCH * lengths).any():
        raise bad_affine(
            path, f"its directions say {shown(lengths.tolist())} a voxel, its spacings {shown(given.ravel().tolist())}."
        )


def _unit_mm(fields: Mapping[str, Any], path: Path, notes: list[str]) -> float:
    """The one unit of length, in mm: that of directions and origin (``space units``), and of spacings (``units``) where
    there are no directions, of which the unit of an axis says nothing."""
    keys = ["space units"]
    if "spacings" in fields and "space directions" not in fields:
        keys.append("units")
    units = {str(unit).strip('"').lower() for key in keys for unit in fields.get(key, ())} - {"", "???"}
    # Other words may be anybody's name, so that they are not quoted.
    if not units <= set(_UNIT_MM):
        raise bad_affine(path, f"its unit of length is none of {', '.join(sorted(_UNIT_MM))}.")
    if len({_UNIT_MM[unit] for unit in units}) > 1:
        raise bad_affine(path, f"its units of length are {sorted(units)}.")
    unit_mm = _UNIT_MM[units.pop()] if units else 1.0
    if unit_mm != 1.0:
        notes.append(f"its unit of length is {unit_mm:g} mm")
    others = {_UNIT_MM.get(str(unit).strip('"').lower(), unit_mm) for unit in fields.get("units", ())} - {unit_mm}
    if others and len(keys) == 1:
        notes.append("the units of its axes are not that of its space, which counts")
    return unit_mm


def _read_voxels(
    stream: ScanStream, fields: Mapping[str, Any], dtype: np.dtype, num_voxels: int
) -> tuple[np.ndarray, str]:
    """Voxels [num_voxels] and the checksum of all bytes read."""
    encoding, path = str(fields["encoding"]).lower(), stream.path
    if encoding not in _ENCODINGS:
        raise unsupported(path, f"its voxels are encoded as {encoding}; raw and gzip are read.")
    line_skip, byte_skip = int(fields.get("line skip", 0)), int(fields.get("byte skip", 0))
    if not 0 <= line_skip <= MAX_HEADER_LINES or byte_skip < (-1 if encoding == "raw" else 0):
        raise unreadable(path, f"it skips {line_skip} lines and {byte_skip} bytes.")
    for _ in range(line_skip):
        stream.read_line(MAX_LINE)
    stream.decode(_ENCODINGS[encoding])
    if byte_skip == -1:  # the voxels are what the file ends with
        byte_skip = max(0, stream.bytes_left() - num_voxels * dtype.itemsize)
    stream.skip(byte_skip)
    return stream.read_array(dtype, num_voxels), stream.finish()
