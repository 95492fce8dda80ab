"""Parts, diameters and distances of masks whose measures are known by construction."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipelines.shapes import components, label_boxes, largest_diameter_mm, nearest_mm, part_mask, rim, surface_mm


def turned(degrees: float, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """A matrix of these spacings, turned about the third axis and then about the first."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    about_third = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    about_first = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]])
    return about_first @ about_third @ np.diag(spacing_mm)


def ball(radius_mm: float, matrix: np.ndarray, size: int = 61) -> np.ndarray:
    """Voxels whose centres lie within ``radius_mm`` of the middle voxel's, in millimetres."""
    index = np.stack(np.meshgrid(*[np.arange(size) - size // 2] * 3, indexing="ij"), axis=-1)
    return np.asarray(((index @ matrix[:3, :3].T) ** 2).sum(axis=-1) <= radius_mm**2)


def test_parts_touch_by_faces_alone() -> None:
    mask = np.zeros((5, 6, 7), bool)
    mask[0, 0, :3] = mask[1, 0, 2] = True  # an L
    mask[2, 1, 2] = True  # touches it by an edge
    mask[4, 5, 6] = True
    parts = components(mask)
    assert sorted(len(points) for points in parts) == [1, 1, 4]
    assert {tuple(p) for p in max(parts, key=len)} == {(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 0, 2)}
    assert components(np.zeros((3, 3, 3), bool)) == []


def test_part_mask_is_the_part_and_its_corner() -> None:
    points = np.array([[4, 7, 9], [5, 7, 9], [5, 8, 9]])
    mask, corner = part_mask(points)
    assert mask.shape == (2, 2, 1) and corner.tolist() == [4, 7, 9]
    assert (np.argwhere(mask) + corner).tolist() == points.tolist()


@pytest.mark.parametrize("count", [1, 2, 9])
def test_row_of_voxels_is_as_long_as_its_voxels_together(count: int) -> None:
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = count
        spacing = [0.5, 0.5, 0.5]
        spacing[axis] = 3.0
        assert largest_diameter_mm(np.ones(shape, bool), np.diag(spacing)) == pytest.approx(3.0 * count)


def test_diameter_of_a_box_is_that_of_its_face_centres() -> None:
    mask = np.zeros((40, 50, 60), bool)
    mask[3:13, 5:10, 7:27] = True
    # From the first face along the longest axis to the last, at opposite corners of the two others.
    expected = math.sqrt((20 * 3.0) ** 2 + (9 * 2.0) ** 2 + (4 * 1.0) ** 2)
    assert largest_diameter_mm(mask, np.diag([2.0, 1.0, 3.0])) == pytest.approx(expected)


@pytest.mark.parametrize("degrees", [0.0, 20.0, 45.0])
@pytest.mark.parametrize("spacing_mm", [(1.0, 1.0, 1.0), (0.8, 0.8, 2.5)])
def test_ball_has_its_diameter_in_every_orientation(degrees: float, spacing_mm: tuple[float, float, float]) -> None:
    matrix = turned(degrees, spacing_mm)
    found = largest_diameter_mm(ball(20.0, matrix), matrix)
    assert 40.0 - min(spacing_mm) <= found <= 40.0 + max(spacing_mm) + 1e-9


def test_diameter_is_that_of_brute_force() -> None:
    random = np.random.default_rng(0)
    mask = random.random((6, 7, 5)) < 0.2
    matrix = random.normal(size=(3, 3))
    padded = np.pad(mask, 1)
    faces = []
    for axis in range(3):
        for step in (-1, 1):
            open_faces = padded & ~np.roll(padded, step, axis)
            points = np.argwhere(open_faces).astype(float)
            points[:, axis] -= step * 0.5
            faces.append(points)
    points = np.concatenate(faces) @ matrix.T
    expected = np.linalg.norm(points[:, None] - points[None], axis=-1).max()
    assert largest_diameter_mm(mask, matrix) == pytest.approx(expected)


def test_surface_and_distance() -> None:
    mask = np.zeros((7, 7, 7), bool)
    mask[1:6, 1:6, 1:6] = True
    matrix = np.diag([1.0, 2.0, 3.0, 1.0])
    matrix[:3, 3] = (10, 20, 30)
    surface = surface_mm(mask, matrix)
    assert len(surface) == 5**3 - 3**3
    assert surface.min(axis=0).tolist() == [11, 22, 33] and surface.max(axis=0).tolist() == [15, 30, 45]
    assert len(surface_mm(np.ones((3, 3, 3), bool), matrix)) == 26  # the edge of the array is outside too
    others = [np.array([[11.0, 22.0, 13.0]]), np.array([[15.0, 30.0, 49.0], [99.0, 99.0, 99.0]])]
    assert nearest_mm(surface, others) == [20.0, 4.0]


def test_rim_and_boxes() -> None:
    mask = np.zeros((5, 5, 5), bool)
    mask[2, 2, 2] = True
    assert np.argwhere(rim(mask)).tolist() == [
        [1, 2, 2],
        [2, 1, 2],
        [2, 2, 1],
        [2, 2, 3],
        [2, 3, 2],
        [3, 2, 2],
    ]
    labels = np.zeros((5, 6, 7), np.uint8)
    labels[1, 2, 3] = labels[4, 5, 6] = 9
    assert label_boxes(labels) == {9: (slice(1, 5), slice(2, 6), slice(3, 7))}
