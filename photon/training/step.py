"""One training step: the loss of a packed batch in a stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from photon import objectives
from photon.config import PhotonConfig
from photon.model.network import Photon
from photon.model.packing import Branch, Context, PackedBatch, pack_batch
from photon.model.pruning import Mode, effective_mode, kept_tokens
from photon.ops.selection.op import Selection
from photon.scheduling import Schedule
from photon.training.stages import MODES, Stage


@dataclass(frozen=True)
class TrainingBatch:
    """A packed batch and what is asked of each branch.

    Attributes:
        batch: contexts and branches.
        is_perturbed: bool [B] branches on a spoilt scan (robustness objective).
        is_flipped: bool [B] branches whose keep mask is inverted (flip objective).
        is_whole: bool [B] branches that keep every token in the hard stage, so that what they look at also teaches the
            scores of tokens that would have been dropped; None: no branch.
        names: ids of the scans, for messages.
    """

    batch: PackedBatch
    is_perturbed: Tensor
    is_flipped: Tensor
    is_whole: Tensor | None = None
    names: tuple[str, ...] = ()

    @property
    def num_branches(self) -> int:
        """Questions of the batch."""
        return len(self.batch.branch_lengths)

    def to(self, device: torch.device | str) -> TrainingBatch:
        """The batch with every tensor on ``device``."""
        whole = None if self.is_whole is None else self.is_whole.to(device)
        return TrainingBatch(
            self.batch.to(device), self.is_perturbed.to(device), self.is_flipped.to(device), whole, self.names
        )


def stand_in(config: PhotonConfig, has_scan: bool) -> TrainingBatch:
    """A question about a blank scan of one visual token, or about none: for a rank that has nothing else to do."""
    merge = config.vision.spatial_merge_size
    ids = torch.tensor([config.vision_start_token_id, config.video_token_id, config.vision_end_token_id])
    context = Context(ids, torch.zeros(merge**2, config.vision.patch_voxels), ((1, merge, merge),))
    if not has_scan:
        context = Context(ids[:0], context.patches[:0], ())
    asked = torch.full((3,), config.eos_token_id)
    nothing = torch.zeros(1, dtype=torch.bool)
    return TrainingBatch(pack_batch([context], [Branch(0, asked, asked)], config), nothing, nothing)


NUM_SUMS = 9


@dataclass(frozen=True)
class StepResult:
    """Loss of a batch with its parts, for the log.

    Attributes:
        loss: scalar with gradient, the mean over branches.
        answer_loss: mean cross-entropy of the undisturbed branches (0 when there is none).
        band_loss: mean keep-band penalty, before its weight.
        kept_fraction: visual tokens kept (or their mean probability while soft) over all, 1 without pruning.
        tokens_per_branch: rows of a branch after pruning, its share of a shared context included.
        correct: fraction of undisturbed answer tokens whose likeliest token is right.
        num_branches, num_answers, num_visual: branches, undisturbed answer tokens, and visual tokens of all branches,
            of which the numbers above are means.
    """

    loss: Tensor
    answer_loss: float
    band_loss: float
    kept_fraction: float
    tokens_per_branch: float
    correct: float
    num_branches: int
    num_answers: int
    num_visual: int

    def sums(self) -> Tensor:
        """The means times the numbers they are of, and these numbers: float64 [9] on the CPU, to be added up."""
        of_branches, of_answers, of_visual = self.num_branches, self.num_answers, self.num_visual
        means = [
            (float(self.loss.detach()), of_branches),
            (self.band_loss, of_branches),
            (self.tokens_per_branch, of_branches),
            (self.answer_loss, of_answers),
            (self.correct, of_answers),
            (self.kept_fraction, of_visual),
        ]
        totals = [mean * count for mean, count in means]
        return torch.tensor([*totals, of_branches, of_answers, of_visual], dtype=torch.float64)

    @classmethod
    def of_sums(cls, sums: Tensor) -> StepResult:
        """The result of several micro-batches from the total of their :meth:`sums`, without gradient."""
        loss, band, tokens, answer, correct, kept, *counts = sums.tolist()
        of_branches, of_answers, of_visual = (int(count) for count in counts)
        return cls(
            loss=torch.tensor(loss / of_branches),
            answer_loss=answer / of_answers if of_answers else 0.0,
            band_loss=band / of_branches,
            kept_fraction=kept / of_visual if of_visual else 1.0,
            tokens_per_branch=tokens / of_branches,
            correct=correct / of_answers if of_answers else 0.0,
            num_branches=of_branches,
            num_answers=of_answers,
            num_visual=of_visual,
        )


def compute_loss(model: Photon, item: TrainingBatch, stage: Stage) -> StepResult:
    """Loss of one packed batch: every branch counts the same, as if each were a batch of its own."""
    batch = item.batch
    num_branches = len(batch.branch_lengths)
    pruning = model.config.pruning
    mode = effective_mode(MODES[stage], pruning)
    # Where nothing is ever dropped there is no mask to invert, and such branches are like the others.
    is_flipped = item.is_flipped if pruning.prunes else torch.zeros_like(item.is_flipped)
    is_disturbed = item.is_perturbed | is_flipped
    flip = is_flipped if mode == "hard" else None
    whole = item.is_whole if mode == "hard" else None
    # What was not pruned says nothing about the threshold.
    detach = is_disturbed if whole is None else is_disturbed | whole
    rows, targets, branch = objectives.answer_targets(batch)
    looking = None
    early, late = pruning.warm_up_distillation_weight, pruning.distillation_weight
    weight = {"alignment": 0.0, "warm-up": early, "soft": late, "hard": late}[stage]
    if weight > 0:
        # To end a turn nobody looks anywhere.
        says_something = rows[targets != model.config.eos_token_id]
        looking = torch.zeros_like(batch.labels, dtype=torch.bool).index_fill_(0, says_something, True)
    output = model(batch, mode, flip=flip, whole=whole, detach=detach, looking=looking)

    logits = model.logits(output.hidden[output.branch_rows[rows]]).float()
    answer = objectives.answer_loss(logits, targets)
    per_target = torch.where(item.is_perturbed[branch], objectives.entropy_loss(logits), answer)
    if flip is not None:
        per_target = torch.where(flip[branch], objectives.flip_loss(logits, targets), per_target)
    loss = objectives.mean_by_branch(per_target, branch, num_branches).mean()

    band = loss.new_zeros(())
    # The band moves a threshold; a share that is fixed has none.
    if mode != "full" and output.schedule is not None and pruning.policy == "photon":
        outside = objectives.keep_band_loss(output.schedule, pruning.keep_band)
        of_branch = objectives.mean_by_branch(outside, output.schedule.branch, num_branches)
        band = torch.where(is_disturbed, 0.0, of_branch).mean()
        loss = loss + pruning.band_weight * band
    if output.attended is not None and output.schedule is not None:
        schedule = output.schedule
        seen = kept_tokens(schedule, mode, flip, whole)
        apart = objectives.distillation_loss(schedule.u, output.attended, seen)
        of_branch = objectives.mean_by_branch(apart, schedule.branch, num_branches)
        distillation = torch.where(is_disturbed, 0.0, of_branch).mean()
        loss = loss + weight * distillation
    is_plain = ~is_disturbed[branch]
    hits = (logits.argmax(-1) == targets)[is_plain].float()
    return StepResult(
        loss=loss,
        answer_loss=float(answer.detach()[is_plain].mean()) if bool(is_plain.any()) else 0.0,
        band_loss=float(band.detach()),
        kept_fraction=_kept_fraction(output.schedule, mode),
        tokens_per_branch=_tokens_per_branch(batch, output.selection),
        correct=float(hits.mean()) if hits.numel() else 0.0,
        num_branches=num_branches,
        num_answers=hits.numel(),
        num_visual=int(batch.layout.pair_lengths.sum()),
    )


def _kept_fraction(schedule: Schedule | None, mode: Mode) -> float:
    if schedule is None or mode == "full":
        return 1.0
    kept = schedule.keep if mode == "hard" else schedule.p.detach()
    return float(kept[schedule.valid].float().mean())


def _tokens_per_branch(batch: PackedBatch, selection: Selection | None) -> float:
    if selection is not None:
        return sum(selection.host_lengths) / len(selection.host_lengths)
    rows = batch.context_ids.shape[0] + batch.branch_ids.shape[0]
    return rows / len(batch.branch_lengths)
