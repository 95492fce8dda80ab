"""Reading exactly the bytes a header promises, from a plain or a gzip file, and proving that they are whole.

Readers that stop at the last voxel never reach gzip's checksum and accept most flipped bits; this one always
reads to the end of the stream.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import BinaryIO, Self, cast

import numpy as np

from photon.errors import PhotonError

MAX_GZIP_RATIO = 1040
"""Deflate cannot expand a byte to more than this many."""

MAX_DRAIN = 1 << 28

_BLOCK = 1 << 22
_GET_AGAIN = "Copy the file again from its source."


class ScanStream:
    """Bytes of one scan file, in order. Use as a context manager.

    Raises:
        PhotonError: from every method, ``SCAN_MISSING``, ``SCAN_UNREADABLE``, ``GZIP_CORRUPT`` or
            ``SCAN_TRUNCATED``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.is_gzip = path.name.lower().endswith(".gz")
        try:
            self.file_size = path.stat().st_size
            self._stream = cast(BinaryIO, gzip.open(path) if self.is_gzip else path.open("rb"))  # noqa: SIM115
        except FileNotFoundError as error:
            raise PhotonError("SCAN_MISSING", path, "the file does not exist.", "Check the path.") from error
        except OSError as error:
            raise PhotonError(
                "SCAN_UNREADABLE",
                path,
                f"the file cannot be opened ({error.strerror}).",
                "Check its permissions.",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def read(self, num_bytes: int) -> bytes:
        """The next bytes, fewer only at the end of the stream."""
        blocks = []
        while num_bytes > 0 and (block := self._read(min(num_bytes, _BLOCK))):
            blocks.append(block)
            num_bytes -= len(block)
        return b"".join(blocks)

    def skip(self, num_bytes: int) -> None:
        """Pass over bytes that must be there."""
        while num_bytes > 0:
            block = self._read(min(num_bytes, _BLOCK))
            if not block:
                raise self._truncated(f"{num_bytes} bytes are missing before the voxels.")
            num_bytes -= len(block)

    def read_array(self, dtype: np.dtype, num_items: int) -> np.ndarray:
        """The next ``num_items`` values as [num_items]; memory is touched only as far as the file
        delivers."""
        needed = num_items * dtype.itemsize
        at_most = self.file_size * (MAX_GZIP_RATIO if self.is_gzip else 1)
        if needed > at_most:
            raise self._truncated(f"the header declares {needed} bytes of voxels, the file can hold {at_most}.")
        array = np.empty(num_items, dtype)
        target = array.view(np.uint8)
        filled = 0
        while filled < needed:
            block = self._read(min(needed - filled, _BLOCK))
            if not block:
                raise self._truncated(f"the header declares {needed} bytes of voxels, the file holds {filled}.")
            target[filled : filled + len(block)] = np.frombuffer(block, np.uint8)
            filled += len(block)
        return array

    def finish(self) -> None:
        """Read to the end, which checks gzip's checksum; nothing may be left.

        Raises:
            PhotonError: also ``SCAN_TRAILING_DATA``.
        """
        if self._read(1):
            raise PhotonError(
                "SCAN_TRAILING_DATA",
                self.path,
                "the file holds more bytes than its header declares.",
                "Check the dimensions in the header, or write the scan again.",
            )

    def drain(self) -> None:
        """Read on, at most 256 MiB, only to find out whether a gzip stream is damaged."""
        for _ in range(MAX_DRAIN // _BLOCK if self.is_gzip else 0):
            if not self._read(_BLOCK):
                return

    def _read(self, num_bytes: int) -> bytes:
        try:
            return self._stream.read(num_bytes)
        except EOFError as error:
            raise self._truncated("the gzip stream ends in the middle.") from error
        except (gzip.BadGzipFile, zlib.error) as error:
            raise PhotonError(
                "GZIP_CORRUPT", self.path, f"the gzip stream is damaged ({error}).", _GET_AGAIN
            ) from error
        except OSError as error:
            raise PhotonError(
                "SCAN_UNREADABLE", self.path, f"the file cannot be read ({error}).", _GET_AGAIN
            ) from error

    def _truncated(self, fact: str) -> PhotonError:
        return PhotonError("SCAN_TRUNCATED", self.path, fact, _GET_AGAIN)
