"""Questions about one structure: is it there, how large, how dense, how many, at which height."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pipelines.mask_questions.candidates import Candidate, NotAsked
from pipelines.mask_questions.outlines import Outline
from pipelines.mask_questions.rules import Reason, Rules

YES_NO = ("yes", "no")
THIRDS = ("lower third", "middle third", "upper third")

Found = Iterator[Candidate | NotAsked]


def existence(outline: Outline, rules: Rules) -> Found:
    """Whether the scan shows it: yes with enough of it, no with none of it."""
    subtype, name = "existence", outline.name
    is_barely = outline.region.is_cut and outline.volume_cm3 < rules.min_cut_cm3
    if not outline.num_voxels and not outline.is_covered:
        yield NotAsked(subtype=subtype, about=name, reason="cut by the field of view")
        return
    if outline.num_voxels and (is_too_small(outline, rules) or is_barely):
        yield NotAsked(subtype=subtype, about=name, reason="cut by the field of view" if is_barely else "too small")
        return
    if outline.structure.kind == "lesion":
        phrasings = (f"Is there any {name}?", f"Does the scan show any {name}?", f"Is any {name} visible?")
    else:
        phrasings = (
            f"Does the scan show any part of the {name}?",
            f"Is any part of the {name} visible?",
            f"Is the {name}, or a part of it, in the scan?",
        )
    yield Candidate(
        family="recognition",
        subtype=subtype,
        about=name,
        organ=name,
        phrasings=phrasings,
        answer="yes" if outline.num_voxels else "no",
        options=YES_NO,
    )


def size(outline: Outline, rules: Rules) -> Found:
    """Volume, and largest diameter of the largest part."""
    name, is_lesion = outline.name, outline.structure.kind == "lesion"
    if outline.is_cut:
        for subtype in ("volume", "largest diameter"):
            yield NotAsked(subtype=subtype, about=name, reason="cut by the field of view")
        return
    total = "total volume" if is_lesion else "volume"
    yield Candidate(
        family="measurement",
        subtype="volume",
        about=name,
        organ=name,
        phrasings=(
            f"What is the {total} of the {name} in cm3?",
            f"How large is the {total} of the {name} in cm3?",
            f"How many cm3 is the {total} of the {name}?",
        ),
        value=three_digits(outline.volume_cm3),
        unit="cm3",
    )
    if reason := unclear_main(outline, rules):
        yield NotAsked(subtype="largest diameter", about=name, reason=reason)
        return
    which = main_words(outline)
    yield Candidate(
        family="measurement",
        subtype="largest diameter",
        about=name,
        organ=name,
        phrasings=(
            f"What is the largest diameter of {which} in mm?",
            f"How long is {which} in mm, measured where it is longest?",
        ),
        value=three_digits(outline.main.diameter_mm),
        unit="mm",
    )


def density(outline: Outline, rules: Rules, unit: str, is_ct: bool) -> Found:
    """Mean value where values have a unit, of SUV the largest too. What lies outside the scan is not missed."""
    name, mean = outline.name, float(outline.values.mean())
    if outline.is_cut and not outline.is_covered:
        yield NotAsked(subtype=f"mean {unit or 'value'}", about=name, reason="cut by the field of view")
        return
    if not unit or (unit == "HU" and not rules.min_hu <= mean <= rules.max_hu):
        reason: Reason = "values are no HU" if is_ct else "values have no unit"
        yield NotAsked(subtype=f"mean {unit or 'value'}", about=name, reason=reason)
        return
    if unit == "HU":
        phrasings = (
            f"What is the mean density of the {name} in HU?",
            f"How dense is the {name} on average, in HU?",
            f"What is the average HU of the {name}?",
        )
        yield _value("mean HU", name, phrasings, float(round(mean)), unit)
        return
    for word, value in (("mean", mean), ("maximum", float(outline.values.max()))):
        yield _value(
            f"{word} {unit}",
            name,
            (f"What is the {word} {unit} of the {name}?", f"How high is the {word} {unit} of the {name}?"),
            three_digits(value),
            unit,
        )


def number_of_parts(outline: Outline, rules: Rules) -> Found:
    """How many separate parts a lesion has; specks make it unclear."""
    name = outline.name
    clear = [part for part in outline.parts if _is_large(len(part.points), part.volume_cm3, rules)]
    if outline.is_cut or len(clear) < len(outline.parts):
        reason: Reason = "cut by the field of view" if outline.is_cut else "in fragments"
        yield NotAsked(subtype="count", about=name, reason=reason)
        return
    yield Candidate(
        family="visual reasoning",
        subtype="count",
        about=name,
        organ=name,
        phrasings=(
            f"How many separate regions of {name} are there?",
            f"How many regions of {name} does the scan show that do not touch each other?",
        ),
        value=float(len(clear)),
    )


def level(outline: Outline, rules: Rules) -> Found:
    """In which third of the scan's height its centre lies, and in which slice it is largest."""
    name = outline.name
    reason: Reason | None = None
    if outline.is_cut:
        reason = "cut by the field of view"
    elif outline.segmentation.frame.obliquity_deg > rules.max_tilt_deg:
        reason = "slices are tilted"
    else:
        reason = unclear_main(outline, rules)
    if reason:
        for subtype in ("third", "largest slice"):
            yield NotAsked(subtype=subtype, about=name, reason=reason)
        return
    yield _third(outline, rules)
    yield _largest_slice(outline, rules)


