"""Conversations in the public Photon's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from photon.errors import PhotonError
from pipelines.datasets.base import ImportOptions, Refusal, ScanFile
from pipelines.datasets.catalogue import DATASETS


def sample(question: str, answer: str, videos: Any = ("/scans/train_1_a_1.nii.gz",), **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "videos": list(videos) if isinstance(videos, tuple) else videos, **more}


@pytest.mark.parametrize("is_list", [False, True])
def test_lists_lines_and_aliases(tmp_path: Path, made: Any, read: Any, is_list: bool) -> None:
    rows = [
        sample("<video> Is there a nodule?", "Yes"),
        sample("<video>\nIs there a nodule?", "No", "/scans/valid_2_a_1.nii.gz"),
        {"messages": sample("<video>How many?", "3")["messages"], "video": "BDMAP_00000001/ct.nii.gz"},
        sample("Look: <video> What is wrong?", "A large mass.", ("other/mine.nii.gz",)),
        sample("<video> Which? A: left B: right", "B"),
        sample("<video> Which? A. left B. right", "right"),
    ]
    if is_list:
        (tmp_path / "train.json").write_text(json.dumps(rows))
    else:
        made.write_jsonl(tmp_path / "train.jsonl", rows)
    drafts, refusals = read("chat", tmp_path)
    assert not refusals and {draft.split for draft in drafts} == {"train"}
    assert [(draft.scan_id, draft.patient_id) for draft in drafts[:4]] == [
        ("train_1_a_1", "train_1"),
        ("valid_2_a_1", "valid_2"),
        ("BDMAP_00000001", "BDMAP_00000001"),
        ("mine", "mine"),
    ]
    assert [(draft.kind, draft.options) for draft in drafts] == [
        ("closed", ("Yes", "No")),
        ("closed", ("Yes", "No")),
        ("number", ()),
        ("text", ()),
        ("closed", ("A", "B")),
        ("closed", ("left", "right")),
    ]
    assert [draft.question for draft in drafts[:4]] == [
        "Is there a nodule?",
        "Is there a nodule?",
        "How many?",
        "Look: What is wrong?",
    ]


def test_what_cannot_be_one_question_is_refused(tmp_path: Path, made: Any, read: Any) -> None:
    good = sample("<video> Is there a nodule?", "yes")
    turns = good["messages"]
    rows = [
        good | {"videos": []},
        good | {"videos": ["a.nii", "b.nii"]},
        good | {"videos": [3]},
        good | {"messages": turns * 2},
        good | {"messages": turns[::-1]},
        good | {"messages": "hello"},
        sample("<video><video> Compare.", "same"),
        good | {"messages": [{"role": "system", "content": "Be brief."}, *turns]},
        good | {"messages": [turns[0], {"role": "assistant", "content": None}]},
    ]
    made.write_jsonl(tmp_path / "data.jsonl", rows)
    (draft,), refusals = read("chat", tmp_path)
    assert draft.question == "Is there a nodule?" and draft.split == "" and draft.place.row == 8
    assert [refusal.place.row for refusal in refusals] == [1, 2, 3, 4, 5, 6, 7, 9]


def test_keys_that_the_public_format_drops_are_used(tmp_path: Path, made: Any, read: Any) -> None:
    more = {"question type": "Visual Reasoning", "question_subtype": "lesion_counting", "id": 7}
    made.write_jsonl(tmp_path / "test.jsonl", [sample("<video> How many?", "2", **more)])
    ((draft,), _) = read("chat", tmp_path)
    assert (draft.family, draft.subtype, draft.identity[0]) == ("visual reasoning", "lesion counting", "7")


def test_scans_are_found_by_path_or_by_name(tmp_path: Path, made: Any) -> None:
    folder, images = tmp_path / "q", tmp_path / "i"
    for path in (folder / "near.nii.gz", images / "deep/far.nii.gz", images / "a/two.nii", images / "b/two.nii"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = ("near.nii.gz", "/gone/far.nii.gz", "/gone/two.nii", "/gone/none.nii")
    made.write_jsonl(folder / "train.jsonl", [sample("<video> ?", "yes", (name,)) for name in names])
    wanted = frozenset({"near", "far", "two", "none"})
    found = list(DATASETS["chat"].scan_files(folder, wanted, ImportOptions(images=images)))
    assert [scan.path for scan in found if isinstance(scan, ScanFile)] == [
        images / "deep/far.nii.gz",
        folder / "near.nii.gz",
    ]
    assert [scan.detail for scan in found if isinstance(scan, Refusal)] == ["two"]


def test_other_json_is_no_conversation(tmp_path: Path, read: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PhotonError, match="DATASET_UNREADABLE"):
        read("chat", tmp_path)
