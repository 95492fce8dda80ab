"""Headers whose voxels may lie in a second file (``.mhd``, ``.nhdr``)."""

from __future__ import annotations

import re
from pathlib import Path

from photon.errors import PhotonError
from pipelines.scans.checks import unsupported

_MANY_FILES = re.compile(r"LIST\b|.*%\d*d")


def data_file(header: Path, name: str) -> Path:
    """The file beside a header that the header names.

    Args:
        name: as the header has it: a relative path.

    Raises:
        PhotonError: ``FORMAT_UNSUPPORTED`` for a list or pattern of files, ``DATA_FILE_OUTSIDE`` for a path out of the
            header's folder, also by a symbolic link, ``SCAN_MISSING`` when there is no such file.
    """
    if _MANY_FILES.match(name):
        raise unsupported(header, "its voxels are spread over many files.")
    try:
        folder = header.parent.resolve()
        path = (folder / name).resolve()
        is_inside = path.is_relative_to(folder) and not Path(name).is_absolute()
        is_there = is_inside and path.is_file() and path != header.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a name no file can have; a circle of links
        raise unsupported(header, f"the name of its data file is no path ({error}).") from error
    if not is_inside:
        fact = f"its voxels are said to be in {name!r}, outside its folder."
        raise PhotonError("DATA_FILE_OUTSIDE", header, fact, "Put the two files into one folder, and mend the name.")
    if not is_there:
        fact = f"the file with its voxels, {name!r}, does not exist."
        raise PhotonError("SCAN_MISSING", header, fact, "Copy both files of the scan.")
    return path
