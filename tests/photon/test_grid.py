"""Patches, boxes, windows and positions agree about where a voxel is."""

from __future__ import annotations

import pytest
import torch

from photon.errors import PhotonError
from photon.grid import (
    Grid,
    grid_of,
    num_visual_tokens,
    patch_coordinates,
    patchify,
    token_boxes,
    visual_positions,
    window_ids,
)
from photon.testing import micro_config

CONFIG = micro_config()  # patches of 2 x 2 x 2 voxels, tokens of 2 x 4 x 4
VISION = CONFIG.vision


@pytest.mark.parametrize("shape", [(6, 8, 12), (2, 4, 4), (4, 12, 4)])
def test_a_voxel_falls_into_the_token_whose_box_contains_it(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        place = [int(torch.randint(size, (), generator=generator)) for size in shape]
        volume = torch.zeros(shape)
        volume[tuple(place)] = 1.0
        patches, grid = patchify(volume, VISION)
        token = int(patches.any(1).nonzero()) // VISION.spatial_merge_size**2
        boxes = token_boxes(grid, VISION)
        inside = ((boxes[:, :, 0] <= torch.tensor(place)) & (torch.tensor(place) < boxes[:, :, 1])).all(1)
        assert inside.nonzero().flatten().tolist() == [token]


@pytest.mark.parametrize("shape", [(6, 8, 12), (2, 4, 4)])
def test_patches_are_cut_where_their_coordinates_say(shape: tuple[int, int, int]) -> None:
    volume = torch.arange(float(torch.tensor(shape).prod())).view(shape)
    patches, grid = patchify(volume, VISION)
    assert patches.shape == (grid[0] * grid[1] * grid[2], VISION.patch_voxels)
    for patch, (z, y, x) in zip(patches, patch_coordinates(grid, VISION).tolist(), strict=True):
        cut = volume[2 * z : 2 * z + 2, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert torch.equal(patch, cut.flatten())


def test_boxes_tile_the_volume() -> None:
    volume = torch.zeros(6, 8, 12)
    _, grid = patchify(volume, VISION)
    boxes = token_boxes(grid, VISION)
    assert len(boxes) == num_visual_tokens(grid, VISION) == 18
    for (z0, z1), (y0, y1), (x0, x1) in boxes.tolist():
        volume[z0:z1, y0:y1, x0:x1] += 1
    assert bool((volume == 1).all())
    assert boxes[0].tolist() == [[0, 2], [0, 4], [0, 4]]
    assert boxes[1].tolist() == [[0, 2], [0, 4], [4, 8]]
    assert boxes[3].tolist() == [[0, 2], [4, 8], [0, 4]]
    assert boxes[-1].tolist() == [[4, 6], [4, 8], [8, 12]]


@pytest.mark.parametrize("shape", [(5, 8, 8), (6, 6, 8), (6, 8, 10), (0, 8, 8)])
def test_sides_that_do_not_fit_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(PhotonError, match=r"multiples of \(2, 4, 4\)") as caught:
        patchify(torch.zeros(shape), VISION)
    assert caught.value.code == "GRID_INVALID"


def test_grid_counts_patches() -> None:
    assert grid_of((6, 8, 12), VISION) == (3, 4, 6)


def test_visual_positions() -> None:
    """Depth steps of tokens_per_second * seconds_per_grid = 2; rows and columns of tokens, not of patches."""
    found = visual_positions((2, 4, 4), CONFIG)
    assert found.T.tolist() == [[2 * z, y, x] for z in range(2) for y in range(2) for x in range(2)]
    sparse = micro_config(pruning={"seconds_per_grid": 14.0})
    assert visual_positions((2, 2, 2), sparse).T.tolist() == [[0, 0, 0], [28, 0, 0]]


@pytest.mark.parametrize("grid", [(2, 4, 4), (2, 6, 10), (1, 2, 2), (3, 8, 2)])
def test_windows_are_squares_of_one_slab(grid: Grid) -> None:
    """Windows of 4 x 4 patches from the corner, cut short at the far sides."""
    coordinates = patch_coordinates(grid, VISION)
    ids = window_ids(coordinates, VISION)
    places = {tuple(place): number for place, number in zip(coordinates.tolist(), ids.tolist(), strict=True)}
    for first in places:
        for second in places:
            is_same = (first[0], first[1] // 4, first[2] // 4) == (second[0], second[1] // 4, second[2] // 4)
            assert (places[first] == places[second]) == is_same
