"""What a scan's context holds before it is packed: fewer visual tokens, or tokens that are already encoded.

Every context of a scan goes through :func:`reduced`, in training and whenever it is asked about, so that the
configuration alone says which tokens enter.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from photon.config import PhotonConfig
from photon.grid import Grid, num_visual_tokens, occupied_tokens, patch_rows
from photon.model.packing import Context, counted_through, volumes_of
from photon.model.vision import VisionTower


def without_empty_tokens(context: Context, config: PhotonConfig) -> Context:
    """Leave out the visual tokens that hold only air, as ``config.vision.empty_below`` says.

    Args:
        context: with patches in [0, 1], of all tokens of its volumes or of those that are still present.

    Returns:
        A context with fewer placeholders and patches; the same one when ``empty_below`` is None or nothing is empty.

    Raises:
        PhotonError: ``PROMPT_INVALID`` when placeholders and volumes do not match.
    """
    if config.vision.empty_below is None:
        return context
    counts = [volume.num_tokens for volume in volumes_of(context, config)]
    volumes = context.patches.split([count * config.vision.spatial_merge_size**2 for count in counts])
    occupied, start = [], 0
    for count, patches in zip(counts, volumes, strict=True):
        occupied.append(occupied_tokens(patches, config.vision) + start)
        start += count
    return _keeping(context, torch.cat([torch.zeros(0, dtype=torch.long), *occupied]), config)


def _keeping(context: Context, places: Tensor, config: PhotonConfig) -> Context:
    """The context with some of its visual tokens, int64 ascending, counted among those that it has."""
    stays = context.input_ids != config.video_token_id
    rows = (~stays).nonzero().flatten()
    if places.numel() == rows.numel():
        return context
    stays[rows[places]] = True
    return replace(
        context,
        input_ids=context.input_ids[stays],
        patches=context.patches[patch_rows(places, config.vision)],
        present=context.grid_tokens(places),
    )


def reduced(context: Context, config: PhotonConfig) -> Context:
    """The context with the visual tokens that the policy of ``config`` lets in, and without empty ones.

    * "slices": tokens of evenly spaced depth slabs, max(1, round(keep_ratio * gz)) of each volume's gz. A slab is the
      middle one of equally many; the vision tower does not see the others.
    * "pooled": tokens that are means over blocks of neighbouring tokens, see :func:`block_counts`. The vision tower
      sees everything; a mean stands at the position of the token in the middle of its block.
    * All others: every token.

    Args:
        context: with the patches, in [0, 1], of all tokens of its volumes.

    Raises:
        PhotonError: ``PROMPT_INVALID`` when placeholders and volumes do not match.
    """
    if config.pruning.policy == "pooled":
        return _pooled(context, config)
    if config.pruning.policy == "slices":
        places = [_tokens_of_slabs(grid, config) for grid in context.grids]
        context = _keeping(context, counted_through(places, context.grids, config), config)
    return without_empty_tokens(context, config)


def _tokens_of_slabs(grid: Grid, config: PhotonConfig) -> Tensor:
    count = max(1, round(config.pruning.keep_ratio * grid[0]))
    slabs = (2 * torch.arange(count) + 1) * grid[0] // (2 * count)
    of_slab = num_visual_tokens(grid, config.vision) // grid[0]
    return (slabs[:, None] * of_slab + torch.arange(of_slab)).flatten()


def block_counts(grid: Grid, config: PhotonConfig) -> Grid:
    """Blocks (bz, by, bx) into which the policy "pooled" divides the visual tokens of a grid along each axis.

    Their product is as near as possible to keep_ratio times the number of tokens. Among equally near divisions it is
    the one whose blocks' edges, in voxels, differ least, then the one with most blocks along z, then along y.
    """
    vision = config.vision
    in_plane = vision.patch_size * vision.spatial_merge_size
    token_edges = (vision.temporal_patch_size, in_plane, in_plane)
    return _nearest_division(_token_grid(grid, config), token_edges, config.pruning.keep_ratio)


@functools.cache
def _nearest_division(sizes: Grid, token_edges: Grid, keep_ratio: float) -> Grid:
    target = keep_ratio * math.prod(sizes)

    def order(counts: Grid) -> tuple[float, float, int, int]:
        edges = [edge * size / count for edge, size, count in zip(token_edges, sizes, counts, strict=True)]
        return abs(math.prod(counts) - target), max(edges) / min(edges), -counts[0], -counts[1]

    z, y, x = (range(1, size + 1) for size in sizes)
    return min(itertools.product(z, y, x), key=order)


def _token_grid(grid: Grid, config: PhotonConfig) -> Grid:
    """Visual tokens along z, y and x."""
    merge = config.vision.spatial_merge_size
    return grid[0], grid[1] // merge, grid[2] // merge


def _pooled(context: Context, config: PhotonConfig) -> Context:
    volumes_of(context, config)  # refuses a prompt that does not fit
    centres, pooled, num_blocks = [], [], 0
    for grid in context.grids:
        sizes, counts = _token_grid(grid, config), block_counts(grid, config)
        # Token t of an axis of n goes into block t * b // n, so edges differ by one token at most.
        blocks = [torch.arange(size) * count // size for size, count in zip(sizes, counts, strict=True)]
        middles = [_middles(block) for block in blocks]
        pooled.append(_flattened(blocks, counts) + num_blocks)
        centres.append(_flattened(middles, sizes))
        num_blocks += math.prod(counts)
    present = counted_through(centres, context.grids, config)
    less = _keeping(context, present, config)
    # The tower wants the patches of all.
    none = torch.zeros(0, dtype=torch.long)
    return replace(less, patches=context.patches, pooled=torch.cat([none, *pooled]))


def _middles(blocks: Tensor) -> Tensor:
    """Middle token of every block along an axis, the later one of two; ``blocks`` int64 [n] is each token's block."""
    count = int(blocks[-1]) + 1
    first = torch.searchsorted(blocks, torch.arange(count))
    end = torch.searchsorted(blocks, torch.arange(count), right=True)
    return (first + end) // 2


