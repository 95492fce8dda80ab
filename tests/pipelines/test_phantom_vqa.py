"""PhantomVQA: the same bytes everywhere, nothing to guess, and every answer true of what was painted."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from pipelines.anatomy import FINDINGS, LABELS, TRAITS
from pipelines.baselines import MajorityAnswerer
from pipelines.files import file_digest
from pipelines.grids import VOLUME_SPECS
from pipelines.measurements import REGIONS
from pipelines.phantom_vqa.ask import questions_about
from pipelines.phantom_vqa.cohort import PHANTOM_VQA_SPECS, RARE_FINDINGS, VQA_LABELS, Subject, plan_cohort
from pipelines.phantom_vqa.scans import make_scan
from pipelines.phantom_vqa.stage import SPEC_FILE, generate
from pipelines.questions import Question, read_questions

SMOKE = PHANTOM_VQA_SPECS["vqa-smoke"]
COARSE = dataclasses.replace(
    PHANTOM_VQA_SPECS["vqa-small"],
    num_train=60,
    num_val=1,
    num_test=60,
    in_plane_tenths_mm=(38, 44),
    slice_tenths_mm=(40, 50),
)
GOLDEN = "ca7aa9098dab164a"
"""Of the first scan of the preset `vqa-small`: it changes only when the benchmark is changed on purpose."""


def asked_about(subject: Subject) -> list[Question]:
    scan = make_scan(subject, COARSE)
    names = {"scan_id": subject.scan_id, "split": subject.split, "asked": subject.asked}
    return questions_about(scan.hu, scan.labels, scan.affine, **names)


@pytest.fixture(scope="module")
def cohort() -> list[tuple[Subject, list[Question]]]:
    """Patients of train and test with their questions."""
    return [(subject, asked_about(subject)) for subject in plan_cohort(COARSE)]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vqa")
    record = generate(SMOKE, folder, num_workers=2)
    assert (record.num_scans, record.num_patients) == (18, 18)
    return folder


def test_the_same_bytes_whatever_the_number_of_processes(archive: Path, tmp_path: Path) -> None:
    generate(SMOKE, tmp_path, num_workers=1)
    paths = sorted(path.relative_to(archive) for path in archive.rglob("*") if path.is_file())
    assert len(paths) == 18 * 2 + 4
    assert all(file_digest(archive / path) == file_digest(tmp_path / path) for path in paths)
    assert json.loads((archive / "raw" / SPEC_FILE).read_text())["seed"] == 0
    assert json.loads((archive / "raw" / "labels.json").read_text()) == VQA_LABELS


def test_the_bytes_of_the_first_scan_are_known() -> None:
    spec = PHANTOM_VQA_SPECS["vqa-small"]
    scan = make_scan(plan_cohort(spec)[0], spec)
    digest = hashlib.sha256(scan.hu.tobytes() + scan.labels.tobytes() + scan.affine.tobytes()).hexdigest()
    assert digest[:16] == GOLDEN


def test_another_seed_gives_other_patients() -> None:
    other = dataclasses.replace(SMOKE, seed=1)
    assert plan_cohort(other) != plan_cohort(SMOKE)
    first, second = (make_scan(plan_cohort(spec)[0], spec) for spec in (SMOKE, other))
    assert first.hu.shape != second.hu.shape or not np.array_equal(first.hu, second.hu)


@pytest.mark.parametrize("name", sorted(PHANTOM_VQA_SPECS))
def test_cohorts_are_balanced(name: str) -> None:
    spec = PHANTOM_VQA_SPECS[name]
    assert spec.volumes in VOLUME_SPECS
    subjects = plan_cohort(spec)
    assert len({subject.scan_id for subject in subjects}) == len(subjects)
    for split, count in (("train", spec.num_train), ("val", spec.num_val), ("test", spec.num_test)):
        own = [subject for subject in subjects if subject.split == split]
        assert len(own) == count
        for finding in FINDINGS:
            assert sum(subject.findings[finding] for subject in own) == (count + 1) // 2
        for trait in TRAITS:
            assert sum(subject.traits[trait] for subject in own) == (count + 1) // 2
        for rare in RARE_FINDINGS:
            have = {s.scan_id for s in own if s.rare[rare]}
            asked = {s.scan_id for s in own if rare in s.asked}
            assert have <= asked and len(asked) == 2 * len(have)
            fraction = spec.rare_test_fraction if split == "test" else spec.rare_fraction
            assert abs(len(have) - count * fraction) < 1


def test_answers_agree_with_the_plan(cohort: list[tuple[Subject, list[Question]]]) -> None:
    for subject, questions in cohort:
        shown = subject.findings | subject.rare
        by_subtype = {(q.subtype, q.organ): q.answer for q in questions}
        for (subtype, _), answer in by_subtype.items():
            finding = subtype.removesuffix(" existence")
            if finding != subtype:
                assert answer == ("yes" if shown[finding] else "no"), (subject.scan_id, subtype)
        nodules = [subject.findings[f"{side} nodule"] for side in ("left", "right")]
        sides = {(1, 0): "left", (0, 1): "right", (1, 1): "both", (0, 0): "neither"}
        assert by_subtype["nodule side", "lungs"] == sides[nodules[0], nodules[1]]
        larger = "left" if subject.traits["larger left kidney"] else "right"
        assert by_subtype["kidney comparison", "kidneys"] == larger
        assert by_subtype["fatty liver", "liver"] == ("yes" if subject.findings["fatty liver"] else "no")


def test_rare_findings_are_asked_of_the_planned_patients_alone(cohort: list[tuple[Subject, list[Question]]]) -> None:
    for subject, questions in cohort:
        assert {q.organ for q in questions if q.organ in RARE_FINDINGS} == set(subject.asked)


def test_a_benchmark_may_ask_some_subtypes_only(tmp_path: Path, archive: Path) -> None:
    chosen = PHANTOM_VQA_SPECS["vqa-quick"].subtypes
    assert chosen is not None
    everything = read_questions(archive / "questions.jsonl")
    assert set(chosen) <= {question.subtype for question in everything}
    generate(dataclasses.replace(SMOKE, subtypes=chosen), tmp_path, num_workers=1)
    some = read_questions(tmp_path / "questions.jsonl")
    assert some == [question for question in everything if question.subtype in chosen]


def test_rare_findings_lie_outside_the_organs_and_at_many_heights() -> None:
    spec = dataclasses.replace(COARSE, num_train=40, num_val=1, num_test=1)
    subjects = [subject for subject in plan_cohort(spec)[:40]]
    heights, overlaps = defaultdict(list), defaultdict(list)
    for subject in subjects:
        everywhere = dataclasses.replace(subject, rare=dict.fromkeys(RARE_FINDINGS, 1))
        with_all = make_scan(everywhere, spec)
        without = make_scan(dataclasses.replace(subject, rare=dict.fromkeys(RARE_FINDINGS, 0)), spec)
        for name in RARE_FINDINGS:
            is_lesion = with_all.labels == VQA_LABELS[name]
            assert is_lesion.any(), (subject.scan_id, name)
            beneath = np.bincount(without.labels[is_lesion], minlength=32)
            organs = {LABELS["spine"]} if name == "bone lesion" else set()
            in_organs = sum(beneath[value] for value in set(LABELS.values()) - organs)
            overlaps[name].append(in_organs / is_lesion.sum())
            # Not in the air around the body; lungs and bowel hold air, too.
            assert (without.hu[is_lesion] > -900).mean() > 0.9
            where = np.argwhere(is_lesion).mean(0) @ with_all.affine[:3, :3].T + with_all.affine[:3, 3]
            heights[name].append(where[2])
    # A few press on the edge of a large organ.
    assert all(np.mean(found) < 0.15 for found in overlaps.values()), {n: np.mean(f) for n, f in overlaps.items()}
    assert all(np.std(found) > 8 for found in heights.values()), {n: np.std(f) for n, f in heights.items()}


def test_text_alone_scores_near_chance(cohort: list[tuple[Subject, list[Question]]]) -> None:
    training = [q for subject, questions in cohort if subject.split == "train" for q in questions]
    test = [q for subject, questions in cohort if subject.split == "test" for q in questions]
    assert all(q.kind == "closed" and q.answer in q.options for q in test)
    said = MajorityAnswerer(training).answer(None, test)
    right = np.mean([answer.text == q.answer for answer, q in zip(said, test, strict=True)])
    chance = np.mean([1 / len(q.options) for q in test])
    assert chance < 0.45 and right - chance < 0.05, (right, chance)
    by_subtype: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for q in [*training, *test]:
        by_subtype[q.subtype, q.organ][q.answer] += 1
    for key, counts in by_subtype.items():
        assert max(counts.values()) / counts.total() < 0.72, (key, counts)


def test_wording_does_not_depend_on_the_answer(cohort: list[tuple[Subject, list[Question]]]) -> None:
    answers = defaultdict(set)
    for _, questions in cohort:
        for q in questions:
            answers[q.question].add(q.answer)
    assert len(answers) == 60
    assert min(len(found) for found in answers.values()) >= 2


def test_questions_name_known_regions(archive: Path) -> None:
    for question in read_questions(archive / "questions.jsonl"):
        assert question.organ in REGIONS or question.organ in VQA_LABELS
        assert question.patient_id == question.scan_id
