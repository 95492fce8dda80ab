"""Reading exactly the bytes a header promises, plain or compressed, and proving that they are whole.

Readers that stop at the last voxel never reach the checksum behind it and accept most flipped bits; this one
always reads to the end of the file.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from isal import isal_zlib

from photon.errors import PhotonError

Encoding = Literal["plain", "gzip", "zlib"]

MAX_RATIO = 1040
"""Deflate cannot expand a byte to more than this many."""

MAX_UNPROVEN_BYTES = 1 << 30
MAX_LARGE_RATIO = 200
"""Voxels that need more than `MAX_UNPROVEN_BYTES` must not be compressed more than this: real scans reach 10,
empty label maps 1000, but those are small."""

MAX_DRAIN = 1 << 28
GZIP_MAGIC = b"\x1f\x8b"
GZIP_RESERVED_FLAGS = 0xE0
"""Bits of a gzip header's fourth byte that RFC 1952 wants to be zero; the decoder does not look at them, and we do at
the beginning of a stream only."""

_BLOCK = 1 << 22
_READ_AHEAD = 1 << 19
_MEMBER_BLOCK = 1 << 12
_GET_AGAIN = "Copy the file again from its source."


class _GoesOn(Exception):
    """A compressed stream is whole, and bytes of something else follow."""


class _HashedFile(io.RawIOBase):
    """A file whose bytes enter a checksum as they are read."""

    def __init__(self, path: Path, digest: Any) -> None:
        self._file = path.open("rb", buffering=0)
        self._digest = digest

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self._digest.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _ZlibReader:
    """One zlib stream, which ends in a checksum of its own (Adler-32)."""

    def __init__(self, source: Any) -> None:
        self._source, self._inflate, self._input = source, isal_zlib.decompressobj(), b""

    def readinto(self, buffer: memoryview) -> int:
        while not self._inflate.eof:
            block = self._input or self._source.read(_READ_AHEAD // 8)
            if not block:
                raise EOFError
            output = self._inflate.decompress(block, len(buffer))
            self._input = self._inflate.unconsumed_tail
            if output:
                buffer[: len(output)] = output
                return len(output)
        if self._inflate.unused_data or self._source.peek(1):
            raise _GoesOn
        return 0


class ScanStream:
    """Bytes of one scan file, in order. Use as a context manager.

    Args:
        digest: a running checksum to go on with, for a scan of two files.

    Raises:
        PhotonError: from every method, ``SCAN_MISSING``, ``SCAN_UNREADABLE``, ``GZIP_CORRUPT``,
            ``SCAN_TRUNCATED`` or ``SCAN_TRAILING_DATA``.
    """

    def __init__(self, path: Path, digest: Any = None) -> None:
        self.path = path
        self.encoding: Encoding = "plain"
        self.digest = digest or hashlib.sha256()
        try:
            self.file_size = path.stat().st_size
            self._file = io.BufferedReader(_HashedFile(path, self.digest), 1 << 16)
        except FileNotFoundError as error:
            raise PhotonError("SCAN_MISSING", path, "the file does not exist.", "Check the path.") from error
        except OSError as error:
            fact = f"the file cannot be opened ({error.strerror})."
            raise PhotonError("SCAN_UNREADABLE", path, fact, "Check its permissions.") from error
        self._decoder: Any = self._file
        self._start = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def peek(self, num_bytes: int) -> bytes:
        """The next bytes of the file as stored, which are not taken."""
        try:
            start = self._file.peek(num_bytes)[:num_bytes]
            if len(start) < num_bytes:  # the buffer ends here, the file perhaps not
                with self.path.open("rb") as file:
                    file.seek(self._file.tell())
                    start = file.read(num_bytes)
            return start
        except OSError as error:
            raise self._unreadable(error) from error

    def decode(self, encoding: Encoding) -> None:
        """From here on the file is compressed in this way."""
        self.encoding, self._start = encoding, self._file.tell()
        if encoding == "gzip":
            start = self.peek(4)
            if start.startswith(GZIP_MAGIC) and len(start) == 4 and start[3] & GZIP_RESERVED_FLAGS:
                raise self._corrupt("reserved flags are set in its header")
            # isal's own file object copies every block once more.
            self._decoder = isal_zlib._GzipReader(self._file, _READ_AHEAD)
        elif encoding == "zlib":
            self._decoder = _ZlibReader(self._file)

    def read(self, num_bytes: int) -> bytes:
        """The next bytes, fewer only at the end of the stream."""
        content = bytearray()
        while len(content) < num_bytes:
            block = bytearray(min(num_bytes - len(content), _BLOCK))
            count = self._read_into(memoryview(block))
            if count == 0:
                break
            content += block[:count]
        return bytes(content)

    def read_line(self, max_bytes: int) -> bytes:
        """The next line of a plain file with its end; without one when the file ends or the line is too long."""
        try:
            return self._file.readline(max_bytes)
        except OSError as error:
            raise self._unreadable(error) from error

    def bytes_left(self) -> int:
        """How many bytes of a plain file are still to come."""
        return self.file_size - self._file.tell()

    def skip(self, num_bytes: int) -> None:
        """Pass over bytes that must be there."""
        while num_bytes > 0:
            block = self.read(min(num_bytes, _BLOCK))
            if not block:
                raise self._truncated(f"{num_bytes} bytes are missing before the voxels.")
            num_bytes -= len(block)

    def read_array(self, dtype: np.dtype, num_items: int) -> np.ndarray:
        """The next values as [num_items] in the machine's byte order; memory is touched only as far as the file
        delivers.

        Raises:
            PhotonError: also ``SCAN_TOO_LARGE`` for a file that is too small for so many voxels to be real.
        """
        needed = num_items * dtype.itemsize
        self._check_plausible(needed)
        array = np.empty(num_items, dtype)
        target = memoryview(array.view(np.uint8))  # type: ignore[arg-type]
        filled = 0
        while filled < needed:
            count = self._read_into(target[filled : filled + _BLOCK])
            if count == 0:
                raise self._truncated(f"the header declares {needed} bytes of voxels, the file holds {filled}.")
            filled += count
        if dtype.isnative:
            return array
        return array.byteswap(inplace=True).view(dtype.newbyteorder("="))

    def finish(self) -> str:
        """Read to the end, which checks the checksum; nothing may be left. Returns the file's sha256.

        Raises:
            PhotonError: also ``SCAN_TRAILING_DATA``.
        """
        if self._read_into(memoryview(bytearray(1))):
            raise PhotonError(
                "SCAN_TRAILING_DATA",
                self.path,
                "the file holds more bytes than its header declares.",
                "Check the dimensions in the header, or write the scan again.",
            )
        return str(self.digest.hexdigest())

    def drain(self) -> None:
        """Read on, at most 256 MiB, only to find out whether a compressed stream is damaged."""
        block = memoryview(bytearray(_BLOCK))
        for _ in range(MAX_DRAIN // _BLOCK if self.encoding != "plain" else 0):
            if not self._read_into(block):
                return

    def _check_plausible(self, needed: int) -> None:
        at_most = self.file_size * (1 if self.encoding == "plain" else MAX_RATIO)
        if needed > at_most:
            raise self._truncated(f"the header declares {needed} bytes of voxels, the file can hold {at_most}.")
        if needed > MAX_UNPROVEN_BYTES and needed > self.file_size * MAX_LARGE_RATIO:
            fact = f"{self.file_size} bytes claim to hold {needed} bytes of voxels, as no real scan does."
            raise PhotonError("SCAN_TOO_LARGE", self.path, fact, "Check where the file comes from.")

    def _read_into(self, buffer: memoryview) -> int:
        try:
            return int(self._decoder.readinto(buffer))
        except _GoesOn as error:
            raise self._goes_on() from error
        except EOFError as error:
            if self._is_followed_by_other_bytes():
                raise self._goes_on() from error
            raise self._truncated("the compressed stream ends in the middle.") from error
        except (gzip.BadGzipFile, zlib.error, isal_zlib.IsalError) as error:  # type: ignore[misc]
            if self._is_followed_by_other_bytes():
                raise self._goes_on() from error
            raise self._corrupt(str(error)) from error
        except OSError as error:
            raise self._unreadable(error) from error

    def _is_followed_by_other_bytes(self) -> bool:
        """Whether a gzip stream that cannot be read on is whole, and what follows is neither zeros, with which tapes
        and blocks are filled up, nor another member.

        The decoder does not tell damage from such bytes. Only what it failed on is read again, as far as it came.
        """
        if self.encoding != "gzip":
            return False
        num_whole, member, content = 0, None, b""
        try:
            with self.path.open("rb") as file:
                file.seek(self._start)
                while content := content or file.read(_MEMBER_BLOCK):
                    if member is None:
                        content = content.lstrip(b"\0")
                        if not content:
                            continue
                        if len(content) < len(GZIP_MAGIC):
                            content += file.read(_MEMBER_BLOCK)
                        if not GZIP_MAGIC.startswith(content[: len(GZIP_MAGIC)]):
                            return num_whole > 0
                        member = zlib.decompressobj(wbits=31)
                    member.decompress(content)  # at most `MAX_RATIO` times a block
                    content = member.unused_data
                    if member.eof:
                        num_whole, member = num_whole + 1, None
        except (OSError, zlib.error):
            pass
        return False

    def _corrupt(self, reason: str) -> PhotonError:
        fact = f"the compressed stream is damaged ({reason})."
        return PhotonError("GZIP_CORRUPT", self.path, fact, _GET_AGAIN)

    def _goes_on(self) -> PhotonError:
        fact = "the file goes on behind the end of its compressed stream."
        return PhotonError("SCAN_TRAILING_DATA", self.path, fact, _GET_AGAIN)

    def _truncated(self, fact: str) -> PhotonError:
        return PhotonError("SCAN_TRUNCATED", self.path, fact, _GET_AGAIN)

    def _unreadable(self, error: OSError) -> PhotonError:
        return PhotonError("SCAN_UNREADABLE", self.path, f"the file cannot be read ({error}).", _GET_AGAIN)
