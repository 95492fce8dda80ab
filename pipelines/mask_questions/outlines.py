"""One structure in numbers: volume, parts, diameter, place, values."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from pipelines.mask_questions.names import Structure
from pipelines.mask_questions.segmentation import BoolArray, Box, Region, Segmentation
from pipelines.shapes import components, largest_diameter_mm, part_mask, surface_mm


class Part:
    """A connected part of a structure.

    Args:
        points: its voxels int64 [n, 3], indices (Z, Y, X) of the scan.
        matrix: [4, 4], such an index to world RAS millimetres.
    """

    def __init__(self, points: np.ndarray, matrix: np.ndarray) -> None:
        self.points, self.matrix = points, matrix

    @functools.cached_property
    def volume_cm3(self) -> float:
        """Number of voxels times the volume of one, which a sheared matrix has too."""
        return len(self.points) * voxel_cm3(self.matrix)

    @functools.cached_property
    def centre_mm(self) -> np.ndarray:
        """Centre of mass, world RAS millimetres [3]."""
        return np.asarray(self.matrix[:3, :3] @ self.points.mean(axis=0) + self.matrix[:3, 3])

    @functools.cached_property
    def diameter_mm(self) -> float:
        """Largest diameter, as :func:`pipelines.shapes.largest_diameter_mm` defines it."""
        return largest_diameter_mm(part_mask(self.points)[0], self.matrix)

    @functools.cached_property
    def surface_mm(self) -> np.ndarray:
        """Its outermost voxels, world RAS millimetres [n, 3]."""
        mask, corner = part_mask(self.points)
        return surface_mm(mask, self.matrix) + self.matrix[:3, :3] @ corner


class Outline:
    """What can be measured of one structure in one scan."""

    def __init__(self, region: Region, segmentation: Segmentation) -> None:
        self.region, self.segmentation = region, segmentation

    @property
    def structure(self) -> Structure:
        """Which structure."""
        return self.region.structure

    @property
    def name(self) -> str:
        """The structure's name."""
        return self.structure.name

    @property
    def is_cut(self) -> bool:
        """Whether a part of it may lie outside the scan or, of a lesion, where its mask does not reach."""
        return self.region.is_cut or (self.structure.kind == "lesion" and not self.is_covered)

    @property
    def is_covered(self) -> bool:
        """Whether its mask reaches over the whole scan."""
        return self.region.is_covered

    @property
    def box(self) -> Box:
        """Where it lies."""
        return self.region.box

    @property
    def mask(self) -> BoolArray:
        """Which voxels of the box are its own."""
        return self.region.mask

    @functools.cached_property
    def num_voxels(self) -> int:
        """How many voxels it has."""
        return int(np.count_nonzero(self.mask))

    @property
    def volume_cm3(self) -> float:
        """Volume of all its parts."""
        return self.num_voxels * voxel_cm3(self.segmentation.matrix)

    @functools.cached_property
    def parts(self) -> list[Part]:
        """Its connected parts, the largest first."""
        corner = np.array([part.start for part in self.box])
        found = [Part(points + corner, self.segmentation.matrix) for points in components(self.mask)]
        return sorted(found, key=lambda part: (-len(part.points), *map(int, part.points[0])))

    @property
    def main(self) -> Part:
        """Its largest part."""
        return self.parts[0]

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The scan's values in it, float64 [n]."""
        return np.asarray(self.segmentation.values[self.box][self.mask], np.float64)

    @functools.cached_property
    def slice_counts(self) -> np.ndarray:
        """Its voxels in every axial slice of the scan, the lowest slice first: int64 [Z]."""
        counts = np.zeros(self.segmentation.values.shape[0], np.int64)
        counts[self.box[0]] = np.count_nonzero(self.mask, axis=(1, 2))
        return counts


def voxel_cm3(matrix: np.ndarray) -> float:
    """Volume of one voxel."""
    return abs(float(np.linalg.det(matrix[:3, :3]))) / 1000.0


def share_within(points: np.ndarray, outline: Outline) -> float:
    """Share of voxels (Z, Y, X) [n, 3] of the scan that belong to a structure."""
    if not len(points) or not outline.mask.size:
        return 0.0
    shifted = points - [part.start for part in outline.box]
    is_inside = ((shifted >= 0) & (shifted < outline.mask.shape)).all(axis=1)
    return float(outline.mask[tuple(shifted[is_inside].T)].sum()) / len(points)


def in_order(outlines: Sequence[Outline]) -> list[Outline]:
    """Outlines by name."""
    return sorted(outlines, key=lambda outline: outline.name)
