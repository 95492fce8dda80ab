"""Which files of a folder or an archive are scans, by name and content."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path, PurePosixPath

from photon.errors import PhotonError
from pipelines.scans.archives import Member, extract, is_archive_name
from pipelines.scans.checks import unsupported
from pipelines.scans.scan import DICOM_ENDINGS, FORMAT_OF_ENDING, PREAMBLE, is_dicom, scan_ending
from pipelines.scans.streams import MAX_LARGE_RATIO, MAX_UNPROVEN_BYTES

OTHER_ARCHIVES = (".7z", ".rar", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
OTHER_FORMATS = (".mgz", ".mgh", ".hdr", ".mnc", ".nii.bz2", ".nii.xz", ".nii.zst", *OTHER_ARCHIVES)
"""Files that are listed as refused; files of other endings are no scans and are passed over."""


def is_scan_name(name: str) -> bool:
    """Whether a file of this name should hold one scan, be that of a format that is read or not."""
    return scan_ending(Path(name)) in FORMAT_OF_ENDING or name.lower().endswith(OTHER_FORMATS)


def refusal_of_name(path: Path) -> PhotonError | None:
    """The refusal of a file, for which :func:`is_scan_name` holds, whose name is of a format that is not read."""
    if scan_ending(path) in FORMAT_OF_ENDING:
        return None
    ending = next(ending for ending in OTHER_FORMATS if path.name.lower().endswith(ending))
    fact = f"{ending} files are not read."
    if ending in OTHER_ARCHIVES:
        remedy = "Unpack it, and give the folder, or pack it again as .tar, .tar.gz or .zip."
        return PhotonError("FORMAT_UNSUPPORTED", path, fact, remedy)
    return unsupported(path, fact)


def is_dicom_file(name: str, content: Path | bytes) -> bool:
    """Whether a file is DICOM, by the ending of its name or by its content."""
    if Path(name).suffix.lower() in DICOM_ENDINGS:
        return True
    if is_archive_name(name) or is_scan_name(name):
        return False
    try:
        return is_dicom(content if isinstance(content, bytes) else _start(content))
    except OSError:
        return False


def _start(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(PREAMBLE + 4)


def is_hidden(member: PurePosixPath) -> bool:
    """Whether a member of an archive is not meant to be seen."""
    return any(part.startswith(".") or part == "__MACOSX" for part in member.parts)


def dicom_folders(members: list[Member]) -> list[tuple[str, list[Member]]]:
    """Folders of an archive that hold DICOM files, and what in them is DICOM or should be, by its name."""
    files: dict[str, list[Member]] = defaultdict(list)
    folders: set[str] = set()
    for member in members:
        inner = PurePosixPath(member.name)
        if is_hidden(inner) or is_archive_name(inner.name) or is_scan_name(inner.name):
            continue
        is_certain = is_dicom_file(inner.name, member.start)
        if is_certain:
            folders.add(inner.parent.as_posix())
        if is_certain or not inner.suffix or inner.suffix[1:].isdigit():  # names are often UIDs
            files[inner.parent.as_posix()].append(member)
    return [(folder, files[folder]) for folder in sorted(folders)]


def unpack(path: Path, members: list[Member], folder: Path) -> None:
    """Take DICOM files out of an archive, under names that say nothing.

    Raises:
        PhotonError: ``ARCHIVE_TOO_LARGE`` when they claim to hold more than such an archive can; as
            :func:`pipelines.scans.archives.extract`.
    """
    size, claimed = path.stat().st_size, sum(member.size for member in members)
    if claimed > max(MAX_UNPROVEN_BYTES, size * MAX_LARGE_RATIO):
        fact = f"an archive of {size} bytes claims to hold {claimed} bytes of DICOM."
        raise PhotonError("ARCHIVE_TOO_LARGE", path, fact, "Check where the file comes from.")
    targets = {}
    for number, member in enumerate(members):
        ending = ".dcm" if is_dicom_file(member.name, member.start) else ""
        targets[member.name] = folder / f"{number:06d}{ending}"
    extract(path, targets, {member.name: member.sha256 for member in members})
