"""Questions about scans: their file, and how they and their answers are computed from label maps.

The four families are recognition, measurement, visual reasoning and medical reasoning. A question's text
never depends on its answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from photon.errors import PhotonError
from pipelines.files import write_text
from pipelines.measurements import (
    ANEURYSM_MM,
    CARDIOMEGALY_RATIO,
    FATTY_LIVER_DIFFERENCE_HU,
    SPLENOMEGALY_ML,
    Lesion,
    Measurements,
)

FAMILIES = ("recognition", "measurement", "visual reasoning", "medical reasoning")
KINDS = ("closed", "number", "text")
EVERY_SCAN = "*"
"""The scan_id of a question that is asked of every scan."""

_YES_NO = ("yes", "no")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """One question about one scan (or, with scan_id ``*``, about every scan).

    Args:
        organ: the organ asked about, a key of `measurements.REGIONS` or a label name, or "".
        kind: ``closed`` (the answer is one of ``options``), ``number`` (``value`` and ``unit``) or ``text``.
        answer: exact training text; "" where it is not known.
        value: the answer as a number, or None.
    """

    question_id: str
    scan_id: str
    patient_id: str
    split: str
    family: str
    subtype: str
    organ: str
    kind: str
    question: str
    options: tuple[str, ...] = ()
    answer: str = ""
    value: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("family", FAMILIES), ("kind", KINDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} '{getattr(self, name)}' is not one of {', '.join(allowed)}")
        if not (self.question_id and self.scan_id and self.question):
            raise ValueError("question_id, scan_id and question must not be empty")

    def as_dict(self) -> dict[str, Any]:
        """The question as JSON values."""
        return dataclasses.asdict(self) | {"options": list(self.options)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Self:
        """The question that :meth:`as_dict` wrote."""
        return cls(**content | {"options": tuple(content.get("options", ()))})


def write_questions(questions: Iterable[Question], path: Path) -> None:
    """Write one JSON object a line, atomically."""
    lines = (json.dumps(question.as_dict(), sort_keys=False, allow_nan=False) for question in questions)
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_questions(path: Path) -> list[Question]:
    """Read questions in file order.

    Raises:
        PhotonError: ``QUESTIONS_UNREADABLE`` when the file is missing, empty, has a line that is not a
            question or gives one question_id twice.
    """
    remedy = "See docs/architecture.md for the fields of a question."
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PhotonError("QUESTIONS_UNREADABLE", path, f"the file cannot be read ({error}).", remedy) from error
    questions: dict[str, Question] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            question = Question.from_dict(json.loads(line))
        except (ValueError, TypeError, AttributeError) as error:
            fact = f"line {number} is not a question ({error})."
            raise PhotonError("QUESTIONS_UNREADABLE", path, fact, remedy) from error
        if question.question_id in questions:
            fact = f"line {number} repeats the question_id {question.question_id}."
            raise PhotonError("QUESTIONS_UNREADABLE", path, fact, remedy)
        questions[question.question_id] = question
    if not questions:
        raise PhotonError("QUESTIONS_UNREADABLE", path, "the file holds no question.", remedy)
    return list(questions.values())


def select(questions: Sequence[Question], question_ids: Sequence[str]) -> list[Question]:
    """The questions with these ids, in the order of the ids.

    Raises:
        PhotonError: ``UNKNOWN_QUESTION`` for an id that none of them has.
    """
    by_id = {question.question_id: question for question in questions}
    for question_id in question_ids:
        if question_id not in by_id:
            fact = f"none of the {len(by_id)} questions has this id."
            raise PhotonError("UNKNOWN_QUESTION", question_id, fact, "Look the id up in questions.jsonl.")
    return [by_id[question_id] for question_id in question_ids]


def questions_about(questions: Iterable[Question], scan_id: str) -> list[Question]:
    """The questions asked of a scan: its own and those asked of every scan."""
    return [question for question in questions if question.scan_id in (scan_id, EVERY_SCAN)]


def questions_for_scan(
    hu: np.ndarray, labels: np.ndarray, affine: np.ndarray, *, scan_id: str, patient_id: str, split: str
) -> list[Question]:
    """About thirty questions, answered from the label map.

    Args:
        hu: scan in HU [i, j, k].
        labels: label map of the same shape, values as in `anatomy.LABELS`.
        affine: [4, 4], array index to world RAS mm.
    """
    writer = QuestionWriter(scan_id, patient_id, split)
    measured = Measurements(hu, labels, affine)
    _recognition(writer, measured)
    _measurement(writer, measured)
    _visual_reasoning(writer, measured)
    _medical_reasoning(writer, measured)
    return writer.questions


class QuestionWriter:
    """Collects the questions about one scan; picks a phrasing by the question's id, so never by its answer."""

    def __init__(self, scan_id: str, patient_id: str, split: str) -> None:
        self.scan_id, self.patient_id, self.split = scan_id, patient_id, split
        self.questions: list[Question] = []
        self.family = ""

    def add(self, subtype: str, organ: str, phrasings: tuple[str, ...], kind: str, answer: str, **fields: Any) -> None:
        name = f"{subtype} {fields.pop('about', organ)}".replace(" ", "-")
        question_id = f"{self.scan_id}.{name}"
        chosen = hashlib.sha256(question_id.encode()).digest()[0] % len(phrasings)
        self.questions.append(
            Question(
                question_id=question_id,
                scan_id=self.scan_id,
                patient_id=self.patient_id,
                split=self.split,
                family=self.family,
                subtype=subtype,
                organ=organ,
                kind=kind,
                question=phrasings[chosen],
                answer=answer,
                **fields,
            )
        )

    def yes_no(self, subtype: str, organ: str, phrasings: tuple[str, ...], is_yes: bool) -> None:
        self.add(subtype, organ, phrasings, "closed", "yes" if is_yes else "no", options=_YES_NO)

    def number(
        self, subtype: str, organ: str, phrasings: tuple[str, ...], value: float, unit: str, about: str = ""
    ) -> None:
        self.add(
            subtype,
            organ,
            phrasings,
            "number",
            f"{value:g} {unit}".strip(),
            value=value,
            unit=unit,
            about=about or organ,
        )


