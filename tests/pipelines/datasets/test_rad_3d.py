"""3D-RAD: six tasks, CT-RATE's names, and the history that tells the answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from photon.errors import PhotonError
from pipelines.datasets.base import assemble
from pipelines.datasets.leaks import find_leaks
from pipelines.datasets.splits import SplitRule


@pytest.fixture
def folder(tmp_path: Path, made: Any) -> Path:
    base = tmp_path / "3DRAD"
    open_rows = {
        "train/Task1_Image_Observation/Anatomical_observation": (1, 1, "train_1_a_1.nii.gz", "What is seen?", "A rib."),
        "train/Task2_Anomaly_Detection/Abnormality_type": (2, 3, "train_1_a_1.nii.gz", "Of what type?", "nodule"),
        "train/Task3_Medical_Computation/Size": (3, 2, "train_2_a_2.nii.gz", "How large?", "55x19 mm"),
        "test/Task3_Medical_Computation/Diameter": (3, 1, "test_12_a_1.nii.gz", "How wide?", "2.5 cm"),
    }
    for name, row in open_rows.items():
        made.write_csv(base / f"{name}.csv", made.RAD_HEADER, [made.rad_open(*row)])
    made.write_csv(
        base / "test/Task4_Existence_Detection/Lung nodule.csv",
        made.RAD_HEADER,
        [made.rad_yes_no(10, "test_12_a_1.nii.gz", "Is there a nodule?", answer) for answer in ("Yes",)],
    )
    for task, name in ((5, "Task5_Static_Temporal_Diagnosis"), (6, "Task6_Longitudinal_Temporal_Diagnosis")):
        question = "What has become of it?" if task == 5 else made.history([0, 1])
        rows = [made.rad_temporal(task, 2, "test_12_c_1.nii.gz", question, "B")]
        made.write_csv(base / f"test/{name}/c.csv", made.RAD_HEADER, rows)
    return base


def test_all_six_tasks(folder: Path, read: Any) -> None:
    drafts, refusals = read("3d-rad", folder)
    assert not refusals and len(drafts) == 7
    by_subtype = {draft.subtype: draft for draft in drafts}
    assert set(by_subtype) == {
        "image observation anatomical observation",
        "anomaly detection abnormality type",
        "medical computation size",
        "medical computation diameter",
        "existence detection lung nodule",
        "static temporal diagnosis visit c",
        "longitudinal temporal diagnosis visit c",
    }
    assert {draft.kind for draft in drafts if draft.subtype.split()[0] in ("image", "anomaly", "medical")} == {"text"}
    yes_no = by_subtype["existence detection lung nodule"]
    assert (yes_no.kind, yes_no.options, yes_no.answer) == ("closed", ("Yes", "No"), "Yes")
    assert (yes_no.scan_id, yes_no.patient_id, yes_no.split) == ("valid_12_a_1", "valid_12", "test")
    temporal = by_subtype["static temporal diagnosis visit c"]
    assert len(temporal.options) == 4 and temporal.answer.startswith("Resolved") and temporal.scan_id == "valid_12_c_1"
    diameter, size = by_subtype["medical computation diameter"], by_subtype["medical computation size"]
    assert (diameter.answer, diameter.value, diameter.unit) == ("2.5 cm", 2.5, "cm")
    assert (size.value, size.unit, size.scan_id, size.split) == (None, "", "train_2_a_2", "train")


def test_the_type_decides_not_the_task_or_folder(tmp_path: Path, made: Any, read: Any) -> None:
    row = made.rad_open(4, 1, "train_1_a_1.nii.gz", "Which findings?", "Yes")
    made.write_csv(tmp_path / "renamed/task4/x.csv", made.RAD_HEADER, [row])
    ((draft,), _) = read("3d-rad", tmp_path)
    assert draft.kind == "text" and draft.options == ()


def test_bad_rows_are_refused_one_by_one(tmp_path: Path, made: Any, read: Any) -> None:
    good = made.rad_yes_no(1, "train_1_a_1.nii.gz", "Is there a nodule?", "No")
    rows = [
        good,
        [*good[:2], "train_1.nii.gz", *good[3:]],
        [*good[:5], "Maybe", *good[6:]],
        [*good[:6], "A", *good[7:]],
        [*good[:6], "E", *good[7:]],
        ["7", *good[1:]],
        [*good[:2], "train_2_a_1.nii.gz", *good[3:]],
    ]
    made.write_csv(tmp_path / "x.csv", made.RAD_HEADER, rows)
    drafts, refusals = read("3d-rad", tmp_path)
    assert [draft.scan_id for draft in drafts] == ["train_1_a_1", "train_2_a_1"]
    assert [refusal.place.row for refusal in refusals] == [3, 4, 5, 6, 7]
    assert len({refusal.reason for refusal in refusals}) == 4


def test_open_questions_may_have_several_answers_and_closed_ones_may_not(tmp_path: Path, made: Any, read: Any) -> None:
    rows = [made.rad_open(1, 1, "train_1_a_1.nii.gz", "What is seen?", answer) for answer in ("rib", "heart", "rib")]
    rows += [made.rad_yes_no(1, "train_1_a_1.nii.gz", "Is there a nodule?", answer) for answer in ("Yes", "No")]
    made.write_csv(tmp_path / "x.csv", made.RAD_HEADER, rows)
    assembled = assemble("3d-rad", read("3d-rad", tmp_path)[0], SplitRule())
    assert sorted(question.answer for question in assembled.questions) == ["heart", "rib"]
    assert len(assembled.refusals) == 3


def test_the_leak_of_task_6_is_told(tmp_path: Path, made: Any, read: Any) -> None:
    histories = {"A": [0, 1], "B": [1, 0], "C": [0, 0], "D": [0, 0]}
    rows = [
        made.rad_temporal(6, 2, f"test_{number}_c_1.nii.gz", made.history(values), letter)
        for number, (letter, values) in enumerate(histories.items(), start=1)
    ]
    made.write_csv(tmp_path / "c.csv", made.RAD_HEADER, rows)
    leaks = find_leaks(assemble("3d-rad", read("3d-rad", tmp_path)[0], SplitRule()).questions, {})
    values = {row["check"]: row["value"] for row in leaks.to_dicts()}
    assert values["history gives the answer"] == 0.75  # all but the new lesion, which no history shows
    assert values["history halves the choices"] == 1.0


def test_another_folder(tmp_path: Path, read: Any) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    with pytest.raises(PhotonError, match="DATASET_UNREADABLE"):
        read("3d-rad", tmp_path)
    with pytest.raises(PhotonError, match="INPUT_MISSING"):
        read("3d-rad", tmp_path / "none")
