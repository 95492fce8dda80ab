"""The version of the data folder: DVC's hash, computed here, recorded by DVC. The only user of DVC.

A folder's version is the MD5 over the sorted list of its files' MD5s, as DVC defines it. Computing it takes
no DVC process, no remote and no git, so a fresh machine that regenerated the data proves equality with
``data.dvc`` alone, and bytes are judged by reading them: DVC itself trusts time stamps and read-only cache
files, and calls a folder up to date whose cached bytes have rotted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from photon.errors import PhotonError
from pipelines.files import file_digest, write_text
from pipelines.results import VersionRecord

LOCK_ATTEMPTS = 3
# Half-written files of a killed job (see `files.atomic_path`) are no data.
IGNORED = ".*.tmp"
DVC_CONFIG = """[core]
    analytics = false
    check_update = false
[cache]
    type = "reflink,copy"
"""
DVC_FILES = {
    ".dvc/config": DVC_CONFIG,
    ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
    ".dvcignore": f"# Half-written files of a killed job.\n{IGNORED}\n",
}


def list_files(folder: Path) -> list[dict[str, str]]:
    """Every file below ``folder`` as ``{"md5", "relpath"}`` with ``/`` separators, sorted by path.

    Raises:
        PhotonError: ``DATA_MISSING`` when the folder does not exist or holds no file.
    """
    paths = sorted(
        (path for path in folder.rglob("*") if path.is_file() and not path.match(IGNORED)),
        key=lambda path: path.relative_to(folder).as_posix(),
    )
    if not paths:
        fact = "the folder holds no files." if folder.is_dir() else "the folder does not exist."
        raise PhotonError("DATA_MISSING", folder, fact, "Generate the data, or fetch it with `dvc pull`.")
    return [{"md5": file_digest(path, hashlib.md5), "relpath": path.relative_to(folder).as_posix()} for path in paths]


def folder_version(folder: Path) -> str:
    """DVC's version of a folder: 32 hex digits and ``.dir``.

    Raises:
        PhotonError: ``DATA_MISSING`` as :func:`list_files`.
    """
    return _version_of(list_files(folder))


def read_version(pointer: Path) -> str:
    """The version a DVC pointer file records.

    Raises:
        PhotonError: ``POINTER_UNREADABLE`` when the file is missing or is no DVC pointer to one folder.
    """
    import yaml

    remedy = "Restore it from version control, or delete it to record the present data as a first version."
    try:
        version = yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"][0]["md5"]
    except FileNotFoundError as error:
        raise PhotonError("POINTER_UNREADABLE", pointer, "the file does not exist.", remedy) from error
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, IndexError, TypeError) as error:
        raise PhotonError("POINTER_UNREADABLE", pointer, "the file is no DVC pointer.", remedy) from error
    if not isinstance(version, str) or not version.endswith(".dir"):
        raise PhotonError("POINTER_UNREADABLE", pointer, f"it records {version!r}, not a folder.", remedy)
    return version


def version_folder(data: Path, pointer: Path | None = None) -> VersionRecord:
    """Compare a data folder with its DVC pointer and record its version when it is another.

    Equal bytes leave the pointer alone. DVC is started when the version is not recorded yet or its cache
    lacks files, so that ``dvc push`` always has them.

    Args:
        data: the folder.
        pointer: ``<data>.dvc`` beside the folder, which is also the default.

    Raises:
        PhotonError: ``DATA_MISSING``, ``POINTER_UNREADABLE``, ``POINTER_MISPLACED`` when the pointer
            is not beside the folder, ``DVC_FAILED`` when DVC refuses.
    """
    data = data.resolve()
    expected = data.with_name(f"{data.name}.dvc")
    pointer = (pointer or expected).resolve()
    if pointer != expected:
        fact = f"DVC writes the pointer of this folder to {expected.name} beside it."
        raise PhotonError("POINTER_MISPLACED", pointer, fact, "Use that file, or leave the setting out.")
    files = list_files(data)
    version = _version_of(files)
    recorded = read_version(pointer) if pointer.exists() else None
    if recorded != version or not _is_cached(data.parent, files, version):
        _add(data, pointer, version)
    if recorded is None:
        status, message = (
            "first",
            f"{data.name} had no recorded version; {pointer.name} now records {version}.",
        )
    elif recorded == version:
        status, message = (
            "matches",
            f"{data.name} holds exactly the bytes {pointer.name} records ({version}).",
        )
    else:
        status = "new"
        message = f"{data.name} differs from {recorded}; {pointer.name} now records the new version {version}."
    return VersionRecord(data_version=version, recorded_version=recorded, status=status, message=message)


def _version_of(files: list[dict[str, str]]) -> str:
    return hashlib.md5(_listing(files)).hexdigest() + ".dir"


def _listing(files: list[dict[str, str]]) -> bytes:
    return json.dumps(files, sort_keys=True).encode()


def cache_folder(project: Path) -> Path:
    """Where DVC keeps the bytes of a project's versions unless it is told otherwise."""
    return project / ".dvc" / "cache" / "files" / "md5"


