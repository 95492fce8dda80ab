"""Older versions of the data folder: which there are, what one holds, and back to it. Reads DVC's cache by itself.

Every file that is restored is checked against its hash on the way; DVC would trust what lies in its cache.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from photon.errors import PhotonError
from pipelines.files import atomic_path, write_text
from pipelines.version_owners import note_versions, owners_of
from pipelines.versioning import cache_folder, list_files, read_version

FETCH = "Fetch it from your DVC remote: check the old data.dvc out of version control and run `dvc fetch`."
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OldVersion:
    """A version whose listing is in the cache; `recorded_at` is when it came there, in UTC. `folders` are the names of
    the data folders it is of, as far as that is known."""

    version: str
    recorded_at: str
    num_files: int
    is_current: bool
    folders: tuple[str, ...]

    def is_for(self, data: Path) -> bool:
        """Whether it is of this data folder, or may be."""
        return not self.folders or data.resolve().name in self.folders


def list_versions(data: Path) -> list[OldVersion]:
    """The versions that the cache lists, of this data folder and of others of the same project; the latest first."""
    data = data.resolve()
    pointer = data.with_name(f"{data.name}.dvc")
    current = read_version(pointer) if pointer.exists() else None
    owners = owners_of(data.parent)
    found = []
    for path in cache_folder(data.parent).glob("??/*.dir"):
        version = path.parent.name + path.name
        moment = datetime.fromtimestamp(path.stat().st_mtime, UTC)
        found.append((moment, version, len(_listing_of(data, version))))
    return [
        OldVersion(
            version=version,
            recorded_at=f"{moment:%Y-%m-%d %H:%M:%S}",
            num_files=count,
            is_current=version == current,
            folders=tuple(sorted(owners.get(version, ()))),
        )
        for moment, version, count in sorted(found, reverse=True)
    ]


def find_version(data: Path, start: str) -> str:
    """The one version of a data folder that begins with these characters; if it has none, the one of another.

    Raises:
        PhotonError: ``VERSION_UNKNOWN`` when there is none, or more than one.
    """
    found = [old for old in list_versions(data) if start and old.version.startswith(start)]
    found = [old for old in found if old.is_for(data)] or found
    if len(found) != 1:
        fact = f"{len(found)} versions in DVC's cache begin with it." if start else "it is empty."
        raise PhotonError("VERSION_UNKNOWN", start, fact, "`photon versions` lists them. " + FETCH)
    return found[0].version


def read_old_file(data: Path, version: str, name: str) -> bytes | None:
    """Bytes of a file as it was in a version; None where that has no such file.

    Args:
        version: whole, as of :func:`find_version`.
        name: path within the data folder, with ``/``.

    Raises:
        PhotonError: ``VERSION_UNKNOWN``, ``VERSION_INCOMPLETE`` when the cache lacks the file or its bytes have rotted.
    """
    data = data.resolve()
    md5 = _listing_of(data, version).get(name)
    if md5 is None:
        return None
    content = _object(data, md5).read_bytes() if _object(data, md5).is_file() else b""
    if hashlib.md5(content).hexdigest() != md5:
        raise _incomplete(version, name)
    return content


def restore_version(
    data: Path,
    version: str,
    *,
    is_forced: bool = False,
    is_any: bool = False,
    on_progress: Progress | None = None,
) -> tuple[int, int]:
    """Make a data folder hold exactly the bytes of an older version, and its pointer record it.

    Whole files first come into being, then those that the version lacks go, then the pointer is written; stopped in the
    middle, the same call goes on.

    Args:
        version: whole, as of :func:`find_version`.
        is_forced: go on although files that are in no version would be lost.
        is_any: go on although it is a version of another data folder.

    Returns:
        Number of files written and of files deleted.

    Raises:
        PhotonError: ``VERSION_UNKNOWN``; ``VERSION_INCOMPLETE`` when the cache lacks one of its files or the file has
            rotted; ``DATA_UNRECORDED`` when files would be lost; ``VERSION_FOREIGN`` when it is of another data
            folder of the project.
    """
    data = data.resolve()
    folders = owners_of(data.parent).get(version, set())
    if folders and data.name not in folders and not is_any:
        theirs = " and ".join(sorted(folders))
        fact = f"it is a version of the data folder {theirs}, not of {data.name}."
        remedy = f"Restore it there by `--data`, or say --from-other if {data.name} is to become a copy of it."
        raise PhotonError("VERSION_FOREIGN", version, fact, remedy)
    wanted = _listing_of(data, version)
    for name, md5 in wanted.items():
        if not _object(data, md5).is_file():
            raise _incomplete(version, name)
    present = (
        {file["relpath"]: file["md5"] for file in list_files(data)} if data.is_dir() and any(data.iterdir()) else {}
    )
    lost = [name for name, md5 in present.items() if wanted.get(name) != md5 and not _object(data, md5).is_file()]
    if lost and not is_forced:
        fact = f"{len(lost)} of its files are in no recorded version and would be lost, e.g. {lost[0]}."
        raise PhotonError("DATA_UNRECORDED", data, fact, "Record them by `photon record`, or say --force.")
    changed = [name for name, md5 in wanted.items() if present.get(name) != md5]
    for name in changed:  # before the first is written, or the folder would be of two versions
        if not _is_whole(_object(data, wanted[name]), wanted[name]):
            raise _incomplete(version, name)
    for number, name in enumerate(changed, start=1):
        _restore_file(data, version, name, wanted[name])
        if on_progress:
            on_progress(number, len(changed), name)
    gone = sorted(set(present) - set(wanted))
    for name in gone:
        (data / name).unlink(missing_ok=True)
    _remove_empty_folders(data)
    size = sum((data / name).stat().st_size for name in wanted)
    content = f"outs:\n- md5: {version}\n  size: {size}\n  nfiles: {len(wanted)}\n  hash: md5\n  path: {data.name}\n"
    pointer = data.with_name(f"{data.name}.dvc")
    if pointer.exists():  # until now it told of the version that is left
        with contextlib.suppress(PhotonError):  # it was damaged
            note_versions(data, read_version(pointer))
    note_versions(data, version, is_anybodys=not folders)
    write_text(pointer, content)
    return len(changed), len(gone)


def _is_whole(path: Path, md5: str) -> bool:
    """Whether an object of the cache still has the bytes it is named after."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest() == md5


