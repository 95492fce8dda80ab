"""Inputs that look right and are not: names that scans share, masks named as scans, values no file can hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipelines.datasets.base import HELD_OUT, ImportOptions, Refusal, ScanFile
from pipelines.datasets.catalogue import DATASETS
from pipelines.datasets.importing import import_dataset
from pipelines.datasets.placing import place_scans
from pipelines.datasets.splits import split_in_name
from pipelines.questions import Question, read_questions
from pipelines.scans.nifti import write_scan


def write_chat(path: Path, *rows: tuple[str, str, str]) -> None:
    """Write conversations of question, answer and path of the scan."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        for asked, answer, video in rows:
            said = [{"role": "user", "content": f"<video> {asked}"}, {"role": "assistant", "content": answer}]
            stream.write(json.dumps({"messages": said, "videos": [video]}) + "\n")


def write_values(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_scan(np.arange(216, dtype=np.int16).reshape(6, 6, 6) + value, np.diag([-1.0, -1.0, 1.0, 1.0]), path)


def chat(tmp_path: Path) -> tuple[dict[str, Question], dict[str, int], dict[str, str]]:
    """Import; questions by their text, refusals by reason, files below the input by scan id."""
    record = import_dataset("chat", tmp_path / "in", tmp_path / "out", num_workers=1)
    table = pl.read_parquet(tmp_path / "out" / "import" / "chat" / "scans.parquet")
    sources = {row["scan_id"]: Path(row["source"]).relative_to(tmp_path / "in").as_posix() for row in table.to_dicts()}
    questions = read_questions(tmp_path / "out" / "questions.jsonl")
    return {question.question: question for question in questions}, record.refused_by_reason, sources


def test_scans_of_one_name_in_several_folders_stay_apart(tmp_path: Path) -> None:
    for number in (1, 2):
        write_values(tmp_path / "in" / f"P{number}" / "CT_image.nii.gz", number)
    write_chat(
        tmp_path / "in" / "train.jsonl",
        ("One?", "a", "P1/CT_image.nii.gz"),
        ("Two?", "b", "/elsewhere/P2/CT_image.nii.gz"),
        ("Two again?", "c", "P2/CT_image.nii.gz"),
        ("Which?", "d", "CT_image.nii.gz"),
    )
    questions, refused, sources = chat(tmp_path)
    assert {text: (q.scan_id, q.patient_id) for text, q in questions.items()} == {
        "One?": ("P1_CT_image", "P1"),
        "Two?": ("P2_CT_image", "P2"),
        "Two again?": ("P2_CT_image", "P2"),
    }
    assert refused == {"two scans have the path": 1}
    assert sources == {"P1_CT_image": "P1/CT_image.nii.gz", "P2_CT_image": "P2/CT_image.nii.gz"}


def test_folders_that_do_not_tell_scans_apart_are_refused(tmp_path: Path, read: Any) -> None:
    write_chat(tmp_path / "train.jsonl", ("One?", "a", "a/P1/CT.nii.gz"), ("Two?", "b", "b/P1/CT.nii.gz"))
    drafts, refusals = read("chat", tmp_path)
    assert not drafts and [refusal.reason for refusal in refusals] == ["two scans have the path"] * 2


@pytest.mark.parametrize(
    ("asked", "answer", "video", "reason"),
    [
        ("How \ud800?", "b", "x.nii.gz", "a text is no Unicode"),
        ("How?", "b", "x\ud800.nii.gz", "a text is no Unicode"),
        ("How?", "b", "x\0y.nii.gz", "the scan's name cannot be that of a file"),
        ("How?", "b", "P1/.nii.gz", "it is about no scan"),
        ("How?", "b", "/", "it is about no scan"),
        ("How?", "b", "../ct.nii.gz", "the scan's name cannot be that of a file"),
        ("How?", "b", "x" * 300 + ".nii.gz", "the path of its scan is too long"),
    ],
)
def test_what_cannot_be_written_is_refused_alone(
    tmp_path: Path, asked: str, answer: str, video: str, reason: str
) -> None:
    write_chat(tmp_path / "in" / "train.jsonl", (asked, answer, video), ("Good?", "yes", "good.nii.gz"))
    questions, refused, _ = chat(tmp_path)
    assert list(questions) == ["Good?"] and refused == {reason: 1}


def test_names_of_files_that_are_no_unicode_are_written_otherwise(tmp_path: Path) -> None:
    folder = Path(f"{tmp_path}/in/tr\udcff")
    write_chat(folder / "train.jsonl", ("Good?", "yes", "x.nii.gz"), ("Empty?", "", "x.nii.gz"))
    write_values(folder / "x.nii.gz", 0)
    questions, refused, sources = chat(tmp_path)
    assert list(questions) == ["Good?"] and refused == {"there is no answer": 1}
    assert sources == {"x": "tr\\udcff/x.nii.gz"}


@pytest.mark.parametrize(
    "first", ["oops", '{"note": 1}', '{"videos": ["x.nii.gz"]}', '{"messages": 3, "videos": ["x.nii"]}']
)
def test_a_first_row_that_is_damaged_does_not_hide_its_file(tmp_path: Path, first: str) -> None:
    write_chat(tmp_path / "in" / "train.jsonl", ("Good?", "yes", "x.nii.gz"))
    path = tmp_path / "in" / "train.jsonl"
    path.write_text(f"{first}\n{path.read_text()}")
    questions, refused, _ = chat(tmp_path)
    assert list(questions) == ["Good?"] and sum(refused.values()) == 1


def test_a_number_without_bounds_is_a_text(tmp_path: Path) -> None:
    write_chat(tmp_path / "in" / "train.jsonl", ("How many?", "1e999", "x.nii.gz"))
    assert chat(tmp_path)[0]["How many?"].kind == "text"


def test_a_row_in_two_splits_stays_in_the_one_held_out(tmp_path: Path) -> None:
    write_chat(tmp_path / "in" / "train.jsonl", ("Both?", "yes", "x.nii.gz"), ("Train?", "no", "y.nii.gz"))
    write_chat(tmp_path / "in" / "test.jsonl", ("Both?", "yes", "x.nii.gz"))
    questions, refused, _ = chat(tmp_path)
    assert questions["Both?"].split == "test" and refused == {HELD_OUT: 1}


@pytest.mark.parametrize(
    ("stem", "split"),
    [
        ("train", "train"),
        ("my-train2", "train"),
        ("M3D_VQA_test5k", "test"),
        ("valid_split", "val"),
        ("validation", "val"),
        ("evaluation", "val"),
        ("eval", "val"),
        ("latest", ""),
        ("interval_values", ""),
        ("constrained", ""),
    ],
)
def test_a_split_is_a_word_of_a_file_s_name(stem: str, split: str) -> None:
    assert split_in_name(stem) == split


def test_masks_named_as_their_scans_are_no_scans(tmp_path: Path) -> None:
    name = "train_1_a_1.nii.gz"
    write_values(tmp_path / "dataset" / "train_fixed" / name, 0)
    write_values(tmp_path / "dataset" / "ts_seg" / "train_fixed" / name, 1)
    (found,) = DATASETS["ct-rate"].scan_files(tmp_path, frozenset({"train_1_a_1"}), ImportOptions())
    assert isinstance(found, ScanFile) and found.path == tmp_path / "dataset" / "train_fixed" / name


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (("annotations/BDMAP_00000001.nii.gz",), "images/BDMAP_00000001.nii.gz"),
        (("a/BDMAP_00000001/ct.nii.gz",), "a/BDMAP_00000001/ct.nii.gz"),
        (("derived/BDMAP_00000001.nii.gz",), ""),
    ],
)
def test_one_of_several_files_of_a_name_is_the_scan(tmp_path: Path, others: tuple[str, ...], expected: str) -> None:
    write_values(tmp_path / "images" / "BDMAP_00000001.nii.gz", 0)
    for other in others:
        (tmp_path / other).parent.mkdir(parents=True)
        write_scan(np.ones((9, 9, 9), np.int16), np.eye(4), tmp_path / other)
    (found,) = DATASETS["abdomenatlas"].scan_files(tmp_path, frozenset({"BDMAP_00000001"}), ImportOptions())
    if expected:
        assert isinstance(found, ScanFile) and found.path == tmp_path / expected
    else:
        assert isinstance(found, Refusal) and found.reason == "two files have the scan's name"


