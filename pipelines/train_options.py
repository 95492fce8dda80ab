"""Training settings as words of a command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from photon.errors import PhotonError
from photon.training.stages import StageSchedule

_NAMES = {
    "alignment": "alignment",
    "warm-up": "warm_up",
    "soft": "soft",
    "hard": "hard",
    "flip-after": "flip_after",
}


def parse_stages(text: str | None, num_steps: int | None, default: StageSchedule) -> StageSchedule:
    """The schedule that options ask for.

    Args:
        text: ``name=number`` for some of alignment, warm-up, soft, hard and flip-after, separated by commas. Whole
            numbers are steps, and what is not named takes none. Numbers with a point are fractions of the run, of
            which hard pruning gets the rest. None: the stages of ``default``, as long as they are or in proportion.
        num_steps: length of the run; None: the sum of the stages, or for fractions that of ``default``.

    Raises:
        PhotonError: ``TRAINING_INVALID`` when the text cannot be read or contradicts ``num_steps``.
    """
    if text is None:
        return default if num_steps is None else _of_length(default, num_steps)
    given: dict[str, str] = {}
    for part in text.split(","):
        name, _, number = (piece.strip() for piece in part.partition("="))
        if name not in _NAMES or _NAMES[name] in given or not _is_number(number):
            fact = f"{part.strip()!r} is not name=number, or its name comes twice."
            raise PhotonError("TRAINING_INVALID", "stages", fact, f"The names are {', '.join(_NAMES)}.")
        given[_NAMES[name]] = number
    if not any("." in number for number in given.values()):
        stages = StageSchedule(**{name: int(given.get(name, 0)) for name in _NAMES.values()})
        if num_steps not in (None, stages.num_steps):
            fact = f"the stages take {stages.num_steps} steps and the run is to take {num_steps}."
            raise PhotonError("TRAINING_INVALID", "stages", fact, "Leave one of both out, or give fractions.")
        return stages
    fractions = {name: float(given.get(name, 0)) for name in ("alignment", "warm_up", "soft", "flip_after")}
    rest = 1 - fractions["alignment"] - fractions["warm_up"] - fractions["soft"]
    if abs(float(given.get("hard", rest)) - rest) > 1e-6:
        fact = f"the fractions of the stages sum to {1 - rest + float(given['hard']):g}."
        raise PhotonError("TRAINING_INVALID", "stages", fact, "Let them sum to 1, or leave hard out: it gets the rest.")
    return StageSchedule.from_fractions(num_steps or default.num_steps, **fractions)


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """Settings ``name=value``; values are JSON, or words; ``vision.depth=6`` goes under ``vision``.

    Raises:
        PhotonError: ``TRAINING_INVALID`` when one has no name or no value.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        name, mark, word = text.partition("=")
        if not name or not mark or not word:
            raise PhotonError("TRAINING_INVALID", text, "it is not name=value.", "For example keep_ratio=0.35.")
        try:
            value = json.loads(word)
        except ValueError:
            value = word
        group, _, inner = name.partition(".")
        if inner:
            settings.setdefault(group, {})[inner] = value
        else:
            settings[name] = value
    return settings


def _of_length(default: StageSchedule, num_steps: int) -> StageSchedule:
    lengths = dataclasses.asdict(default)
    del lengths["hard"]
    fractions = {name: steps / default.num_steps for name, steps in lengths.items()}
    return StageSchedule.from_fractions(num_steps, **fractions)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isdigit() or "." in text
