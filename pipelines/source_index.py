"""What a run learned about source files, so that the next one need not read unchanged ones again.

The truth about a source is the hash of its bytes. The index only spares computing it: where size, times and inode of
every file of a source are what they were, its hash is too. Losing the index costs time and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.files import write_text

INDEX_FILE = ".sources.tmp"
SETTLED_S = 2.0
"""Files changed later than this before they were looked at are not trusted: a change within the clock's step is not
seen in their times."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Known:
    """What is known of a source.

    Args:
        signature: of its files, see :func:`signature_of`.
        sha256: of its bytes, None where it was refused before they were hashed.
        refusal: code, message and what they depend on besides the bytes; None for a usable scan.
    """

    signature: str
    sha256: str | None = None
    refusal: tuple[str, str, str] | None = None


class SourceIndex:
    """The index of one output folder. Several processes may append to it."""

    def __init__(self, folder: Path) -> None:
        """Read the index of ``folder``; what cannot be read of it is unknown."""
        self.path = folder / INDEX_FILE
        self.known: dict[str, Known] = {}
        try:
            lines = self.path.read_bytes().split(b"\n")
        except OSError:
            return
        for line in lines:
            try:
                name, signature, sha256, refusal = json.loads(line)
                self.known[name] = Known(
                    signature=signature, sha256=sha256, refusal=None if refusal is None else tuple(refusal)
                )
            except (ValueError, TypeError):  # the last line of a killed run
                continue

    @contextmanager
    def appending(self) -> Iterator[Appender]:
        """For the length of the block, note what is learned as it is learned."""
        with self.path.open("ab", buffering=0) as stream:
            yield Appender(self, stream)

    def keep_only(self, names: Iterable[str]) -> None:
        """Rewrite the file with one line for each of these sources."""
        wanted = set(names)
        self.known = {name: known for name, known in self.known.items() if name in wanted}
        write_text(self.path, "".join(_line(name, known) for name, known in sorted(self.known.items())))


class Appender:
    """Writes lines to an open index."""

    def __init__(self, index: SourceIndex, stream: Any) -> None:
        self._index, self._stream = index, stream

    def note(self, name: str, known: Known) -> None:
        """Remember a source; one write, so that lines of several processes do not mix."""
        if self._index.known.get(name) != known:
            self._index.known[name] = known
            self._stream.write(b"\n" + _line(name, known).encode())


def signature_of(path: Path) -> str | None:
    """What the file system says about a source's files: names, sizes, times, inodes.

    None where a file is missing, or was changed just now.
    """
    files = [path]
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.is_file())
        stats = [file.stat() for file in files]
    except OSError:
        return None
    if any(max(found.st_ctime, found.st_mtime) > time.time() - SETTLED_S for found in stats):
        return None
    digest = hashlib.sha256()
    for file, found in zip(files, stats, strict=True):
        numbers = (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)
        digest.update(os.fsencode(file.name) + repr(numbers).encode())
    return digest.hexdigest()[:32]


def _line(name: str, known: Known) -> str:
    return json.dumps([name, known.signature, known.sha256, known.refusal]) + "\n"
