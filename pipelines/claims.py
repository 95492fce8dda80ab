"""Who works on which entry of a folder that several processes fill at once.

Claims are byte-range locks on one file: the system drops them when their holder dies, however it dies, so that none is
ever stale, and ten thousand of them leave no files behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from photon.errors import PhotonError

# Names that versions of the data pass over (see `versioning.IGNORED`).
CLAIMS_FILE = ".claims.tmp"
SETTINGS_FILE = ".settings.tmp"


@contextmanager
def claim(folder: Path, name: str, *, is_waiting: bool = False) -> Iterator[bool]:
    """Claim an entry of ``folder`` for the length of the block; yields whether it is ours.

    Args:
        is_waiting: wait for the present holder to finish or die; otherwise the answer comes at once.
    """
    start = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:7], "big")
    with (folder / CLAIMS_FILE).open("a+b") as stream:
        yield _lock(stream.fileno(), start, is_shared=False, is_waiting=is_waiting)


@contextmanager
def share_folder(folder: Path, settings: str) -> Iterator[None]:
    """Fill ``folder`` together with other processes that have the same settings, and only with these.

    Raises:
        PhotonError: ``OUTPUT_BUSY`` when a process with other settings is filling it.
    """
    with (folder / SETTINGS_FILE).open("a+b") as stream:
        descriptor = stream.fileno()
        if _lock(descriptor, 0, is_shared=False, is_waiting=False):
            stream.truncate(0)
            stream.write(settings.encode())
            stream.flush()
        # Ours becomes a shared one without a gap; another's first has to.
        _lock(descriptor, 0, is_shared=True, is_waiting=True)
        stream.seek(0)
        if stream.read().decode() != settings:
            fact = "another process fills this folder from another input or with other settings."
            raise PhotonError(
                "OUTPUT_BUSY", folder, fact, "Wait until it has finished, or choose another output folder."
            )
        yield


def _lock(descriptor: int, start: int, *, is_shared: bool, is_waiting: bool) -> bool:
    try:
        if hasattr(fcntl, "F_OFD_SETLK"):
            # Linux: the lock belongs to the open file, so that it holds between threads, too. struct flock: type,
            # whence, start, length, pid, and what rounds it up.
            command = fcntl.F_OFD_SETLKW if is_waiting else fcntl.F_OFD_SETLK
            fcntl.fcntl(
                descriptor,
                command,
                struct.pack("hhqqi0q", fcntl.F_RDLCK if is_shared else fcntl.F_WRLCK, os.SEEK_SET, start, 1, 0),
            )
        else:
            kind = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX
            fcntl.lockf(descriptor, kind if is_waiting else kind | fcntl.LOCK_NB, 1, start)
    except (BlockingIOError, PermissionError):  # which of the two is up to the system
        return False
    return True
