"""The bytes of a tar file as tarfile wants them, bounded: forwards only, and no piece larger than 1 MiB."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Self

from pipelines.scans.streams import ScanStream

TAR_BLOCK = 512
MAX_HEADER = 1 << 20
BLOCK = 1 << 20


class PlainFile:
    """An uncompressed archive; what is skipped is not read."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self.file_size = path.stat().st_size
        self.read = self._file.read

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def skip(self, num_bytes: int) -> None:
        self._file.seek(num_bytes, io.SEEK_CUR)


class TarSource:
    """A stream as tarfile wants it: read forwards only, in pieces of bounded size."""

    def __init__(self, stream: ScanStream | PlainFile) -> None:
        self._stream, self._position = stream, 0
        self.last_header = b""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        if whence != 0 or position < self._position:
            raise tarfile.ReadError("its entries overlap")
        self._stream.skip(position - self._position)
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        content = self._stream.read(size)
        self._position += len(content)
        if size == TAR_BLOCK:
            self.last_header = content
        return content

    def read_to_end(self) -> None:
        while block := self._stream.read(BLOCK):
            if block.strip(b"\0"):
                raise tarfile.ReadError("it goes on behind its end")
