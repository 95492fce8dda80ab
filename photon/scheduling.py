"""Instruction-conditioned token scheduling (ITS): which visual tokens does this question need?

Everything here is per question and volume: a prompt with an earlier and a later scan has a row for each, so that
neither crowds the other out. The arithmetic is in :mod:`photon.ops.saliency` and :mod:`photon.ops.schedule`.

Letters: B branches (questions), S pairs of a branch and one of its volumes (B where every prompt has one), N visual
tokens of the largest volume; tables are [S, N], and the padding of shorter rows enters no statistic.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from photon.config import PruningConfig
from photon.ops.backend import Backend
from photon.ops.schedule.op import schedule
from photon.ops.schedule.reference import DESCRIPTOR_SIZE, LARGEST_SCORE, ThresholdWeights, normalise, rank


@dataclass(frozen=True)
class Schedule:
    """The decision for every branch and volume.

    Attributes:
        u: float32 [S, N] raw scores.
        rho: float32 [S, N] scores scaled to [0, 1] within the volume.
        theta: float32 [S] thresholds, with gradient to the threshold network; where none decides, the lowest rho kept.
        p: float32 [S, N] keep probabilities, with gradient to theta; where no threshold decides, 1 or 0.
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

    def with_saliency_gradient(self, u: Tensor, config: PruningConfig) -> Schedule:
        """The same numbers, with a gradient from p to the scores ``u`` [S, N] that they were made of.

        It is the derivative of ``p = sigmoid((rho - theta) / temperature)`` at a fixed theta, through the whole of
        ``rho = (u - min) / (max - min)``. Minimum and maximum are not detached: their own rho stays 0 and 1 however
        they move, and everybody else's moves with them. The threshold network keeps its own gradient, and none reaches
        the scores through what it reads of them.
        """
        usable = self.valid & (u.detach().abs() < LARGEST_SCORE)
        counted = usable | ~usable.any(-1, keepdim=True)
        rho = normalise(torch.where(usable, u, 0.0), counted)
        p = torch.sigmoid((rho - self.theta.detach()[:, None]) / config.temperature)
        moved = torch.where(usable, p - p.detach(), 0.0)
        return replace(self, p=self.p + moved)


def kept_counts(lengths: Tensor, config: PruningConfig) -> Tensor:
    """Visual tokens that stay of volumes of ``lengths`` int64 [S] tokens where no threshold decides: int64 [S].

    A share ``keep_ratio``, rounded up, and at least ``min_tokens`` of a ranked policy; all of the others.
    """
    if not config.is_ranked:
        return lengths
    # 0.07 * 100 is a little more than 7, and must not become 8.
    share = (lengths.double() * config.keep_ratio - 1e-9).ceil().long()
    return torch.minimum(share.clamp_min(config.min_tokens), lengths)


def ranked(u: Tensor, lengths: Tensor, branch: Tensor, config: PruningConfig) -> Schedule:
    """The decision of every policy that sets no threshold, see :func:`photon.ops.schedule.reference.rank`.

    Args:
        u, lengths, branch: as in :meth:`ThresholdPredictor.forward`, N >= 1.
    """
    valid = torch.arange(u.shape[1], device=u.device) < lengths[:, None]
    return Schedule(**rank(u, valid, kept_counts(lengths, config))._asdict(), valid=valid, branch=branch)


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
