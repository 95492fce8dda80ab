"""Archives of scans: ``.tar``, ``.tar.gz`` (``.tgz``) and ``.zip``, of which single members are taken out.

What an archive says is not believed: names, sizes and kinds of all entries are checked before anything is taken out,
and a member is written to a place of the caller's choice, never to where the archive wants it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import re
import stat
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from photon.errors import PhotonError
from pipelines.scans.streams import MAX_LARGE_RATIO, MAX_UNPROVEN_BYTES, ScanStream
from pipelines.scans.tar_source import TAR_BLOCK, PlainFile, TarSource

MAX_ENTRIES = 200_000
MAX_TOTAL_BYTES = 1 << 40
MAX_COMPRESSED_TAR_BYTES = 1 << 33
"""A compressed tar is read from its start for every scan taken out of it."""

MAX_MEMBER_BYTES = 1 << 33
MAX_NAME = 1024
DICOM_START = 132

_BLOCK = 1 << 20
_TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")
_UNPACK = "Unpack it yourself, look at what it holds, and give the folder."
_GET_AGAIN = "Copy the archive again from its source."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Member:
    """A file in an archive.

    Args:
        name: path within the archive, with ``/``.
        start: its first 132 bytes.
        sha256: of its bytes, where listing had to read them all; they are held to it when it is taken out.
    """

    name: str
    size: int
    start: bytes
    sha256: str | None = None


def is_archive_name(name: str) -> bool:
    """Whether a file of this name is an archive that can be read."""
    return name.lower().endswith((*_TAR_ENDINGS, ".zip"))


def is_compressed_tar(name: str) -> bool:
    """Whether a file of this name is a compressed tar, of which all has to be read to reach any part."""
    return name.lower().endswith((".tar.gz", ".tgz"))


def list_members(path: Path) -> list[Member]:
    """The files of an archive, in its order.

    A ``.tar.gz`` is read to its end, which checks its checksum.

    Raises:
        PhotonError: ``SCAN_MISSING``; ``ARCHIVE_UNREADABLE``, ``GZIP_CORRUPT``, ``SCAN_TRUNCATED`` or
            ``SCAN_TRAILING_DATA`` when it is damaged; ``ARCHIVE_UNSAFE`` for names out of the archive, two files of one
            name, links and devices; ``ARCHIVE_TOO_LARGE`` for too many or too large entries, and sizes that no real
            file has.
    """
    with _reading(path):
        return list(_list_zip(path) if path.name.lower().endswith(".zip") else _list_tar(path))


def extract(path: Path, targets: Mapping[str, Path], sha256: Mapping[str, str | None]) -> None:
    """Write members to files that do not exist yet.

    Args:
        targets: name of each wanted member, and where to write it.
        sha256: by name, what :func:`list_members` found; members are held to it.

    Raises:
        PhotonError: as :func:`list_members`; ``ARCHIVE_CHANGED`` when a member is missing or not what it was;
            ``OUTPUT_UNWRITABLE`` when a target cannot be written.
    """
    wanted = dict(targets)
    # Without checksums of its members, a compressed tar is only known to be whole at its end.
    is_to_the_end = is_compressed_tar(path.name) and not all(sha256.get(name) for name in targets)
    with _reading(path):
        entries = _zip_entries(path) if path.name.lower().endswith(".zip") else _tar_entries(path)
        for name, size, open_entry in entries:
            if name not in wanted:
                continue
            with open_entry() as stream:
                found = _copy(stream, wanted.pop(name), size, path)
            if sha256.get(name) not in (None, found):
                raise _changed(path, f"'{name}' is not what it was when the archive was listed.")
            if not wanted and not is_to_the_end:
                return
    if wanted:
        raise _changed(path, f"'{next(iter(wanted))}' is not in it.")


Entry = tuple[str, int, Callable[[], IO[bytes]]]
"""Name, size and a function that opens the bytes, to be called before the next entry is asked for."""


def _copy(stream: IO[bytes], target: Path, size: int, path: Path) -> str:
    digest, left = hashlib.sha256(), size
    while block := stream.read(_BLOCK):
        left -= len(block)
        digest.update(block)
        if left < 0:
            break
        try:
            with target.open("ab") as output:
                output.write(block)
        except OSError as error:
            fact = f"there is no room to unpack '{path.name}' ({error.strerror or error})."
            remedy = "Free space, or name another folder for temporary files in TMPDIR."
            raise PhotonError("OUTPUT_UNWRITABLE", target.parent, fact, remedy) from error
    if left != 0:
        raise PhotonError("ARCHIVE_UNREADABLE", path, "a member has another size than is declared.", _GET_AGAIN)
    return digest.hexdigest()


_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    ValueError,
)
"""What the readers raise, also by mistake, on damaged archives."""


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise PhotonError("SCAN_MISSING", path, "the file does not exist.", "Check the path.") from error
    except _DAMAGE as error:
        fact = f"the archive cannot be read ({error or type(error).__name__})."
        raise PhotonError("ARCHIVE_UNREADABLE", path, fact, _GET_AGAIN) from error


class _Quota:
    """Counts what an archive declares, and refuses what no archive of scans holds."""

    def __init__(self, path: Path) -> None:
        self._path, self._num_entries, self._num_bytes = path, 0, 0
        self._max_bytes = MAX_COMPRESSED_TAR_BYTES if is_compressed_tar(path.name) else MAX_TOTAL_BYTES
        self._names: set[str] = set()

    def entry(self, name: str, size: int, stored_size: int | None = None) -> str:
        """Check one entry; returns its name in normal form."""
        self._num_entries += 1
        self._num_bytes += size
        if self._num_entries > MAX_ENTRIES:
            self._refuse(f"it has more than {MAX_ENTRIES} entries.")
        if size > MAX_MEMBER_BYTES or self._num_bytes > self._max_bytes:
            self._refuse(f"its entries declare {self._num_bytes} bytes or more, {size} in one of them.")
        if stored_size is not None and size > MAX_UNPROVEN_BYTES and size > stored_size * MAX_LARGE_RATIO:
            self._refuse(f"an entry of {stored_size} bytes claims to hold {size}.")
        return _checked_name(name, self._path)

    def file(self, name: str) -> None:
        """Note the name of a file, which has to be the only one."""
        if name in self._names:
            raise _unsafe(self._path, f"it holds two files called '{name}'.")
        self._names.add(name)

    def _refuse(self, fact: str) -> None:
        raise PhotonError("ARCHIVE_TOO_LARGE", self._path, fact, _UNPACK)


def _checked_name(name: str, path: Path) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    is_outside = name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name)
    if is_outside or "\0" in name or len(name) > MAX_NAME:
        raise _unsafe(path, f"the name {name[:80]!r} leads out of it or is no name.")
    return unicodedata.normalize("NFC", "/".join(parts))


def _unsafe(path: Path, fact: str) -> PhotonError:
    return PhotonError("ARCHIVE_UNSAFE", path, fact, _UNPACK)


def _changed(path: Path, fact: str) -> PhotonError:
    return PhotonError("ARCHIVE_CHANGED", path, fact, "Run the command again once nobody writes to the archive.")


def _list_zip(path: Path) -> Iterator[Member]:
    for name, size, open_entry in _zip_entries(path):
        start = b""
        with contextlib.suppress(*_DAMAGE), open_entry() as stream:  # a damaged member is told when it is taken out
            start = stream.read(DICOM_START)
        yield Member(name=name, size=size, start=start)


def _zip_entries(path: Path) -> Iterator[Entry]:
    _check_directory_size(path)
    quota = _Quota(path)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = quota.entry(info.orig_filename, info.file_size, info.compress_size)
            kind = stat.S_IFMT(info.external_attr >> 16)
            if info.is_dir():
                continue
            if kind not in (0, stat.S_IFREG):
                raise _unsafe(path, f"'{name}' is a link or a device.")
            if info.flag_bits & 1:
                raise PhotonError("ARCHIVE_UNREADABLE", path, "it is encrypted.", "Give an archive without a password.")
            quota.file(name)
            yield name, info.file_size, lambda info=info: archive.open(info)  # type: ignore[misc]


def _check_directory_size(path: Path) -> None:
    """Look at the size of a zip file's table of contents before it is read into memory."""
    with path.open("rb") as stream:
        stream.seek(0, io.SEEK_END)
        stream.seek(max(0, stream.tell() - 22 - 65535 - 76))
        tail = stream.read()
    end, large = tail.rfind(b"PK\5\6"), tail.rfind(b"PK\6\6")
    size = struct.unpack_from("<I", tail, end + 12)[0] if end >= 0 else 0
    if size == 0xFFFFFFFF and large >= 0:
        size = struct.unpack_from("<Q", tail, large + 40)[0]
    if size > MAX_ENTRIES * 150:
        raise PhotonError("ARCHIVE_TOO_LARGE", path, f"its table of contents has {size} bytes.", _UNPACK)


