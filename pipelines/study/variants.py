"""The token policies and ablations that a study compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pipelines import train_spec
from pipelines.study.answer_table import CONDITIONS

DISTILLED: dict[str, Any] = {"warm_up_distillation_weight": 0.3}
"""Of the shared warm-up: the saliency learns to foretell where the later layers look (docs/evidence.md)."""
LEARNT: dict[str, Any] = {**train_spec.LEARNT, **DISTILLED}
"""Of photon: where to look is learnt, under pressure to keep little; as published only how much is."""
UNTAUGHT: dict[str, Any] = {"warm_up_distillation_weight": 0.0}
"""Of what goes on from the shared warm-up without a saliency to teach."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to train from a shared start, and what its checkpoint is asked afterwards."""

    name: str
    """In tables, file names and runs: lower-case letters, digits, hyphens."""
    pruning: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the pruning configuration that differ from the start's."""
    draw: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of the batches' settings that differ from the study's, in the soft and hard stages."""
    lengths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Steps that differ from the study's: ``alignment``, ``soft``, ``hard``, ``flip_after``."""
    has_own_warm_up: bool = False
    """Warms up by itself from the vision start under its own configuration, as many steps as the shared one took: for
    policies whose tokens differ from the first layer on, which cannot go on from a warm-up with all tokens."""
    freeze_vision: bool = True
    """Whether the vision tower stays as the vision start left it."""
    conditions: tuple[str, ...] = ()
    """What-if conditions that its checkpoint answers in, beside its own."""

    @property
    def policy(self) -> str:
        """The token policy, a value of ``photon.config.POLICIES``."""
        return str(self.pruning.get("policy", "photon"))


PHOTON = Variant(name="photon", pruning=LEARNT, conditions=CONDITIONS[1:])
"""The same in every preset, so that ablations in the folder of a study go on from what it found."""


KEEP_RATIO = 0.38
"""Of the policies that keep a set number: above what photon keeps in the mean on vqa-small (docs/evidence.md)."""


def policies(keep_ratio: float | None = None) -> tuple[Variant, ...]:
    """One variant a policy.

    Args:
        keep_ratio: share of tokens of the policies that keep a set number; default `KEEP_RATIO`.
    """
    ratio = {"keep_ratio": KEEP_RATIO if keep_ratio is None else keep_ratio}
    return (
        PHOTON,
        Variant(name="all", pruning={"policy": "all", **UNTAUGHT}),
        Variant(
            name="published",
            pruning=UNTAUGHT,
            draw={"whole_probability": 0.0},
            has_own_warm_up=True,
            conditions=CONDITIONS[1:2],
        ),
        Variant(name="fixed", pruning={"policy": "fixed", **UNTAUGHT, **ratio}),
        Variant(name="fixed-blind", pruning={"policy": "fixed-blind", **UNTAUGHT, **ratio}),
        Variant(name="slices", pruning={"policy": "slices", **UNTAUGHT, **ratio}, has_own_warm_up=True),
        Variant(name="pooled", pruning={"policy": "pooled", **UNTAUGHT, **ratio}, has_own_warm_up=True),
    )


def ablations(soft: int, hard: int) -> tuple[Variant, ...]:
    """Photon with one thing different each.

    Args:
        soft, hard: the study's steps; without a soft stage the hard one takes its steps over.
    """
    unfrozen: dict[str, Any] = {"has_own_warm_up": True, "freeze_vision": False}
    return (
        PHOTON,
        _changed("no-saliency-gradient", {"saliency_gradient": False}),
        _changed("no-distillation", {"distillation_weight": 0.0, **UNTAUGHT}, has_own_warm_up=True),
        _changed("no-distillation-in-warm-up", UNTAUGHT, has_own_warm_up=True),
        _changed("distillation-0.3", {"distillation_weight": 0.3}),
        _changed("no-whole", draw={"whole_probability": 0.0}),
        _changed("rule-paper", {"sgp_rule": "paper"}),
        _changed("rule-paper-no-saliency-gradient", {"sgp_rule": "paper", "saliency_gradient": False}),
        _changed("bias-minus-5", {"threshold_bias_init": -5.0}),
        _changed("no-band", {"band_weight": 0.0}),
        _changed("published-band", {"keep_band": (0.3, 0.8)}),
        _changed("low-band", {"keep_band": (0.05, 0.2)}),
        _changed("no-robustness", draw={"robust_probability": 0.0}),
        _changed("flips", draw={"flip_probability": 0.05}),
        _changed("no-soft-stage", lengths={"soft": 0, "hard": soft + hard}),
        _changed("temperature-0.1", {"temperature": 0.1}),
        _changed("temperature-0.4", {"temperature": 0.4}),
        # The patch embedding is trained alone before everything is: this means something only with a tower that learns.
        _changed("vision-learns", **unfrozen),
        _changed("vision-learns-no-alignment", lengths={"alignment": 0}, **unfrozen),
    )


def _changed(name: str, pruning: Mapping[str, Any] | None = None, **others: Any) -> Variant:
    """Photon with something different, that also answers from all tokens."""
    return Variant(name=name, pruning={**LEARNT, **(pruning or {})}, conditions=("all tokens",), **others)
