"""Batches for vision pretraining: volumes, and from their label maps what lies in the box of each visual token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from photon.config import PhotonConfig
from photon.grid import Grid, grid_of, num_visual_tokens, occupied_tokens, patch_rows, patchify
from photon.training.pretrain import NamingBatch, token_labels
from pipelines.dataset import LabelledScan, draw_shift, shifted
from pipelines.volumes import normalise, resample_labels


class NamingSource:
    """Batches of a split. Batch ``step`` depends on the seed and the step, so nothing has to be remembered."""

    MIN_FRACTION = 0.01
    """Share of a token's box that a structure must fill to be named."""

    def __init__(
        self, scans: Sequence[LabelledScan], labels: Path, config: PhotonConfig, *, scans_per_step: int, seed: int
    ) -> None:
        """Read the label maps ``<scan_id>.nii`` of the scans from the folder ``labels``."""
        self.scans, self.config, self.scans_per_step, self.seed = scans, config, scans_per_step, seed
        self._labels = [
            resample_labels(labels / f"{scan.questions[0].scan_id}.nii", scan.volume.spec, scan.volume.affine)
            for scan in scans
        ]
        self.num_labels = 1 + max(int(label_map.max()) for label_map in self._labels)

    def frequencies(self) -> Tensor:
        """Share of visual tokens that hold each structure: float [K]."""
        return torch.stack([self.held(index).mean(0) for index in range(len(self.scans))]).mean(0)

    def held(self, index: int) -> Tensor:
        """Which structures each visual token of a scan holds: float [N, K], 0 or 1, over its whole grid."""
        return self._targets(self._labels[index], grid_of(self._labels[index].shape, self.config.vision))

    def _targets(self, label_map: np.ndarray, grid: Grid) -> Tensor:
        return token_labels(torch.from_numpy(label_map), grid, self.config.vision, self.num_labels, self.MIN_FRACTION)

    def batch(self, step: int, max_shift: tuple[int, int, int]) -> NamingBatch:
        """Batch of a step, volumes and labels moved together by up to ``max_shift`` voxels."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        vision = self.config.vision
        patches, grids, present, targets, num_tokens = [], [], [], [], 0
        for index in torch.randperm(len(self.scans), generator=generator)[: self.scans_per_step].tolist():
            volume, shift = self.scans[index].volume, draw_shift(max_shift, generator)
            moved = normalise(shifted(volume.voxels, shift, volume.spec.window_hu[0]), volume.spec.window_hu)
            cut, grid = patchify(torch.from_numpy(moved), vision)
            label_map = shifted(self._labels[index], shift, 0)
            own = occupied_tokens(cut, vision)
            patches.append(cut[patch_rows(own, vision)])
            grids.append(grid)
            present.append(own + num_tokens)
            targets.append(self._targets(label_map, grid)[own])
            num_tokens += num_visual_tokens(grid, vision)
        return NamingBatch(torch.cat(patches), tuple(grids), torch.cat(targets), torch.cat(present))
