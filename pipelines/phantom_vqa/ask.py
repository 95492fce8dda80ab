"""The questions of PhantomVQA: closed, balanced, and each about a region that is known.

Every answer is one of few options, about equally frequent over the cohort, so a model that only reads scores little
above chance. Recognition needs the few tokens of a lesion, measurement and comparison those of whole organs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipelines.measurements import (
    ANEURYSM_MM,
    CARDIOMEGALY_RATIO,
    FATTY_LIVER_DIFFERENCE_HU,
    REGIONS,
    SPLENOMEGALY_ML,
    Measurements,
)
from pipelines.phantom_vqa.cohort import RARE_FINDINGS, VQA_LABELS
from pipelines.questions import Question, QuestionWriter

USUAL_ML = {"liver": 910.0, "left lung": 985.0, "right lung": 1070.0, "stomach": 210.0}
"""Median volume of an organ, its lesions included, over 120 patients of the cohort's distribution."""

LARGE_LESION_MM = 33.3
"""Median diameter of the largest liver lesion."""

SIDES = ("left", "right")
_COUNTS = ("none", "one", "two", "several")


def questions_about(
    hu: np.ndarray,
    labels: np.ndarray,
    affine: np.ndarray,
    *,
    scan_id: str,
    split: str,
    asked: Sequence[str],
) -> list[Question]:
    """About 24 questions about a scan, answered from its label map.

    Args:
        hu: scan in HU [i, j, k].
        labels: label map of the same shape, values as in `VQA_LABELS`.
        affine: [4, 4], array index to world RAS mm.
        asked: the rare findings that are asked about.
    """
    writer = QuestionWriter(scan_id, scan_id, split)
    measured = Measurements(hu, labels, affine, VQA_LABELS)
    _recognition(writer, measured, asked)
    _measurement(writer, measured)
    _visual_reasoning(writer, measured)
    _medical_reasoning(writer, measured)
    return writer.questions


def _recognition(writer: QuestionWriter, measured: Measurements, asked: Sequence[str]) -> None:
    writer.family = "recognition"
    for lesion in ("cyst", "tumor"):
        phrasings = (f"Is there a {lesion} in the liver?", f"Does the liver contain a {lesion}?")
        writer.yes_no(f"liver {lesion} existence", "liver", phrasings, measured.has(f"liver {lesion}"))
    for side in SIDES:
        for label, organ, phrasings in (
            (f"{side} kidney cyst", f"{side} kidney", ("Is there a cyst in the {}?", "Does the {} contain a cyst?")),
            (f"{side} nodule", f"{side} lung", ("Is there a nodule in the {}?", "Does the {} contain a nodule?")),
            (f"{side} effusion", f"{side} lung", ("Is there fluid around the {}?", "Does the {} have an effusion?")),
        ):
            chosen = tuple(phrasing.format(organ) for phrasing in phrasings)
            writer.yes_no(f"{label} existence", organ, chosen, measured.has(label))
    for name in RARE_FINDINGS:
        if name in asked:
            phrasings = (f"Is there a {name}?", f"Does the scan show a {name}?")
            writer.yes_no(f"{name} existence", name, phrasings, measured.has(name))


def _measurement(writer: QuestionWriter, measured: Measurements) -> None:
    writer.family = "measurement"
    for organ, usual in USUAL_ML.items():
        phrasings = (f"Is the {organ} larger than usual?", f"Does the {organ} exceed its usual volume?")
        writer.yes_no("organ volume", organ, phrasings, _region_ml(measured, organ) > usual)
    lesions = [*measured.lesions("liver cyst"), *measured.lesions("liver tumor")]
    writer.add(
        "liver lesion count",
        "liver",
        ("How many lesions are in the liver?", "How many liver lesions are there?"),
        "closed",
        _COUNTS[min(len(lesions), 3)],
        options=_COUNTS,
    )
    if lesions:
        is_large = max(lesion.diameter_mm for lesion in lesions) > LARGE_LESION_MM
        phrasings = ("Is the largest liver lesion a large one?", "Is any liver lesion large?")
        writer.yes_no("liver lesion size", "liver", phrasings, is_large)


