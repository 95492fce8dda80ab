"""Voxels of a volume as compressed slabs: the only module that knows numcodecs.

A slab is 14 planes, the depth of a patch. Bits are shuffled (all lowest bits first) and packed by LZ4 in a buffer of
blosc; the choice is from measurement (docs/decisions.md). A slab is packed by one thread in blocks of a fixed size, so
that the same voxels give the same bytes on every machine. The library is loaded when the first volume is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from types import ModuleType

import numpy as np

from pipelines.grids import PATCH, SlabMaker

LEVEL = 5
BLOCK_BYTES = 1 << 17
MAX_PACKED_BYTES = (1 << 31) - 17
"""blosc packs no more at once."""


def pack_slabs(makers: Sequence[SlabMaker], num_slabs: int) -> Iterator[bytes]:
    """The compressed bytes of slabs 0, 1, ... in order, each made and packed by one of as many threads as there are
    makers.

    Args:
        makers: number of a slab -> int16 [planes, Y, X], contiguous and little endian, which may be overwritten by the
            maker's next one; only one thread at a time calls a maker.
    """
    blosc = _blosc()
    idle = deque(makers)

    def pack(number: int) -> bytes:
        maker = idle.pop()
        try:
            return bytes(blosc.compress(maker(number), b"lz4", LEVEL, blosc.BITSHUFFLE, BLOCK_BYTES))
        finally:
            idle.append(maker)

    if len(makers) == 1:
        yield from map(pack, range(num_slabs))
        return
    with ThreadPoolExecutor(len(makers)) as pool:
        waiting: deque[Future[bytes]] = deque()
        for number in range(num_slabs):
            waiting.append(pool.submit(pack, number))
            if len(waiting) > len(makers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def unpack(packed: Sequence[bytes | memoryview], shape: tuple[int, int, int]) -> np.ndarray:
    """Compressed slabs -> int16 [Z, Y, X].

    Raises:
        ValueError: they are not the slabs of a volume of this shape.
    """
    blosc = _blosc()
    voxels = np.empty(shape, "<i2")
    slabs = slabs_of(voxels)
    if len(packed) != len(slabs):
        raise ValueError(f"{len(packed)} slabs instead of {len(slabs)}")
    for source, slab in zip(packed, slabs, strict=True):
        # The library believes what the header says: hold it against what is there and what it is for.
        num_bytes, num_packed = (int.from_bytes(source[first : first + 4], "little") for first in (4, 12))
        if (num_bytes, num_packed) != (slab.nbytes, len(source)):
            fact = f"{len(source)} packed bytes for {slab.nbytes} that say they are {num_packed} for {num_bytes}"
            raise ValueError(fact)
        try:
            blosc.decompress(source, slab)
        except RuntimeError as error:
            raise ValueError(f"a slab cannot be unpacked: {error}") from error
    return voxels


@cache
def _blosc() -> ModuleType:
    from numcodecs import blosc

    # Several threads would write the blocks of a slab in the order in which they finish.
    blosc.use_threads = False
    return blosc


def num_slabs_of(shape: tuple[int, int, int]) -> int:
    """How many slabs voxels [Z, Y, X] have."""
    return -(-shape[0] // PATCH)


def slabs_of(voxels: np.ndarray) -> list[np.ndarray]:
    """Views of the slabs of voxels [Z, Y, X], lowest Z first; the last one may be thinner."""
    return [voxels[start : start + PATCH] for start in range(0, len(voxels), PATCH)]
