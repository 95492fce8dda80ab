"""Instruction-conditioned token scheduling (ITS): which visual tokens does this question need?

Everything here is per question and volume: a prompt with an earlier and a later scan has a row for each, so that
neither crowds the other out. Scores are float32, arrays [S, N] with a mask of the real entries, and padding enters no
statistic. No gradient flows through the scores.

Letters: B branches (questions), S pairs of a branch and one of its volumes (B where every prompt has one), Q question
tokens, N visual tokens, H query heads, G key heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from photon.config import PruningConfig

DESCRIPTOR_SIZE = 12
_EXACT = 2.0**14


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
    """theta = scale * sigmoid(MLP(descriptor)); Linear(12, D/8), GELU, Linear(D/8, 1)."""

    def __init__(self, width: int, config: PruningConfig) -> None:
        super().__init__()
        self.config = config
        self.mlp = nn.Sequential(nn.Linear(DESCRIPTOR_SIZE, width // 8), nn.GELU(), nn.Linear(width // 8, 1))

    def forward(self, descriptor: Tensor) -> Tensor:
        """[S, 12] to [S], in float32 whatever the type of the weights."""
        hidden = F.gelu(_linear_in_float32(self.mlp[0], descriptor))
        logits = _linear_in_float32(self.mlp[2], hidden).squeeze(-1)
        return self.config.threshold_scale * torch.sigmoid(logits)


def _linear_in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(layer, nn.Linear)
    return F.linear(x, layer.weight.float(), layer.bias.float())


@torch.no_grad()
def question_vector(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
    """What a question looks for, as one vector per key head.

    The score of a visual token is linear in the queries, `u_j = sum_g <z_g, k_jg>`, so the question tokens
    collapse to z once; no [Q, N] matrix is needed. Question tokens weigh by centrality: how strongly the others
    answer to them (non-negative scaled products, without themselves).

    Args:
        q: [B, Q, H, d] rotated queries of the question tokens.
        k: [B, Q, G, d] their rotated keys.
        valid: bool [B, Q] real question tokens; a question may be empty.

    Returns:
        z: float32 [B, G, d], zero for an empty question.
    """
    num_heads, num_key_heads, head_dim = q.shape[2], k.shape[2], q.shape[3]
    q, k = q.float(), k.float()
    grouped = q.unflatten(2, (num_key_heads, num_heads // num_key_heads))
    products = torch.einsum("bqgsd,btgd->bgsqt", grouped, k) / head_dim**0.5
    size = q.shape[1]
    others = valid[:, :, None] & valid[:, None, :] & ~torch.eye(size, dtype=torch.bool, device=q.device)
    answered = torch.where(others[:, None, None], products.clamp_min(0.0), 0.0)
    centrality = answered.sum(-1).mean((1, 2))
    weights = centrality / centrality.sum(-1, keepdim=True).clamp_min(1.0)
    weighted = torch.where(valid[:, :, None, None, None], grouped * weights[:, :, None, None, None], 0.0)
    return weighted.sum((1, 3)) / (num_heads * head_dim**0.5)


@torch.no_grad()
def saliency(z: Tensor, k_visual: Tensor) -> Tensor:
    """Raw scores u [S, N] of visual keys [S, N, G, d] for question vectors [S, G, d], in float32."""
    return torch.einsum("bgd,bngd->bn", z, k_visual.float())


def normalise(u: Tensor, valid: Tensor) -> Tensor:
    """rho = (u - min) / (max - min + 1e-8) over the real entries; 0 elsewhere."""
    low = torch.where(valid, u, torch.inf).min(-1, keepdim=True).values
    high = torch.where(valid, u, -torch.inf).max(-1, keepdim=True).values
    # Both sides of the fraction times 2^14, which is exact: the ONNX exporter takes a plain 1e-8 for zero and drops
    # it, and equal scores would become 0 / 0.
    rho = (u - low) * _EXACT / ((high - low) * _EXACT + 1e-8 * _EXACT)
    return torch.where(valid, rho, 0.0)


def describe(u: Tensor, rho: Tensor, valid: Tensor) -> Tensor:
    """The twelve numbers the threshold network sees, [S, 12] (order of the public code).

    Mean, std (biased), min, max, 0.25- and 0.5-quantile of rho; mean, std, min, max of u; mean and max of
    sign(u) log(1 + |u|).
    """
    signed_log = u.sign() * u.abs().log1p()
    rho_mean, rho_std = _mean_std(rho, valid)
    u_mean, u_std = _mean_std(u, valid)
    log_mean, _ = _mean_std(signed_log, valid)
    ordered = torch.where(valid, rho, torch.inf).sort(-1).values
    columns = [
        rho_mean,
        rho_std,
        *_extremes(rho, valid),
        _quantile(ordered, valid, 0.25),
        _quantile(ordered, valid, 0.5),
        u_mean,
        u_std,
        *_extremes(u, valid),
        log_mean,
        _extremes(signed_log, valid)[1],
    ]
    return torch.stack(columns, dim=-1)


def schedule(u: Tensor, valid: Tensor, predictor: ThresholdPredictor, branch: Tensor | None = None) -> Schedule:
    """Threshold the scores of every branch and volume.

    A score that is not finite never steers the threshold and is kept only if nothing else is left; at least
    `min_tokens` of the highest scores always stay, so a blank volume keeps some tokens too. A row without
    visual tokens gets an empty decision.

    Args:
        u: float32 [S, N] raw scores; valid: bool [S, N].
        branch: int64 [S] branch of each row; None when every branch has one.
    """
    usable = valid & torch.isfinite(u)
    # A row without usable tokens would reduce over nothing: let it see zeros, its result is masked anyway.
    counted = usable | ~usable.any(-1, keepdim=True)
    u = torch.where(usable, u, 0.0)
    rho = normalise(u, counted)
    theta = predictor(describe(u, rho, counted))
    delta = torch.where(usable, rho - theta[:, None], -torch.inf)
    p = torch.sigmoid(delta / predictor.config.temperature)
    preference = torch.where(usable, rho, torch.where(valid, -1.0, -2.0))
    keep = valid & ((delta > 0) | highest(preference, predictor.config.min_tokens))
    if branch is None:
        branch = torch.arange(u.shape[0], device=u.device)
    return Schedule(u=u, rho=rho, theta=theta, p=p, keep=keep, valid=valid, branch=branch)


def highest(values: Tensor, count: int) -> Tensor:
    """The ``count`` highest values of every row [S, N] as a mask; of equal values the first ones."""
    place = min(count, values.shape[-1]) - 1
    lowest_taken = values.sort(-1, descending=True).values[:, place : place + 1]
    above, level = values > lowest_taken, values == lowest_taken
    room = place + 1 - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1) <= room))


def invert(decision: Tensor, valid: Tensor) -> Tensor:
    """The flipped mask of the flip objective: tokens dropped become kept and the other way round."""
    return valid & ~decision


def _count(valid: Tensor) -> Tensor:
    return valid.sum(-1).float()


def _mean_std(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    count = _count(valid)
    mean = torch.where(valid, x, 0.0).sum(-1) / count
    variance = torch.where(valid, (x - mean[:, None]).square(), 0.0).sum(-1) / count
    return mean, variance.sqrt()


def _extremes(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    low = torch.where(valid, x, torch.inf).min(-1).values
    high = torch.where(valid, x, -torch.inf).max(-1).values
    return low, high


def _quantile(ordered: Tensor, valid: Tensor, fraction: float) -> Tensor:
    """Linear-interpolated quantile of ascending rows whose real entries come first."""
    place = (_count(valid) - 1) * fraction
    below = place.floor()
    low = ordered.gather(-1, below.long()[:, None]).squeeze(-1)
    high = ordered.gather(-1, place.ceil().long()[:, None]).squeeze(-1)
    return low + (high - low) * (place - below)
