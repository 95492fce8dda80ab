"""NIfTI-1 and NIfTI-2, plain or gzip: the only module that knows nibabel."""

from __future__ import annotations

import gzip
import io
import math
from pathlib import Path
from typing import Any, cast

import nibabel
import numpy as np

from photon.errors import PhotonError
from pipelines.files import write_bytes
from pipelines.scans.checks import EXPORT_AGAIN, MAX_VOXELS, Trust, bad_affine, scaled, unreadable
from pipelines.scans.nifti_header import (
    checked_affine,
    checked_scaling,
    declared_grid,
    voxel_offset,
)
from pipelines.scans.scan import Scan, make_scan
from pipelines.scans.streams import GZIP_MAGIC, ScanStream

GZIP_LEVEL = 1

_HEADERS = {348: nibabel.Nifti1Header, 540: nibabel.Nifti2Header}


def read_nifti(
    path: Path, *, max_voxels: int = MAX_VOXELS, trust: Trust | None = None, is_labels: bool = False
) -> Scan:
    """Read a NIfTI file whole.

    Args:
        trust: see :func:`pipelines.scans.nifti_header.checked_affine`.

    Raises:
        PhotonError: as :func:`pipelines.scans.scan.read_scan`.
    """
    notes: list[str] = []
    with ScanStream(path) as stream:
        _choose_decoder(stream, notes)
        try:
            header = _read_header(stream)
            shape, dtype = declared_grid(header, path, notes, max_voxels)
            affine = checked_affine(header, *_matrices(header, path), path, notes, trust)
            slope, intercept = checked_scaling(header, path, notes)
            stream.skip(voxel_offset(header, path) - int(header["sizeof_hdr"]) - 4)
            raw = stream.read_array(dtype, math.prod(shape))
            sha256 = stream.finish()
        except PhotonError as error:
            if error.code not in ("GZIP_CORRUPT", "SCAN_TRUNCATED"):
                stream.drain()  # a damaged gzip stream explains whatever else was found
            raise
    values, extent, value_notes = scaled(raw, slope, intercept, path, is_labels=is_labels)
    array, notes = values.reshape(shape, order="F"), [*notes, *value_notes]
    return make_scan(array, affine, path=path, sha256=sha256, notes=tuple(notes), extent=extent)


def write_scan(array: np.ndarray, affine: np.ndarray, path: Path) -> None:
    """Write voxels [i, j, k] as NIfTI-1 in millimetres; the bytes of ``.nii`` depend on the content alone."""
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    content = image.to_bytes()
    write_bytes(path, gzip.compress(content, GZIP_LEVEL, mtime=0) if path.name.endswith(".gz") else content)


def sample_scans() -> list[Path]:
    """Real MR files that ship inside the nibabel package: 3D ones, and a 4D one that has to be refused."""
    folder = Path(nibabel.__file__).parent / "tests" / "data"
    names = (
        "anatomical.nii",
        "reoriented_anat_moved.nii",
        "functional.nii",
        "example4d.nii.gz",
        "example_nifti2.nii.gz",
    )
    return [folder / name for name in names if (folder / name).is_file()]


def _choose_decoder(stream: ScanStream, notes: list[str]) -> None:
    """The first bytes say whether a file is compressed; its name may be wrong."""
    is_named_gzip = stream.path.name.lower().endswith(".gz")
    start = stream.peek(4)
    if start.startswith(GZIP_MAGIC) or (is_named_gzip and _header_size(start) is None):
        stream.decode("gzip")
    if is_named_gzip != (stream.encoding == "gzip"):
        kind = "compressed" if stream.encoding == "gzip" else "not compressed"
        notes.append(f"the file is {kind}, other than its name says")


def _header_size(start: bytes) -> int | None:
    """Size of the header that a file with these first four bytes has, if it is NIfTI."""
    sizes = {order: int.from_bytes(start, cast(Any, order)) for order in ("little", "big")}
    return next((size for size in sizes.values() if size in _HEADERS), None)


def _read_header(stream: ScanStream) -> Any:
    """NIfTI-1 or NIfTI-2 header in either byte order; its 4 bytes of extension flag are read too."""
    path = stream.path
    first = stream.read(4)
    if len(first) < 4:
        raise PhotonError("SCAN_TRUNCATED", path, f"the file holds {len(first)} bytes.", EXPORT_AGAIN)
    size = _header_size(first)
    if size is None:
        raise unreadable(path, "it does not begin with a NIfTI header.")
    content = first + stream.read(size)
    if len(content) < size + 4:
        raise PhotonError("SCAN_TRUNCATED", path, "the file ends inside its header.", EXPORT_AGAIN)
    header = _HEADERS[size].from_fileobj(io.BytesIO(content[:size]), check=False)
    magic = bytes(header["magic"].tobytes())[:4].rstrip(b"\x00")
    if magic not in (b"n+1", b"n+2"):
        raise unreadable(path, f"the magic in its header is {magic!r}; two-file NIfTI is not read.")
    return header


def _matrices(header: Any, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """The matrix to use and, where the header has both, the other one (NaN where it cannot be computed)."""
    wrong = (ValueError, ArithmeticError, nibabel.spatialimages.HeaderDataError)
    try:
        with np.errstate(all="ignore"):
            best = header.get_best_affine()
    except wrong as error:
        raise bad_affine(path, f"its quaternion is wrong ({error}).") from error
    if int(header["sform_code"]) <= 0 or int(header["qform_code"]) <= 0:
        return best, None
    try:
        with np.errstate(all="ignore"):
            return best, header.get_qform()
    except wrong:
        return best, np.full((4, 4), np.nan)