def _is_cached(project: Path, files: list[dict[str, str]], version: str) -> bool:
    """Whether DVC's cache has the listing and every file; a cache kept elsewhere counts as lacking them."""
    cache = cache_folder(project)
    return all((cache / md5[:2] / md5[2:]).is_file() for md5 in (version, *(file["md5"] for file in files)))


def _add(data: Path, pointer: Path, version: str) -> None:
    """``dvc add``: fill the cache, write the pointer, and check that DVC counts the same version."""
    project = data.parent
    _prepare_project(project)
    with _serialised(project):
        for attempt in range(1, LOCK_ATTEMPTS + 1):
            try:
                _call_dvc(project, data)
                break
            except Exception as error:  # DVC's classes are many; all that matters is whether a lock was in the way
                if type(error).__name__ == "LockError" and attempt < LOCK_ATTEMPTS:
                    time.sleep(attempt)
                    continue
                remedy = "Close other DVC commands in this project; check free space and permissions of .dvc."
                fact = f"DVC could not record the data ({type(error).__name__}: {str(error)[:200]})."
                raise PhotonError("DVC_FAILED", data, fact, remedy) from error
    if (counted := read_version(pointer)) != version:
        remedy = "Make sure nothing writes into the folder and that .dvcignore hides none of its files."
        raise PhotonError("DVC_FAILED", data, f"DVC counts version {counted}, the bytes say {version}.", remedy)


def _call_dvc(project: Path, data: Path) -> None:
    os.environ.setdefault("DVC_NO_ANALYTICS", "true")
    from dvc.repo import Repo

    with contextlib.ExitStack() as stack:
        # A private, empty state makes DVC read every byte; its own would trust time stamps. And git is no
        # precondition: the project may be an unpacked archive.
        state = stack.enter_context(tempfile.TemporaryDirectory(prefix="photon-dvc-"))
        settings: dict[str, Any] = {"core": {"no_scm": True, "site_cache_dir": state}}
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        repo = stack.enter_context(contextlib.closing(Repo(str(project), config=settings)))
        repo.add(str(data))


def _prepare_project(project: Path) -> None:
    """Write the settings of a DVC project where there is none; a user's own are left alone."""
    (project / ".dvc").mkdir(exist_ok=True)
    is_checkout = (project / ".git").exists()
    for name, content in DVC_FILES.items():
        target = project / name
        if not target.exists():
            outside_git = name == ".dvc/config" and not is_checkout
            write_text(target, content.replace("[core]\n", "[core]\n    no_scm = true\n") if outside_git else content)


@contextlib.contextmanager
def _serialised(project: Path) -> Iterator[None]:
    """One caller at a time: DVC gives up at once when another holds its lock."""
    (project / ".dvc" / "tmp").mkdir(exist_ok=True)
    with (project / ".dvc" / "tmp" / "photon.lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
