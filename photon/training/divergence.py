"""When a training has gone wrong: numbers that are none, and a loss that explodes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from photon.errors import PhotonError
from photon.training.parallel import own_part
from photon.training.stages import Stage

WINDOW = 10
"""Steps in a row that have to be too high, and steps over which a low loss is averaged."""
FACTOR = 3.0
_REMEDY = "Lower the learning rate and start again from the last checkpoint."


def refuse_not_finite(name: str, value: Tensor | float, step: int, stage: Stage) -> None:
    """Stop a step whose loss or gradient is not a finite number.

    Raises:
        PhotonError: ``TRAINING_DIVERGED``.
    """
    if not math.isfinite(number := float(value)):
        fact = f"the {name} became {number} in the {stage} stage."
        raise PhotonError("TRAINING_DIVERGED", f"step {step}", fact, _REMEDY)


def refuse_bad_weights(named: Iterable[tuple[str, Tensor]], num_done: int) -> None:
    """Stop before parameters that are not finite, of which a rank looks at its own part, are written.

    Raises:
        PhotonError: ``TRAINING_DIVERGED``, naming the first.
    """
    for name, tensor in named:
        if not bool(torch.isfinite(own_part(tensor.detach())).all()):
            fact = f"after {num_done} steps {name} is not finite."
            raise PhotonError("TRAINING_DIVERGED", f"step {num_done - 1}", fact, _REMEDY)


@dataclasses.dataclass
class LossWatch:
    """Tells an exploding loss from a noisy one, by the cross-entropy of the undisturbed answers.

    A step is too high when its loss is above that of a uniform guess over the vocabulary, ln V, and above three times
    the lowest the run has had (its first loss, or the mean of any ten steps in a row). Ten such steps in a row are an
    explosion. No stage does this to a training that works: a model that had learnt anything guesses better than that
    even when half of its tokens are suddenly gone.
    """

    vocab_size: int
    recent: list[float] = dataclasses.field(default_factory=list)
    """Losses of the last steps, at most ten."""
    lowest: float = math.inf
    num_high: int = 0
    """Steps in a row, up to now, that were too high."""

    @property
    def ceiling(self) -> float:
        """Loss above which a step is too high."""
        return max(math.log(self.vocab_size), FACTOR * self.lowest)

    def see(self, loss: float, step: int, stage: Stage) -> None:
        """Take in the loss of a step.

        Raises:
            PhotonError: ``TRAINING_DIVERGED`` when it is the last of ten that are too high.
        """
        if self.lowest == math.inf:
            self.lowest = loss
        self.num_high = self.num_high + 1 if loss > self.ceiling else 0
        if self.num_high >= WINDOW:
            fact = (
                f"the answer loss was above {self.ceiling:.3g} for {WINDOW} steps, now {loss:.3g} in the {stage} "
                f"stage, after having been {self.lowest:.3g}."
            )
            raise PhotonError("TRAINING_DIVERGED", f"step {step}", fact, _REMEDY)
        self.recent = [*self.recent, loss][-WINDOW:]
        if len(self.recent) == WINDOW:
            self.lowest = min(self.lowest, sum(self.recent) / WINDOW)

    def as_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had never stopped."""
        lowest = None if self.lowest == math.inf else self.lowest
        return {"recent": self.recent, "lowest": lowest, "num_high": self.num_high}

    def resume(self, content: dict[str, Any]) -> None:
        """Go on from what :meth:`as_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: when something is missing or malformed.
        """
        self.recent = [float(loss) for loss in content["recent"]]
        self.lowest = math.inf if content["lowest"] is None else float(content["lowest"])
        self.num_high = int(content["num_high"])
