"""Which scans a folder or an archive holds, what they are called, and how to get at one."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from photon.errors import PhotonError
from pipelines.scans.archives import Member, extract, is_archive_name, list_members
from pipelines.scans.checks import MAX_VOXELS, Trust, unsupported
from pipelines.scans.detached import data_file
from pipelines.scans.kinds import dicom_folders, is_dicom_file, is_hidden, is_scan_name, refusal_of_name, unpack
from pipelines.scans.scan import (
    FORMAT_OF_ENDING,
    Scan,
    data_file_name,
    read_scan,
    scan_ending,
)

MAX_NAME = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A scan that was found: a file, a series of DICOM files, or one of these in an archive.

    Args:
        scan_id: unique among the sources found with it; a file name fit for any system.
        path: the file, the folder of DICOM files, or the archive.
        relative: where it lies below the folder that was searched, for people and tables; it names an archive's
            member and a DICOM series, too.
        member: path of the file, or of the folder of DICOM files, within the archive; None outside archives.
        series: key of the DICOM series; empty for files.
        sha256: of an archive's member where finding it took reading it.
        refusal: why it cannot be read, where that is known already; :func:`located` raises it.
        heights_mm: where the slices of a DICOM series lie, by which parts of one series are told from copies.
    """

    scan_id: str
    path: Path
    relative: str
    member: str | None = None
    series: str = ""
    sha256: str | None = None
    refusal: PhotonError | None = None
    heights_mm: tuple[float, ...] = dataclasses.field(default=(), repr=False)


def find_scans(folder: Path) -> list[Source]:
    """Every scan below ``folder``, also in archives there, sorted; hidden files and folders are passed over.

    The id of a file is its name without its ending; where two have the same (upper and lower case are not told
    apart), the path within ``folder`` with ``_`` for ``/``, and a checksum of it if that is not enough or the
    path is long. The id of a DICOM series is the key that its headers give it, whatever its files and folder are
    called. An archive that is refused counts as one scan, which is refused. So is a DICOM series of which slices lie in
    other folders.

    Args:
        folder: or an archive or a scan file alone.

    Raises:
        PhotonError: ``INPUT_MISSING`` when the folder is not there, or a file that is neither archive nor scan;
            ``ARCHIVE_EMPTY`` when it holds no scan.
    """
    if folder.is_file():
        found = _of_file(folder)
    elif folder.is_dir():
        found = list(_in_folder(folder))
    else:
        raise PhotonError("INPUT_MISSING", folder, "there is no such folder or archive.", "Check the path.")
    if not found:
        fact = "it holds no scan (NIfTI, MetaImage, NRRD or DICOM, also in .tar, .tar.gz or .zip)."
        raise PhotonError("ARCHIVE_EMPTY", folder, fact, "Put scans into it or give another folder.")
    return _named(_none_scattered(sorted(found, key=lambda source: source.relative)))


@contextmanager
def located(source: Source) -> Iterator[Path]:
    """A local file, or folder of DICOM files, that holds a source; what an archive holds is unpacked for as long.

    Raises:
        PhotonError: the source's refusal; as :func:`pipelines.scans.archives.extract`. Errors raised while it is
            in use name the archive and member in place of the temporary file.
    """
    if source.refusal is not None:
        raise source.refusal
    if source.member is None:
        yield source.path
        return
    with tempfile.TemporaryDirectory(prefix="photon-") as folder:
        try:
            yield _unpacked(source, source.member, Path(folder))
        except PhotonError as error:
            if error.code == "OUTPUT_UNWRITABLE":
                raise
            raise _about_member(error, folder, source.path / source.member) from error


def read_source(
    source: Source, *, max_voxels: int = MAX_VOXELS, trust: Trust | None = None, is_labels: bool = False
) -> Scan:
    """Read a source, wherever it lies.

    Raises:
        PhotonError: as :func:`located` and :func:`pipelines.scans.scan.read_scan`.
    """
    with located(source) as path:
        return read_scan(path, series=source.series, max_voxels=max_voxels, trust=trust, is_labels=is_labels)


