"""When each stage of training runs, what may end the warm-up sooner, and how the learning rate moves."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, Self

from photon.errors import PhotonError
from photon.model.pruning import Mode

Stage = Literal["alignment", "warm-up", "soft", "hard"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageSchedule:
    """Steps of each stage, in order.

    The public training takes 4000 warm-up and 4000 soft steps, then hard pruning with flips from 1000 steps on.

    Raises:
        PhotonError: ``TRAINING_INVALID`` for a number of steps below 0, or when all are 0.
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

    def __post_init__(self) -> None:
        steps = dataclasses.asdict(self)
        if min(steps.values()) < 0 or self.num_steps == 0:
            fact = f"the stages are to take {steps} steps."
            raise PhotonError("TRAINING_INVALID", "stages", fact, "Give whole numbers from 0, not all of them 0.")

    @classmethod
    def from_fractions(
        cls, num_steps: int, *, alignment: float, warm_up: float, soft: float, flip_after: float = 0.0
    ) -> Self:
        """The schedule of a run of ``num_steps``, its stages as fractions of the run; hard pruning gets the rest.

        Every edge between two stages is rounded to the nearest step, so stages never add up to another length.

        Args:
            flip_after: part of the whole run, not of the hard stage, that passes in the hard stage before flips.

        Raises:
            PhotonError: ``TRAINING_INVALID`` for fractions that are negative or sum to more than 1.
        """
        fractions = {"alignment": alignment, "warm_up": warm_up, "soft": soft, "flip_after": flip_after}
        # Fractions such as 0.6 + 0.3 + 0.1 add up to a little more than 1 in binary.
        if not all(math.isfinite(f) and f >= 0 for f in fractions.values()) or alignment + warm_up + soft > 1 + 1e-9:
            fact = f"the fractions {fractions} are not parts of a run."
            raise PhotonError("TRAINING_INVALID", "stages", fact, "Give fractions from 0 that sum to at most 1.")
        sums = (alignment, alignment + warm_up, alignment + warm_up + soft)
        edges = [round(num_steps * fraction) for fraction in sums]
        return cls(
            alignment=edges[0],
            warm_up=edges[1] - edges[0],
            soft=edges[2] - edges[1],
            hard=num_steps - edges[2],
            flip_after=round(num_steps * flip_after),
        )

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmUpSwitch:
    """Evidence that ends the warm-up: the model answers better with the scan than a model that never saw one.

    Pruning by a saliency that does not yet look at the right place only removes what there is to learn from, so the
    end of the warm-up is a matter of what has been learnt, not of how many steps have passed.

    Raises:
        PhotonError: ``TRAINING_INVALID`` for a margin that is no number or fewer than one validation.
    """

    margin: float = 0.02
    """By how much (a fraction of the validation questions) the blind model's validation accuracy is to be beaten."""
    patience: int = 1
    """Validations in a row that have to beat it; more than one guards against a lucky one."""
    baseline: float | None = None
    """Validation accuracy to beat; None: the blind model's, which is then trained and measured first."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.margin) or self.patience < 1:
            fact = f"margin {self.margin} and patience {self.patience} decide nothing."
            raise PhotonError("TRAINING_INVALID", "switch", fact, "Give a finite margin and a patience from 1.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum:
    """The schedule that a run follows: the planned one, until evidence ends the warm-up."""

    plan: StageSchedule
    switch: WarmUpSwitch | None = None
    """What ends the warm-up before ``plan`` does, its baseline known; None: nothing."""
    num_above: int = 0
    """Validations in a row that beat the baseline by the margin."""
    switched_at: int | None = None
    """Steps that were done when evidence ended the warm-up."""
    accuracy: float | None = None
    """Validation accuracy at the last validation of the warm-up."""

    @property
    def schedule(self) -> StageSchedule:
        """Steps of each stage: the later stages keep their lengths when the warm-up gets shorter."""
        if self.switched_at is None:
            return self.plan
        return dataclasses.replace(self.plan, warm_up=self.switched_at - self.plan.alignment)

    @property
    def warm_up_end(self) -> int:
        """Steps after which the warm-up ends at the latest."""
        return self.plan.alignment + self.plan.warm_up

    def validated(self, num_done: int, accuracy: float) -> tuple[Curriculum, bool | None]:
        """The curriculum after a validation, and whether it decides: True switches, False gives up, None neither.

        Args:
            num_done: steps done; only validations of the warm-up count.
            accuracy: fraction of the validation questions that are answered rightly.
        """
        is_warm_up = self.plan.alignment < num_done <= self.warm_up_end
        if self.switch is None or self.switch.baseline is None or self.switched_at is not None or not is_warm_up:
            return self, None
        is_above = accuracy > self.switch.baseline + self.switch.margin
        after = dataclasses.replace(self, accuracy=accuracy, num_above=self.num_above + 1 if is_above else 0)
        if after.num_above >= self.switch.patience:
            return dataclasses.replace(after, switched_at=num_done), True
        return after, False if num_done == self.warm_up_end else None

    def clock(self, step: int) -> float:
        """Place of a step on the planned run's learning-rate curve.

        Up to an early end of the warm-up it is the step itself. From there the rest of the curve is passed through
        evenly in the fewer steps that are left, so that the rate neither jumps nor misses its last value.
        """
        if self.switched_at is None or step < self.switched_at:
            return step
        num_planned, num_left = (s.num_steps - 1 - self.switched_at for s in (self.plan, self.schedule))
        return self.switched_at + (step - self.switched_at) * num_planned / max(num_left, 1)

    def told(self, num_done: int) -> dict[str, Any]:
        """What a file tells about it after ``num_done`` steps; :meth:`resumed` reads the parts that were decided."""
        is_over = self.switched_at is not None or num_done >= self.warm_up_end
        return {
            "schedule": dataclasses.asdict(self.schedule),
            "planned": dataclasses.asdict(self.plan),
            "num_steps": self.schedule.num_steps,
            "switch": None if self.switch is None else dataclasses.asdict(self.switch),
            "evidence": (self.switched_at is not None) if self.switch is not None and is_over else None,
            "switched_at": self.switched_at,
            "accuracy": self.accuracy,
            "num_above": self.num_above,
        }

    def resumed(self, told: dict[str, Any]) -> Curriculum:
        """The curriculum as a run had it when it wrote ``told``.

        Raises:
            KeyError, TypeError, ValueError: when something is missing or malformed.
        """
        switched_at, accuracy = told["switched_at"], told["accuracy"]
        return dataclasses.replace(
            self,
            switch=None if told["switch"] is None else WarmUpSwitch(**told["switch"]),
            num_above=int(told["num_above"]),
            switched_at=None if switched_at is None else int(switched_at),
            accuracy=None if accuracy is None else float(accuracy),
        )


MODES: dict[Stage, Mode] = {"alignment": "full", "warm-up": "full", "soft": "soft", "hard": "hard"}


def learning_rate_factor(step: float, num_steps: int, *, warm_up_steps: int, floor: float) -> float:
    """Linear rise over ``warm_up_steps``, then a cosine from 1 to ``floor`` at the last step."""
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    progress = (step - warm_up_steps) / max(num_steps - 1 - warm_up_steps, 1)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
