"""The training loop: optimiser, stages, exact resume. Knows batches and folders, nothing of questions or scans."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from photon.checkpoint import (
    load_tensors,
    read_config,
    replace_folder,
    restore_weights,
    save_tensors,
    settle_folder,
    write_model,
)
from photon.errors import PhotonError
from photon.model.network import Photon
from photon.training.divergence import LossWatch, refuse_bad_weights, refuse_not_finite
from photon.training.faults import naming
from photon.training.stages import Curriculum, Stage, StageSchedule, WarmUpSwitch, learning_rate_factor
from photon.training.step import StepResult, TrainingBatch, compute_loss

OPTIMISER = "optimiser.safetensors"
PROGRESS = "progress.json"

Precision = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW, its learning rates, and the arithmetic of a step.

    Raises:
        PhotonError: ``PRECISION_UNKNOWN`` for a precision that is none.
    """

    learning_rate: float
    vision_learning_rate: float
    alignment_learning_rate: float
    """Of the patch embedding while nothing else learns."""
    weight_decay: float = 0.01
    warm_up_fraction: float = 0.05
    floor: float = 0.05
    """Share of the learning rate left at the last step."""
    max_grad_norm: float = 1.0
    precision: Precision = "float32"
    """With "bfloat16" matrices are multiplied in it; weights, scores, thresholds and losses stay float32."""

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            fact = f"it is not one of {get_args(Precision)}."
            raise PhotonError("PRECISION_UNKNOWN", self.precision, fact, "Choose one of them.")


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
    ) -> None:
        """Train the parameters of ``model`` that require a gradient.

        Args:
            run_digest: names everything that decides the result; a folder of another run is refused.
            switch: what ends the warm-up early, its baseline known; :meth:`validated` brings the evidence.
        """
        self.device = model.model.embed_tokens.weight.device
        self.model, self.config, self.run_digest = model, config, run_digest
        self.curriculum = Curriculum(plan=schedule, switch=switch)
        self.watch = LossWatch(model.config.vocab_size)
        self.num_steps_done = 0
        self.optimiser = torch.optim.AdamW(_parameter_groups(model, config), betas=(0.9, 0.95), eps=1e-8)

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
        """Train to the end of the schedule.

        A state is written once the next step has found its loss and gradient in order, so that what is on disk is a
        model that was still well.

        Args:
            batch_at: batch of a step, on any device, given the step and whether flips are on; or several, whose
                branches count as if they were one batch.
            on_step: called after every step.
            save_to: folder of the resumable state, written every ``save_every`` steps and at the end.

        Raises:
            PhotonError: ``TRAINING_DIVERGED`` when a loss is not finite or explodes (:class:`LossWatch`); the last
                saved state stays usable. ``TRAINING_FAILED`` with the scans of the step when anything else goes wrong.
        """
        due: dict[str, Any] | None = None  # progress of the state that waits to be written
        while self.num_steps_done < self.schedule.num_steps:
            step = self.num_steps_done
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
            refuse_bad_weights(dict(self.model.named_parameters()), self.num_steps_done)
            self.save(save_to)

    def validated(self, accuracy: float) -> bool | None:
        """Tell a validation accuracy that was measured after the step that is being reported.

        Returns:
            True when it ends the warm-up, False when the warm-up ends without evidence, else None.
        """
        self.curriculum, verdict = self.curriculum.validated(self.num_steps_done + 1, accuracy)
        return verdict

    def _gradient(self, items: Sequence[TrainingBatch], step: int) -> StepReport:
        """The gradient of a step's micro-batches together, clipped."""
        started = time.perf_counter()
        stage = self.schedule.stage_at(step)
        self._set_learning_rates(step, stage)
        self.optimiser.zero_grad(set_to_none=True)
        num_branches = sum(item.num_branches for item in items)
        if not num_branches:
            fact, remedy = "none of its scans has a question.", "Ask something about every scan of the training split."
            raise PhotonError("TRAINING_FAILED", f"step {step}", fact, remedy)
        results = [self._backward(item, stage, step, num_branches) for item in items if item.num_branches]
        result = (
            results[0] if len(results) == 1 else StepResult.of_sums(torch.stack([r.sums() for r in results]).sum(0))
        )
        with naming([name for item in items for name in item.names], f"step {step}"):
            refuse_not_finite("loss", result.loss.detach(), step, stage)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
            refuse_not_finite("gradient", norm, step, stage)
            if result.num_answers:
                self.watch.see(result.answer_loss, step, stage)
        rate = self.optimiser.param_groups[0]["lr"]
        return StepReport(step, stage, rate, float(norm), result, time.perf_counter() - started)

    def _backward(self, item: TrainingBatch, stage: Stage, step: int, num_branches: int) -> StepResult:
        """Add the gradient of a micro-batch: its mean over branches, weighted by its share of all branches."""
        with naming(item.names, f"step {step}"):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
                result = compute_loss(self.model, item.to(self.device), stage)
            (result.loss * (item.num_branches / num_branches)).backward()
        return dataclasses.replace(result, loss=result.loss.detach())

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
            for parameter in group["params"]:
                parameter.requires_grad_(group["is_patch_embedding"] or not is_alignment)

    def save(self, folder: Path) -> None:
        """Write weights, optimiser state and progress, atomically as one folder."""
        self._save(folder, self._progress())

    def _save(self, folder: Path, progress: Mapping[str, Any]) -> None:
        def build(temporary: Path) -> None:
            write_model(self.model, temporary)
            save_tensors(self._optimiser_tensors(), temporary / OPTIMISER)
            (temporary / PROGRESS).write_text(json.dumps(progress))

        replace_folder(folder, build)

    def _progress(self) -> dict[str, Any]:
        return {
            "num_steps_done": self.num_steps_done,
            "run_digest": self.run_digest,
            "curriculum": self.curriculum.told(self.num_steps_done),
            "watch": self.watch.as_dict(),
        }

    def restore(self, folder: Path) -> bool:
        """Continue from a folder that :meth:`save` wrote; False when there is none.

        Raises:
            PhotonError: ``CHECKPOINT_MISMATCH`` when it belongs to another run, ``CHECKPOINT_CORRUPT``.
        """
        settle_folder(folder)
        if not (folder / PROGRESS).is_file():
            return False
        with _refusing_damage(folder / PROGRESS):
            progress = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            run_digest, num_steps_done = str(progress["run_digest"]), int(progress["num_steps_done"])
        if run_digest != self.run_digest or read_config(folder) != self.model.config:
            raise PhotonError(
                "CHECKPOINT_MISMATCH",
                folder,
                "it was saved by a run with other settings or other data.",
                "Choose another output folder, or remove this one to start anew.",
            )
        with _refusing_damage(folder / PROGRESS):
            # States from before there was either have neither.
            if "curriculum" in progress:
                self.curriculum = self.curriculum.resumed(progress["curriculum"])
            if "watch" in progress:
                self.watch.resume(progress["watch"])
        restore_weights(self.model, folder)
        self._load_optimiser(load_tensors(folder / OPTIMISER))
        self.num_steps_done = num_steps_done
        return True

    def _optimiser_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}:{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimiser.state.get(parameter, {}).items()
        }

    def _load_optimiser(self, tensors: dict[str, Tensor]) -> None:
        parameters = dict(self.model.named_parameters())
        for label, value in tensors.items():
            name, key = label.rsplit(":", 1)
            # The step count stays on the CPU, where AdamW keeps it; the moments belong beside their parameter.
            place = "cpu" if key == "step" else parameters[name].device
            self.optimiser.state[parameters[name]][key] = value.to(place)


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        fact = f"it does not tell how far the run was ({type(error).__name__}: {error})."
        remedy = "Remove this folder to start the run anew."
        raise PhotonError("CHECKPOINT_CORRUPT", path, fact, remedy) from error


def _parameter_groups(model: Photon, config: OptimiserConfig) -> list[dict[str, Any]]:
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("pos_proj.weight") or not parameter.requires_grad:
            continue  # the first is unused by the method, kept for its name in public checkpoints
        kind = (name.startswith("visual."), "patch_embed" in name, parameter.ndim > 1)
        groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "base_lr": config.vision_learning_rate if is_vision else config.learning_rate,
            "is_patch_embedding": is_patch,
            "weight_decay": config.weight_decay if is_matrix else 0.0,
        }
        for (is_vision, is_patch, is_matrix), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
