"""MetaImage: ``.mha``, and ``.mhd`` with its ``.raw`` or ``.zraw``.

The header is a few lines of ``Key = value``, read here, since the usual reader takes what a truncated file lacks as
zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from photon.errors import PhotonError
from pipelines.scans.checks import (
    MAX_SPACING_MISMATCH,
    MAX_VOXELS,
    bad_affine,
    check_grid,
    check_matrix,
    check_scaling,
    check_spacing,
    column_length,
    orientation_of,
    scaled,
    shown,
    unreadable,
    unsupported,
)
from pipelines.scans.detached import data_file
from pipelines.scans.scan import Scan, make_scan
from pipelines.scans.streams import GZIP_MAGIC, ScanStream

MAX_HEADER_LINES = 1000
MAX_LINE = 4096
MIN_LETTER_COSINE = 0.3
"""An axis less than this along the direction that a letter names is not meant by it. Naming each axis by the nearest
direction that is free gives at least 1/3, however oblique the axes are."""

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])

_DTYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}
_MODALITIES = {"MET_MOD_CT": "ct", "MET_MOD_MR": "mr"}
_ALIASES = {
    "Position": "Offset",
    "Origin": "Offset",
    "Rotation": "TransformMatrix",
    "Orientation": "TransformMatrix",
    "ElementByteOrderMSB": "BinaryDataByteOrderMSB",
}


def read_metaimage(path: Path, *, max_voxels: int = MAX_VOXELS, is_labels: bool = False) -> Scan:
    """Read a MetaImage and the data file that it names.

    Raises:
        PhotonError: as :func:`pipelines.scans.scan.read_scan`.
    """
    with ScanStream(path) as stream:
        header = _Header(path, _read_fields(stream))
        shape, dtype = header.grid(max_voxels)
        affine = header.affine()
        slope, intercept = header.scaling()
        name = header.text("ElementDataFile")
        if name.upper() == "LOCAL":
            raw, sha256 = _read_voxels(stream, header, dtype, math.prod(shape))
        else:
            voxels_path = data_file(path, name)
            stream.skip(stream.bytes_left())
            with ScanStream(voxels_path, stream.digest) as data:
                raw, sha256 = _read_voxels(data, header, dtype, math.prod(shape))
    values, extent, notes = scaled(raw, slope, intercept, path, is_labels=is_labels)
    return make_scan(
        values.reshape(shape, order="F"),
        affine,
        path=path,
        sha256=sha256,
        notes=(*header.notes, *notes),
        modality=_MODALITIES.get(header.text("Modality", "")),
        extent=extent,
    )


def data_file_name(path: Path) -> str | None:
    """The data file that a header names; None where the voxels are in the file itself.

    Raises:
        PhotonError: ``SCAN_UNREADABLE`` or ``SCAN_TRUNCATED``.
    """
    with ScanStream(path) as stream:
        name = _Header(path, _read_fields(stream)).text("ElementDataFile")
    return None if name.upper() == "LOCAL" else name


class _Header:
    """The fields of a header, each checked when it is asked for."""

    def __init__(self, path: Path, fields: Mapping[str, str]) -> None:
        self._path, self._fields = path, fields
        self.notes: list[str] = []

    def text(self, key: str, default: str | None = None) -> str:
        value = self._fields.get(key, default)
        if value is None:
            raise unreadable(self._path, f"its header has no {key}.")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.text(key, str(default)).lower()
        if value not in ("true", "false", "1", "0"):
            raise unreadable(self._path, f"its {key} is {value!r}, neither True nor False.")
        return value in ("true", "1")

    def numbers(self, key: str, count: int, default: str | None = None) -> list[float]:
        words = self.text(key, default).split()
        try:
            values = [float(word) for word in words]
        except ValueError as error:
            raise unreadable(self._path, f"its {key} is no list of numbers.") from error
        if len(values) != count:
            raise unreadable(self._path, f"its {key} has {len(values)} numbers instead of {count}.")
        return values

    def whole(self, key: str, count: int, default: str | None = None) -> list[int]:
        values = self.numbers(key, count, default)
        if not all(value.is_integer() for value in values):
            raise unreadable(self._path, f"its {key} holds numbers that are not whole.")
        return [int(value) for value in values]

    def grid(self, max_voxels: int) -> tuple[tuple[int, ...], np.dtype]:
        """Shape (i, j, k) and stored dtype."""
        kind = self.text("ObjectType", "Image")
        if kind.lower() != "image":
            raise unsupported(self._path, f"it holds an object of type {kind}, not an image.")
        (num_axes,) = self.whole("NDims", 1)
        if not 1 <= num_axes <= 10:
            raise unreadable(self._path, f"it declares {num_axes} dimensions.")
        shape = tuple(self.whole("DimSize", num_axes))
        check_grid(shape, self._path, max_voxels)
        if num_axes > 3:
            raise PhotonError("SCAN_NOT_3D", self._path, f"it has {num_axes} axes.", "Give one frame as a 3D scan.")
        if self.whole("ElementNumberOfChannels", 1, "1") != [1]:
            raise PhotonError("SCAN_RGB", self._path, "its voxels have several channels.", "Give the grey scan.")
        if not self.flag("BinaryData", True):
            raise unsupported(self._path, "its voxels are text.")
        element = self.text("ElementType")
        if element not in _DTYPES:
            raise unsupported(self._path, f"its voxels are of type {element}.")
        return shape, np.dtype((">" if self.flag("BinaryDataByteOrderMSB") else "<") + _DTYPES[element])

    def affine(self) -> np.ndarray:
        """Matrix [4, 4], voxel to world RAS mm; the file's own frame is LPS."""
        unit = self.text("DistanceUnits", "mm").lower()
        if unit not in ("mm", "?"):  # other readers take any for mm
            raise bad_affine(self._path, f"its unit of length is {unit}; mm is read.")
        spacing = self._spacing()
        check_spacing(spacing, self._path)
        if "TransformMatrix" not in self._fields:
            self.notes.append("the header records no orientation: axes towards left, back and head (LPS) are assumed")
        directions = np.array(self.numbers("TransformMatrix", 9, "1 0 0 0 1 0 0 0 1")).reshape(3, 3)
        affine = np.eye(4)
        affine[:3, :3] = directions.T * spacing
        affine[:3, 3] = self.numbers("Offset", 3, "0 0 0")
        check_matrix(affine, self._path, self.notes)
        lengths = np.linalg.norm(directions, axis=1)
        if np.abs(lengths - 1).max() > 1e-3:
            fact = f"its axes have lengths {tuple(lengths.round(4).tolist())} instead of 1."
            raise PhotonError("AFFINE_INVALID", self._path, fact, "Export the scan again from its source.")
        affine = LPS_TO_RAS @ affine
        self._compare_orientation(affine)
        return affine

    def _spacing(self) -> list[float]:
        """Distance of voxels along (i, j, k); ElementSize, how large one is, stands in for it as in ITK."""
        if "ElementSize" not in self._fields:
            if "ElementSpacing" not in self._fields:
                self.notes.append("the header records no voxel spacing: 1 mm is assumed")
            return self.numbers("ElementSpacing", 3, "1 1 1")
        if "ElementSpacing" not in self._fields:
            self.notes.append("the header records no ElementSpacing: ElementSize is taken for it")
            return self.numbers("ElementSize", 3)
        spacing = self.numbers("ElementSpacing", 3)
        try:
            size = self.numbers("ElementSize", 3)
        except PhotonError:
            self.notes.append("ElementSize is no list of three numbers: ElementSpacing counts")
            return spacing
        # Written so that what is not finite differs.
        if not all(abs(a - b) <= MAX_SPACING_MISMATCH * b for a, b in zip(size, spacing, strict=True)):
            self.notes.append(f"ElementSize {shown(size)} differs from ElementSpacing {shown(spacing)}, which counts")
        return spacing

    def _compare_orientation(self, affine: np.ndarray) -> None:
        """Note letters that contradict the directions of the axes (matrix [4, 4] to RAS), which count.

        ITK names where an axis comes from (RAI without a turn), the format itself where it goes to (LPS): letters
        that are right either way contradict nothing.
        """
        letters = self.text("AnatomicalOrientation", "").upper()
        if not letters or "?" in letters:
            return
        if not re.fullmatch("[RLAPSI]{3}", letters):
            self.notes.append("AnatomicalOrientation is no orientation: the directions of the axes count")
            return
        cosines = []
        for axis, letter in enumerate(letters):
            row, sign = ("RAS".index(letter), 1) if letter in "RAS" else ("LPI".index(letter), -1)
            cosines.append(sign * float(affine[row, axis]) / column_length(affine, axis))
        if not (min(cosines) >= MIN_LETTER_COSINE or max(cosines) <= -MIN_LETTER_COSINE):
            fact = f"AnatomicalOrientation {letters} contradicts axes towards {orientation_of(affine)}"
            self.notes.append(f"{fact}: the directions of the axes count")

    def scaling(self) -> tuple[float, float]:
        """Slope and intercept, which other readers leave out: a file that has them is told so."""
        (slope,) = self.numbers("ElementToIntensityFunctionSlope", 1, "1")
        (intercept,) = self.numbers("ElementToIntensityFunctionOffset", 1, "0")
        check_scaling(slope, intercept, self._path)
        if (slope, intercept) != (1.0, 0.0):
            self.notes.append(f"slope {slope:g} and offset {intercept:g} are applied, as the header says")
        return slope, intercept


