"""Voxels of a volume as compressed slabs: the only module that knows blosc2.

A slab is 14 planes, the depth of a patch. Bits are shuffled (all lowest bits first) and packed by LZ4; the choice is
from measurement (docs/decisions.md). Number of threads and size of blocks are fixed, so that the same voxels give the
same bytes on every machine. The library is loaded when the first volume is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pipelines.grids import PATCH

LEVEL = 5
BLOCK_BYTES = 1 << 17
MAX_PACKED_BYTES = 1 << 31
"""blosc2 packs no more at once."""


def pack_slabs(slabs: Iterable[np.ndarray]) -> Iterator[bytes]:
    """int16 [planes, Y, X], contiguous and little endian -> its compressed bytes, one slab after another.

    All but the last have the size of the first. A slab is packed before the next one is asked for.
    """
    import blosc2

    options = {
        "typesize": 2,
        "codec": blosc2.Codec.LZ4,
        "clevel": LEVEL,
        "filters": [blosc2.Filter.BITSHUFFLE],
        "blocksize": BLOCK_BYTES,
        "nthreads": 1,
    }
    packer = None
    for slab in slabs:
        # One that is kept spares the memory that `compress2` takes, clears and copies for every slab.
        if packer is None:
            packer = blosc2.SChunk(chunksize=slab.nbytes, cparams=options)
        packer.append_data(slab)
        yield packer.get_chunk(0)
        packer.delete_chunk(0)


def unpack(packed: Sequence[bytes | memoryview], shape: tuple[int, int, int]) -> np.ndarray:
    """Compressed slabs -> int16 [Z, Y, X].

    Raises:
        ValueError: they are not the slabs of a volume of this shape.
    """
    import blosc2

    voxels = np.empty(shape, "<i2")
    slabs = slabs_of(voxels)
    if len(packed) != len(slabs):
        raise ValueError(f"{len(packed)} slabs instead of {len(slabs)}")
    for source, slab in zip(packed, slabs, strict=True):
        try:
            num_bytes = blosc2.get_cbuffer_sizes(source)[0]
            if num_bytes != slab.nbytes:
                raise ValueError(f"a slab of {num_bytes} bytes instead of {slab.nbytes}")
            blosc2.decompress2(source, dst=slab, nthreads=1)
        except RuntimeError as error:
            raise ValueError(f"a slab cannot be unpacked: {error}") from error
    return voxels


def num_slabs_of(shape: tuple[int, int, int]) -> int:
    """How many slabs voxels [Z, Y, X] have."""
    return -(-shape[0] // PATCH)


def slabs_of(voxels: np.ndarray) -> list[np.ndarray]:
    """Views of the slabs of voxels [Z, Y, X], lowest Z first; the last one may be thinner."""
    return [voxels[start : start + PATCH] for start in range(0, len(voxels), PATCH)]