def _list_tar(path: Path) -> Iterator[Member]:
    is_compressed = is_compressed_tar(path.name)
    for name, size, open_entry in _tar_entries(path):
        with open_entry() as stream:
            start = stream.read(DICOM_START)
            digest = hashlib.sha256(start)
            while is_compressed and (block := stream.read(_BLOCK)):
                digest.update(block)
        yield Member(name=name, size=size, start=start, sha256=digest.hexdigest() if is_compressed else None)


def _tar_entries(path: Path) -> Iterator[Entry]:
    quota = _Quota(path)
    with ScanStream(path) if is_compressed_tar(path.name) else PlainFile(path) as stream:
        if isinstance(stream, ScanStream):
            stream.decode("gzip")
        source = TarSource(stream)
        archive = tarfile.TarFile(fileobj=source, mode="r", errorlevel=2)  # type: ignore[arg-type]
        while (info := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # what was passed is not needed again
            name = quota.entry(info.name, info.size, stream.file_size)
            if info.isdir():
                continue
            if not info.isreg() or info.issparse():
                raise _unsafe(path, f"'{name}' is a link, a device or a file with holes.")
            quota.file(name)
            yield name, info.size, lambda info=info: _opened(archive, info)  # type: ignore[misc]
        # tarfile stops without a word at a damaged header, and where the file was cut between two entries.
        if source.last_header != bytes(TAR_BLOCK):
            raise PhotonError("ARCHIVE_UNREADABLE", path, "an entry's header is damaged or missing.", _GET_AGAIN)
        source.read_to_end()


def _opened(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    stream = archive.extractfile(info)
    if stream is None:
        raise tarfile.ReadError("an entry without content")
    return stream
