"""Settings of a training run, and the presets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from photon.errors import PhotonError
from photon.training.optimiser import OptimiserConfig, Precision
from photon.training.pretrain import NamingConfig
from photon.training.stages import StageSchedule, WarmUpSwitch
from pipelines.dataset import Draw

Method = Literal["learnt", "published"]

LEARNT: dict[str, Any] = {"distillation_weight": 1.0, "saliency_gradient": True, "keep_band": (0.37, 0.5)}
"""Pruning whose scores have a teacher, docs/evidence.md; as published nothing teaches them."""
WHOLE_PROBABILITY = 0.1
"""Questions of the hard stage that keep every token: what nobody sees could never be looked for again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSpec:
    """Everything that decides a training run, the data aside.

    Raises:
        PhotonError: ``TRAINING_INVALID`` when a setting is out of its range or contradicts another.
    """

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
    pruning: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of :class:`photon.config.PruningConfig` that are to be other than the start's."""
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the model from scratch that are to be other than the tiny preset's, see
    :func:`pipelines.start.start_from_scratch`."""
    freeze_vision: bool = False
    """Whether the vision tower learns nothing but its pretraining on label maps. Scans are then encoded once and do
    not move (``max_shift`` holds for the pretraining alone)."""
    switch: WarmUpSwitch | None = None
    """What ends the warm-up before the schedule does; None: nothing."""
    accumulate: int = 1
    """Micro-batches that a step's scans are dealt to, one after another; the gradient is that of all together."""

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            fact = f"a step of {self.accumulate} micro-batches does nothing."
            raise PhotonError("TRAINING_INVALID", "accumulate", fact, "Give a whole number from 1.")
        if self.freeze_vision and self.schedule.alignment:
            fact = f"in its {self.schedule.alignment} steps only the vision tower would learn, and it is frozen."
            remedy = "Plan no alignment, or let the vision tower learn."
            raise PhotonError("TRAINING_INVALID", "alignment", fact, remedy)

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
        schedule: StageSchedule | None = None,
        learning_rate: float | None = None,
        freeze_vision: bool = False,
        method: Method | None = None,
        pruning: Mapping[str, Any] | None = None,
    ) -> Self:
        """The settings of a preset.

        Args:
            is_pretrained: the training starts from a checkpoint: with the published training's learning rates, and
                without vision pretraining.
            naming_steps: length of vision pretraining, when it is to be another.
            precision: of the arithmetic of a step, as :class:`OptimiserConfig` has it.
            scans_per_step, questions_per_scan: size of every stage's batches, when it is to be another.
            schedule: the stages, when they are to be others.
            learning_rate: of the decoder, when it is to be another; the other rates keep their ratio to it.
            freeze_vision: the vision tower does not learn, so that there is no alignment unless ``schedule`` has one.
            method: "learnt", scores that are taught where to look, or "published", with flips in the hard stage. None:
                "published" of a pretrained model and of a policy without a threshold, else "learnt".
            pruning: settings of the pruning that are to be other than the method's.

        Raises:
            PhotonError: ``PRESET_UNKNOWN``, ``PRECISION_UNKNOWN``, ``TRAINING_INVALID``.
        """
        if name not in _PRESETS:
            known = ", ".join(_PRESETS)
            raise PhotonError("PRESET_UNKNOWN", name, "there is no such training preset.", f"Choose one of: {known}.")
        spec = cls(**_PRESETS[name] | {"seed": seed})
        if is_pretrained:
            spec = dataclasses.replace(spec, optimiser=_PRETRAINED_OPTIMISER)
            naming_steps = naming_steps or 0
        optimiser = dataclasses.replace(spec.optimiser, precision=precision)
        if learning_rate is not None:
            optimiser = _with_rate(optimiser, learning_rate)
        if schedule is None:
            alignment = 0 if freeze_vision else spec.schedule.alignment
            schedule = dataclasses.replace(spec.schedule, alignment=alignment)
        pruning = pruning or {}
        method = method or ("published" if is_pretrained or pruning.get("policy", "photon") != "photon" else "learnt")
        if method == "learnt":
            pruned_draw = dataclasses.replace(
                spec.pruned_draw, flip_probability=0.0, whole_probability=WHOLE_PROBABILITY
            )
            spec, pruning = dataclasses.replace(spec, pruned_draw=pruned_draw), {**LEARNT, **pruning}
        sizes = {"scans_per_step": scans_per_step, "questions_per_scan": questions_per_scan}
        changed: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
        return dataclasses.replace(
            spec,
            schedule=schedule,
            freeze_vision=freeze_vision,
            optimiser=optimiser,
            draw=dataclasses.replace(spec.draw, **changed),
            pruned_draw=dataclasses.replace(spec.pruned_draw, **changed),
            naming=spec.naming if naming_steps is None else dataclasses.replace(spec.naming, num_steps=naming_steps),
            naming_scans_per_step=scans_per_step or spec.naming_scans_per_step,
            pruning=pruning,
        )

    def digest(self) -> str:
        """Twelve hex digits that name these settings."""
        # Runs from before these settings existed stay what they were.
        later = {name: getattr(self, name) for name in _LATER}
        content = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in later or later[name] != _LATER[name]
        }
        if self.naming.largest_positive_weight == NamingConfig.largest_positive_weight:
            del content["naming"]["largest_positive_weight"]
        for draw in (content["draw"], content["pruned_draw"]):
            if draw["whole_probability"] == 0.0:
                del draw["whole_probability"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _with_rate(optimiser: OptimiserConfig, learning_rate: float) -> OptimiserConfig:
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        fact = f"{learning_rate} is not a positive number."
        raise PhotonError("TRAINING_INVALID", "learning rate", fact, "Give one, for example 0.001.")
    ratio = learning_rate / optimiser.learning_rate
    return dataclasses.replace(
        optimiser,
        learning_rate=learning_rate,
        vision_learning_rate=optimiser.vision_learning_rate * ratio,
        alignment_learning_rate=optimiser.alignment_learning_rate * ratio,
    )


_LATER: dict[str, Any] = {"pruning": {}, "model": {}, "freeze_vision": False, "switch": None, "accumulate": 1}
"""Settings that count in :meth:`TrainSpec.digest` only where they are not as ever, with their defaults."""


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
