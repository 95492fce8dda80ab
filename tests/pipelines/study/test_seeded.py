"""Scores over seeds, against values by hand."""

from __future__ import annotations

import polars as pl
import pytest

from pipelines.study.seeded import averaged, seeded_difference, seeded_finding, seeded_mean, seeded_ratio

ROWS = pl.DataFrame(
    {
        "seed": [0, 0, 0, 1, 1, 1],
        "question_id": ["a", "b", "c"] * 2,
        "patient_id": ["p", "p", "q"] * 2,
        "score": [1.0, 0.0, 1.0, 0.0, 0.0, 1.0],
        "share": [0.5, 0.5, None, 0.1, 0.3, None],
    }
)


def test_seeds_are_averaged_for_every_question_first() -> None:
    assert averaged(ROWS, "score").rows() == [("a", "p", 0.5), ("b", "p", 0.0), ("c", "q", 1.0)]
    score = seeded_mean(ROWS)
    assert score["value"] == pytest.approx(0.5)
    assert score["by_seed"] == pytest.approx([2 / 3, 1 / 3])
    assert score["seed_sd"] == pytest.approx(abs(2 / 3 - 1 / 3) / 2**0.5)
    assert (score["num_questions"], score["num_patients"]) == (3, 2)
    assert score["low"] == pytest.approx(0.25)  # the patient p alone: (0.5 + 0) / 2
    assert score["high"] == pytest.approx(1.0)  # the patient q alone


def test_two_seeds_do_not_count_as_two_patients() -> None:
    """A second seed with the same answers changes nothing: the interval is one over patients."""
    one = ROWS.filter(seed=0)
    two = pl.concat([one, one.with_columns(seed=pl.lit(1, pl.Int64))])
    first, second = seeded_mean(one), seeded_mean(two)
    assert {**first, "by_seed": None} == {**second, "by_seed": None}
    assert first["seed_sd"] == 0.0


def test_questions_without_a_value_take_no_part() -> None:
    score = seeded_mean(ROWS, "share")
    assert score["value"] == pytest.approx((0.3 + 0.4) / 2)
    assert score["num_questions"] == 2


def test_ratio_is_of_the_means() -> None:
    rows = ROWS.drop_nulls().with_columns(other=pl.Series([1.0, 0.5, 0.2, 0.3]))
    ratio = seeded_ratio(rows, "share", "other", (0.0, 9.0))
    assert ratio["value"] == pytest.approx((0.3 + 0.4) / (0.6 + 0.4))
    assert ratio["by_seed"] == pytest.approx([1.0 / 1.5, 0.4 / 0.5])


def test_difference_pairs_questions_and_seeds() -> None:
    second = ROWS.with_columns(score=pl.Series([0.0, 0.0, 1.0, 0.0, 1.0, 1.0]))
    gap = seeded_difference(ROWS, second)
    assert gap["value"] == pytest.approx((0.5 - 0.5 + 0.0) / 3)
    assert gap["by_seed"] == pytest.approx([1 / 3, -1 / 3])
    one_seed = seeded_difference(ROWS, second.filter(seed=0))
    assert one_seed["value"] == pytest.approx((0.5 + 0.0 + 0.0) / 3)
    assert one_seed["by_seed"] == pytest.approx([1 / 3])


def test_questions_that_only_one_side_has_are_left_out() -> None:
    gap = seeded_difference(ROWS, ROWS.filter(pl.col("question_id") == "a"))
    assert (gap["value"], gap["num_questions"]) == (0.0, 1)


def test_findings_by_hand() -> None:
    present = pl.Series([True, True, False] * 2)
    right = pl.Series([True, False, True, True, True, False])
    found = seeded_finding(ROWS, present, right)
    assert found["sensitivity"]["value"] == pytest.approx((1.0 + 0.5) / 2)
    assert found["specificity"]["value"] == pytest.approx(0.5)
    assert found["balanced_accuracy"]["value"] == pytest.approx((0.75 + 0.5) / 2)
    assert found["sensitivity"]["by_seed"] == pytest.approx([0.5, 1.0])
    assert found["balanced_accuracy"]["by_seed"] == pytest.approx([(0.5 + 1.0) / 2, (1.0 + 0.0) / 2])


def test_a_finding_that_nobody_has_is_undefined_not_wrong() -> None:
    found = seeded_finding(ROWS, pl.Series([False] * 6), pl.Series([True] * 6))
    assert found["sensitivity"]["num_questions"] == 0 and found["sensitivity"]["by_seed"] == []
    assert found["specificity"]["value"] == 1.0