def test_a_copy_in_other_axes_and_numbers_is_the_same_image(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(-1000, 1000, (6, 7, 8)).astype(np.int16)
    affine, flipped = np.diag([1.0, 1.0, 2.0, 1.0]), np.diag([-1.0, 1.0, 2.0, 1.0])
    flipped[0, 3] = 5.0
    write_scan(values, affine, tmp_path / "a.nii")
    write_scan(values[::-1].astype(np.float32), flipped, tmp_path / "b.nii")
    write_scan(values.transpose(2, 0, 1), affine[:, [2, 0, 1, 3]], tmp_path / "c.nii.gz")
    write_scan(values[::-1], affine, tmp_path / "mirrored.nii")
    scans = [ScanFile(scan_id=path.name.split(".")[0], path=path) for path in sorted(tmp_path.glob("*.nii*"))]
    table = place_scans(scans, tmp_path / "images", tmp_path / "scans.parquet", "link", num_workers=1)
    checksums = dict(table.select("scan_id", "voxels_sha256").iter_rows())
    assert checksums["a"] == checksums["b"] == checksums["c"] != checksums["mirrored"]


@pytest.mark.parametrize("value", ["1e300", "1" + "0" * 400, "[" * 3000, "NaN", "[1, 2]"])
@pytest.mark.parametrize("column", ["RescaleSlope", "ImagePositionPatient"])
def test_metadata_that_no_header_can_hold_is_refused(tmp_path: Path, made: Any, column: str, value: str) -> None:
    name, shape = "valid_1_a_1", (6, 6, 6)
    write_values(tmp_path / "dataset" / f"{name}.nii.gz", 0)
    row = made.metadata_row(f"{name}.nii.gz", shape, **{column: value})
    made.write_csv(tmp_path / "valid_metadata.csv", made.METADATA_HEADER, [row])
    (found,) = DATASETS["ct-rate"].scan_files(tmp_path, frozenset({name}), ImportOptions())
    assert isinstance(found, Refusal) and found.reason == "a value in the metadata table is no number"


def test_values_and_options_of_deeptumorvqa_are_taken_literally(tmp_path: Path, read: Any) -> None:
    row = {
        "image_id": "BDMAP_00000001",
        "question": "Q?",
        "question_type": "recognition",
        "question_subtype": "liver lesion existence",
        "multiple_choice_question": "Q? A: no B: yes C: cyst",
    }
    given = [("yes", "(b)"), ("yes", "B: yes"), (float("nan"), "Cyst"), ("no", "Answer B")]
    rows = [
        row | {"question_id": 1, "question": f"Q{number}?", "answer": answer, "correct_option": option}
        for number, (answer, option) in enumerate(given)
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    drafts, refusals = read("deeptumorvqa-v1", tmp_path)
    assert [draft.answer for draft in drafts] == ["yes", "yes", "no"] and len(refusals) == 1
    assert len({draft.identity for draft in drafts}) == 3  # the same number in two tables is not the same question
    drafts, refusals = read("deeptumorvqa-v1", tmp_path, form="choice")
    assert [draft.answer for draft in drafts] == ["B", "B"]
    assert [refusal.reason for refusal in refusals] == ["the correct option is no letter"] * 2
