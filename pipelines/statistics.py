"""Patient-level bootstrap intervals.

Questions about one patient are not independent, so whole patients are resampled, with replacement. Every
statistic here is a function of sums over questions; one row of sums a patient is enough, and a resample is a
weighted sum of those rows. The interval is the 95 % percentile interval of 2000 resamples from a seeded
generator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_RESAMPLES = 2000
TAIL = 0.025
"""Probability left out at each end of the interval."""

Array = NDArray[np.float64]
Bounds = tuple[float, float]
Statistic = Callable[[Array], Array]
"""From sums [R, C] to one value a row [R]; NaN where a row leaves the statistic undefined."""


class Score(TypedDict):
    """A value with its interval and what it rests on; JSON as it is."""

    value: float
    low: float
    high: float
    num_questions: int
    num_patients: int


def mean_interval(values: ArrayLike, patients: Sequence[str], *, bounds: Bounds = (0.0, 1.0), seed: int = 0) -> Score:
    """Mean over questions.

    Args:
        values: [Q] one score a question, within ``bounds``.
        patients: [Q] whose question it is.
        bounds: smallest and largest value that a score can take.
        seed: of the resampling.

    Returns:
        The score; value 0 and the interval ``bounds`` for no questions.
    """
    values = np.asarray(values, dtype=np.float64)
    return ratio_interval(values, np.ones_like(values), patients, bounds=bounds, seed=seed)


def paired_difference_interval(first: ArrayLike, second: ArrayLike, patients: Sequence[str], *, seed: int = 0) -> Score:
    """Mean of ``first - second``, two scores in [0, 1] of the same questions [Q]; within [-1, 1].

    Raises:
        ValueError: the lengths differ.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired scores need equal lengths, got {first.shape} and {second.shape}")
    return mean_interval(first - second, patients, bounds=(-1.0, 1.0), seed=seed)


def ratio_interval(
    numerators: ArrayLike,
    denominators: ArrayLike,
    patients: Sequence[str],
    *,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
) -> Score:
    """Sum of ``numerators`` over sum of ``denominators``, such as a sensitivity: true positives over
    positives.

    Args:
        numerators: [Q].
        denominators: [Q], not negative; questions with 0 take no part and are not counted.
        patients: [Q] whose question it is.
        bounds: smallest and largest value that the ratio can take.
        seed: of the resampling.

    Returns:
        The score; value 0 and the interval ``bounds`` when no denominator is above 0.
    """
    columns = np.stack([np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)], axis=1)
    is_counted = columns[:, 1] > 0
    counted_patients = [patient for patient, counts in zip(patients, is_counted, strict=True) if counts]
    return interval(columns[is_counted], counted_patients, _ratio_of_sums, bounds=bounds, seed=seed)


def balanced_accuracy_interval(
    is_positive: ArrayLike, is_correct: ArrayLike, patients: Sequence[str], *, seed: int = 0
) -> Score:
    """Mean of sensitivity and specificity of a yes/no finding.

    Args:
        is_positive: bool [Q], the truth.
        is_correct: [Q], whether the answer was right; or how often, 0 to 1, where a question was answered repeatedly.
        patients: [Q] whose question it is.
        seed: of the resampling.

    Returns:
        The score; value 0 and the interval (0, 1) when one of the two classes is missing.
    """
    positive, correct = np.asarray(is_positive, dtype=bool), np.asarray(is_correct, dtype=np.float64)
    columns = np.stack([positive * correct, positive, ~positive * correct, ~positive], axis=1).astype(np.float64)
    return interval(columns, patients, _balanced_accuracy_of_sums, seed=seed)


def interval(
    columns: Array,
    patients: Sequence[str],
    statistic: Statistic,
    *,
    bounds: Bounds = (0.0, 1.0),
    seed: int = 0,
) -> Score:
    """Percentile bootstrap interval of any statistic of summed columns.

    Resamples in which the statistic is undefined are left out. Patients who show no variation at all, a
    single patient among them, give resamples that are all equal and an interval of no width, which would
    claim certainty: then the interval covers what could still be if as large a share of patients as ``n``
    patients can miss with probability 2.5 % were at either bound.

    Args:
        columns: [Q, C] what ``statistic`` needs summed.
        patients: [Q] whose question it is.
        statistic: see :data:`Statistic`.
        bounds: smallest and largest possible value.
        seed: of the resampling.

    Returns:
        The score, free of NaN; value 0 and the interval ``bounds`` where the statistic is undefined.

    Raises:
        ValueError: ``columns`` and ``patients`` have different lengths.
    """
    if len(columns) != len(patients):
        raise ValueError(f"{len(columns)} questions but {len(patients)} patient ids")
    names, owners = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)
    sums = np.zeros((len(names), columns.shape[1]))
    np.add.at(sums, owners, columns)
    value = statistic(sums.sum(axis=0, keepdims=True))[0] if len(names) else np.nan
    if not np.isfinite(value):
        return _score(0.0, *bounds, len(columns), len(names))
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=NUM_RESAMPLES)
    resampled = statistic(weights @ sums)
    resampled = resampled[np.isfinite(resampled)]
    low, high = np.quantile(resampled, [TAIL, 1 - TAIL]) if len(resampled) else (value, value)
    if high - low < 1e-12:
        unseen = 1 - TAIL ** (1 / len(names))
        low, high = (value + unseen * (bound - value) for bound in bounds)
    return _score(value, low, high, len(columns), len(names))


def _ratio_of_sums(sums: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio: Array = sums[:, 0] / sums[:, 1]
    return ratio


def _balanced_accuracy_of_sums(sums: Array) -> Array:
    return (_ratio_of_sums(sums[:, :2]) + _ratio_of_sums(sums[:, 2:])) / 2


def _score(value: float, low: float, high: float, num_questions: int, num_patients: int) -> Score:
    return Score(
        value=float(value),
        low=float(low),
        high=float(high),
        num_questions=num_questions,
        num_patients=num_patients,
    )
