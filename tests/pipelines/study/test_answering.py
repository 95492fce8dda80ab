"""What a checkpoint answers, and from which tokens, in every condition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from photon.errors import PhotonError
from pipelines.dataset import read_split
from pipelines.predict import TorchAnswerer
from pipelines.questions import read_questions
from pipelines.study.answer_table import CONDITIONS, STUDY_SCHEMA, TRAINED, read_study_answers, write_study_answers
from pipelines.study.answering import StudyAnswerer
from pipelines.study.region_table import read_regions, write_regions
from pipelines.study.what_if import answer_split, donors, other_wordings


@pytest.fixture(scope="module")
def regions(smoke_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("regions") / "regions.parquet"
    write_regions(smoke_data, target, split="test")
    return target


@pytest.fixture(scope="module")
def table(smoke_data: Path, trained: Path, regions: Path, tmp_path_factory: pytest.TempPathFactory) -> pl.DataFrame:
    """Everything a model of two depth slabs, twelve tokens, says about the test patients."""
    target = tmp_path_factory.mktemp("study") / "answers.parquet"
    checkpoint = trained / "checkpoint"
    made = answer_split(
        checkpoint, smoke_data, target, regions=regions, variant="photon", seed=3, conditions=CONDITIONS[1:]
    )
    assert made.equals(read_study_answers(target))
    return made


def test_every_question_is_answered_as_the_model_was_trained_to(
    table: pl.DataFrame, smoke_data: Path, trained: Path
) -> None:
    """Closed questions and others, against the answerer that `photon evaluate` uses."""
    own = table.filter(condition=TRAINED)
    assert own["question_id"].n_unique() == len(own)
    assert sorted(own["question_id"]) == sorted(
        q.question_id for q in read_questions(smoke_data / "questions.jsonl") if q.split == "test"
    )
    said = {}
    other = TorchAnswerer(trained / "checkpoint", closed_by="likelihood")
    for scan in read_split(smoke_data, "test"):
        said |= {answer.question_id: answer for answer in other.answer(scan.volume, scan.questions)}
    for row in own.iter_rows(named=True):
        answer = said[row["question_id"]]
        assert row["predicted"] == answer.text
        assert row["confidence"] == pytest.approx(answer.confidence, abs=1e-6)
        assert tuple(row["kept"]) == answer.kept and row["num_kept"] == len(answer.kept)
        assert row["num_tokens"] == answer.num_tokens
    closed = own.filter(kind="closed")
    right = closed.filter(pl.col("gold") == pl.col("predicted"))
    assert right["gold_probability"].to_list() == pytest.approx(right["confidence"].to_list())
    assert (closed["gold_probability"] <= closed["confidence"] + 1e-9).all()
    assert own.filter(pl.col("kind") != "closed")["gold_probability"].null_count() == len(own) - len(closed)


def test_conditions_use_the_tokens_they_say(table: pl.DataFrame, regions: Path) -> None:
    known = read_regions(regions)
    place = dict(zip(known["question_id"].to_list(), known["place"].to_list(), strict=True))
    by = {name: {row["question_id"]: row for row in table.filter(condition=name).to_dicts()} for name in CONDITIONS}
    own = by[TRAINED]
    assert all(by[name].keys() == own.keys() for name in ("all tokens", "removed", "none", "random"))
    donors_found = 0
    for question_id, row in own.items():
        kept, everything = set(row["kept"]), set(range(row["num_tokens"]))
        assert set(by["all tokens"][question_id]["kept"]) == everything
        assert set(by["removed"][question_id]["kept"]) == everything - kept
        assert by["none"][question_id]["kept"] == []
        assert by["random"][question_id]["num_kept"] == len(kept)
        if swapped := by["swapped"].get(question_id):
            donors_found += 1
            given = [
                other
                for other in own.values()
                if other["scan_id"] == row["scan_id"]
                and other["kept"] == swapped["kept"]
                and not set(place[other["question_id"]]) & set(place[question_id])
            ]
            assert given, "the tokens are those of a question about another place in the same scan"
    assert donors_found > len(own) / 2
    assert any(by["random"][key]["kept"] != row["kept"] for key, row in own.items())


def test_counterfactual_answers_are_those_of_these_tokens(smoke_data: Path, trained: Path) -> None:
    """All tokens by flag, and by keep flags that leave none out, are one; without any token it is another answer."""
    answerer = StudyAnswerer(trained / "checkpoint")
    first = read_split(smoke_data, "test")[0]
    questions = [question for question in first.questions if question.kind == "closed"]
    scan, _ = answerer.encode(first.volume)
    number = answerer.ask(scan, questions[:1])[0].keep
    assert number is not None
    everything = torch.ones(len(questions), number.numel(), dtype=torch.bool)
    by_flag, by_keep = answerer.ask(scan, questions, keep_all=True), answerer.ask(scan, questions, keep=everything)
    for one, two in zip(by_flag, by_keep, strict=True):
        assert one.confidence == pytest.approx(two.confidence, abs=1e-5) and one.text == two.text
    nothing = answerer.ask(scan, questions, keep=~everything)
    assert all(said.keep is not None and not said.keep.any() for said in nothing)
    assert any(abs(one.confidence - two.confidence) > 1e-4 for one, two in zip(by_flag, nothing, strict=True))


def test_questions_together_and_alone_are_one(smoke_data: Path, trained: Path) -> None:
    scan_of = read_split(smoke_data, "test")[0]
    together = StudyAnswerer(trained / "checkpoint").ask
    alone = StudyAnswerer(trained / "checkpoint", max_branches=1)
    answerer = StudyAnswerer(trained / "checkpoint")
    scan, _ = answerer.encode(scan_of.volume)
    for one, two in zip(together(scan, scan_of.questions), alone.ask(scan, scan_of.questions), strict=True):
        assert one.text == two.text and one.confidence == pytest.approx(two.confidence, abs=1e-5)
        assert one.keep is not None and two.keep is not None and torch.equal(one.keep, two.keep)


def test_a_model_of_the_text_alone(smoke_data: Path, trained: Path, regions: Path, tmp_path: Path) -> None:
    made = answer_split(
        trained / "blind",
        smoke_data,
        tmp_path / "blind.parquet",
        regions=regions,
        variant="blind",
        seed=0,
        conditions=CONDITIONS[1:],
        has_volume=False,
        max_scans=2,
    )
    assert made["scan_id"].n_unique() == 2
    assert set(made["condition"]) == {TRAINED} and set(made["num_kept"]) == {0}
    assert made["kept"].null_count() == len(made)


def test_other_wordings_ask_the_same(smoke_data: Path) -> None:
    questions = read_questions(smoke_data / "questions.jsonl")
    by_id = {question.question_id: question for question in questions}
    found = other_wordings(questions)
    assert len(found) > len(questions) / 2
    for question_id, text in found.items():
        mine = by_id[question_id]
        name = question_id.removeprefix(mine.scan_id)
        assert text != mine.question
        same = [q for q in questions if q.question == text and q.question_id.removeprefix(q.scan_id) == name]
        assert same, "another scan is asked so"


def test_donors_repeat_and_are_elsewhere() -> None:
    ids = [f"scan.{number}" for number in range(9)]
    is_elsewhere = np.arange(9)[:, None] // 3 != np.arange(9) // 3
    chosen = donors(ids, is_elsewhere)
    assert chosen == donors(ids, is_elsewhere)
    assert all(donor is not None and is_elsewhere[place, donor] for place, donor in enumerate(chosen))
    assert len(set(chosen)) > 3
    assert donors(ids[:1], np.zeros((1, 1), dtype=bool)) == [None]


def test_tables_are_checked_when_read(tmp_path: Path) -> None:
    write_study_answers([], tmp_path / "empty.parquet")
    assert read_study_answers(tmp_path / "empty.parquet").schema == pl.Schema(STUDY_SCHEMA)
    pl.DataFrame({"variant": [1]}).write_parquet(tmp_path / "other.parquet")
    (tmp_path / "text.parquet").write_text("no")
    for name in ("other", "text", "missing"):
        with pytest.raises(PhotonError) as caught:
            read_study_answers(tmp_path / f"{name}.parquet")
        assert caught.value.code == "TABLE_UNREADABLE"
