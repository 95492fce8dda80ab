"""The training loop: optimiser, stages, exact resume. Knows batches and folders, nothing of questions or scans."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from photon.checkpoint import load_tensors, restore_weights, settle_folder
from photon.device import sums_in_order
from photon.errors import PhotonError
from photon.model.network import Photon
from photon.training.divergence import LossWatch, refuse_bad_weights, refuse_not_finite
from photon.training.faults import naming
from photon.training.optimiser import OptimiserConfig, build_optimiser, load_optimiser, optimiser_tensors
from photon.training.parallel import ALONE, Ranks, SharedError, is_split
from photon.training.stages import Curriculum, Stage, StageSchedule, WarmUpSwitch, learning_rate_factor
from photon.training.state import OPTIMISER, PROGRESS, read_progress, refusing_damage, write_state
from photon.training.step import NUM_SUMS, StepResult, TrainingBatch, compute_loss, stand_in

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a step did, for logs."""

    step: int
    stage: Stage
    learning_rate: float
    grad_norm: float
    result: StepResult
    elapsed_s: float


class Trainer:
    """A model, its optimiser and the number of steps done; saved and restored as one folder.

    Training runs where the model is. The folder does not say where that was: a run may go on on another device.

    Attributes:
        curriculum: what is trained when, with what evidence has decided about it.
    """

    def __init__(
        self,
        model: Photon,
        schedule: StageSchedule,
        config: OptimiserConfig,
        *,
        run_digest: str,
        switch: WarmUpSwitch | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        """Train the parameters of ``model`` that require a gradient.

        Args:
            model: where it is trained; on the CPU for shards, which go to their rank's device when :meth:`run` begins.
            ranks: the processes that share every step; all of them call the methods that say so.
            run_digest: names everything that decides the result; a folder of another run is refused.
            switch: what ends the warm-up early, its baseline known; :meth:`validated` brings the evidence.
        """
        self.device = ranks.device or model.model.embed_tokens.weight.device
        self.model, self.config, self.run_digest, self.ranks = model, config, run_digest, ranks
        self.shell: nn.Module | None = None
        self.curriculum = Curriculum(plan=schedule, switch=switch)
        self.watch = LossWatch(model.config.vocab_size)
        self.num_steps_done = 0
        self.optimiser = build_optimiser(model, config)

    @property
    def schedule(self) -> StageSchedule:
        """The stages as they are followed."""
        return self.curriculum.schedule

    def run(
        self,
        batch_at: Callable[[int, bool], TrainingBatch | Sequence[TrainingBatch]],
        *,
        on_step: Callable[[StepReport], None],
        save_to: Path | None = None,
        save_every: int = 100,
    ) -> None:
        """Train to the end of the schedule; all ranks together.

        A state is written once the next step has found its loss and gradient in order, so that what is on disk is a
        model that was still well.

        Args:
            batch_at: batch of a step, on any device, given the step and whether flips are on; or several, whose
                branches count as if they were one batch. Of several ranks, each gives its own share of the step.
            on_step: called after every step, with the numbers of all ranks.
            save_to: folder of the resumable state, written by rank 0 every ``save_every`` steps and at the end.

        Raises:
            PhotonError: ``TRAINING_DIVERGED`` when a loss is not finite or explodes (:class:`LossWatch`); the last
                saved state stays usable. ``TRAINING_FAILED`` with the scans of the step when anything else goes wrong.
        """
        if self.shell is None:
            self._distribute()
        due: dict[str, Any] | None = None  # progress of the state that waits to be written
        while self.num_steps_done < self.schedule.num_steps:
            step = self.num_steps_done
            with self.ranks.together():
                items = batch_at(step, self.schedule.flips_at(step))
            report = self._gradient([items] if isinstance(items, TrainingBatch) else items, step)
            if save_to is not None and due and self.watch.num_high == 0:
                self._save(save_to, due)
                due = None
            self.optimiser.step()
            on_step(report)
            self.num_steps_done += 1
            if due or self.num_steps_done % save_every == 0:
                due = self._progress()
        if save_to is not None:
            with self.ranks.together():
                refuse_bad_weights(self.model.named_parameters(), self.num_steps_done)
            self.save(save_to)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """A function of the model and the arguments, wherever the parameters are; all ranks together for shards."""
        if self.shell is None:
            self._distribute()
        shell = self.shell.module if isinstance(self.shell, DistributedDataParallel) else self.shell
        assert shell is not None
        result: T = shell(function, *arguments)
        return result

    def whole_weights(self) -> dict[str, Tensor]:
        """All parameters whole, by name; all ranks together, and only rank 0 gets them."""
        return self.ranks.whole(self.model.named_parameters())

    def validated(self, accuracy: float) -> bool | None:
        """Tell a validation accuracy that was measured after the step that is being reported.

        Returns:
            True when it ends the warm-up, False when the warm-up ends without evidence, else None.
        """
        self.curriculum, verdict = self.curriculum.validated(self.num_steps_done + 1, accuracy)
        return verdict

    def _distribute(self) -> None:
        """Wrap the model for its ranks; the optimiser then owns the parameters that it has become."""
        state = optimiser_tensors(self.model, self.optimiser)
        self.shell = self.ranks.distributed(self.model)
        if self.ranks.kind == "fsdp":
            self.optimiser = build_optimiser(self.model, self.config)
            load_optimiser(self.model, self.optimiser, state)

    def _gradient(self, items: Sequence[TrainingBatch], step: int) -> StepReport:
        """The gradient of a step's micro-batches together, those of all ranks, clipped."""
        started = time.perf_counter()
        if self.shell is None:
            self._distribute()
        stage = self.schedule.stage_at(step)
        self._set_learning_rates(step, stage)
        self.optimiser.zero_grad(set_to_none=True)
        asked = [item for item in items if item.num_branches]
        num_items, num_branches, has_scans = self._agreed(asked, step)
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64)
        for number in range(num_items):
            is_own = number < len(asked)
            # Layers that are shared out are gathered by all ranks together, so each takes part to the end.
            item = asked[number] if is_own else stand_in(self.model.config, has_scans)
            weight = item.num_branches / num_branches if is_own else 0.0
            result = self._backward(item, stage, step, weight, is_last=number == num_items - 1)
            sums += result.sums() * is_own
        result = result if num_items == self.ranks.size == 1 else StepResult.of_sums(self.ranks.total(sums))
        with self._naming_all(items, step):
            refuse_not_finite("loss", result.loss, step, stage)
            norm = self._clip(stage)
            refuse_not_finite("gradient", norm, step, stage)
            if result.num_answers:
                self.watch.see(result.answer_loss, step, stage)
        rate = self.optimiser.param_groups[0]["lr"]
        return StepReport(step, stage, rate, norm, result, time.perf_counter() - started)

    def _agreed(self, items: Sequence[TrainingBatch], step: int) -> tuple[int, int, bool]:
        """Micro-batches of the rank that has most, branches of all ranks, and whether these have scans."""
        num_branches = sum(item.num_branches for item in items)
        with_scans = sum(item.batch.visual_rows.numel() > 0 for item in items)
        shares = self.ranks.gathered([len(items), num_branches, with_scans])
        num_items, num_branches, with_scans = (sum(column) for column in zip(*shares, strict=True))
        if not num_branches:
            fact, remedy = "none of its scans has a question.", "Ask something about every scan of the training split."
            raise SharedError("TRAINING_FAILED", f"step {step}", fact, remedy)
        if self.ranks.kind == "fsdp" and with_scans not in (0, num_items):
            fact = f"of its {num_items} micro-batches {with_scans} have visual tokens; shards need all of them or none."
            raise SharedError("TRAINING_FAILED", f"step {step}", fact, "Train by ddp.")
        return max(count for count, _, _ in shares), num_branches, with_scans > 0

    @contextmanager
    def _naming_all(self, items: Sequence[TrainingBatch], step: int) -> Iterator[None]:
        """For what every rank finds at the same place: name the scans of all."""
        try:
            yield
        except PhotonError as error:
            own = ", ".join(name for item in items for name in item.names)
            with naming([names for names in self.ranks.texts(own) if names], f"step {step}"):
                raise SharedError(error.code, error.subject, error.fact, error.remedy) from error

    def _backward(self, item: TrainingBatch, stage: Stage, step: int, weight: float, *, is_last: bool) -> StepResult:
        """Add the gradient of a micro-batch, its mean over branches times ``weight``."""
        assert self.shell is not None
        ordered = sums_in_order(self.device)
        with naming(item.names, f"step {step}"), self.ranks.accumulating(self.shell, is_last), ordered:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                loss, result = self.shell(_loss, item.to(self.device), stage)
            (loss * weight).backward()
        return result

    def _clip(self, stage: Stage) -> float:
        """Scale the gradient to the largest norm it may have; its norm before, of all ranks' shards."""
        if stage == "alignment":
            for group in self.optimiser.param_groups:
                for parameter in group["params"] if not group["is_patch_embedding"] else ():
                    parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        return float(norm.full_tensor() if is_split(norm) else norm)  # type: ignore[attr-defined]

    def _set_learning_rates(self, step: int, stage: Stage) -> None:
        num_steps = self.curriculum.plan.num_steps
        warm_up_steps = max(round(num_steps * self.config.warm_up_fraction), 1)
        factor = learning_rate_factor(
            self.curriculum.clock(step), num_steps, warm_up_steps=warm_up_steps, floor=self.config.floor
        )
        is_alignment = stage == "alignment"
        for group in self.optimiser.param_groups:
            base = self.config.alignment_learning_rate if is_alignment else group["base_lr"]
            group["lr"] = base * factor
            if self.ranks.kind is None:  # wrapped modules take note once of what learns; their gradients are dropped
                for parameter in group["params"]:
                    parameter.requires_grad_(group["is_patch_embedding"] or not is_alignment)

    def save(self, folder: Path) -> None:
        """Write weights, optimiser state and progress, atomically as one folder; all ranks together."""
        self._save(folder, self._progress())

    def _save(self, folder: Path, progress: Mapping[str, Any]) -> None:
        weights = self.whole_weights()
        moments = self.ranks.whole(optimiser_tensors(self.model, self.optimiser).items())
        if self.ranks.is_main:
            write_state(folder, self.model, weights, moments, progress)

    def _progress(self) -> dict[str, Any]:
        return {
            "num_steps_done": self.num_steps_done,
            "run_digest": self.run_digest,
            "curriculum": self.curriculum.told(self.num_steps_done),
            "watch": self.watch.as_dict(),
        }

    def restore(self, folder: Path) -> bool:
        """Continue from a folder that :meth:`save` wrote; False when there is none. All ranks together, before a step.

        Raises:
            PhotonError: ``CHECKPOINT_MISMATCH`` when it belongs to another run, ``CHECKPOINT_CORRUPT``.
        """
        with self.ranks.together():
            if self.ranks.is_main:
                settle_folder(folder)
        with self.ranks.together():
            is_there = self._restore(folder)
        if len({count for (count,) in self.ranks.gathered([self.num_steps_done])}) > 1:
            fact = "not every rank finds the same state in it."
            raise PhotonError(
                "CHECKPOINT_MISMATCH", folder, fact, "Put the output on a file system that all ranks see."
            )
        return is_there

    def _restore(self, folder: Path) -> bool:
        progress = read_progress(folder, self.run_digest, self.model.config)
        if progress is None:
            return False
        with refusing_damage(folder / PROGRESS):
            # States from before there was either have neither.
            if "curriculum" in progress:
                self.curriculum = self.curriculum.resumed(progress["curriculum"])
            if "watch" in progress:
                self.watch.resume(progress["watch"])
        restore_weights(self.model, folder)
        load_optimiser(self.model, self.optimiser, load_tensors(folder / OPTIMISER))
        self.num_steps_done = progress["num_steps_done"]
        return True


def _loss(model: Photon, item: TrainingBatch, stage: Stage) -> tuple[Tensor, StepResult]:
    """The loss apart from the report, so that wrapped modules see the tensor that gradients come from."""
    result = compute_loss(model, item, stage)
    return result.loss, dataclasses.replace(result, loss=result.loss.detach())
