"""The shape of a mask in millimetres: connected parts, largest diameter, distance. The only importer of scipy.

Masks are bool arrays of three axes. Their matrix maps an array index to millimetres and may be of any kind:
anisotropic, tilted, sheared, mirrored.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, find_objects, label
from scipy.spatial import ConvexHull, cKDTree
from scipy.spatial.distance import cdist

BoolArray = NDArray[np.bool_]
_ROWS_AT_ONCE = 512


def components(mask: BoolArray) -> list[np.ndarray]:
    """Face-connected parts of a mask, each as voxel indices int64 [n, 3]."""
    names, num_parts = label(mask)
    where = np.argwhere(mask)
    found = names[tuple(where.T)]
    order = np.argsort(found, kind="stable")
    ends = np.searchsorted(found[order], np.arange(1, num_parts + 2))
    return [where[order[first:last]] for first, last in zip(ends[:-1], ends[1:], strict=True)]


def part_mask(points: np.ndarray) -> tuple[BoolArray, np.ndarray]:
    """Mask that just holds voxels [n, 3], and the index int64 [3] of its first corner."""
    corner = points.min(axis=0)
    mask = np.zeros(points.max(axis=0) - corner + 1, bool)
    mask[tuple((points - corner).T)] = True
    return mask, corner


def largest_diameter_mm(mask: BoolArray, matrix: np.ndarray) -> float:
    """Largest distance between two points of the surface: the centres of the outer faces of the voxels.

    These are the corners of the surface that marching cubes puts around a mask, so this is the "maximum 3D
    diameter" of radiomics: ``n * spacing`` for a row of ``n`` voxels.

    Args:
        mask: bool of three axes, at least one voxel True.
        matrix: [3, 3] or [4, 4], array index to millimetres.
    """
    points = _outermost_faces(mask) @ np.asarray(matrix, np.float64)[:3, :3].T
    corners = points[ConvexHull(points).vertices]
    parts = range(0, len(corners), _ROWS_AT_ONCE)
    return max(float(cdist(corners[start : start + _ROWS_AT_ONCE], corners).max()) for start in parts)


def _outermost_faces(mask: BoolArray) -> np.ndarray:
    """Centres [n, 3], in voxels, of the first and the last face in every row of voxels along every axis; the
    other faces lie between these."""
    points = []
    for axis in range(3):
        rows = np.moveaxis(mask, axis, 2)
        hit = np.argwhere(rows.any(axis=2))
        inside = rows[hit[:, 0], hit[:, 1]]
        first = inside.argmax(axis=1) - 0.5
        last = mask.shape[axis] - 0.5 - inside[:, ::-1].argmax(axis=1)
        for end in (first, last):
            points.append(np.insert(hit.astype(np.float64), axis, end, axis=1))
    return np.concatenate(points)


def surface_mm(mask: BoolArray, matrix: np.ndarray) -> np.ndarray:
    """Centres float64 [n, 3] in millimetres of the voxels that have a face outside the mask.

    Args:
        matrix: [4, 4], array index to millimetres.
    """
    padded = np.pad(mask, 1)
    inner = mask.copy()
    for axis in range(3):
        for step in (-1, 1):
            inner &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(mask & ~inner) @ matrix[:3, :3].T + matrix[:3, 3]


def nearest_mm(points: np.ndarray, others: list[np.ndarray]) -> list[float]:
    """For each of several point sets [n, 3] its smallest distance to ``points`` [m, 3]."""
    tree = cKDTree(points)
    return [float(tree.query(other)[0].min()) for other in others]


def label_boxes(labels: np.ndarray) -> dict[int, tuple[slice, slice, slice]]:
    """The smallest box of every value above 0 in a label map of whole numbers."""
    boxes = find_objects(labels)
    return {value: box for value, box in enumerate(boxes, start=1) if box is not None}


def rim(mask: BoolArray) -> BoolArray:
    """The voxels that share a face with a mask and do not belong to it."""
    return binary_dilation(mask) & ~mask
