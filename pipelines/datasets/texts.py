"""What answers and questions of public datasets say: yes or no, numbers with units, lists of choices."""

from __future__ import annotations

import math
import re

from pipelines.datasets.base import RowError

AnswerShape = tuple[str, tuple[str, ...], float | None, str]
"""Kind, options, value and unit of an answer."""

_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_QUANTITY = re.compile(rf"(?P<number>{_NUMBER})\s*(?P<unit>[A-Za-z%µ][\w%^³²/·]*)?\.?")


def yes_no_options(answer: str) -> tuple[str, str] | None:
    """The two options in the spelling of ``answer`` when it is yes or no, else None."""
    pairs = (("yes", "no"), ("Yes", "No"), ("YES", "NO"))
    return next((pair for pair in pairs if answer in pair), None)


def quantity(answer: str) -> tuple[float, str] | None:
    """Number and unit of a text that is one number, with a unit or without; None for ranges, sizes and sentences."""
    found = _QUANTITY.fullmatch(answer)
    if not found or not math.isfinite(value := float(found["number"])):
        return None
    return value, found["unit"] or ""


def split_choices(text: str, mark: str = ":") -> tuple[str, dict[str, str]]:
    """Stem and choices of a question that lists them in one string, e.g. ``Which is larger? A: liver B: spleen``.

    A choice begins with a letter from A to F by itself and ``mark``, and the letters run from A without a gap.

    Raises:
        RowError: the text has no such list, or can be read as more than one.
    """
    markers = list(re.finditer(rf"(?<!\S)([A-F]){re.escape(mark)}(?:\s+|$)", text))
    letters = [marker[1] for marker in markers]
    if len(letters) < 2 or letters != [chr(ord("A") + index) for index in range(len(letters))]:
        raise RowError("its choices cannot be told apart", f"letters {' '.join(letters) or '(none)'}")
    ends = [marker.start() for marker in markers[1:]] + [len(text)]
    choices = {
        letter: text[marker.end() : end].strip() for letter, marker, end in zip(letters, markers, ends, strict=True)
    }
    if not all(choices.values()):
        raise RowError("a choice is empty")
    return text[: markers[0].start()].strip(), choices
