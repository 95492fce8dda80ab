"""Scans that benchmarks of preprocessing work on."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

SHAPE, SPACING_MM = (512, 512, 200), (0.7, 0.7, 1.5)
GZIP_LEVEL = 6


def write_generated_scan(path: Path) -> None:
    """A CT of 512 x 512 x 200 int16 voxels of 0.7 x 0.7 x 1.5 mm: air, a body with organs, noise; about 2.3 times as
    large as its gzip file, as real ones are."""
    import nibabel

    random = np.random.default_rng(0)
    x, y = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in SHAPE[:2]), indexing="ij")
    array = np.empty(SHAPE, np.int16, order="F")
    for index, z in enumerate(np.linspace(-1, 1, SHAPE[2])):
        plane = np.full(SHAPE[:2], -1000.0, np.float32)
        plane[(x / 0.85) ** 2 + (y / 0.6) ** 2 < 1] = -100
        plane[(x / 0.8) ** 2 + (y / 0.55) ** 2 < 1] = 40
        for side in (-0.4, 0.4):
            plane[((x - side) / 0.28) ** 2 + (y / 0.4) ** 2 + (z / 0.8) ** 2 < 1] = -850
        plane[(x / 0.1) ** 2 + ((y - 0.38) / 0.1) ** 2 < 1] = 600
        plane += 30 * np.sin(9 * x + 5 * z) * np.cos(7 * y) * (plane > -900)
        plane += random.standard_normal(SHAPE[:2], np.float32) * np.where(plane > -900, 14, 4)
        array[:, :, index] = np.rint(plane).clip(-1024, 3071)
    affine = np.diag([-SPACING_MM[0], -SPACING_MM[1], SPACING_MM[2], 1.0])  # LPS, as scanners write
    affine[:3, 3] = 180.0, 175.0, -150.0
    content = nibabel.Nifti1Image(array, affine).to_bytes()
    path.write_bytes(gzip.compress(content, GZIP_LEVEL, mtime=0))
