"""Robustness: scans spoilt beyond use, from which the model must learn to claim nothing."""

from __future__ import annotations

import torch
from torch import Tensor

# Six kinds with the public code's odds; shuffling twice is one more shuffle.
KINDS = ("shuffle", "shuffle_twice", "drop_patches", "drop_voxels", "noise", "blank")
ODDS = (0.16, 0.16, 0.16, 0.16, 0.16, 0.20)


def draw_kind(generator: torch.Generator) -> str:
    """Draw one of :data:`KINDS` with its odds."""
    return KINDS[int(torch.multinomial(torch.tensor(ODDS), 1, generator=generator))]


def perturb(patches: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """Spoil the patches [P, voxels] of one volume.

    Patches are shuffled (once or twice), 80 % of them or 90 % of the voxels set to zero, all replaced by uniform
    noise, or all set to zero. Random numbers are drawn on the CPU, so every device gives the same result.
    """
    if kind == "blank":
        return torch.zeros_like(patches)
    if kind == "noise":
        return torch.rand(patches.shape, generator=generator).to(patches)
    if kind == "drop_patches":
        return patches * (torch.rand(patches.shape[0], 1, generator=generator) >= 0.8).to(patches)
    if kind == "drop_voxels":
        return patches * (torch.rand(patches.shape, generator=generator) >= 0.9).to(patches)
    for _ in range(2 if kind == "shuffle_twice" else 1):
        patches = patches[torch.randperm(patches.shape[0], generator=generator).to(patches.device)]
    return patches