def _recognition(writer: QuestionWriter, measured: Measurements) -> None:
    writer.family = "recognition"
    for lesion in ("cyst", "tumor"):
        phrasings = (
            f"Is there a {lesion} in the liver?",
            f"Does the liver contain a {lesion}?",
            f"Is a liver {lesion} present?",
        )
        writer.yes_no(f"liver {lesion} existence", "liver", phrasings, measured.has(f"liver {lesion}"))
    for side in ("left", "right"):
        writer.yes_no(
            "kidney cyst existence",
            f"{side} kidney",
            (f"Is there a cyst in the {side} kidney?", f"Does the {side} kidney contain a cyst?"),
            measured.has(f"{side} kidney cyst"),
        )
        writer.yes_no(
            "lung nodule existence",
            f"{side} lung",
            (f"Is there a nodule in the {side} lung?", f"Does the {side} lung contain a nodule?"),
            measured.has(f"{side} nodule"),
        )
        writer.yes_no(
            "pleural effusion existence",
            f"{side} lung",
            (f"Is there a {side} pleural effusion?", f"Is there fluid around the {side} lung?"),
            measured.has(f"{side} effusion"),
        )


def _measurement(writer: QuestionWriter, measured: Measurements) -> None:
    writer.family = "measurement"
    for organ in ("liver", "spleen", "heart", "left kidney", "right kidney"):
        writer.number(
            "organ volume measurement",
            organ,
            (f"What is the volume of the {organ} in mL?", f"How large is the {organ} in mL?"),
            _two_digits(measured.volume_ml(organ)),
            "mL",
        )
    for organ in ("liver", "left kidney"):
        writer.number(
            "organ HU measurement",
            organ,
            (f"What is the mean density of the {organ} in HU?", f"How dense is the {organ} in HU?"),
            float(round(measured.mean_hu(organ) / 10) * 10),
            "HU",
        )
    for lesion in ("cyst", "tumor"):
        found = measured.lesions(f"liver {lesion}")
        if found:
            writer.number(
                "largest lesion diameter",
                "liver",
                (
                    f"What is the diameter of the largest liver {lesion} in cm?",
                    f"How large is the largest liver {lesion} in cm?",
                ),
                round(found[0].diameter_mm / 10, 1),
                "cm",
                about=f"liver {lesion}",
            )
    writer.number(
        "aortic diameter measurement",
        "aorta",
        (
            "What is the largest diameter of the abdominal aorta in cm?",
            "How wide is the abdominal aorta in cm?",
        ),
        round(measured.abdominal_aorta_mm() / 10, 1),
        "cm",
    )


