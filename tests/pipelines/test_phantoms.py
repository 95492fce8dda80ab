"""The synthetic archive: same bytes everywhere, plausible anatomy, questions that cannot be guessed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from pipelines.anatomy import FINDINGS, LABELS, TRAITS
from pipelines.files import file_digest
from pipelines.phantoms import PHANTOM_SPECS, PhantomSpec, generate, make_phantom, plan_visits
from pipelines.questions import Question, read_questions
from pipelines.resample import frame_of
from pipelines.scans.scan import read_scan
from pipelines.volumes import VOLUME_SPECS, resample

SPEC = PhantomSpec(num_train=4, num_val=2, num_test=2, second_visit_fraction=0.5)

GOLDEN = "75c7ad896df5b81d"
"""Of the first demo scan's voxels: it changes only when the anatomy is changed on purpose."""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    record = generate(SPEC, folder)
    assert (record.num_patients, record.num_scans) == (8, 12)
    assert sum(record.num_questions_by_split.values()) == record.num_questions
    return folder


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Of the demo archive's 55 held-out scans, with the scans themselves left unwritten."""
    from pipelines.questions import questions_for_scan

    found = []
    for visit in plan_visits(PHANTOM_SPECS["demo"]):
        if visit.split == "test":
            made = make_phantom(visit, 0)
            names = {"scan_id": visit.scan_id, "patient_id": visit.patient_id, "split": "test"}
            found += questions_for_scan(made.hu, made.labels, made.affine, **names)
    return found


def test_the_same_bytes_again(archive: Path, tmp_path: Path) -> None:
    generate(SPEC, tmp_path)
    paths = sorted(path.relative_to(archive) for path in archive.rglob("*") if path.is_file())
    assert len(paths) == 12 * 2 + 3
    assert all(file_digest(archive / path) == file_digest(tmp_path / path) for path in paths)


def test_the_bytes_of_the_first_scan_are_known() -> None:
    made = make_phantom(plan_visits(PHANTOM_SPECS["demo"])[0], 0)
    digest = hashlib.sha256(made.hu.tobytes() + made.labels.tobytes() + made.affine.tobytes()).hexdigest()
    assert digest[:16] == GOLDEN


def test_another_seed_gives_other_patients() -> None:
    visit = plan_visits(SPEC)[0]
    first, second = make_phantom(visit, 0), make_phantom(visit, 1)
    assert first.hu.shape != second.hu.shape or not np.array_equal(first.hu, second.hu)
    assert plan_visits(SPEC) != plan_visits(dataclasses.replace(SPEC, seed=1))


def test_patients_stay_in_one_split_and_findings_are_balanced() -> None:
    visits = plan_visits(PHANTOM_SPECS["demo"])
    splits = defaultdict(set)
    for visit in visits:
        splits[visit.patient_id].add(visit.split)
    assert all(len(names) == 1 for names in splits.values())
    assert len({visit.scan_id for visit in visits}) == len(visits)
    first = [visit for visit in visits if visit.visit == 1]
    assert Counter(visit.split for visit in first) == {"train": 180, "val": 16, "test": 48}
    for split in ("train", "val", "test"):
        here = [visit for visit in first if visit.split == split]
        for name in FINDINGS:
            assert sum(visit.findings[name] for visit in here) * 2 == len(here)
        for name in TRAITS:
            assert sum(visit.traits[name] for visit in here) * 2 == len(here)
    assert 30 <= len(visits) - len(first) <= 40


def test_scans_differ_in_geometry_but_show_one_body(archive: Path) -> None:
    orientations, shapes = set(), set()
    for path in sorted((archive / "raw" / "images").iterdir()):
        scan = read_scan(path)
        labels = read_scan(archive / "raw" / "labels" / path.name)
        assert scan.array.shape == labels.array.shape and np.array_equal(scan.affine, labels.affine)
        orientations.add(scan.orientation)
        shapes.add(scan.array.shape)
        frame = frame_of(scan.array.shape, scan.affine)
        grid = frame.canonical(labels.array)

        def centre(label: str, grid: np.ndarray = grid) -> np.ndarray:
            return np.argwhere(grid == LABELS[label]).mean(axis=0)

        # [Z, Y, X] run to the head, the back and the left.
        assert centre("left lung")[2] > centre("heart")[2] > centre("right lung")[2]
        assert centre("spleen")[2] > centre("liver")[2]
        assert centre("spine")[1] > centre("heart")[1]
        assert centre("heart")[0] > centre("liver")[0] > centre("left kidney")[0]
        volume = resample(scan, VOLUME_SPECS["demo"])
        assert volume.metadata["modality"] == "ct" and volume.metadata["notes"] == []
    assert len(orientations) >= 3 and len(shapes) >= 6


def test_organs_have_their_density_and_noise() -> None:
    for visit in plan_visits(SPEC)[:3]:
        made = make_phantom(visit, 0)
        for label, low, high in (
            ("left lung", -880, -700),
            ("liver", 30, 150),
            ("spleen", 60, 150),
            ("spine", 150, 450),
        ):
            assert low < made.hu[made.labels == LABELS[label]].mean() < high
        quarter, half, rest = np.percentile(made.hu[made.labels == LABELS["heart"]], (25, 50, 75))
        assert 100 < half < 180 and 10 < (rest - quarter) / 1.35 < 25  # noise of 15 HU and soft edges
        assert made.hu.min() < -1000


def test_answers_agree_with_what_was_drawn(questions: list[Question]) -> None:
    drawn = {visit.scan_id: visit.findings for visit in plan_visits(PHANTOM_SPECS["demo"])}
    names = {
        "liver cyst existence": "liver cyst",
        "liver tumor existence": "liver tumor",
        "fatty liver": "fatty liver",
        "splenomegaly detection": "splenomegaly",
        "aortic aneurysm": "aneurysm",
        "cardiomegaly": "cardiomegaly",
    }
    checked = [(q.answer == "yes") == bool(drawn[q.scan_id][names[q.subtype]]) for q in questions if q.subtype in names]
    assert len(checked) == 6 * 55 and sum(checked) >= len(checked) - 2


def test_answers_cannot_be_guessed_from_the_text(questions: list[Question]) -> None:
    by_subtype = defaultdict(Counter)
    for question in questions:
        if question.kind != "number":
            by_subtype[question.subtype, question.organ][question.answer] += 1
            assert not question.options or question.answer in question.options
    for (subtype, _), answers in by_subtype.items():
        share = answers.most_common(1)[0][1] / answers.total()
        if set(answers) == {"yes", "no"}:
            assert share <= 0.56, subtype
        else:
            assert share <= 0.60, subtype


def test_words_are_few_and_scans_have_tens_of_questions(questions: list[Question]) -> None:
    words = {word for q in questions for word in f"{q.question} {q.answer}".replace("?", " ?").split()}
    assert len({word for word in words if not word[0].isdigit()}) < 120
    assert not any("  " in q.question + q.answer for q in questions)
    assert max(len(q.answer.split()) for q in questions) <= 3
    per_scan = Counter(question.scan_id for question in questions)
    assert min(per_scan.values()) >= 24
    assert {question.family for question in questions} == {
        "recognition",
        "measurement",
        "visual reasoning",
        "medical reasoning",
    }


def test_written_questions_belong_to_written_scans(archive: Path) -> None:
    scans = {path.stem for path in (archive / "raw" / "images").iterdir()}
    assert {question.scan_id for question in read_questions(archive / "questions.jsonl")} == scans
