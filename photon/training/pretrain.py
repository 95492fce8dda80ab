"""Vision pretraining: every visual token learns to say which labelled structures lie in its box.

The published model starts from a vision tower that has seen the world; one trained from scratch has to learn what
a liver looks like before a question about it can teach it anything. Where label maps exist they are the cheapest
teacher: one target per visual token instead of one per question. The naming head is thrown away afterwards.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from photon.config import VisionConfig
from photon.device import sums_in_order
from photon.grid import Grid, token_boxes
from photon.model.vision import VisionTower


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamingConfig:
    """Length and learning rates of vision pretraining."""

    num_steps: int
    learning_rate: float = 3e-3
    patch_learning_rate: float = 3e-4
    weight_decay: float = 0.05
    positive_weight: float = 4.0
    """Least weight of a structure's presence against its absence; most boxes hold few structures."""
    largest_positive_weight: float = 4.0
    """Largest weight of a presence: between the two it is absences over presences, so that rare structures count."""


@dataclasses.dataclass(frozen=True)
class NamingBatch:
    """Patches of several volumes and what their visual tokens hold.

    Attributes:
        patches: float [P, 14*14*14]; grids: of each volume; present: int64 [N] or None, as the vision tower takes
            them.
        targets: float [N, K] of the present tokens, 0 or 1.
    """

    patches: Tensor
    grids: tuple[Grid, ...]
    targets: Tensor
    present: Tensor | None = None

    def to(self, device: torch.device | str) -> NamingBatch:
        """The batch with every tensor on ``device``."""
        present = None if self.present is None else self.present.to(device)
        return NamingBatch(self.patches.to(device), self.grids, self.targets.to(device), present)


def token_labels(labels: Tensor, grid: Grid, vision: VisionConfig, num_labels: int, min_fraction: float) -> Tensor:
    """Which labels fill at least ``min_fraction`` of each visual token's box.

    Args:
        labels: integer label map [Z, Y, X] on the volume's grid, 0 background.

    Returns:
        float [N, num_labels], 0 or 1.
    """
    depth, height, width = (int(size) for size in (token_boxes(grid, vision)[0, :, 1]))
    z, y, x = (size // step for size, step in zip(labels.shape, (depth, height, width), strict=True))
    boxes = labels.long().reshape(z, depth, y, height, x, width).permute(0, 2, 4, 1, 3, 5).reshape(z * y * x, -1)
    counts = torch.zeros(boxes.shape[0], num_labels).scatter_add_(1, boxes, torch.ones(boxes.shape))
    return (counts >= min_fraction * boxes.shape[1]).float()


def pretrain_vision(
    tower: VisionTower,
    batch_at: Callable[[int], NamingBatch],
    config: NamingConfig,
    *,
    frequencies: Tensor,
    on_step: Callable[[int, float], None],
) -> None:
    """Train the tower, in place and where it is, to name what each visual token holds.

    Args:
        batch_at: batch of a step, on any device.
        frequencies: [K] share of visual tokens that hold each structure.
        on_step: called after every step with its number and its loss.
    """
    device = tower.vision_patch_embed.proj.weight.device
    head = nn.Linear(tower.config.out_hidden_size, frequencies.shape[0], device=device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    patch = list(tower.vision_patch_embed.parameters())
    rest = [p for name, p in tower.named_parameters() if not name.startswith("vision_patch_embed")]
    groups = [
        {"params": patch, "lr": config.patch_learning_rate},
        {"params": [*rest, *head.parameters()], "lr": config.learning_rate},
    ]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=config.weight_decay)
    bases = [group["lr"] for group in optimiser.param_groups]
    odds = (1 - frequencies) / frequencies.clamp_min(1e-6)
    weight = odds.clamp(config.positive_weight, config.largest_positive_weight).to(device)
    for step in range(config.num_steps):
        rise = min((step + 1) / 10, 1.0)
        fall = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / config.num_steps))
        for group, base in zip(optimiser.param_groups, bases, strict=True):
            group["lr"] = base * rise * fall
        batch = batch_at(step).to(device)
        # Only the direction of a token counts, as for the decoder, which normalises what it reads.
        tokens = F.rms_norm(tower(batch.patches, batch.grids, batch.present), (tower.config.out_hidden_size,))
        loss = F.binary_cross_entropy_with_logits(head(tokens), batch.targets, pos_weight=weight)
        optimiser.zero_grad(set_to_none=True)
        with sums_in_order(device):
            loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
        optimiser.step()
        on_step(step, float(loss.detach()))