def _read_fields(stream: ScanStream) -> dict[str, str]:
    """The lines up to the data file's name, which is the last one."""
    fields: dict[str, str] = {}
    for _ in range(MAX_HEADER_LINES):
        line = stream.read_line(MAX_LINE)
        if not line:
            raise PhotonError("SCAN_TRUNCATED", stream.path, "the file ends inside its header.", "Copy it again.")
        key, is_field, value = line.decode("utf-8", "replace").partition("=")
        if not line.strip():
            continue
        if not is_field or (not line.endswith(b"\n") and key.strip() != "ElementDataFile"):
            raise unreadable(stream.path, "a line of its header is not `Key = value`.")
        key = _ALIASES.get(key.strip(), key.strip())
        if fields.setdefault(key, value.strip()) != value.strip():
            raise unreadable(stream.path, f"its header has two different {key}.")
        if key == "ElementDataFile":
            return fields
    raise unreadable(stream.path, f"its header has more than {MAX_HEADER_LINES} lines.")


def _read_voxels(stream: ScanStream, header: _Header, dtype: np.dtype, num_voxels: int) -> tuple[np.ndarray, str]:
    """Voxels [num_voxels] and the checksum of all bytes read."""
    (skipped,) = header.whole("HeaderSize", 1, "0")
    if header.flag("CompressedData"):
        if skipped != 0:
            raise unsupported(stream.path, "it skips bytes of a compressed file.")
        stream.decode("gzip" if stream.peek(2) == GZIP_MAGIC else "zlib")
    elif skipped == -1:  # the voxels are what the file ends with
        skipped = max(0, stream.bytes_left() - num_voxels * dtype.itemsize)
    if skipped < 0:
        raise unreadable(stream.path, f"its HeaderSize is {skipped}.")
    stream.skip(skipped)
    try:
        raw = stream.read_array(dtype, num_voxels)
        return raw, stream.finish()
    except PhotonError as error:
        if error.code == "SCAN_TRAILING_DATA":
            stream.drain()
        raise