def source_sha256(source: Source) -> str:
    """Checksum of a source's bytes, that of the scan read from it; nothing but the bytes is looked at.

    Raises:
        PhotonError: as :func:`located`; ``SCAN_MISSING`` or ``SCAN_UNREADABLE``. ``OSError`` comes through.
    """
    with located(source) as path:
        if path.is_dir():
            from pipelines.scans.dicom import list_series, series_sha256

            series = next((one for one in list_series(path) if one.key == source.series), None)
            if series is None:
                raise PhotonError("SCAN_MISSING", path, f"it holds no series {source.series}.", "Check the path.")
            return series_sha256(series)
        name = data_file_name(path)
        digest = hashlib.sha256()
        for file in [path] if name is None else [path, data_file(path, name)]:
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def scan_id_of(path: Path) -> str:
    """File name without the ending of its format."""
    ending = scan_ending(path)
    return path.name[: -len(ending)] if ending in FORMAT_OF_ENDING else path.name


def _in_folder(folder: Path) -> Iterator[Source]:
    """Sources without ids."""
    closed: list[OSError] = []
    for parent, folders, files in os.walk(folder, onerror=closed.append):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(parent) / name for name in sorted(files) if not name.startswith(".")]
        paths = [path for path in paths if path.is_file() or not path.exists()]  # reading a pipe would never end
        relative = Path(parent).relative_to(folder)
        if any(is_dicom_file(path.name, path) for path in paths):
            yield from _series(Path(parent), relative.as_posix())
        for path in paths:
            name = (relative / path.name).as_posix()
            if is_archive_name(path.name):
                yield from _in_archive(path, name)
            elif is_scan_name(path.name):
                yield Source(scan_id="", path=path, relative=name, refusal=refusal_of_name(path))
    for error in closed:
        path = Path(error.filename)
        fact = f"the folder cannot be listed ({error.strerror})."
        refusal = PhotonError("SCAN_UNREADABLE", path, fact, "Check its permissions.")
        yield Source(scan_id="", path=path, relative=path.relative_to(folder).as_posix(), refusal=refusal)


def _of_file(path: Path) -> list[Source]:
    """Sources without ids of a file that was given in place of a folder."""
    if is_archive_name(path.name):
        return [dataclasses.replace(one, relative=one.relative or path.name) for one in _in_archive(path, "")]
    if is_scan_name(path.name) and not path.name.startswith("."):
        return [Source(scan_id="", path=path, relative=path.name, refusal=refusal_of_name(path))]
    if is_dicom_file(path.name, path):
        fact = "it is one DICOM file; a series is read from its folder."
        raise PhotonError("INPUT_MISSING", path, fact, "Give the folder that the file lies in.")
    fact = f"it is a file, but by its name neither a scan ({', '.join(FORMAT_OF_ENDING)}) nor an archive."
    raise PhotonError("INPUT_MISSING", path, fact, "Give a folder, a scan, or a .tar, .tar.gz or .zip of scans.")


def _in_archive(path: Path, relative: str) -> list[Source]:
    """Sources without ids; a refused archive is one of them."""
    try:
        members = list_members(path)
        sources = list(_of_members(path, relative, members))
        if not sources:
            raise PhotonError("ARCHIVE_EMPTY", path, "the archive holds no scan.", "Put scans into it.")
    except PhotonError as error:
        return [Source(scan_id="", path=path, relative=relative, refusal=error)]
    return sources