def _restore_file(data: Path, version: str, name: str, md5: str) -> None:
    target = data / name
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.md5()
    with atomic_path(target) as temporary:
        with _object(data, md5).open("rb") as source, temporary.open("wb") as stream:
            while block := source.read(1 << 20):
                digest.update(block)
                stream.write(block)
        if digest.hexdigest() != md5:
            raise _incomplete(version, name)


def _listing_of(data: Path, version: str) -> dict[str, str]:
    """MD5 of every file of a version by its path; paths cannot lead out of the folder."""
    path = _object(data, version)
    try:
        content = path.read_bytes()
        if hashlib.md5(content).hexdigest() + ".dir" != version:
            raise ValueError("its bytes have rotted")
        files = {str(file["relpath"]): str(file["md5"]) for file in json.loads(content)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        fact = f"DVC's cache has no whole listing of it ({type(error).__name__})."
        raise PhotonError("VERSION_UNKNOWN", version, fact, FETCH) from error
    for name in files:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/") or (os.sep != "/" and os.sep in name):
            raise PhotonError("VERSION_UNKNOWN", version, f"it lists {name!r}, outside the folder.", FETCH)
    return files


def _object(data: Path, md5: str) -> Path:
    return cache_folder(data.parent) / md5[:2] / md5[2:]


def _incomplete(version: str, name: str) -> PhotonError:
    fact = f"DVC's cache lacks the whole bytes of {name} as of this version."
    return PhotonError("VERSION_INCOMPLETE", version, fact, FETCH)


def _remove_empty_folders(data: Path) -> None:
    for folder, _, _ in os.walk(data, topdown=False):
        if folder != str(data) and not os.listdir(folder):  # noqa: PTH208
            Path(folder).rmdir()
