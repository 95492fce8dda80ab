"""Voxels of a volume as compressed slabs: the only module that knows blosc2.

A slab is 14 planes, the depth of a patch. Bits are shuffled (all lowest bits first) and packed by LZ4; the choice is
from measurement (docs/decisions.md). Number of threads and size of blocks are fixed, so that the same voxels give the
same bytes on every machine. The library is loaded when the first volume is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.grids import PATCH

LEVEL = 5
BLOCK_BYTES = 1 << 17


def pack_slab(slab: np.ndarray) -> bytes:
    """int16 [planes, Y, X], contiguous and little endian -> its compressed bytes."""
    import blosc2

    return blosc2.compress2(
        slab,
        typesize=2,
        codec=blosc2.Codec.LZ4,
        clevel=LEVEL,
        filters=[blosc2.Filter.BITSHUFFLE],
        blocksize=BLOCK_BYTES,
        nthreads=1,
    )


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


def slabs_of(voxels: np.ndarray) -> list[np.ndarray]:
    """Views of the slabs of voxels [Z, Y, X], lowest Z first; the last one may be thinner."""
    return [voxels[start : start + PATCH] for start in range(0, len(voxels), PATCH)]
