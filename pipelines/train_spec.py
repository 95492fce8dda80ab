"""Settings of a training run, and the presets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Self

from photon.errors import PhotonError
from photon.training.loop import OptimiserConfig, Precision
from photon.training.pretrain import NamingConfig
from photon.training.stages import StageSchedule
from pipelines.dataset import Draw


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Everything that decides a training run, the data aside."""

    seed: int = 0
    schedule: StageSchedule
    optimiser: OptimiserConfig
    draw: Draw
    """Batches before pruning begins, while contexts are shared through every layer."""
    pruned_draw: Draw
    """Batches of the soft and hard stages, where every branch carries its own visual rows."""
    blind_steps: int
    """Steps of the text-only baseline."""
    naming: NamingConfig
    """Vision pretraining on label maps; left out when the data folder has none."""
    naming_scans_per_step: int = 8
    validate_every: int = 50
    save_every: int = 50

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        seed: int = 0,
        is_pretrained: bool = False,
        naming_steps: int | None = None,
        precision: Precision = "float32",
        scans_per_step: int | None = None,
        questions_per_scan: int | None = None,
    ) -> Self:
        """The settings of a preset.

        Args:
            is_pretrained: the training starts from a checkpoint: with the published training's learning rates, and
                without vision pretraining.
            naming_steps: length of vision pretraining, when it is to be another.
            precision: of the arithmetic of a step, as :class:`OptimiserConfig` has it.
            scans_per_step, questions_per_scan: size of every stage's batches, when it is to be another.

        Raises:
            PhotonError: ``PRESET_UNKNOWN``, ``PRECISION_UNKNOWN``.
        """
        if name not in _PRESETS:
            known = ", ".join(_PRESETS)
            raise PhotonError("PRESET_UNKNOWN", name, "there is no such training preset.", f"Choose one of: {known}.")
        spec = cls(**_PRESETS[name] | {"seed": seed})
        if is_pretrained:
            spec = dataclasses.replace(spec, optimiser=_PRETRAINED_OPTIMISER)
            naming_steps = naming_steps or 0
        sizes = {"scans_per_step": scans_per_step, "questions_per_scan": questions_per_scan}
        changed: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        return dataclasses.replace(
            spec,
            optimiser=dataclasses.replace(spec.optimiser, precision=precision),
            draw=dataclasses.replace(spec.draw, **changed),
            pruned_draw=dataclasses.replace(spec.pruned_draw, **changed),
            naming=spec.naming if naming_steps is None else dataclasses.replace(spec.naming, num_steps=naming_steps),
            naming_scans_per_step=scans_per_step or spec.naming_scans_per_step,
        )

    def digest(self) -> str:
        """Twelve hex digits that name these settings."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:12]


_OPTIMISER = OptimiserConfig(
    learning_rate=3e-3, vision_learning_rate=5e-4, alignment_learning_rate=1e-4, weight_decay=0.01
)
_PRETRAINED_OPTIMISER = dataclasses.replace(
    _OPTIMISER, learning_rate=1e-5, vision_learning_rate=5e-6, alignment_learning_rate=1.25e-4
)
_DRAW = Draw(scans_per_step=8, questions_per_scan=24, max_shift=(6, 6, 6), robust_probability=0.0, flip_probability=0.0)
_PRUNED_DRAW = dataclasses.replace(_DRAW, questions_per_scan=12, robust_probability=0.15, flip_probability=0.05)
_PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "schedule": StageSchedule(alignment=10, warm_up=500, soft=30, hard=80, flip_after=20),
        "optimiser": _OPTIMISER,
        "draw": _DRAW,
        "pruned_draw": _PRUNED_DRAW,
        "blind_steps": 120,
        "naming": NamingConfig(num_steps=250, learning_rate=6e-3),
    },
    "smoke": {
        "schedule": StageSchedule(alignment=1, warm_up=4, soft=2, hard=3, flip_after=1),
        "optimiser": _OPTIMISER,
        "draw": dataclasses.replace(_DRAW, scans_per_step=4, questions_per_scan=8),
        "pruned_draw": dataclasses.replace(_PRUNED_DRAW, scans_per_step=2, questions_per_scan=4),
        "blind_steps": 6,
        "naming": NamingConfig(num_steps=4),
        "naming_scans_per_step": 4,
        "validate_every": 5,
        "save_every": 5,
    },
}