def _of_members(path: Path, relative: str, members: list[Member]) -> Iterator[Source]:
    for member in members:
        inner = PurePosixPath(member.name)
        if is_hidden(inner):
            continue
        source = Source(
            scan_id="",
            path=path,
            relative=f"{relative}/{inner}".lstrip("/"),
            member=member.name,
            sha256=member.sha256,
        )
        if is_archive_name(inner.name):
            fact = f"it holds an archive, '{inner}'; archives in archives are not opened."
            refusal = PhotonError("ARCHIVE_NESTED", path, fact, "Unpack the outer one, and give the folder.")
            yield dataclasses.replace(source, refusal=refusal)
        elif is_scan_name(inner.name):
            yield dataclasses.replace(source, refusal=refusal_of_name(path / inner))
    for folder, files in dicom_folders(members):
        with tempfile.TemporaryDirectory(prefix="photon-") as temporary:
            unpack(path, files, Path(temporary))
            found = list(_series(Path(temporary), f"{relative}/{folder}".strip("/")))
        for one in found:
            told = one.refusal and _about_member(one.refusal, temporary, path / folder)
            yield dataclasses.replace(one, path=path, member=folder, refusal=told)


def _none_scattered(sources: list[Source]) -> list[Source]:
    """Refuse series of which another folder holds other slices; copies of a series, also of a part of it, are not."""
    alike: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        if source.heights_mm:
            alike[source.series].append(source)
    checked = []
    for source in sources:
        heights = set(source.heights_mm)
        others = [one for one in alike[source.series] if heights.isdisjoint(one.heights_mm)] if heights else []
        refusal = source.refusal
        if others and refusal is None:
            fact = f"slices of it lie elsewhere, too: '{others[0].relative}'."
            refusal = PhotonError(
                "SERIES_SCATTERED", Path(source.relative), fact, "Put all files of the series into one folder."
            )
        checked.append(dataclasses.replace(source, refusal=refusal, heights_mm=()))
    return checked


def _series(folder: Path, relative: str) -> Iterator[Source]:
    from pipelines.scans.dicom import list_series

    for series in list_series(folder):
        yield Source(
            scan_id="",
            path=folder,
            relative=series.key if relative == "." else f"{relative}/{series.key}",
            series=series.key,
            refusal=series.refusal,
            heights_mm=series.heights_mm,
        )


def _about_member(error: PhotonError, temporary: str, name: Path) -> PhotonError:
    """The same error, not about a temporary file but about what it was unpacked from."""
    if not error.subject.startswith(temporary):
        return error
    return PhotonError(error.code, name, error.fact, error.remedy)


def _unpacked(source: Source, member: str, folder: Path) -> Path:
    """Take a member out of its archive into files whose names are ours."""
    if source.series:
        unpack(source.path, dict(dicom_folders(list_members(source.path))).get(member, []), folder)
        return folder
    path = folder / f"scan{scan_ending(Path(member))}"
    extract(source.path, {member: path}, {member: source.sha256})
    name = data_file_name(path)
    if name is not None:
        if "/" in name or "\\" in name or name in ("", ".", "..", path.name):
            raise unsupported(path, f"its voxels are in {name!r}, which is not a file beside it.")
        extract(source.path, {(PurePosixPath(member).parent / name).as_posix(): folder / name}, {})
    return path


def _named(sources: list[Source]) -> list[Source]:
    """The same sources, with ids."""
    names = [_names(source) for source in sources]
    level = [0] * len(sources)
    while repeated := _repeated([names[n][level[n]] for n in range(len(sources))]):
        for n in range(len(sources)):
            if names[n][level[n]].casefold() in repeated:
                level[n] += 1
    return [dataclasses.replace(source, scan_id=names[n][level[n]]) for n, source in enumerate(sources)]


def _names(source: Source) -> tuple[str, str, str]:
    """Candidates for a scan's id, each longer and rarer than the one before; the last is unique."""
    relative = Path(source.relative)
    whole = source.relative.replace("/", "_")
    digest = hashlib.sha256(source.relative.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    if source.series:
        return source.series, f"{source.series}-{digest}", f"{source.series}-{digest}"
    unique = f"{whole[:40]}-{digest}"
    if len(os.fsencode(whole)) > MAX_NAME:
        return unique, unique, unique
    return scan_id_of(relative), scan_id_of(Path(whole)), unique


def _repeated(names: list[str]) -> set[str]:
    return {name for name, count in Counter(name.casefold() for name in names).items() if count > 1}
