"""The vision tower: 3D patches to decoder tokens (Qwen2.5-VL's tower with a 14-deep, one-channel patch)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from photon.config import VisionConfig
from photon.errors import PhotonError
from photon.grid import Grid, patch_coordinates, patch_rows, window_ids
from photon.model.attention import Attention, RaggedAttention
from photon.model.layers import GatedMLP, RMSNorm, maybe_checkpoint, rotary_table, rotate

ROTARY_BASE = 10000.0


class PatchEmbedding(nn.Module):
    """Bias-free 3D convolution whose stride is its kernel: one row of numbers per patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, kernel, stride=kernel, bias=False)
        self.mean, self.std = config.intensity_mean, config.intensity_std

    def forward(self, patches: Tensor) -> Tensor:
        patches = (patches - self.mean) / self.std
        dtype = self.proj.weight.dtype
        # In mixed precision the product is narrower than the weights, and what the blocks add to it would be too.
        return F.linear(patches.to(dtype), self.proj.weight.flatten(1)).to(dtype)

    @torch.no_grad()
    def initialise(self) -> None:
        """Start the first n^3 filters as means over an n x n x n division of the patch (n as large as fits).

        White random filters see noise as well as anatomy, and a network from scratch spends hundreds of steps
        learning to smooth.
        """
        weight = self.proj.weight
        side = int(weight.shape[0] ** (1 / 3) + 1e-6)
        depth, height, width = (_division(size, side) for size in weight.shape[2:])
        means = torch.einsum("az,by,cx->abczyx", depth, height, width).flatten(0, 2)
        weight[: side**3] = means[:, None] / weight.shape[1]


class VisionAttention(nn.Module):
    """Multi-head attention with rotary row and column positions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        return self.proj(attend(rotate(q, table), rotate(k, table), v).flatten(-2))


class VisionBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.hidden_size, 1e-6)
        self.norm2 = RMSNorm(config.hidden_size, 1e-6)
        self.attn = VisionAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Tensor, table: tuple[Tensor, Tensor], attend: Attention) -> Tensor:
        x = x + self.attn(self.norm1(x), table, attend)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Four neighbouring patches to one decoder token."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = RMSNorm(config.hidden_size, 1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.out_hidden_size)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.ln_q(x).reshape(-1, self.width))


class VisionTower(nn.Module):
    """Patches of any number of volumes to visual tokens."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_patch_embed = PatchEmbedding(config)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.depth))
        self.merger = PatchMerger(config)
        self.checkpoint_activations = False

    def forward(self, patches: Tensor, grids: Sequence[Grid], present: Tensor | None = None) -> Tensor:
        """Encode volumes.

        Args:
            patches: [P, 14*14*14] of the present tokens in patch order, one volume after another.
            grids: patch counts (gz, gy, gx) of each whole volume.
            present: int64 [N] visual tokens that the patches belong to, counted through all grids; None when to all.

        Returns:
            [N, D] visual tokens, one volume after another.

        Raises:
            PhotonError: ``PROMPT_INVALID`` when there are more or fewer patches than tokens take.
        """
        parts = [patch_coordinates(grid, self.config).to(patches.device) for grid in grids]
        coordinates = torch.cat(parts)
        windows = _numbered([window_ids(part, self.config) for part in parts])
        slabs = _numbered([part[:, 0] for part in parts])
        if present is not None:
            rows = patch_rows(present, self.config)
            coordinates, windows, slabs = coordinates[rows], windows[rows], slabs[rows]
        if patches.shape[0] != coordinates.shape[0]:
            fact = f"it has {patches.shape[0]} patches where its visual tokens take {coordinates.shape[0]}."
            raise PhotonError("PROMPT_INVALID", "prompt", fact, "Give the patches of all present tokens, no others.")
        # Sorting by window keeps each slab together (a window lies in one slab), so both kinds of attention
        # see their segments as ranges of rows; the order is undone at the end.
        order = torch.argsort(windows, stable=True)
        tokens = self.encode(
            patches[order],
            coordinates[order, 1:],
            full=_segments(slabs[order]),
            windowed=_segments(windows[order]),
        )
        return self.merger(tokens[torch.argsort(order)])

    def encode(self, patches: Tensor, rows_columns: Tensor, *, full: Attention, windowed: Attention) -> Tensor:
        """Run the blocks on patches [P, 14*14*14] at [P, 2] rows and columns; returns [P, width]."""
        table = self.rotary(rows_columns)
        x = self.vision_patch_embed(patches)
        for index, block in enumerate(self.blocks):
            attend = full if index in self.config.fullatt_block_indexes else windowed
            x = maybe_checkpoint(block, x, table, attend, is_on=self.checkpoint_activations)
        return x

    def rotary(self, rows_columns: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary table for [P, 2] rows and columns: the first half of the pairs turns with the row."""
        quarter = self.config.hidden_size // self.config.num_heads // 4
        exponent = torch.arange(quarter, dtype=torch.float32, device=rows_columns.device) / quarter
        frequency = 1.0 / ROTARY_BASE**exponent
        return rotary_table((rows_columns[:, :, None].float() * frequency).flatten(1))


def _division(size: int, parts: int) -> Tensor:
    """Rows that average ``parts`` consecutive pieces of ``size`` voxels: [parts, size]."""
    piece = torch.arange(size) * parts // size
    member = (piece == torch.arange(parts)[:, None]).float()
    return member / member.sum(1, keepdim=True).clamp_min(1.0)


def _numbered(ids: list[Tensor]) -> Tensor:
    """Concatenate the segment ids of several volumes so that no two volumes share one."""
    parts, offset = [], 0
    for part in ids:
        parts.append(part + offset)
        offset = int(parts[-1].max()) + 1
    return torch.cat(parts)


def _segments(ids: Tensor) -> RaggedAttention:
    lengths = torch.unique_consecutive(ids, return_counts=True)[1].tolist()
    return RaggedAttention.build(lengths, device=ids.device, is_causal=False)
