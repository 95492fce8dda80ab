"""Atomic writes, hashes and paths: the only place that renames a file into being."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from photon.errors import PhotonError


def prepare_output_folder(folder: Path) -> Path:
    """Create ``folder`` and prove that it can be written to.

    Raises:
        PhotonError: ``OUTPUT_UNWRITABLE`` when it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PhotonError(
            "OUTPUT_UNWRITABLE",
            folder,
            f"the output folder cannot be written to ({error.strerror or error}).",
            "Choose another folder, free space or change its permissions.",
        ) from error
    return folder


def check_apart(data: Path, *inputs: Path) -> None:
    """Neither may inputs be searched for what is written to a data folder, nor scans in its ``raw`` be written over.

    Raises:
        PhotonError: ``OUTPUT_MISPLACED`` when the data folder lies inside an input folder, or one inside its ``raw``.
    """
    target = data.resolve()
    for folder in (path.resolve() for path in inputs):
        if target.is_relative_to(folder) or folder.is_relative_to(target / "raw"):
            fact = f"the data folder and {folder} lie inside each other."
            raise PhotonError("OUTPUT_MISPLACED", data, fact, "Choose a data folder beside it.")


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``target``; on success it is fsynced and renamed to ``target``.

    A reader sees the old file or the whole new one, never a part of it.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(target)
        _sync_folder(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(target: Path, *parts: bytes | memoryview) -> None:
    """Write the parts to ``target``, one after another, atomically."""
    with atomic_path(target) as temporary, temporary.open("wb") as stream:
        for part in parts:
            stream.write(part)


def write_text(target: Path, content: str) -> None:
    """Write ``content`` to ``target`` atomically, as UTF-8."""
    write_bytes(target, content.encode("utf-8"))


def write_json(target: Path, content: Any) -> None:
    """Write ``content`` as readable JSON, atomically; numbers that JSON has no word for are an error."""
    write_text(target, json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(source: Path, code: str, remedy: str) -> Any:
    """Read JSON.

    Raises:
        PhotonError: ``code`` when the file is missing or is not JSON.
    """
    try:
        return json.loads(source.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PhotonError(code, source, "the file does not exist.", remedy) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PhotonError(code, source, f"the file is not valid JSON ({error}).", remedy) from error


def file_digest(source: Path, algorithm: Callable[[], Any] = hashlib.sha256) -> str:
    """Hex digest of a file's bytes, read in pieces."""
    digest = algorithm()
    with source.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock_output(folder: Path) -> Iterator[None]:
    """Keep a second process out of `folder` while this one writes to it.

    The system drops the lock when its holder dies, however it dies, so no stale lock is ever left behind.

    Raises:
        PhotonError: `OUTPUT_BUSY` when another process holds it.
    """
    path = folder / ".lock"
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            raise PhotonError(
                "OUTPUT_BUSY",
                folder,
                f"another process (pid {stream.read().strip() or 'unknown'}) is writing to this folder.",
                "Wait until it has finished, or choose another output folder.",
            ) from error
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield
