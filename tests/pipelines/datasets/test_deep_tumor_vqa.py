"""DeepTumorVQA: two versions, spellings of columns, numbers, yes and no, categories, and multiple choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.datasets.base import assemble
from pipelines.datasets.splits import SplitRule

V1 = [
    "question_id",
    "image_id",
    "spacing",
    "shape",
    "sex",
    "age",
    "scanner",
    "contrast",
    "question",
    "answer",
    "multiple_choice_question",
    "correct_option",
    "organ",
    "lesion",
    "question_type",
    "question_subtype",
    "split",
]


def v1_row(number: int, **changed: Any) -> list[Any]:
    row = dict.fromkeys(V1, "") | {
        "question_id": number,
        "image_id": f"BDMAP_{number:08d}",
        "spacing": "[0.8222656 0.8222656 2.5 ]",
        "shape": "(512, 512, 339)",
        "sex": "F",
        "age": 61.0,
        "question": "What is the volume of the liver?",
        "answer": "1520.4 cm^3",
        "multiple_choice_question": "What is the volume of the liver? A: 800 cm^3 B: 1520.4 cm^3 C: 3000 cm^3",
        "correct_option": "B",
        "organ": "liver",
        "question_type": "measurement",
        "question_subtype": "organ_volume_measurement",
        "split": "train",
    }
    return list((row | changed).values())


EXISTENCE = {
    "question": "Is there a liver lesion?",
    "answer": "Yes",
    "multiple_choice_question": "Is there a liver lesion? A: Yes B: No",
    "correct_option": "A",
    "question_type": "recognition",
    "question_subtype": "liver lesion existence",
}
LOCATION = {
    "question": "Where is the largest lesion?",
    "answer": "Segment V",
    "multiple_choice_question": "Where is the largest lesion? A: Segment II B: Segment V C: Segment VIII D: none",
    "question_type": "visual reasoning",
    "question_subtype": "largest_lesion_location",
}


@pytest.fixture
def folder(tmp_path: Path, made: Any) -> Path:
    rows = [
        v1_row(1),
        v1_row(2, split="validation", **EXISTENCE),
        v1_row(3, **LOCATION),
        v1_row(4, answer="none", **{"organ": "nan"}),
        v1_row(5, image_id="x5"),
        v1_row(6, question_type="guessing"),
    ]
    return Path(made.write_csv(tmp_path / "v1/v1.csv", V1, rows)).parent


def test_kinds_of_answers(folder: Path, read: Any) -> None:
    drafts, refusals = read("deeptumorvqa-v1", folder)
    assembled = assemble("deeptumorvqa-v1", [*drafts, *refusals], SplitRule(val_percent=0))
    number, closed, category = sorted(assembled.questions, key=lambda q: q.scan_id)
    assert (number.kind, number.value, number.unit, number.answer) == ("number", 1520.4, "cm^3", "1520.4 cm^3")
    assert (number.subtype, number.family, number.organ) == ("organ volume measurement", "measurement", "liver")
    assert (closed.kind, closed.options, closed.answer, closed.split) == ("closed", ("Yes", "No"), "Yes", "test")
    assert (category.kind, category.options) == ("closed", ("Segment II", "Segment V", "Segment VIII", "none"))
    assert category.split == "train" and category.patient_id == "BDMAP_00000003"
    assert [(refusal.place.row, refusal.reason) for refusal in assembled.refusals] == [
        (5, "the answer is no number"),
        (6, "the image id is not one of AbdomenAtlas"),
        (7, "it is no question"),
    ]
    assert "61" not in json.dumps([question.as_dict() for question in assembled.questions])


def test_multiple_choice(folder: Path, read: Any) -> None:
    drafts, _ = read("deeptumorvqa-v1", folder, form="choice")
    first = next(draft for draft in drafts if draft.scan_id.endswith("1"))
    assert (first.kind, first.options, first.answer) == ("closed", ("A", "B", "C"), "B")
    assert first.question.endswith("A: 800 cm^3 B: 1520.4 cm^3 C: 3000 cm^3")
    free = next(draft for draft in read("deeptumorvqa-v1", folder)[0] if draft.scan_id.endswith("1"))
    assert free.identity != first.identity


def test_spellings_of_columns_give_the_same_questions(folder: Path, tmp_path: Path, made: Any, read: Any) -> None:
    header = [name.replace("_", " ").title().replace("Image Id", "Image ID") for name in V1]
    text = (folder / "v1.csv").read_text()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/v1.csv").write_text(text.replace(",".join(V1), ",".join(header)))
    assert read("deeptumorvqa-v1", tmp_path / "other")[0] == read("deeptumorvqa-v1", folder)[0]


def test_the_split_may_be_in_the_file_s_name(tmp_path: Path, made: Any, read: Any) -> None:
    keys = {"question type": "recognition", "question subtype": "kidney_cyst existence", "image_id": "BDMAP_00000001"}
    row = {"question": "Is there a cyst?", "answer": "no"} | keys
    made.write_jsonl(tmp_path / "val_free_text.jsonl", [row])
    made.write_jsonl(tmp_path / "unnamed.jsonl", [row])
    for version, split in ((1, "test"), (2, "val")):
        drafts, refusals = read(f"deeptumorvqa-v{version}", tmp_path)
        assert [draft.split for draft in drafts] == [split]
        assert [refusal.place.file for refusal in refusals] == ["unnamed.jsonl"]
        assert drafts[0].subtype == "kidney cyst existence"


def test_version_2(tmp_path: Path, made: Any, read: Any) -> None:
    record = {
        "qid": "q1",
        "image_id": "BDMAP_00000009",
        "spacing": "[1 1 1]",
        "shape": "(9, 9, 9)",
        "sex": None,
        "age": None,
        "question": "What share of the liver is tumor?",
        "answer": 12.5,
        "mc_question": "What share of the liver is tumor? A: 12.5 B: 50",
        "correct_option": "A",
        "organ": "liver",
        "lesion": "tumor",
        "question_type": "measurement",
        "question_subtype": "tumor burden percentage",
        "requires_tools": ["segmentation"],
    }
    (tmp_path / "benchmark").mkdir()
    whole = {"version": "2.0", "num_questions": 1, "question_types": ["measurement"], "questions": [record]}
    (tmp_path / "benchmark/test_qa.json").write_text(json.dumps(whole, indent=1))
    header = [key for key in record if key != "requires_tools"]
    row = [str(record[key] or "") for key in header]
    made.write_csv(tmp_path / "train/train_qa.csv", header, [["q2", *row[1:]]])
    made.write_csv(tmp_path / "train/val_qa_pool.csv", header, [["q3", *row[1:]]])
    made.write_csv(tmp_path / "metadata/subtype_schema.csv", ["question_subtype", "type"], [["a", "b"]])
    for is_twice in (False, True):
        drafts, refusals = read("deeptumorvqa-v2", tmp_path)
        assert sorted(draft.split for draft in drafts) == ["test", "train", "val"] and not refusals
        assert {draft.value for draft in drafts} == {12.5} and {draft.kind for draft in drafts} == {"number"}
        if not is_twice:  # the same questions as lines do not double them
            made.write_jsonl(tmp_path / "benchmark/test_qa.jsonl", [record])


def test_two_ids_of_one_origin_are_one_patient(folder: Path, made: Any, read: Any) -> None:
    rows = [["LiTS_7", "BDMAP_00000001"], ["LiTS_7", "BDMAP_00000003"], ["MSD_1", "BDMAP_00000002"]]
    made.write_csv(folder / "AbdomenAtlas_ID_mapping.csv", ["original id", "AbdomenAtlas_id"], rows)
    patients = {draft.scan_id: draft.patient_id for draft in read("deeptumorvqa-v1", folder)[0]}
    assert patients["BDMAP_00000001"] == patients["BDMAP_00000003"] == "BDMAP_00000001"
    assert patients["BDMAP_00000002"] == "BDMAP_00000002"
