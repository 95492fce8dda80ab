"""Which scans a folder holds, and what they are called."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from photon.errors import PhotonError
from pipelines.scans.scan import FORMAT_OF_ENDING, scan_ending

MAX_NAME = 200

OTHER_FORMATS = (".mha", ".mhd", ".nrrd", ".nhdr", ".mgz", ".mgh", ".hdr", ".mnc")
"""Image files that are listed as refused; files of other endings are no scans and are passed over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A scan found in a folder: a file, or a folder of DICOM slices."""

    scan_id: str
    path: Path
    relative: str


def find_scans(folder: Path) -> list[Source]:
    """Every scan below ``folder``, sorted; hidden files and folders are passed over.

    The id is the file name without its ending; where two have the same, the path within ``folder`` with ``_``
    for ``/``, and a checksum of it if that is not enough or the path is long.

    Raises:
        PhotonError: ``INPUT_MISSING`` when the folder is not there, ``ARCHIVE_EMPTY`` when it holds no scan.
    """
    if not folder.is_dir():
        raise PhotonError("INPUT_MISSING", folder, "there is no such folder.", "Check the path.")
    paths = sorted(_scan_paths(folder), key=lambda path: path.relative_to(folder).as_posix())
    if not paths:
        fact = "it holds no scan (.nii, .nii.gz)."
        raise PhotonError("ARCHIVE_EMPTY", folder, fact, "Put scans into it or give another folder.")
    names = {path: _names(path.relative_to(folder)) for path in paths}
    level = dict.fromkeys(paths, 0)
    while repeated := _repeated([names[path][level[path]] for path in paths]):
        for path in paths:
            if names[path][level[path]] in repeated:
                level[path] += 1
    return [
        Source(scan_id=names[path][level[path]], path=path, relative=path.relative_to(folder).as_posix())
        for path in paths
    ]


def scan_id_of(path: Path) -> str:
    """File name without ``.nii`` or ``.nii.gz``."""
    name = path.name
    for ending in (".gz", ".nii"):
        if name.lower().endswith(ending):
            name = name[: -len(ending)]
    return name


def _scan_paths(folder: Path) -> Iterator[Path]:
    """Scan files below a folder, and folders that hold DICOM slices."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(parent) / name for name in files if not name.startswith(".")]
        if any(path.suffix.lower() in (".dcm", ".ima") for path in paths):
            yield Path(parent)
        yield from (
            path for path in paths if scan_ending(path) in FORMAT_OF_ENDING or path.suffix.lower() in OTHER_FORMATS
        )


def _names(relative: Path) -> tuple[str, str, str]:
    """Candidates for a scan's id, each longer and rarer than the one before; the last is unique."""
    whole = relative.as_posix().replace("/", "_")
    digest = hashlib.sha256(relative.as_posix().encode("utf-8", "surrogateescape")).hexdigest()[:12]
    unique = f"{whole[:40]}-{digest}"
    if len(os.fsencode(whole)) > MAX_NAME:
        return unique, unique, unique
    return scan_id_of(relative), scan_id_of(Path(whole)), unique


def _repeated(names: list[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}
