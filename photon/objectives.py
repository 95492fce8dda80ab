"""Loss terms, one function each. Rows are packed; a batch is the mean of its branches."""

from __future__ import annotations

import torch
from torch import Tensor

from photon.model.packing import IGNORE_INDEX, PackedBatch
from photon.scheduling import Schedule


def answer_targets(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Branch rows that predict a labelled token: rows [M], target ids [M], branch of each [M].

    A token is predicted by the row before it in the same branch; a branch's first token by nothing here.
    """
    branches = torch.arange(len(batch.branch_lengths), device=batch.labels.device)
    branch = torch.repeat_interleave(branches, batch.layout.own_lengths, output_size=batch.labels.shape[0])
    is_first = torch.ones_like(branch, dtype=torch.bool)
    is_first[1:] = branch[1:] != branch[:-1]
    places = ((batch.labels != IGNORE_INDEX) & ~is_first).nonzero().flatten()
    return places - 1, batch.labels[places], branch[places]


def mean_by_branch(values: Tensor, branch: Tensor, num_branches: int) -> Tensor:
    """Mean of values [M] (of targets, of volumes) within each branch: [B], 0 for a branch without any."""
    total = values.new_zeros(num_branches).index_add(0, branch, values)
    count = values.new_zeros(num_branches).index_add(0, branch, torch.ones_like(values))
    return total / count.clamp_min(1.0)


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every target: -log p(answer token), float32 [M]."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def entropy_loss(logits: Tensor) -> Tensor:
    """Robustness: minus the entropy of the answer distribution, for scans perturbed beyond use."""
    log_p = logits.float().log_softmax(-1)
    return (log_p.exp() * log_p).sum(-1)


def flip_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Flip: -log(1 - p(answer) + 1e-6), with the keep mask inverted."""
    p = logits.float().softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return -torch.log(1.0 - p + 1e-6)


def keep_band_loss(decision: Schedule, band: tuple[float, float]) -> Tensor:
    """Keep band: how far the mean keep probability of a volume is outside ``band``, float32 [S]."""
    low, high = band
    count = decision.valid.sum(-1)
    mean = torch.where(decision.valid, decision.p, 0.0).sum(-1) / count.clamp_min(1)
    outside = (low - mean).clamp_min(0.0) + (mean - high).clamp_min(0.0)
    return torch.where(count > 0, outside, 0.0)


def distillation_loss(u: Tensor, attended: Tensor, counted: Tensor) -> Tensor:
    """Distillation of attention: how far softmax(u) is from where later layers look, float32 [S].

    The Kullback-Leibler divergence of the attention, as shares of what each volume got, from the scores' softmax.

    Args:
        u: [S, N] raw scores.
        attended: [S, N] attention to each token, from 0, without gradient.
        counted: bool [S, N] tokens that could be looked at; a volume without one counts 0.
    """
    counted = counted & u.detach().isfinite() & attended.isfinite()
    seen = torch.where(counted, attended, 0.0)
    share = seen / seen.sum(-1, keepdim=True).clamp_min(1e-20)
    log_p = torch.where(counted, u, -1e30).log_softmax(-1)
    return torch.where(counted, torch.xlogy(share, share) - share * log_p, 0.0).sum(-1)
