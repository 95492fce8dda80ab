"""What would let a model know the test: patients, scans or questions in two splits, and answers told by the question.

:func:`find_leaks` reports; :func:`without_leaks` takes out of train (and val) what is also in test (or val).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from pipelines.datasets.rad_3d import history_answer, history_narrows
from pipelines.datasets.splits import SPLITS
from pipelines.metrics import fold_text
from pipelines.questions import Question

LEAKS_SCHEMA: dict[str, Any] = {
    "check": pl.String,
    "subject": pl.String,
    "splits": pl.List(pl.String),
    "num_questions": pl.Int64,
    "value": pl.Float64,
    "detail": pl.String,
}
"""One row a finding. `check` is one of those in :data:`CHECKS`; `value` is a share from 0 to 1 where it is one."""

CHECKS = {
    "patient in two splits": "the same patient is learnt from and tested on",
    "scan of two patients": "one scan id belongs to two patient ids",
    "image under two ids": "two scans have the same voxels",
    "image in two splits": "scans with the same voxels are learnt from and tested on",
    "question in two splits": "the same question about the same scan, or the same voxels, is learnt and tested",
    "told by the question": "share of held-out answers that the most frequent training answer to the same words gives",
    "always the same answer": "share of held-out questions of a subtype that have its most frequent answer",
    "answer in the question": "share of open answers whose words all stand in the question",
    "history gives the answer": "share of answers that a rule reads off the history in the question",
    "history halves the choices": "share of questions whose history leaves two of four choices",
}
BLOCKING = ("patient in two splits", "image in two splits", "question in two splits")
"""Leaks proper; the others are facts that a reader of scores has to know."""

_GIVEAWAY_SHARE = 0.95
_MIN_QUESTIONS = 20


def find_leaks(questions: Sequence[Question], voxels: Mapping[str, str]) -> pl.DataFrame:
    """Every finding about these questions.

    Args:
        voxels: scan id -> checksum of its voxels, for scans whose file was read.
    """
    rows = [
        *_patients(questions),
        *_images(questions, voxels),
        *_repeated_questions(questions, voxels),
        *_told_by_words(questions),
        *_same_answers(questions),
        *_echoes(questions),
        *_histories(questions),
    ]
    return pl.DataFrame(rows, schema=LEAKS_SCHEMA, orient="row")


def without_leaks(questions: Sequence[Question], voxels: Mapping[str, str]) -> list[Question]:
    """The questions without those about patients that a more held-out split has too.

    Patients whose scans have the same voxels count as one. Test is kept whole; val loses what is in test, and train
    what is in either.
    """
    group = _groups(questions, voxels)
    held: dict[str, int] = defaultdict(int)
    for question in questions:
        name = group[question.patient_id]
        held[name] = max(held[name], SPLITS.index(question.split))
    return [question for question in questions if SPLITS.index(question.split) == held[group[question.patient_id]]]


def _groups(questions: Sequence[Question], voxels: Mapping[str, str]) -> dict[str, str]:
    """Patient -> the patient that stands for all that share a scan or voxels with them."""
    parent: dict[str, str] = {question.patient_id: question.patient_id for question in questions}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first: dict[str, str] = {}
    for scan_id, patient_id in sorted({(question.scan_id, question.patient_id) for question in questions}):
        for key in filter(None, (f"scan {scan_id}", voxels.get(scan_id))):
            parent[root(patient_id)] = root(first.setdefault(key, patient_id))
    return {name: root(name) for name in parent}


def _patients(questions: Sequence[Question]) -> Iterable[dict[str, Any]]:
    splits: defaultdict[str, Counter[str]] = defaultdict(Counter)
    patients: defaultdict[str, set[str]] = defaultdict(set)
    for question in questions:
        splits[question.patient_id][question.split] += 1
        patients[question.scan_id].add(question.patient_id)
    for patient, found in sorted(splits.items()):
        if len(found) > 1:
            yield _finding("patient in two splits", patient, splits=found)
    for scan, owners in sorted(patients.items()):
        if len(owners) > 1:
            yield _finding("scan of two patients", scan, detail=", ".join(sorted(owners)))


def _images(questions: Sequence[Question], voxels: Mapping[str, str]) -> Iterable[dict[str, Any]]:
    by_voxels: defaultdict[str, set[str]] = defaultdict(set)
    splits: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        if checksum := voxels.get(question.scan_id):
            by_voxels[checksum].add(question.scan_id)
            splits[checksum][question.split] += 1
    for checksum, scans in sorted(by_voxels.items(), key=lambda item: min(item[1])):
        if len(scans) > 1:
            check = "image in two splits" if len(splits[checksum]) > 1 else "image under two ids"
            yield _finding(check, min(scans), splits=splits[checksum], detail=", ".join(sorted(scans)))


def _repeated_questions(questions: Sequence[Question], voxels: Mapping[str, str]) -> Iterable[dict[str, Any]]:
    splits: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for question in questions:
        image = voxels.get(question.scan_id, question.scan_id)
        splits[image, fold_text(question.question)][question.split] += 1
    found = Counter(tuple(s for s in SPLITS if s in counts) for counts in splits.values() if len(counts) > 1)
    for names, count in sorted(found.items()):
        yield _finding("question in two splits", " and ".join(names), num_questions=count, names=names)


def _told_by_words(questions: Sequence[Question]) -> Iterable[dict[str, Any]]:
    """Answers given by the words alone: the most frequent training answer to exactly the same question."""
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        if question.split == "train":
            answers[fold_text(question.question)][fold_text(question.answer)] += 1
    best = {text: min(counts.items(), key=lambda item: (-item[1], item[0]))[0] for text, counts in answers.items()}
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for question in questions:
        if question.split != "train" and question.kind != "number":
            guess = best.get(fold_text(question.question))
            right[question.subtype].append(guess == fold_text(question.answer))
    for subtype, marks in sorted(right.items()):
        share = sum(marks) / len(marks)
        if len(marks) >= _MIN_QUESTIONS and share >= _GIVEAWAY_SHARE:
            yield _finding("told by the question", subtype, num_questions=len(marks), value=share)


def _same_answers(questions: Sequence[Question]) -> Iterable[dict[str, Any]]:
    answers: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        if question.split != "train" and question.kind != "number":
            answers[question.subtype][fold_text(question.answer)] += 1
    for subtype, counts in sorted(answers.items()):
        answer, count = min(counts.items(), key=lambda item: (-item[1], item[0]))
        if counts.total() >= _MIN_QUESTIONS and count / counts.total() >= _GIVEAWAY_SHARE:
            detail = f"the answer is {answer!r}"
            value = count / counts.total()
            yield _finding("always the same answer", subtype, num_questions=counts.total(), value=value, detail=detail)


def _echoes(questions: Sequence[Question]) -> Iterable[dict[str, Any]]:
    marks: defaultdict[str, list[bool]] = defaultdict(list)
    for question in questions:
        if question.kind == "text":
            asked = set(_words(question.question))
            marks[question.subtype].append(set(_words(question.answer)) <= asked)
    for subtype, found in sorted(marks.items()):
        if any(found):
            share = sum(found) / len(found)
            yield _finding("answer in the question", subtype, num_questions=len(found), value=share)


def _histories(questions: Sequence[Question]) -> Iterable[dict[str, Any]]:
    guesses = [(question, history_answer(question)) for question in questions]
    guessed = [(question, guess) for question, guess in guesses if guess is not None]
    by_split: defaultdict[str, list[Question]] = defaultdict(list)
    right: Counter[str] = Counter()
    for question, guess in guessed:
        by_split[question.split].append(question)
        right[question.split] += question.answer == guess
    for split, found in sorted(by_split.items()):
        num_halved, count = history_narrows(found)
        yield _finding("history gives the answer", split, num_questions=count, value=right[split] / count)
        yield _finding("history halves the choices", split, num_questions=count, value=num_halved / count)


def _words(text: str) -> list[str]:
    return [word.strip(".,:;!?()") for word in fold_text(text).split()]


def _finding(
    check: str,
    subject: str,
    *,
    splits: Counter[str] | None = None,
    names: Sequence[str] = (),
    num_questions: int = 0,
    value: float | None = None,
    detail: str = "",
) -> dict[str, Any]:
    counts = splits or Counter()
    return {
        "check": check,
        "subject": subject,
        "splits": [split for split in SPLITS if split in counts or split in names],
        "num_questions": num_questions or counts.total(),
        "value": value,
        "detail": detail,
    }
