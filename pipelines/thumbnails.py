"""Small grey pictures of slices for pages with hundreds of them: scale, letters and lines are left to the page."""

from __future__ import annotations

import struct
import zlib

import numpy as np
from numpy.typing import NDArray

from pipelines.slices import Plane, display_window, make_planes

MAX_SIDE = 128
"""Longest side in pixels; larger slices are averaged down."""
GREY_STEP = 4
"""Greys are rounded to this step of 255: the eye does not see it, and the picture is half as large."""


def centre_planes(voxels: NDArray[np.integer], spacing_mm: tuple[float, float, float]) -> list[Plane]:
    """Axial, coronal and sagittal slices through the centre of a volume [Z, Y, X], a pixel a voxel."""
    z, y, x = (side // 2 for side in voxels.shape)
    step = max(1, max(voxels.shape) // MAX_SIDE)  # percentiles of every voxel would take most of the time
    window = display_window(voxels[::step, ::step, ::step])
    return make_planes(voxels, centre=(z, y, x), spacing_mm=spacing_mm, window_hu=window, pixels_per_plane=1)


def thumbnail(plane: Plane) -> bytes:
    """A plane as a grey PNG, its pixels not necessarily square."""
    grey = _reduced(plane.pixels[..., 0])
    return grey_png((np.rint(grey * (255 / GREY_STEP)) * GREY_STEP).clip(0, 255).astype(np.uint8))


def grey_png(pixels: NDArray[np.uint8]) -> bytes:
    """Grey values [H, W] as a PNG file; the same values give the same bytes."""
    height, width = pixels.shape
    above = np.vstack([np.zeros((1, width), np.uint8), pixels[:-1]])
    rows = np.hstack([np.full((height, 1), 2, np.uint8), pixels - above])  # filter 2: the row above is subtracted
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _reduced(grey: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means over whole boxes, so that no side is longer than `MAX_SIDE`; a rest at the end is left out."""
    rows, columns = (-(-side // MAX_SIDE) for side in grey.shape)
    height, width = grey.shape[0] // rows, grey.shape[1] // columns
    boxes = grey[: height * rows, : width * columns].reshape(height, rows, width, columns)
    return boxes.mean(axis=(1, 3), dtype=np.float32)
