"""Settings of a study, and the presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Self

from photon.errors import PhotonError
from photon.training.optimiser import OptimiserConfig, Precision
from photon.training.pretrain import NamingConfig
from photon.training.stages import StageSchedule, WarmUpSwitch
from pipelines.dataset import Draw
from pipelines.phantom_vqa.cohort import RARE_FINDINGS
from pipelines.study.variants import DISTILLED, Variant, ablations, policies
from pipelines.train_spec import WHOLE_PROBABILITY, TrainSpec

CHOSEN = {"quick": ("photon", "all", "fixed-blind")}
"""Variants of the presets that do not have all of them."""
PRESETS = ("quick", "small", "medium", "full", "real", "ablations", "smoke")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Optimiser steps of every part of a study."""

    naming: int
    """Vision pretraining on label maps."""
    blind: int
    """The model of the text alone."""
    warm_up: int
    """All tokens, at most; a validation that beats the blind model by ``margin`` ends it earlier."""
    soft: int
    """Rows scaled by their keep probability."""
    hard: int
    """Rows removed."""
    flip_after: int
    """Hard steps before the flip objective begins."""
    alignment: int
    """Of the variants whose vision tower learns: steps in which the patch embedding learns alone."""
    validate_every: int
    """Steps between two validations."""


LENGTHS = {
    "smoke": Lengths(naming=4, blind=4, warm_up=6, soft=2, hard=4, flip_after=2, alignment=1, validate_every=3),
    "quick": Lengths(
        naming=450, blind=60, warm_up=450, soft=100, hard=200, flip_after=60, alignment=20, validate_every=25
    ),
    "small": Lengths(
        naming=600, blind=120, warm_up=900, soft=100, hard=160, flip_after=60, alignment=20, validate_every=50
    ),
    "medium": Lengths(
        naming=450, blind=120, warm_up=1200, soft=120, hard=240, flip_after=80, alignment=40, validate_every=50
    ),
    "full": Lengths(
        naming=2000, blind=500, warm_up=4000, soft=500, hard=2000, flip_after=500, alignment=200, validate_every=200
    ),
    "real": Lengths(
        naming=200, blind=80, warm_up=200, soft=40, hard=80, flip_after=30, alignment=20, validate_every=20
    ),
}
"""The one table of lengths. The ablations take those of "quick"."""

