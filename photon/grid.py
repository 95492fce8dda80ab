"""Between a volume in space and its tokens: patches, their order, and the box each visual token covers.

Volumes are [Z, Y, X]. A grid (gz, gy, gx) counts patches. Patches come in the vision tower's order: depth, then
2x2 in-plane merge blocks, then inside the block. Four patches in a row make one visual token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from photon.config import PhotonConfig, VisionConfig
from photon.errors import PhotonError

Grid = tuple[int, int, int]


def grid_of(shape: tuple[int, int, int], vision: VisionConfig) -> Grid:
    """Patches along z, y and x of a volume of ``shape`` voxels.

    Raises:
        PhotonError: ``GRID_INVALID`` when the shape is not a whole number of patches and merge blocks.
    """
    steps = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    merged = (steps[0], *(step * vision.spatial_merge_size for step in steps[1:]))
    if any(size == 0 or size % step for size, step in zip(shape, merged, strict=True)):
        raise PhotonError(
            "GRID_INVALID",
            f"volume of {shape} voxels",
            f"its sides are not multiples of {merged}.",
            "Preprocess it with a volume specification whose shape is.",
        )
    gz, gy, gx = (size // step for size, step in zip(shape, steps, strict=True))
    return gz, gy, gx


def num_visual_tokens(grid: Grid, vision: VisionConfig) -> int:
    """Tokens that a grid becomes after the in-plane merge."""
    return grid[0] * grid[1] * grid[2] // vision.spatial_merge_size**2


def patchify(volume: Tensor, vision: VisionConfig) -> tuple[Tensor, Grid]:
    """Cut a volume into patches in the vision tower's order.

    Args:
        volume: float [Z, Y, X].

    Returns:
        [P, 14*14*14] patches (each flattened z, y, x) and the grid.
    """
    gz, gy, gx = grid_of((volume.shape[0], volume.shape[1], volume.shape[2]), vision)
    m, p, t = vision.spatial_merge_size, vision.patch_size, vision.temporal_patch_size
    blocks = volume.reshape(gz, t, gy // m, m, p, gx // m, m, p)
    patches = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(gz * gy * gx, t * p * p)
    return patches.contiguous(), (gz, gy, gx)


def occupied_tokens(patches: Tensor, vision: VisionConfig) -> Tensor:
    """Visual tokens of one volume that hold more than air; all of them when ``empty_below`` is None.

    A voxel that is not a number counts as more than air: it must not vanish in silence. Of a blank volume all
    tokens are returned, so that it is treated as ever.

    Args:
        patches: float [P, 14*14*14] of the whole volume, in [0, 1].

    Returns:
        int64 [n] indices of tokens with a voxel above ``empty_below``, ascending.
    """
    voxels = patches.unflatten(0, (-1, vision.spatial_merge_size**2)).flatten(1)
    everything = torch.arange(voxels.shape[0])
    if vision.empty_below is None:
        return everything
    is_occupied = ~(voxels <= vision.empty_below).all(1)
    return everything[is_occupied] if bool(is_occupied.any()) else everything


def patch_rows(tokens: Tensor, vision: VisionConfig) -> Tensor:
    """Patches of visual tokens int64 [n], in patch order: int64 [4 n]."""
    size = vision.spatial_merge_size**2
    return (tokens[:, None] * size + torch.arange(size, device=tokens.device)).flatten()


def token_boxes(grid: Grid, vision: VisionConfig) -> Tensor:
    """Voxel box of every visual token: int64 [N, 3, 2], start and end along z, y, x."""
    gz, gy, gx = grid
    m = vision.spatial_merge_size
    sizes = torch.tensor([vision.temporal_patch_size, m * vision.patch_size, m * vision.patch_size])
    start = torch.cartesian_prod(torch.arange(gz), torch.arange(gy // m), torch.arange(gx // m)) * sizes
    return torch.stack([start, start + sizes], dim=-1)


def patch_coordinates(grid: Grid, vision: VisionConfig) -> Tensor:
    """Depth slab, row and column of every patch, in patch order: int64 [P, 3]."""
    gz, gy, gx = grid
    m = vision.spatial_merge_size
    axes = [torch.arange(n) for n in (gz, gy // m, gx // m, m, m)]
    z, by, bx, dy, dx = torch.cartesian_prod(*axes).unbind(-1)
    return torch.stack([z, by * m + dy, bx * m + dx], dim=-1)


def window_ids(coordinates: Tensor, vision: VisionConfig) -> Tensor:
    """Attention window of every patch: [P]; equal numbers attend to each other. Windows stay in one slab."""
    merge = vision.spatial_merge_size
    side = vision.window_size // merge // vision.patch_size * merge
    z, y, x = coordinates.unbind(-1)
    rows, columns = y // side, x // side
    return (z * (rows.max() + 1) + rows) * (columns.max() + 1) + columns


def visual_positions(grid: Grid, config: PhotonConfig) -> Tensor:
    """Rotary positions of the visual tokens relative to the first: int64 [3, N] over depth, height, width."""
    gz, gy, gx = grid
    m = config.vision.spatial_merge_size
    depth = (torch.arange(gz) * config.depth_position_step).long()
    return torch.cartesian_prod(depth, torch.arange(gy // m), torch.arange(gx // m)).T.contiguous()
