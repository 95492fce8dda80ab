"""Questions about where a lesion lies: in which organ or nearest to which, and on which side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.mask_questions.candidates import Candidate, NotAsked, listed, shuffled
from pipelines.mask_questions.outlines import Outline, share_within
from pipelines.mask_questions.rules import Rules
from pipelines.mask_questions.single import Found, main_words, unclear_main
from pipelines.shapes import nearest_mm, part_mask, rim

NUM_CHOICES = 4
SIDES = ("left", "right")
MIN_SHARE = 0.5
MIDLINE_WORDS = frozenset(("spine", "spinal", "vertebra", "vertebrae", "sternum", "sacrum"))
"""Structures with one of these words in their name, and no side, lie in the middle of the body."""

_SPANNING_WORDS = frozenset(("atrial", "atrium", "heart", "hepatic", "liver", "myocardium", "ventricle"))
"""Left and right parts of what has one of these words in its name do not end at the middle of the body."""


def place(lesion: Outline, organs: Sequence[Outline], scan_id: str, rules: Rules) -> Found:
    """The organ that contains a lesion's largest part or, where none does, the nearest; and its side."""
    if reason := "cut by the field of view" if lesion.is_cut else unclear_main(lesion, rules):
        yield NotAsked(subtype="location", about=lesion.name, reason=reason)
        return
    containing = _containing(lesion, organs)
    if len(organs) > 1:  # else there is nothing to choose from
        yield _location(lesion, containing, organs, scan_id, rules)
    if not lesion.structure.side:
        yield _side(lesion, containing, organs, rules)


def _containing(lesion: Outline, organs: Sequence[Outline]) -> list[Outline]:
    """Organs that hold most of a lesion or, where each voxel has one label alone, most of what surrounds it."""
    mask, corner = part_mask(lesion.main.points)
    around = np.argwhere(rim(np.pad(mask, 1))) + corner - 1
    return [organ for organ in organs if max(share_within(p, organ) for p in (lesion.main.points, around)) > MIN_SHARE]


def _location(
    lesion: Outline, containing: Sequence[Outline], organs: Sequence[Outline], scan_id: str, rules: Rules
) -> Candidate | NotAsked:
    subtype = "containing structure" if containing else "nearest structure"
    if len(containing) > 1:
        return NotAsked(subtype=subtype, about=lesion.name, reason="too close to call")
    if containing:
        answer = containing[0].name
    elif any(organ.is_cut and not organ.is_covered for organ in organs):
        return NotAsked(subtype=subtype, about=lesion.name, reason="cut by the field of view")
    else:
        distances = nearest_mm(lesion.main.surface_mm, [_surface_mm(organ) for organ in organs])
        order = np.argsort(distances)
        if distances[order[1]] - distances[order[0]] < rules.min_lead_mm:
            return NotAsked(subtype=subtype, about=lesion.name, reason="too close to call")
        answer = organs[order[0]].name
    others = [organ.name for organ in organs if organ.name != answer]
    wrong = shuffled(others, [f"{scan_id}|{lesion.name}|{name}" for name in others])[: NUM_CHOICES - 1]
    options = tuple(sorted([answer, *wrong]))
    which, verb = main_words(lesion), "contains" if containing else "is nearest to"
    return Candidate(
        family="visual reasoning",
        subtype=subtype,
        about=lesion.name,
        organ=lesion.name,
        phrasings=(
            f"Which of these {verb} {which}: {listed(options)}?",
            f"Which structure {verb} {which}, {listed(options)}?",
        ),
        answer=answer,
        options=options,
    )


def _side(
    lesion: Outline, containing: Sequence[Outline], organs: Sequence[Outline], rules: Rules
) -> Candidate | NotAsked:
    subtype, name = "side", lesion.name
    sides = {organ.structure.side for organ in containing if _SPANNING_WORDS.isdisjoint(organ.name.lower().split())}
    sides -= {""}
    if len(sides) == 1:
        side = sides.pop()
    else:
        middles = [organ for organ in organs if not MIDLINE_WORDS.isdisjoint(organ.name.lower().split())]
        middles = [organ for organ in middles if not organ.structure.side]
        if not middles:
            return NotAsked(subtype=subtype, about=name, reason="no midline")
        height = float(lesion.main.centre_mm[2])
        middle = min(middles, key=lambda organ: abs(float(organ.main.centre_mm[2]) - height))
        to_left = float(middle.main.centre_mm[0] - lesion.main.centre_mm[0])  # RAS: x grows to the right
        if abs(to_left) < 2 * rules.min_lead_mm:
            return NotAsked(subtype=subtype, about=name, reason="too close to call")
        side = SIDES[0] if to_left > 0 else SIDES[1]
    which = main_words(lesion)
    return Candidate(
        family="visual reasoning",
        subtype=subtype,
        about=name,
        organ=name,
        phrasings=(
            f"On which side of the patient's body is {which}?",
            f"Is {which} on the patient's left or right?",
        ),
        answer=side,
        options=SIDES,
    )


def _surface_mm(organ: Outline) -> np.ndarray:
    return np.concatenate([part.surface_mm for part in organ.parts])
