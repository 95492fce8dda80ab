"""When each stage of training runs, and how the learning rate moves."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from photon.model.pruning import Mode

Stage = Literal["alignment", "warm-up", "soft", "hard"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSchedule:
    """Steps of each stage, in order.

    The public training takes 4000 warm-up and 4000 soft steps, then hard pruning with flips from 1000 steps on.
    """

    alignment: int
    """Steps in which only the patch embedding learns."""
    warm_up: int
    """Steps without pruning."""
    soft: int
    """Steps whose visual rows are scaled by their keep probability."""
    hard: int
    """Steps with rows removed."""
    flip_after: int
    """Hard steps before the flip objective begins."""

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.alignment + self.warm_up + self.soft + self.hard

    def stage_at(self, step: int) -> Stage:
        """Stage of step ``step`` (from 0)."""
        if step < self.alignment:
            return "alignment"
        if step < self.alignment + self.warm_up:
            return "warm-up"
        return "soft" if step < self.num_steps - self.hard else "hard"

    def flips_at(self, step: int) -> bool:
        """Whether the flip objective is on."""
        return step >= self.num_steps - self.hard + self.flip_after


MODES: dict[Stage, Mode] = {"alignment": "full", "warm-up": "full", "soft": "soft", "hard": "hard"}


def learning_rate_factor(step: int, num_steps: int, *, warm_up_steps: int, floor: float) -> float:
    """Linear rise over ``warm_up_steps``, then a cosine from 1 to ``floor`` at the last step."""
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    progress = (step - warm_up_steps) / max(num_steps - 1 - warm_up_steps, 1)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