_OPTIMISER = OptimiserConfig(
    learning_rate=3e-3, vision_learning_rate=5e-4, alignment_learning_rate=1e-4, weight_decay=0.01
)
_DRAW = Draw(scans_per_step=8, questions_per_scan=24, max_shift=(6, 6, 6), robust_probability=0.0, flip_probability=0.0)
_PRUNED_DRAW = dataclasses.replace(
    _DRAW, questions_per_scan=8, robust_probability=0.15, whole_probability=WHOLE_PROBABILITY
)
_TINY_DRAW = dataclasses.replace(_DRAW, scans_per_step=2, questions_per_scan=4)
_LARGER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 8,
    "vision": {"depth": 6, "hidden_size": 128, "intermediate_size": 256, "window_size": 112},
}
"""The tiny model twice as wide."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudySpec:
    """Everything that decides a study, the data aside."""

    name: str
    """Preset it came from."""
    seeds: tuple[int, ...]
    """Each trains every variant once, from starts of its own."""
    variants: tuple[Variant, ...]
    lengths: Lengths
    model: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the tiny configuration that differ, see :func:`pipelines.start.start_from_scratch`."""
    pruning: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(DISTILLED))
    """Fields of its pruning configuration that differ in the shared starts, and in every variant that says nothing."""
    optimiser: OptimiserConfig = _OPTIMISER
    """Of the warm-up and the text-only model."""
    pruned_optimiser: OptimiserConfig = dataclasses.replace(_OPTIMISER, learning_rate=1.2e-3)
    """Of the variants, which go on from a warm-up."""
    draw: Draw = _DRAW
    """Batches of the warm-up and the text-only model."""
    pruned_draw: Draw = _PRUNED_DRAW
    """Batches of the variants."""
    naming_learning_rate: float = 6e-3
    naming_scans_per_step: int = 8
    margin: float | None = 0.24
    """Validation accuracy above the blind model's that ends the warm-up."""
    accumulate: int = 1
    """Micro-batches that a step's scans are dealt to."""
    start_threads: int = 1
    """Of computation, at least, for a seed's vision start and warm-up. A setting, as another number adds up in another
    order."""
    save_every: int = 50
    split: str = "test"
    """Whose questions are answered in the end."""
    max_scans: int | None = None
    """At most so many scans of that split, in order of their ids; None: all."""
    phantoms: str | None = None
    """Preset of PhantomVQA that is made where there is no data yet; None: the data has to be there."""
    rare_subtypes: tuple[str, ...] = ()
    """Subtypes of questions about rare findings, which are also reported by themselves."""

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        seeds: Sequence[int] | None = None,
        variants: Collection[str] | None = None,
        precision: Precision = "float32",
        keep_ratio: float | None = None,
    ) -> Self:
        """The settings of a preset.

        Args:
            seeds: other seeds than the preset's.
            variants: names of those variants that are trained; None: all, of "quick" three.
            precision: of the arithmetic of a training step.
            keep_ratio: share of tokens of the policies that keep a set number.

        Raises:
            PhotonError: ``PRESET_UNKNOWN``; ``VARIANT_UNKNOWN``; ``PRECISION_UNKNOWN``.
        """
        if name not in PRESETS:
            fact, remedy = "there is no such study.", f"Choose one of: {', '.join(PRESETS)}."
            raise PhotonError("PRESET_UNKNOWN", name, fact, remedy)
        lengths = LENGTHS["quick" if name == "ablations" else name]
        known = ablations(lengths.soft, lengths.hard) if name == "ablations" else policies(keep_ratio)
        names = [variant.name for variant in known]
        variants = CHOSEN.get(name) if variants is None else variants
        for variant in variants or ():
            if variant not in names:
                raise PhotonError(
                    "VARIANT_UNKNOWN", variant, f"study {name!r} has none.", f"Choose of: {', '.join(names)}."
                )
        chosen = tuple(variant for variant in known if variants is None or variant.name in variants)
        settings = {"seeds": (0, 1, 2)} | _SETTINGS[name] | ({"seeds": tuple(seeds)} if seeds else {})
        spec = cls(name=name, variants=chosen, lengths=lengths, **settings)
        return dataclasses.replace(
            spec,
            optimiser=dataclasses.replace(spec.optimiser, precision=precision),
            pruned_optimiser=dataclasses.replace(spec.pruned_optimiser, precision=precision),
        )

    @property
    def naming(self) -> NamingConfig:
        """Of the vision start."""
        rate = self.naming_learning_rate
        return NamingConfig(
            num_steps=self.lengths.naming,
            learning_rate=rate,
            patch_learning_rate=rate / 3,
            largest_positive_weight=60.0,
        )

    def warm_up(self, seed: int) -> TrainSpec:
        """The shared warm-up with all tokens, and the text-only model."""
        return self._training(
            seed,
            schedule=StageSchedule(alignment=0, warm_up=self.lengths.warm_up, soft=0, hard=0, flip_after=0),
            optimiser=self.optimiser,
            blind_steps=self.lengths.blind,
            switch=None if self.margin is None else WarmUpSwitch(margin=self.margin),
            freeze_vision=True,
        )

    def own_warm_up(self, variant: Variant, seed: int, num_steps: int) -> TrainSpec:
        """The warm-up of a variant that cannot share one: its own configuration, and all else as the shared one had it.

        Args:
            num_steps: how many steps the shared warm-up took. The learning rate follows the plan of the whole
                length, as it did there.
        """
        alignment = 0 if variant.freeze_vision else variant.lengths.get("alignment", self.lengths.alignment)
        alignment, planned = min(alignment, num_steps - 1), self.lengths.warm_up
        every = self.lengths.validate_every
        # The shared warm-up ended with a validation: counting validations that beat anything ends this one there too.
        count = num_steps // every - alignment // every
        stops = num_steps < planned
        return self._training(
            seed,
            schedule=StageSchedule(alignment=alignment, warm_up=planned - alignment, soft=0, hard=0, flip_after=0),
            optimiser=self.optimiser,
            switch=WarmUpSwitch(margin=-1.0, patience=count, baseline=0.0) if stops else None,
            pruning=variant.pruning,
            freeze_vision=variant.freeze_vision,
        )

    def training(self, variant: Variant, seed: int) -> TrainSpec:
        """A variant's own training, from a warm-up."""
        steps = {
            name: variant.lengths.get(name, getattr(self.lengths, name)) for name in ("soft", "hard", "flip_after")
        }
        return self._training(
            seed,
            schedule=StageSchedule(alignment=0, warm_up=0, **steps),
            optimiser=self.pruned_optimiser,
            pruning=variant.pruning,
            freeze_vision=variant.freeze_vision,
            pruned_draw=dataclasses.replace(self.pruned_draw, **variant.draw),
        )

    def _training(self, seed: int, **settings: Any) -> TrainSpec:
        common: dict[str, Any] = {
            "draw": self.draw,
            "pruned_draw": self.pruned_draw,
            "blind_steps": 0,
            "naming": NamingConfig(num_steps=0),
            "validate_every": self.lengths.validate_every,
            "save_every": self.save_every,
            "accumulate": self.accumulate,
        }
        return TrainSpec(seed=seed, **common | settings)


_RARE = tuple(f"{name} existence" for name in RARE_FINDINGS)
_QUICK: dict[str, Any] = {
    "phantoms": "vqa-quick",
    "draw": dataclasses.replace(_DRAW, questions_per_scan=12),
    "margin": 0.3,
    "start_threads": 2,
}
"""Shared, so that ablations go on from the starts of a quick study in the same folder."""
_SETTINGS: dict[str, dict[str, Any]] = {
    "smoke": {
        "phantoms": "vqa-smoke",
        "rare_subtypes": _RARE,
        "seeds": (0,),
        "draw": _TINY_DRAW,
        "pruned_draw": dataclasses.replace(_TINY_DRAW, robust_probability=0.15, flip_probability=0.05),
        "naming_scans_per_step": 2,
        "save_every": 2,
    },
    "quick": {**_QUICK, "seeds": (0,)},
    "ablations": _QUICK,
    "small": {"phantoms": "vqa-small", "rare_subtypes": _RARE},
    "medium": {"phantoms": "vqa-medium", "rare_subtypes": _RARE},
    "full": {
        "phantoms": "vqa-full",
        "rare_subtypes": _RARE,
        "model": _LARGER,
        "optimiser": dataclasses.replace(_OPTIMISER, learning_rate=1e-3),
        "pruned_optimiser": dataclasses.replace(_OPTIMISER, learning_rate=5e-4),
        "save_every": 200,
    },
    "real": {"margin": 0.05},
}
