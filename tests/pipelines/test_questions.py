"""Questions: their file, and answers computed from label maps that are known by construction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines.anatomy import LABELS
from pipelines.measurements import Measurements, organ_mask
from pipelines.questions import (
    FAMILIES,
    Question,
    questions_about,
    questions_for_scan,
    read_questions,
    select,
    write_questions,
)

LPS_MM = np.diag([-5.0, -5.0, 5.0, 1.0])  # arrays below are [x, y, z] to left, back, head; a voxel is 0.125 mL


def block(labels: np.ndarray, label: str, x: slice, y: slice, z: slice) -> None:
    labels[x, y, z] = LABELS[label]


@pytest.fixture
def scene() -> tuple[np.ndarray, np.ndarray]:
    """HU and labels of boxes: fatty liver with two cysts, large right kidney, right effusion, left nodule."""
    labels = np.zeros((60, 40, 50), np.uint8)
    block(labels, "right lung", slice(2, 22), slice(5, 35), slice(25, 50))
    block(labels, "left lung", slice(38, 58), slice(5, 35), slice(25, 50))
    block(labels, "right effusion", slice(2, 22), slice(30, 35), slice(25, 50))
    block(labels, "left nodule", slice(45, 50), slice(10, 15), slice(42, 47))
    block(labels, "heart", slice(22, 38), slice(10, 25), slice(25, 40))
    block(labels, "liver", slice(5, 30), slice(5, 30), slice(8, 25))
    block(labels, "liver cyst", slice(8, 12), slice(8, 12), slice(10, 14))
    block(labels, "liver cyst", slice(20, 25), slice(20, 25), slice(15, 20))
    block(labels, "spleen", slice(45, 55), slice(15, 30), slice(10, 25))
    block(labels, "stomach", slice(35, 45), slice(5, 15), slice(10, 24))
    block(labels, "right kidney", slice(10, 20), slice(30, 38), slice(2, 12))
    block(labels, "left kidney", slice(40, 48), slice(30, 38), slice(2, 12))
    block(labels, "aorta", slice(30, 35), slice(32, 37), slice(0, 50))
    hu = np.zeros(labels.shape, np.int16)
    for label, value in (("liver", 53), ("spleen", 118), ("left kidney", 162)):
        hu[labels == LABELS[label]] = value
    return hu, labels


def ask(scene: tuple[np.ndarray, np.ndarray], affine: np.ndarray = LPS_MM) -> dict[str, Question]:
    found = questions_for_scan(*scene, affine, scan_id="s", patient_id="p", split="test")
    assert len({question.question_id for question in found}) == len(found)
    return {question.question_id.removeprefix("s."): question for question in found}


EXPECTED = {
    "liver-cyst-existence-liver": "yes",
    "liver-tumor-existence-liver": "no",
    "kidney-cyst-existence-left-kidney": "no",
    "lung-nodule-existence-left-lung": "yes",
    "lung-nodule-existence-right-lung": "no",
    "pleural-effusion-existence-left-lung": "no",
    "pleural-effusion-existence-right-lung": "yes",
    "organ-volume-measurement-liver": "1300 mL",
    "organ-volume-measurement-left-kidney": "80 mL",
    "organ-HU-measurement-liver": "50 HU",
    "organ-HU-measurement-left-kidney": "160 HU",
    "largest-lesion-diameter-liver-cyst": "3.1 cm",
    "aortic-diameter-measurement-aorta": "2.8 cm",
    "kidney-volume-comparison-kidneys": "right kidney",
    "nodule-side-lungs": "left",
    "organ-volume-comparison-spleen": "spleen",
    "lesion-counting-liver-cysts": "2",
    "lesion-counting-liver-lesions": "2",
    "liver-finding-liver": "cyst",
    "lung-finding-left-lung": "nodule",
    "lung-finding-right-lung": "effusion",
    "lesion-location-left-lung": "upper half",
    "splenomegaly-detection-spleen": "yes",
    "splenomegaly-grading-spleen": "mild",
    "fatty-liver-liver": "yes",
    "aortic-aneurysm-aorta": "no",
    "cardiomegaly-heart": "no",
    "effusion-side-lungs": "right",
}


def test_answers_follow_from_the_label_map(scene: tuple[np.ndarray, np.ndarray]) -> None:
    found = ask(scene)
    assert {name: found[name].answer for name in EXPECTED} == EXPECTED
    assert found["organ-volume-measurement-liver"].value == 1300 and found["lesion-counting-liver-cysts"].unit == ""
    assert {question.family for question in found.values()} == set(FAMILIES)
    assert "largest-lesion-diameter-liver-tumor" not in found


def test_answers_do_not_depend_on_how_the_scan_is_stored(scene: tuple[np.ndarray, np.ndarray]) -> None:
    hu, labels = (array.transpose(2, 0, 1)[::-1, ::-1] for array in scene)
    affine = np.array([[0, 5.0, 0, 0], [0, 0, -5.0, 0], [-5.0, 0, 0, 0], [0, 0, 0, 1]])
    assert ask((hu, labels), affine) == ask(scene)


def test_the_text_does_not_depend_on_the_answer(scene: tuple[np.ndarray, np.ndarray]) -> None:
    hu, labels = scene
    healthy = labels.copy()
    for lesion, tissue in (("liver cyst", "liver"), ("left nodule", "left lung"), ("right effusion", "right lung")):
        healthy[labels == LABELS[lesion]] = LABELS[tissue]
    sick, well = ask(scene), ask((hu, healthy))
    shared = set(sick) & set(well)
    assert len(shared) > 25
    assert all(sick[name].question == well[name].question for name in shared)
    assert well["liver-finding-liver"].answer == "no lesion" and well["lung-finding-left-lung"].answer == "clear"
    assert well["effusion-side-lungs"].answer == "neither"


def test_regions_hold_their_lesions(scene: tuple[np.ndarray, np.ndarray]) -> None:
    labels = scene[1]
    assert organ_mask(labels, "liver").sum() == (labels == LABELS["liver"]).sum() + 64 + 125
    assert organ_mask(labels, "spleen").sum() == 10 * 15 * 15


def test_lesions_that_touch_by_a_corner_are_two() -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[2:6, 2:6, 2:6] = labels[6:10, 6:10, 6:10] = LABELS["liver cyst"]
    labels[15, 15, 15] = LABELS["liver cyst"]  # a speck of 0.125 mL is no lesion
    found = Measurements(labels.astype(np.int16), labels, LPS_MM).lesions("liver cyst")
    assert [lesion.volume_ml for lesion in found] == [8.0, 8.0]


def test_file_round_trip_and_select(tmp_path: Path, scene: tuple[np.ndarray, np.ndarray]) -> None:
    questions = list(ask(scene).values())
    write_questions(questions, tmp_path / "q.jsonl")
    assert read_questions(tmp_path / "q.jsonl") == questions
    ids = [questions[3].question_id, questions[1].question_id]
    assert select(questions, ids) == [questions[3], questions[1]]
    with pytest.raises(PhotonError, match="UNKNOWN_QUESTION"):
        select(questions, ["s.no-such-question"])
    everywhere = Question(**questions[0].__dict__ | {"question_id": "q", "scan_id": "*"})
    assert questions_about([*questions, everywhere], "other") == [everywhere]
    assert len(questions_about([*questions, everywhere], "s")) == len(questions) + 1


def test_unreadable_questions_are_refused(tmp_path: Path, scene: tuple[np.ndarray, np.ndarray]) -> None:
    path = tmp_path / "q.jsonl"
    good = next(iter(ask(scene).values())).as_dict()
    wrong = {
        "not JSON": "{",
        "a list": "[1]",
        "no answer field": json.dumps({"question_id": "a"}),
        "unknown field": json.dumps(good | {"colour": "red"}),
        "unknown family": json.dumps(good | {"family": "astrology"}),
        "unknown kind": json.dumps(good | {"kind": "essay"}),
        "no question": json.dumps(good | {"question": ""}),
        "twice": json.dumps(good) + "\n" + json.dumps(good),
        "nothing": "\n",
    }
    for text in wrong.values():
        path.write_text(text)
        with pytest.raises(PhotonError, match="QUESTIONS_UNREADABLE"):
            read_questions(path)
    with pytest.raises(PhotonError, match="QUESTIONS_UNREADABLE"):
        read_questions(tmp_path / "none")
