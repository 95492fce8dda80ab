"""The training loop: optimiser, stages, exact resume. Knows batches and folders, nothing of questions or scans."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
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
from photon.training.stages import Stage, StageSchedule, learning_rate_factor
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
    """

    def __init__(self, model: Photon, schedule: StageSchedule, config: OptimiserConfig, *, run_digest: str) -> None:
        """``run_digest`` names everything that decides the result; a folder of another run is refused."""
        self.device = model.model.embed_tokens.weight.device
        self.model, self.schedule, self.config, self.run_digest = model, schedule, config, run_digest
        self.num_steps_done = 0
        self.optimiser = torch.optim.AdamW(_parameter_groups(model, config), betas=(0.9, 0.95), eps=1e-8)

    def run(
        self,
        batch_at: Callable[[int, bool], TrainingBatch],
        *,
        on_step: Callable[[StepReport], None],
        save_to: Path | None = None,
        save_every: int = 100,
    ) -> None:
        """Train to the end of the schedule.

        Args:
            batch_at: batch of a step, on any device, given the step and whether flips are on.
            on_step: called after every step.
            save_to: folder of the resumable state, written every ``save_every`` steps and at the end.

        Raises:
            PhotonError: ``TRAINING_DIVERGED`` when a loss is not finite; the last saved state stays usable.
        """
        while self.num_steps_done < self.schedule.num_steps:
            step = self.num_steps_done
            on_step(self._step(batch_at(step, self.schedule.flips_at(step)), step))
            self.num_steps_done += 1
            is_last = self.num_steps_done == self.schedule.num_steps
            if save_to is not None and (is_last or self.num_steps_done % save_every == 0):
                self.save(save_to)

    def _step(self, item: TrainingBatch, step: int) -> StepReport:
        started = time.perf_counter()
        stage = self.schedule.stage_at(step)
        self._set_learning_rates(step, stage)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            result = compute_loss(self.model, item.to(self.device), stage)
        _refuse_divergence("loss", result.loss, step, stage)
        self.optimiser.zero_grad(set_to_none=True)
        result.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        _refuse_divergence("gradient", norm, step, stage)
        self.optimiser.step()
        rate = self.optimiser.param_groups[0]["lr"]
        return StepReport(step, stage, rate, float(norm), result, time.perf_counter() - started)

    def _set_learning_rates(self, step: int, stage: Stage) -> None:
        warm_up_steps = max(round(self.schedule.num_steps * self.config.warm_up_fraction), 1)
        factor = learning_rate_factor(
            step, self.schedule.num_steps, warm_up_steps=warm_up_steps, floor=self.config.floor
        )
        is_alignment = stage == "alignment"
        for group in self.optimiser.param_groups:
            base = self.config.alignment_learning_rate if is_alignment else group["base_lr"]
            group["lr"] = base * factor
            for parameter in group["params"]:
                parameter.requires_grad_(group["is_patch_embedding"] or not is_alignment)

    def save(self, folder: Path) -> None:
        """Write weights, optimiser state and progress, atomically as one folder."""

        def build(temporary: Path) -> None:
            write_model(self.model, temporary)
            save_tensors(self._optimiser_tensors(), temporary / OPTIMISER)
            progress = {"num_steps_done": self.num_steps_done, "run_digest": self.run_digest}
            (temporary / PROGRESS).write_text(json.dumps(progress))

        replace_folder(folder, build)

    def restore(self, folder: Path) -> bool:
        """Continue from a folder that :meth:`save` wrote; False when there is none.

        Raises:
            PhotonError: ``CHECKPOINT_MISMATCH`` when it belongs to another run, ``CHECKPOINT_CORRUPT``.
        """
        settle_folder(folder)
        if not (folder / PROGRESS).is_file():
            return False
        run_digest, num_steps_done = _read_progress(folder / PROGRESS)
        if run_digest != self.run_digest or read_config(folder) != self.model.config:
            raise PhotonError(
                "CHECKPOINT_MISMATCH",
                folder,
                "it was saved by a run with other settings or other data.",
                "Choose another output folder, or remove this one to start anew.",
            )
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


def _refuse_divergence(name: str, value: Tensor, step: int, stage: Stage) -> None:
    if not bool(torch.isfinite(value)):
        raise PhotonError(
            "TRAINING_DIVERGED",
            f"step {step}",
            f"the {name} became {float(value.detach())} in the {stage} stage.",
            "Lower the learning rate and start again from the last checkpoint.",
        )


def _read_progress(path: Path) -> tuple[str, int]:
    try:
        progress = json.loads(path.read_text(encoding="utf-8"))
        return str(progress["run_digest"]), int(progress["num_steps_done"])
    except (ValueError, KeyError, TypeError) as error:
        fact = f"it does not tell how far the run was ({type(error).__name__}: {error})."
        remedy = "Remove this folder to start the run anew."
        raise PhotonError("CHECKPOINT_CORRUPT", path, fact, remedy) from error


def _parameter_groups(model: Photon, config: OptimiserConfig) -> list[dict[str, Any]]:
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("pos_proj.weight"):
            continue  # unused by the method; kept for its name in public checkpoints
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
