"""Ids, repeated and contradicting rows, and splits by patient."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any

import pytest

from photon.errors import PhotonError
from pipelines.datasets.base import CONTRADICTED, REPEATED, Draft, Place, Refusal, assemble, stable_id
from pipelines.datasets.splits import SplitRule

RULE = SplitRule()


def draft(number: int, row: int = 1, **changed: Any) -> Draft:
    fields: dict[str, Any] = {
        "place": Place(file="t.csv", row=row),
        "identity": (str(number),),
        "scan_id": f"s{number}",
        "patient_id": f"p{number // 3}",
        "split": "train",
        "family": "recognition",
        "subtype": "nodule existence",
        "kind": "closed",
        "question": "Is there a nodule?",
        "options": ("yes", "no"),
        "answer": "yes",
    }
    return Draft(**fields | changed)


def test_the_order_and_place_of_rows_do_not_matter() -> None:
    rows = [draft(number, row=number) for number in range(40)]
    first = assemble("d", rows, RULE)
    moved = [dataclasses.replace(row, place=Place(file="t.csv", row=row.place.row + 7)) for row in rows]
    random.Random(1).shuffle(moved)
    assert assemble("d", moved, RULE).questions == first.questions
    assert len({question.question_id for question in first.questions}) == 40
    assert first.questions == sorted(first.questions, key=lambda q: (q.scan_id, q.question_id))


def test_ids_name_dataset_and_row_and_do_not_change() -> None:
    assert stable_id("3d-rad", ("4", "1", "é")) == "3d-rad.d0457fa50e92edec"
    assert stable_id("a", ("b", "c")) != stable_id("a", ("bc",))
    assert stable_id("a", ("b",)) != stable_id("b", ("b",))


def test_repeated_rows_are_told_and_contradictions_leave_none() -> None:
    rows = [draft(1, 1), draft(1, 2), draft(2, 3), draft(2, 4, answer="no"), draft(2, 5), draft(3, 6)]
    for order in (rows, rows[::-1]):
        assembled = assemble("d", order, RULE)
        assert [question.scan_id for question in assembled.questions] == ["s1", "s3"]
        counts = Counter(refusal.reason for refusal in assembled.refusals)
        assert counts == {REPEATED: 2, CONTRADICTED: 2}
        assert len(assembled.refusals) + len(assembled.questions) == len(rows)


@pytest.mark.parametrize(
    "changed",
    [
        {"answer": ""},
        {"answer": "maybe"},
        {"options": ("yes", "yes")},
        {"options": ("yes",)},
        {"kind": "number", "options": ()},
        {"family": "guessing"},
        {"question": ""},
    ],
)
def test_what_is_no_question_is_refused_alone(changed: dict[str, Any]) -> None:
    assembled = assemble("d", [draft(1), draft(2, 2, **changed), draft(3)], RULE)
    assert [question.scan_id for question in assembled.questions] == ["s1", "s3"]
    assert [refusal.place.row for refusal in assembled.refusals] == [2]


def test_refusals_of_the_reader_are_kept() -> None:
    refusal = Refusal(place=Place(file="a", row=3), reason="r")
    assert assemble("d", [refusal, draft(1)], RULE).refusals == [refusal]


def test_val_is_carved_out_of_train_by_patient() -> None:
    rows = [draft(number, number) for number in range(3000)]
    rows += [draft(number, number, split="test", patient_id=f"t{number}") for number in range(3000, 3100)]
    questions = assemble("d", rows, RULE).questions
    splits: dict[str, set[str]] = {}
    for question in questions:
        splits.setdefault(question.patient_id, set()).add(question.split)
    assert all(len(found) == 1 for found in splits.values())
    counts = Counter(next(iter(found)) for found in splits.values())
    assert counts["test"] == 100 and 70 <= counts["val"] <= 130
    others = assemble("another", rows, RULE).questions
    assert {q.patient_id: q.split for q in others} == {q.patient_id: q.split for q in questions}


def test_a_dataset_with_val_keeps_its_own_splits() -> None:
    rows = [draft(number, number) for number in range(300)] + [draft(300, split="val", patient_id="v")]
    counts = Counter(question.split for question in assemble("d", rows, RULE).questions)
    assert counts == {"train": 300, "val": 1}


def test_without_splits_patients_are_divided_three_ways() -> None:
    rows = [draft(number, number, split="") for number in range(3000)]
    counts = Counter(q.split for q in assemble("d", rows, SplitRule(val_percent=10, test_percent=30)).questions)
    assert 800 < counts["test"] < 1000 and 220 < counts["val"] < 380
    larger = assemble("d", rows, SplitRule(val_percent=10, test_percent=40)).questions
    moved = {q.question_id for q in larger if q.split == "test"}
    assert moved >= {q.question_id for q in assemble("d", rows, SplitRule()).questions if q.split == "test"}


def test_shares_that_leave_nothing() -> None:
    with pytest.raises(PhotonError, match="OPTION_UNKNOWN"):
        SplitRule(val_percent=60, test_percent=40)