def _visual_reasoning(writer: QuestionWriter, measured: Measurements) -> None:
    writer.family = "visual reasoning"
    larger = max(("left", "right"), key=lambda side: measured.volume_ml(f"{side} kidney"))
    writer.add(
        "kidney volume comparison",
        "kidneys",
        ("Which kidney is larger?", "Which of the two kidneys is larger?"),
        "closed",
        f"{larger} kidney",
        options=("left kidney", "right kidney"),
    )
    nodules = {side: measured.lesions(f"{side} nodule") for side in ("left", "right")}
    writer.add(
        "nodule side",
        "lungs",
        ("Which lung holds a nodule?", "On which side is a lung nodule?"),
        "closed",
        {(1, 0): "left", (0, 1): "right", (1, 1): "both", (0, 0): "neither"}[
            bool(nodules["left"]), bool(nodules["right"])
        ],
        options=("left", "right", "both", "neither"),
    )
    writer.add(
        "organ volume comparison",
        "spleen",
        ("Which is larger, the spleen or the stomach?", "Which is larger, the stomach or the spleen?"),
        "closed",
        max(("spleen", "stomach"), key=measured.volume_ml),
        options=("spleen", "stomach"),
    )
    cysts, tumors = measured.lesions("liver cyst"), measured.lesions("liver tumor")
    for name, count in (("cysts", len(cysts)), ("lesions", len(cysts) + len(tumors))):
        phrasings = (f"How many {name} are in the liver?", f"How many liver {name} are there?")
        writer.number("lesion counting", "liver", phrasings, count, "", about=f"liver {name}")
    writer.add(
        "liver finding",
        "liver",
        ("What kind of lesion does the liver show?", "Which lesions are in the liver?"),
        "text",
        _joined(cysts, tumors, "no lesion"),
    )
    for side, found in nodules.items():
        lung = f"{side} lung"
        writer.add(
            "lung finding",
            lung,
            (f"What does the {lung} show?", f"What is the finding in the {lung}?"),
            "text",
            _joined(found, measured.lesions(f"{side} effusion"), "clear", ("nodule", "effusion")),
        )
        if found:
            half = "upper half" if measured.is_in_upper_half(found[0], lung) else "lower half"
            writer.add(
                "lesion location",
                lung,
                (f"In which half of the {lung} is the nodule?", f"Where is the nodule of the {lung}?"),
                "text",
                half,
            )


def _medical_reasoning(writer: QuestionWriter, measured: Measurements) -> None:
    writer.family = "medical reasoning"
    spleen_ml = measured.volume_ml("spleen")
    mild, severe = SPLENOMEGALY_ML
    writer.yes_no(
        "splenomegaly detection",
        "spleen",
        ("Is the spleen enlarged?", "Is there splenomegaly?"),
        spleen_ml >= mild,
    )
    writer.add(
        "splenomegaly grading",
        "spleen",
        ("What is the grade of splenomegaly?", "How severe is the splenomegaly?"),
        "closed",
        "severe" if spleen_ml >= severe else "mild" if spleen_ml >= mild else "none",
        options=("none", "mild", "severe"),
    )
    writer.yes_no(
        "fatty liver",
        "liver",
        ("Is the liver fatty?", "Is there hepatic steatosis?"),
        measured.mean_hu("liver") - measured.mean_hu("spleen") <= FATTY_LIVER_DIFFERENCE_HU,
    )
    writer.yes_no(
        "aortic aneurysm",
        "aorta",
        ("Is there an aneurysm of the abdominal aorta?", "Is the abdominal aorta enlarged?"),
        measured.abdominal_aorta_mm() >= ANEURYSM_MM,
    )
    writer.yes_no(
        "cardiomegaly",
        "heart",
        ("Is the heart enlarged?", "Is there cardiomegaly?"),
        measured.heart_to_chest_ratio() >= CARDIOMEGALY_RATIO,
    )
    fluid = {side: measured.volume_ml(f"{side} effusion") for side in ("left", "right")}
    writer.add(
        "effusion side",
        "lungs",
        ("Which side has more pleural effusion?", "On which side is the pleural effusion larger?"),
        "closed",
        max(fluid, key=lambda side: fluid[side]) if any(fluid.values()) else "neither",
        options=("left", "right", "neither"),
    )


def _joined(first: list[Lesion], second: list[Lesion], nothing: str, names: tuple[str, str] = ("cyst", "tumor")) -> str:
    present = [name for name, found in zip(names, (first, second), strict=True) if found]
    return " and ".join(present) or nothing


def _two_digits(value: float) -> float:
    """Rounded to two significant digits; below 10 to whole numbers."""
    step = 10 ** max(len(str(int(value))) - 2, 0)
    return float(round(value / step) * step)
