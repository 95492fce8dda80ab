"""Questions about several structures: which is larger, denser, higher, and which of them a slice shows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from pipelines.mask_questions.candidates import Candidate, NotAsked, listed, shuffled
from pipelines.mask_questions.outlines import Outline, in_order
from pipelines.mask_questions.rules import Rules
from pipelines.mask_questions.single import Found, unclear_main

NUM_CHOICES = 4
MIN_AREA_MM2 = 100.0
HEIGHTS = {"a quarter": 0.25, "half": 0.5, "three quarters": 0.75}


def compare_sides(outlines: Sequence[Outline], rules: Rules) -> Found:
    """Left and right of a pair: which is larger, which lies higher."""
    by_name = {outline.name: outline for outline in outlines}
    for left in in_order(outlines):
        right = by_name.get(left.structure.of_other_side)
        if left.structure.side != "left" or right is None:
            continue
        about = f"{left.name}, {right.name}"
        if left.is_cut or right.is_cut:
            for subtype in ("larger side", "higher side"):
                yield NotAsked(subtype=subtype, about=about, reason="cut by the field of view")
            continue
        yield _larger("larger side", left, right, rules)
        yield _higher(left, right, rules)


def compare_volumes(outlines: Sequence[Outline], rules: Rules) -> Found:
    """Which of two organs is larger, for those whose volumes are of the same order; pairs of sides are asked by
    :func:`compare_sides`."""
    whole = [one for one in in_order(outlines) if not one.is_cut and one.structure.kind == "organ"]
    for first, second in itertools.combinations(whole, 2):
        small, large = sorted((first.volume_cm3, second.volume_cm3))
        if first.structure.of_other_side != second.name and small * (1 + rules.min_lead) <= large <= (
            small * rules.max_lead
        ):
            yield _larger("larger", first, second, rules)


def compare_densities(outlines: Sequence[Outline], rules: Rules) -> Found:
    """Which of two organs has the higher mean HU, for those that differ clearly but are both soft tissue or both
    bone or both air: not by more than five times the least difference."""
    organs = [one for one in in_order(outlines) if one.structure.kind == "organ" and not one.is_cut]
    means = {one.name: float(one.values.mean()) for one in organs}
    for first, second in itertools.combinations(organs, 2):
        difference = means[first.name] - means[second.name]
        if rules.min_lead_hu <= abs(difference) <= 5 * rules.min_lead_hu:
            names = (first.name, second.name)
            yield _pair(
                "denser",
                names,
                (
                    f"Which is denser on average, the {names[0]} or the {names[1]}?",
                    f"Which has the higher mean HU, the {names[0]} or the {names[1]}?",
                ),
                names[0] if difference > 0 else names[1],
            )


def slice_contents(outlines: Sequence[Outline], scan_id: str, rules: Rules) -> Iterator[Candidate]:
    """Which of four structures the slice at a quarter, half and three quarters of the height shows.

    One of them has at least a square centimetre there, the others, though in the scan, are nowhere near; a mask that
    leaves out a part of the scan cannot tell that.
    """
    if not outlines or outlines[0].segmentation.frame.obliquity_deg > rules.max_tilt_deg:
        return
    matrix, frame = outlines[0].segmentation.matrix, outlines[0].segmentation.frame
    area_mm2 = float(np.linalg.norm(np.cross(matrix[:3, 1], matrix[:3, 2])))
    margin = int(np.ceil(2 * rules.min_lead_mm / frame.spacing_mm[0]))
    for words, height in HEIGHTS.items():
        place = int(height * frame.shape[0])
        near = slice(max(place - margin, 0), place + margin + 1)
        shown = [one.name for one in outlines if one.slice_counts[place] * area_mm2 >= MIN_AREA_MM2]
        hidden = [one.name for one in outlines if one.is_covered and not one.slice_counts[near].any()]
        if not shown or len(hidden) < NUM_CHOICES - 1:
            continue
        seeds = f"{scan_id}|{words}|"
        right = shuffled(shown, [seeds + name for name in shown])[0]
        wrong = shuffled(hidden, [seeds + name for name in hidden])[: NUM_CHOICES - 1]
        options = tuple(sorted([right, *wrong]))
        yield Candidate(
            family="visual reasoning",
            subtype="slice contents",
            about=f"{words} of the height",
            organ="",
            phrasings=(
                f"Which of these does the axial slice at {words} of the scan's height show: {listed(options)}?",
                f"In the axial slice at {words} of the scan's height, which one is seen: {listed(options)}?",
            ),
            answer=right,
            options=options,
        )


def _larger(subtype: str, first: Outline, second: Outline, rules: Rules) -> Candidate | NotAsked:
    names = (first.name, second.name)
    small, large = sorted((first, second), key=lambda one: one.volume_cm3)
    if large.volume_cm3 < (1 + rules.min_lead) * small.volume_cm3:
        return NotAsked(subtype=subtype, about=", ".join(names), reason="too close to call")
    phrasings = (
        f"Which is larger, the {names[0]} or the {names[1]}?",
        f"Which has the larger volume, the {names[0]} or the {names[1]}?",
    )
    return _pair(subtype, names, phrasings, large.name)


def _higher(left: Outline, right: Outline, rules: Rules) -> Candidate | NotAsked:
    names, about = (left.name, right.name), f"{left.name}, {right.name}"
    for outline in (left, right):
        if reason := unclear_main(outline, rules):
            return NotAsked(subtype="higher side", about=about, reason=reason)
    lead = float(left.main.centre_mm[2] - right.main.centre_mm[2])
    if abs(lead) < rules.min_lead_mm:
        return NotAsked(subtype="higher side", about=about, reason="too close to call")
    phrasings = (
        f"Which lies higher, nearer to the head, the {names[0]} or the {names[1]}?",
        f"Whose centre is nearer to the head, that of the {names[0]} or that of the {names[1]}?",
    )
    return _pair("higher side", names, phrasings, names[0] if lead > 0 else names[1])


def _pair(subtype: str, names: tuple[str, str], phrasings: tuple[str, ...], answer: str) -> Candidate:
    return Candidate(
        family="visual reasoning",
        subtype=subtype,
        about=", ".join(names),
        organ=names[0],
        phrasings=phrasings,
        answer=answer,
        options=names,
    )