def _visual_reasoning(writer: QuestionWriter, measured: Measurements) -> None:
    writer.family = "visual reasoning"
    larger = max(SIDES, key=lambda side: _region_ml(measured, f"{side} kidney"))
    phrasings = ("Which kidney is larger?", "Which of the two kidneys is larger?")
    writer.add("kidney comparison", "kidneys", phrasings, "closed", larger, options=SIDES)
    nodules = {side: measured.lesions(f"{side} nodule") for side in SIDES}
    cysts = {side: measured.lesions(f"{side} kidney cyst") for side in SIDES}
    writer.add(
        "nodule side",
        "lungs",
        ("Which lung holds a nodule?", "On which side is a lung nodule?"),
        "closed",
        _side(*(bool(nodules[side]) for side in SIDES)),
        options=(*SIDES, "both", "neither"),
    )
    writer.add(
        "liver finding",
        "liver",
        ("What does the liver show?", "Which lesions are in the liver?"),
        "closed",
        _joined(measured.has("liver cyst"), measured.has("liver tumor"), ("cyst", "tumor")),
        options=("cyst", "tumor", "both", "nothing"),
    )
    for side in SIDES:
        writer.add(
            "lung finding",
            f"{side} lung",
            (f"What does the {side} lung show?", f"What is the finding in the {side} lung?"),
            "closed",
            _joined(bool(nodules[side]), measured.has(f"{side} effusion"), ("nodule", "effusion")),
            options=("nodule", "effusion", "both", "nothing"),
        )
        if nodules[side]:
            half = "upper" if measured.is_in_upper_half(nodules[side][0], f"{side} lung") else "lower"
            writer.add(
                "nodule location",
                f"{side} lung",
                (f"In which half of the {side} lung is the nodule?", f"Where is the nodule of the {side} lung?"),
                "closed",
                half,
                options=("upper", "lower"),
            )
    num_cysts, num_nodules = (sum(bool(found[side]) for side in SIDES) for found in (cysts, nodules))
    writer.add(
        "organs compared",
        "lungs and kidneys",
        ("Do more lungs hold a nodule than kidneys a cyst?", "Are more lungs than kidneys affected?"),
        "closed",
        "more" if num_nodules > num_cysts else "fewer" if num_nodules < num_cysts else "same",
        options=("more", "fewer", "same"),
    )


def _medical_reasoning(writer: QuestionWriter, measured: Measurements) -> None:
    writer.family = "medical reasoning"
    phrasings: tuple[str, ...]
    for subtype, organ, phrasings, is_so in (
        (
            "splenomegaly",
            "spleen",
            ("Is the spleen enlarged?", "Is there splenomegaly?"),
            measured.volume_ml("spleen") >= SPLENOMEGALY_ML[0],
        ),
        (
            "fatty liver",
            "liver",
            ("Is the liver fatty?", "Is there hepatic steatosis?"),
            measured.mean_hu("liver") - measured.mean_hu("spleen") <= FATTY_LIVER_DIFFERENCE_HU,
        ),
        (
            "aneurysm",
            "aorta",
            ("Is there an aneurysm of the abdominal aorta?", "Is the abdominal aorta enlarged?"),
            measured.abdominal_aorta_mm() >= ANEURYSM_MM,
        ),
        (
            "cardiomegaly",
            "heart",
            ("Is the heart enlarged?", "Is there cardiomegaly?"),
            measured.heart_to_chest_ratio() >= CARDIOMEGALY_RATIO,
        ),
    ):
        writer.yes_no(subtype, organ, phrasings, is_so)
    fluid = [measured.volume_ml(f"{side} effusion") for side in SIDES]
    writer.add(
        "effusion side",
        "lungs",
        ("Which side has more pleural effusion?", "On which side is the pleural effusion larger?"),
        "closed",
        SIDES[int(fluid[1] > fluid[0])] if any(fluid) else "neither",
        options=(*SIDES, "neither"),
    )


def _region_ml(measured: Measurements, organ: str) -> float:
    """Volume of an organ, its lesions included."""
    return sum(measured.volume_ml(label) for label in REGIONS.get(organ, (organ,)))


def _side(is_left: bool, is_right: bool) -> str:
    return {(True, False): "left", (False, True): "right", (True, True): "both", (False, False): "neither"}[
        is_left, is_right
    ]


def _joined(is_first: bool, is_second: bool, names: tuple[str, str]) -> str:
    found = [name for name, is_there in zip(names, (is_first, is_second), strict=True) if is_there]
    return "both" if len(found) == 2 else found[0] if found else "nothing"