def _flattened(along: Sequence[Tensor], sizes: Grid) -> Tensor:
    """Number in a grid of ``sizes``, z slowest, of every combination of places along z, y and x."""
    z, y, x = along
    return ((z[:, None, None] * sizes[1] + y[:, None]) * sizes[2] + x).flatten()


@torch.no_grad()
def encoded(context: Context, tower: VisionTower) -> Context:
    """The context with what a vision tower makes of its patches, float32 on the CPU, instead of the patches.

    For towers that no longer learn: encoded once, a scan can be trained on and asked about any number of times. A
    context without volumes, or one that is already encoded, is returned as it is.

    Raises:
        PhotonError: ``PROMPT_INVALID`` when there are more or fewer patches than tokens take.
    """
    if context.tokens is not None or not context.grids:
        return context
    place = tower.vision_patch_embed.proj.weight.device
    # What is averaged has the patches of everything, not of the tokens that come out.
    present = context.present if context.pooled is None else None
    present, pooled = (None if x is None else x.to(place) for x in (present, context.pooled))
    tokens = visual_tokens(tower, context.patches.to(place), context.grids, present, pooled)
    return replace(context, patches=context.patches[:0].clone(), pooled=None, tokens=tokens.float().cpu())


def visual_tokens(
    tower: VisionTower, patches: Tensor, grids: Sequence[Grid], present: Tensor | None, pooled: Tensor | None
) -> Tensor:
    """Visual tokens [V, D] of patches; arguments as in :class:`photon.model.packing.PackedBatch`."""
    tokens: Tensor = tower(patches, grids, present)
    return tokens if pooled is None else _block_means(tokens, pooled)


def _block_means(tokens: Tensor, block: Tensor) -> Tensor:
    """Means [blocks, D], added up in float32 in the tokens' order, of the tokens [T, D] of each block int64 [T]."""
    counts = torch.bincount(block)
    nothing = torch.zeros(counts.shape[0], tokens.shape[1], device=tokens.device)
    if tokens.is_cpu:
        total = nothing.index_add(0, block, tokens.float())
    else:  # index_add adds in whatever order its atomics come; this one sorts first
        total = nothing.index_put((block,), tokens.float(), accumulate=True)
    return (total / counts[:, None]).to(tokens.dtype)
