"""Intervals: known values, clustering, edges, and coverage in a small simulation."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest

from pipelines import statistics


def test_mean_counts_questions_and_patients_and_repeats_with_its_seed() -> None:
    values = [1.0, 0.0, 1.0, 1.0, 0.5]
    patients = ["a", "a", "b", "c", "c"]
    score = statistics.mean_interval(values, patients)
    assert score["value"] == pytest.approx(0.7)
    assert (score["num_questions"], score["num_patients"]) == (5, 3)
    assert 0.5 <= score["low"] < 0.7 < score["high"] <= 1.0
    assert score == statistics.mean_interval(values, patients)
    json.dumps(score, allow_nan=False)


def test_order_of_the_questions_does_not_matter() -> None:
    generator = np.random.default_rng(1)
    values, owners = generator.random(60), generator.integers(0, 8, 60)
    order = generator.permutation(60)
    first = statistics.mean_interval(values, [f"p{owner}" for owner in owners])
    second = statistics.mean_interval(values[order], [f"p{owners[index]}" for index in order])
    assert first == pytest.approx(second)


def test_patients_are_resampled_not_questions() -> None:
    """Twenty identical answers of a patient carry as much as one: the interval must not shrink."""
    once = statistics.mean_interval([1.0, 0.0, 1.0, 0.0], list("abcd"))
    often = statistics.mean_interval(np.repeat([1.0, 0.0, 1.0, 0.0], 20), np.repeat(list("abcd"), 20).tolist())
    assert (often["low"], often["high"]) == pytest.approx((once["low"], once["high"]))
    assert often["num_questions"] == 80


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Patients differ (beta-distributed ability), 10 questions each: nominal 95 %, few patients cost a
    little."""
    generator = np.random.default_rng(7)
    patients = np.repeat([f"p{index}" for index in range(30)], 10).tolist()
    num_covered = 0
    for _ in range(200):
        ability = generator.beta(4, 2, size=30)  # mean 2/3
        answers = (generator.random((30, 10)) < ability[:, None]).ravel()
        score = statistics.mean_interval(answers, patients)
        num_covered += score["low"] <= 2 / 3 <= score["high"]
    assert 0.88 <= num_covered / 200 <= 0.99


def test_paired_difference_cancels_what_the_patients_share() -> None:
    generator = np.random.default_rng(3)
    ability = np.repeat(generator.random(20), 10)
    patients = np.repeat([f"p{index}" for index in range(20)], 10).tolist()
    first = ability
    second = np.clip(ability - 0.05 + generator.normal(0, 0.01, 200), 0, 1)
    difference = statistics.paired_difference_interval(first, second, patients)
    alone = statistics.mean_interval(first, patients)
    assert difference["value"] == pytest.approx(0.05, abs=0.02)
    assert difference["low"] > 0
    assert difference["high"] - difference["low"] < (alone["high"] - alone["low"]) / 3
    with pytest.raises(ValueError, match="equal lengths"):
        statistics.paired_difference_interval([1.0], [1.0, 0.0], ["a"])


def test_ratio_leaves_out_questions_without_a_denominator() -> None:
    score = statistics.ratio_interval([1, 0, 0, 1], [1, 1, 0, 1], ["a", "b", "c", "d"])
    assert score["value"] == pytest.approx(2 / 3)
    assert (score["num_questions"], score["num_patients"]) == (3, 3)


def test_undefined_is_zero_with_the_widest_interval() -> None:
    nothing = {"value": 0.0, "low": 0.0, "high": 1.0, "num_questions": 0, "num_patients": 0}
    assert statistics.ratio_interval([0, 0], [0, 0], ["a", "b"]) == nothing
    assert statistics.mean_interval([], []) == nothing
    one_class = statistics.balanced_accuracy_interval([True, True], [True, False], ["a", "b"])
    assert (one_class["value"], one_class["low"], one_class["high"]) == (0.0, 0.0, 1.0)


def test_one_patient_and_perfect_scores_do_not_claim_certainty() -> None:
    one = statistics.mean_interval([1.0, 0.0, 1.0], ["a"] * 3)
    assert one["value"] == pytest.approx(2 / 3)
    assert one["low"] < 0.05
    assert one["high"] > 0.95
    five = statistics.mean_interval([1.0] * 5, list("abcde"))
    assert five["high"] == 1.0
    assert five["low"] == pytest.approx(0.025 ** (1 / 5))  # the exact binomial limit for 5 of 5
    same = statistics.paired_difference_interval([1.0] * 5, [1.0] * 5, list("abcde"))
    assert same["low"] == pytest.approx(-same["high"])
    assert same["high"] > 0


def test_balanced_accuracy_with_rare_positives() -> None:
    """Some resamples hold no positive; they are left out and nothing becomes NaN."""
    is_positive = [True] + [False] * 9
    is_correct = [True] + [True] * 6 + [False] * 3
    score = statistics.balanced_accuracy_interval(is_positive, is_correct, [f"p{index}" for index in range(10)])
    assert score["value"] == pytest.approx((1 + 6 / 9) / 2)
    assert 0.5 < score["low"] < score["value"] < score["high"] <= 1.0


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="patient ids"):
        statistics.balanced_accuracy_interval([True, False], [True, True], ["a"])
    with pytest.raises(ValueError, match="zip"):
        statistics.mean_interval([1.0, 0.0], ["a"])


def test_a_large_table_takes_well_under_a_second() -> None:
    generator = np.random.default_rng(0)
    values = generator.random(30_000)
    patients = [f"p{owner}" for owner in generator.integers(0, 1300, 30_000)]
    started = time.perf_counter()
    statistics.mean_interval(values, patients)
    assert time.perf_counter() - started < 5
