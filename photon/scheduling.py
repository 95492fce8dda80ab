"""Instruction-conditioned token scheduling (ITS): which visual tokens does this question need?

Everything here is per question and volume: a prompt with an earlier and a later scan has a row for each, so that
neither crowds the other out. The arithmetic is in :mod:`photon.ops.saliency` and :mod:`photon.ops.schedule`.

Letters: B branches (questions), S pairs of a branch and one of its volumes (B where every prompt has one), N visual
tokens of the largest volume; tables are [S, N], and the padding of shorter rows enters no statistic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from photon.config import PruningConfig
from photon.ops.backend import Backend
from photon.ops.schedule.op import schedule
from photon.ops.schedule.reference import DESCRIPTOR_SIZE, ThresholdWeights


@dataclass(frozen=True)
class Schedule:
    """The decision for every branch and volume.

    Attributes:
        u: float32 [S, N] raw scores.
        rho: float32 [S, N] scores scaled to [0, 1] within the volume.
        theta: float32 [S] thresholds, with gradient to the threshold network.
        p: float32 [S, N] keep probabilities, with gradient to theta.
        keep: bool [S, N] tokens kept.
        valid: bool [S, N] entries that are tokens.
        branch: int64 [S] branch of each row, ascending.
    """

    u: Tensor
    rho: Tensor
    theta: Tensor
    p: Tensor
    keep: Tensor
    valid: Tensor
    branch: Tensor

    def kept_tokens(self, branch: int) -> Tensor:
        """Visual tokens that a branch keeps, counted through all volumes of its prompt: int64, ascending."""
        rows = self.branch == branch
        return self.keep[rows][self.valid[rows]].nonzero().flatten()


class ThresholdPredictor(nn.Module):
    """The threshold network: Linear(12, D/8), GELU, Linear(D/8, 1). No gradient reaches the scores through it."""

    def __init__(self, width: int, config: PruningConfig) -> None:
        super().__init__()
        self.config = config
        self.mlp = nn.Sequential(nn.Linear(DESCRIPTOR_SIZE, width // 8), nn.GELU(), nn.Linear(width // 8, 1))

    @property
    def weights(self) -> ThresholdWeights:
        """The network's weights as the operator wants them."""
        first, last = self.mlp[0], self.mlp[2]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        return ThresholdWeights(first.weight, first.bias, last.weight, last.bias)

    def forward(self, u: Tensor, lengths: Tensor, branch: Tensor, *, backend: Backend = "auto") -> Schedule:
        """Threshold the scores of every branch and volume, see :func:`photon.ops.schedule.op.schedule`.

        Args:
            u: float32 [S, N] raw scores; lengths: int64 [S] real scores of each row, the first ones.
            branch: int64 [S] branch of each row.
        """
        decision = schedule(
            u,
            lengths,
            self.weights,
            scale=self.config.threshold_scale,
            temperature=self.config.temperature,
            min_tokens=self.config.min_tokens,
            backend=backend,
        )
        valid = torch.arange(u.shape[1], device=u.device) < lengths[:, None]
        return Schedule(**decision._asdict(), valid=valid, branch=branch)
