"""Scores over several seeds: intervals over patients of the seeds' mean, and how far the seeds are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from pipelines.statistics import balanced_accuracy_interval, mean_interval, ratio_interval

Seeded = dict[str, Any]
"""A :class:`pipelines.statistics.Score` with ``by_seed``, the value of every seed, and ``seed_sd``, their standard
deviation (0 for one seed)."""

KEY = ("question_id", "patient_id")


def averaged(rows: pl.DataFrame, *columns: str) -> pl.DataFrame:
    """The mean over seeds of each column, one row a question; questions in order of their ids, null ones left out."""
    known = rows.drop_nulls(list(columns))
    return known.group_by(*KEY).agg(pl.col(column).mean() for column in columns).sort("question_id")


def seeded_mean(rows: pl.DataFrame, column: str = "score", bounds: tuple[float, float] = (0.0, 1.0)) -> Seeded:
    """Mean of a column over questions, each averaged over seeds first. The interval resamples patients."""
    table = averaged(rows, column)
    score = mean_interval(table[column].to_numpy(), table["patient_id"].to_list(), bounds=bounds)
    known = rows.drop_nulls([column])
    return {**score, **_spread([float(part[column].mean()) for part in _by_seed(known)])}  # type: ignore[arg-type]


def seeded_ratio(rows: pl.DataFrame, numerator: str, denominator: str, bounds: tuple[float, float]) -> Seeded:
    """Mean of one column over the mean of another, with both averaged over seeds first."""
    table = averaged(rows, numerator, denominator)
    score = ratio_interval(
        table[numerator].to_numpy(), table[denominator].to_numpy(), table["patient_id"].to_list(), bounds=bounds
    )
    parts = _by_seed(rows.drop_nulls([numerator, denominator]))
    sums = [(float(part[numerator].sum()), float(part[denominator].sum())) for part in parts]
    return {**score, **_spread([above / below for above, below in sums if below > 0])}


def seeded_difference(first: pl.DataFrame, second: pl.DataFrame, column: str = "score", *, span: float = 1.0) -> Seeded:
    """Mean of ``first - second`` over the questions that both have, each averaged over its seeds; within +-``span``.

    Args:
        first, second: rows of two variants or conditions. Seeds are compared one by one where both have them.
    """
    pairs = averaged(first, column).join(averaged(second, column), on=list(KEY), suffix="_other").sort("question_id")
    values = (pairs[column] - pairs[f"{column}_other"]).to_numpy()
    score = mean_interval(values, pairs["patient_id"].to_list(), bounds=(-span, span))
    key = ["seed", *KEY]
    both = first.drop_nulls([column]).join(second.drop_nulls([column]), on=key, suffix="_other")
    gaps = [float((part[column] - part[f"{column}_other"]).mean()) for part in _by_seed(both)]  # type: ignore[arg-type]
    return {**score, **_spread(gaps)}


def seeded_finding(rows: pl.DataFrame, is_present: pl.Series, is_right: pl.Series) -> dict[str, Seeded]:
    """Sensitivity, specificity and balanced accuracy of yes/no answers.

    Args:
        rows: with ``question_id``, ``patient_id`` and ``seed``.
        is_present: bool, the truth of each row; is_right: bool, whether its answer was right.
    """
    table = rows.select("seed", *KEY).with_columns(present=is_present, right=is_right.cast(pl.Float64))
    questions = table.group_by(*KEY).agg(pl.col("present").first(), pl.col("right").mean()).sort("question_id")
    present, right = questions["present"].to_numpy(), questions["right"].to_numpy()
    patients = questions["patient_id"].to_list()
    parts = [(part["present"].to_numpy(), part["right"].to_numpy()) for part in _by_seed(table)]
    sensitivity = [float(found[there].mean()) for there, found in parts if there.any()]
    specificity = [float(found[~there].mean()) for there, found in parts if not there.all()]
    both = len(sensitivity) == len(specificity)
    balanced = [(a + b) / 2 for a, b in zip(sensitivity, specificity, strict=True)] if both else []
    return {
        "sensitivity": {**ratio_interval(present * right, present, patients), **_spread(sensitivity)},
        "specificity": {**ratio_interval(~present * right, ~present, patients), **_spread(specificity)},
        "balanced_accuracy": {**balanced_accuracy_interval(present, right, patients), **_spread(balanced)},
    }


def _by_seed(rows: pl.DataFrame) -> list[pl.DataFrame]:
    return [rows.filter(seed=seed) for seed in sorted(rows["seed"].unique().to_list())]


def _spread(values: list[float]) -> dict[str, Any]:
    sd = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"by_seed": values, "seed_sd": sd}
