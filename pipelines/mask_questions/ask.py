"""All questions about one scan."""

from __future__ import annotations

import dataclasses

from pipelines.mask_questions.candidates import Candidate, NotAsked, write_candidates
from pipelines.mask_questions.compared import compare_densities, compare_sides, compare_volumes, slice_contents
from pipelines.mask_questions.names import Description
from pipelines.mask_questions.outlines import Outline
from pipelines.mask_questions.places import place
from pipelines.mask_questions.rules import Rules
from pipelines.mask_questions.segmentation import Segmentation
from pipelines.mask_questions.single import density, existence, level, number_of_parts, size
from pipelines.questions import Question, QuestionWriter

LENGTH_UNITS = ("cm3", "mm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """Questions about a scan, all wordings of each by its id, and what was left out."""

    questions: list[Question]
    wordings: dict[str, tuple[str, ...]]
    not_asked: list[NotAsked]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Identity:
    """Whose scan it is, and what its values are.

    Args:
        modality: ``ct``, ``mr``, ``pt`` or "" where nobody knows.
        unit: of the values: ``HU``, ``SUV`` or "".
    """

    scan_id: str
    patient_id: str
    split: str
    modality: str
    unit: str


def ask(
    segmentation: Segmentation, description: Description, who: Identity, rules: Rules, *, is_size_told: bool = False
) -> Asked:
    """Every question that the outlines of a scan answer.

    Args:
        is_size_told: say in questions about millimetres how large the scan is; a model whose grid is stretched over
            the field of view cannot know it otherwise.
    """
    outlines = [Outline(region, segmentation) for region in segmentation.regions]
    looked_for = {outline.name for outline in outlines}
    missing = [structure.name for structure in description.structures if structure.name not in looked_for]
    found: list[Candidate | NotAsked] = [
        NotAsked(subtype="existence", about=name, reason="not outlined") for name in missing
    ]
    clear = []
    for outline in outlines:
        about_existence = list(existence(outline, rules))
        found += about_existence
        if outline.num_voxels and isinstance(about_existence[0], Candidate):
            clear.append(outline)
    organs = [outline for outline in clear if outline.structure.kind == "organ"]
    for outline in clear:
        found += [*size(outline, rules), *density(outline, rules, who.unit, who.modality == "ct")]
        found += level(outline, rules)
        if outline.structure.kind == "lesion":
            found += [*number_of_parts(outline, rules), *place(outline, organs, who.scan_id, rules)]
    found += [*compare_sides(clear, rules), *compare_volumes(clear, rules)]
    found += slice_contents(clear, who.scan_id, rules)
    if who.unit == "HU":
        found += compare_densities(clear, rules)
    candidates = [one for one in found if isinstance(one, Candidate)]
    if is_size_told:
        candidates = [_with_size(one, segmentation) for one in candidates]
    writer = QuestionWriter(who.scan_id, who.patient_id, who.split)
    wordings, left_out = write_candidates(writer, candidates, rules.max_per_subtype)
    left_out += [one for one in found if isinstance(one, NotAsked)]
    return Asked(questions=writer.questions, wordings=wordings, not_asked=left_out)


def _with_size(candidate: Candidate, segmentation: Segmentation) -> Candidate:
    if candidate.unit not in LENGTH_UNITS:
        return candidate
    frame = segmentation.frame
    z, y, x = (f"{n * step:.0f}" for n, step in zip(frame.shape, frame.spacing_mm, strict=True))
    told = f"The scan is {x} mm wide, {y} mm deep and {z} mm high."
    return dataclasses.replace(candidate, phrasings=tuple(f"{told} {text}" for text in candidate.phrasings))