def is_too_small(outline: Outline, rules: Rules) -> bool:
    """Whether an outline could as well be noise."""
    return not _is_large(outline.num_voxels, outline.volume_cm3, rules)


def unclear_main(outline: Outline, rules: Rules) -> Reason | None:
    """Why an outline's largest part does not stand for it; None where it does."""
    parts = outline.parts
    if outline.structure.kind == "organ":
        return "in fragments" if len(parts[0].points) < rules.min_main_share * outline.num_voxels else None
    if not _is_large(len(parts[0].points), parts[0].volume_cm3, rules):
        return "in fragments"
    is_close = len(parts) > 1 and parts[0].volume_cm3 < (1 + rules.min_lead) * parts[1].volume_cm3
    return "several of similar size" if is_close else None


def main_words(outline: Outline) -> str:
    """What questions call an outline's largest part; the same words whether there are others or not."""
    return f"the largest {outline.name}" if outline.structure.kind == "lesion" else f"the {outline.name}"


def three_digits(value: float) -> float:
    """Rounded to three significant digits."""
    return float(f"{value:.3g}")


def _third(outline: Outline, rules: Rules) -> Candidate | NotAsked:
    height = (float(outline.main.points[:, 0].mean()) + 0.5) / outline.segmentation.values.shape[0]
    if min(abs(height - border) for border in (1 / 3, 2 / 3)) < rules.third_margin:
        return NotAsked(subtype="third", about=outline.name, reason="too close to call")
    which = main_words(outline)
    return Candidate(
        family="visual reasoning",
        subtype="third",
        about=outline.name,
        organ=outline.name,
        phrasings=(
            f"In which third of the scan's height does the centre of {which} lie?",
            f"Does the centre of {which} lie in the lower, middle or upper third of the scan?",
        ),
        answer=THIRDS[int(height * 3)],
        options=THIRDS,
    )


def _largest_slice(outline: Outline, rules: Rules) -> Candidate | NotAsked:
    counts = outline.slice_counts
    as_good = np.flatnonzero(counts >= rules.plateau_share * counts.max())
    if as_good[-1] - as_good[0] > rules.max_plateau * len(counts):
        return NotAsked(subtype="largest slice", about=outline.name, reason="too close to call")
    largest = np.flatnonzero(counts == counts.max())
    told = f"The scan has {len(counts)} axial slices, numbered from 1 at the feet."
    return Candidate(
        family="visual reasoning",
        subtype="largest slice",
        about=outline.name,
        organ=outline.name,
        phrasings=(
            f"{told} Which one shows the largest cross-section of the {outline.name}?",
            f"{told} In which one is the cross-section of the {outline.name} largest?",
        ),
        value=float(largest[(len(largest) - 1) // 2] + 1),
    )


def _value(subtype: str, name: str, phrasings: tuple[str, ...], value: float, unit: str) -> Candidate:
    return Candidate(
        family="measurement", subtype=subtype, about=name, organ=name, phrasings=phrasings, value=value, unit=unit
    )


def _is_large(num_voxels: int, volume_cm3: float, rules: Rules) -> bool:
    return num_voxels >= rules.min_voxels and volume_cm3 >= rules.min_cm3
