"""Where a model looks: kept tokens of all questions about a scan, the regions asked about, and how sets differ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pipelines.statistics import Score, mean_interval
from pipelines.study.answer_table import STUDY_SCHEMA, TRAINED
from pipelines.study.region_table import REGION_SCHEMA, elsewhere

JOINED_SCHEMA = {**STUDY_SCHEMA, **REGION_SCHEMA}
"""Answers with the regions of their questions."""

NUM_PERMUTATIONS = 1999
Bool = NDArray[np.bool_]
Float = NDArray[np.float64]


@dataclass(frozen=True)
class ScanLooks:
    """What one model kept for the Q questions about one scan of N tokens.

    Attributes:
        rows: of the answers table, condition "trained", in order of the question ids.
        kept: bool [Q, N].
        paraphrased: bool [Q, N] kept for the same question in other words; has_paraphrase: bool [Q] where there is one.
        region: bool [Q, N] tokens asked about: the lesion's where the question is about one that is there, else the
            organ's; no token where no place is known.
        is_elsewhere: bool [Q, Q] whether two questions are about different places.
    """

    rows: pl.DataFrame
    kept: Bool
    paraphrased: Bool
    has_paraphrase: Bool
    region: Bool
    is_elsewhere: Bool


def scan_looks(answers: pl.DataFrame) -> Iterator[ScanLooks]:
    """Every scan and seed of one variant's answers, :data:`JOINED_SCHEMA`, as far as its tokens have places."""
    placed = answers.filter(pl.col("kept").is_not_null() & (pl.col("num_tokens") > 0)).sort("question_id")
    for _, rows in placed.filter(condition=TRAINED).group_by("seed", "scan_id", maintain_order=True):
        seed, scan_id, num_tokens = rows["seed"][0], rows["scan_id"][0], rows["num_tokens"][0]
        others = placed.filter(seed=seed, scan_id=scan_id, condition="paraphrase")
        said = dict(zip(others["question_id"], others["kept"], strict=True))
        again = [said.get(question_id) for question_id in rows["question_id"]]
        regions = rows.select(pl.coalesce("lesion_region", "organ_region")).to_series()
        yield ScanLooks(
            rows=rows,
            kept=_masks(rows["kept"], num_tokens),
            paraphrased=_masks(again, num_tokens),
            has_paraphrase=np.array([each is not None for each in again]),
            region=_masks(regions, num_tokens),
            is_elsewhere=elsewhere(rows["organ"].to_list(), rows["place"].to_list()),
        )


def region_shares(looks: Sequence[ScanLooks]) -> pl.DataFrame:
    """One row a seed and question whose region is in the scan.

    Columns beside those that name the question: ``asked_share`` of the region's tokens that were kept,
    ``overall_share`` of all tokens, ``unasked_share`` of the same region's tokens kept, on average, by the questions
    about other places in the scan (null where there is none), ``about`` ("lesion" or "organ")."""
    names = ("seed", "question_id", "patient_id", "family", "subtype", "organ")
    tables = []
    for look in looks:
        sizes = look.region.sum(axis=1)
        share = (look.region.astype(np.float64) @ look.kept.T) / np.maximum(sizes, 1)[:, None]  # [asked, by whom]
        num_others = look.is_elsewhere.sum(axis=1)
        unasked = np.where(num_others > 0, (share * look.is_elsewhere).sum(axis=1) / np.maximum(num_others, 1), np.nan)
        table = look.rows.select(
            *names,
            about=pl.when(pl.col("lesion_region").is_not_null()).then(pl.lit("lesion")).otherwise(pl.lit("organ")),
        ).with_columns(
            asked_share=np.diagonal(share),
            overall_share=look.kept.mean(axis=1),
            unasked_share=pl.Series(unasked).fill_nan(None),
        )
        tables.append(table.filter(pl.Series(sizes > 0)))
    return pl.concat(tables) if tables else pl.DataFrame()


def jaccard_distances(first: Bool, second: Bool) -> Float:
    """One minus the shared over all tokens of every pair of sets [A, N] and [B, N]: [A, B]; 0 for two empty sets."""
    ours, theirs = first.astype(np.float64), second.astype(np.float64)
    shared = ours @ theirs.T
    united = ours.sum(axis=1)[:, None] + theirs.sum(axis=1) - shared
    distances: Float = 1 - np.where(united > 0, shared / np.maximum(united, 1), 1.0)
    return distances


def wording_test(looks: Sequence[ScanLooks], *, seed: int = 0) -> dict[str, Any] | None:
    """Do two questions about a scan keep different tokens, more so than one question in two wordings does?

    Statistic: the mean Jaccard distance between the tokens of a question and those of its paraphrase. Null hypothesis:
    which question it was leaves no trace, so the paraphrases of a scan's questions may be exchanged; they are permuted
    within scans. One-sided: the own paraphrase is nearer than exchange would have it. Distances are averaged over seeds
    first.

    Returns:
        ``same_question``, ``other_question`` (mean distances with patient-level intervals), ``difference`` (other minus
        same), ``p_value``, ``num_permutations``, ``num_scans``; None without two paraphrased questions on one scan.
    """
    groups = _over_seeds(
        looks,
        lambda look: jaccard_distances(look.kept[look.has_paraphrase], look.paraphrased[look.has_paraphrase]),
        lambda look: look.rows.filter(pl.Series(look.has_paraphrase)),
    )
    groups = [group for group in groups if len(group[0]) > 1]
    if not groups:
        return None
    generator = np.random.default_rng(seed)
    observed, permuted, same, other, patients = 0.0, np.zeros(NUM_PERMUTATIONS), [], [], []
    for distances, rows in groups:
        count = len(distances)
        own = np.diagonal(distances)
        observed += own.sum()
        orders = generator.permuted(np.tile(np.arange(count), (NUM_PERMUTATIONS, 1)), axis=1)
        permuted += distances[np.arange(count), orders].sum(axis=1)
        same += own.tolist()
        other += ((distances.sum(axis=1) - own) / (count - 1)).tolist()
        patients += rows["patient_id"].to_list()
    return {
        **_distances(same, other, patients, ("same_question", "other_question")),
        "p_value": float((1 + (permuted <= observed + 1e-9).sum()) / (1 + NUM_PERMUTATIONS)),
        "num_permutations": NUM_PERMUTATIONS,
        "num_scans": len(groups),
    }


def place_test(looks: Sequence[ScanLooks], *, seed: int = 0) -> dict[str, Any] | None:
    """Do questions about different organs of a scan keep more different tokens than questions about the same one?

    Statistic: the mean over scans of the mean Jaccard distance of pairs with different organs minus that of pairs with
    the same. Null hypothesis: what is kept has nothing to do with the organ asked about; organs are permuted among the
    questions of a scan. One-sided. Distances are averaged over seeds first.

    Returns:
        ``same_organ``, ``other_organ`` (means over questions, patient-level intervals), ``difference``, ``statistic``,
        ``p_value``, ``num_permutations``, ``num_scans``; None without a scan that has pairs of both kinds.
    """
    groups = _over_seeds(looks, lambda look: jaccard_distances(look.kept, look.kept), lambda look: look.rows)
    generator = np.random.default_rng(seed)
    statistics, permuted, same, other, patients = [], [], [], [], []
    for distances, rows in groups:
        organs = rows["organ"].to_numpy()
        is_same = organs[:, None] == organs
        upper = np.triu_indices(len(organs), 1)
        if is_same[upper].all() or not is_same[upper].any():
            continue
        pairs = distances[upper]
        statistics.append(_gap(pairs, is_same[upper][None])[0])
        orders = generator.permuted(np.tile(np.arange(len(organs)), (NUM_PERMUTATIONS, 1)), axis=1)
        permuted.append(_gap(pairs, is_same[orders[:, upper[0]], orders[:, upper[1]]]))
        np.fill_diagonal(is_same, False)
        is_other = organs[:, None] != organs
        has_both = is_same.any(axis=1) & is_other.any(axis=1)
        same += ((distances * is_same).sum(axis=1)[has_both] / is_same.sum(axis=1)[has_both]).tolist()
        other += ((distances * is_other).sum(axis=1)[has_both] / is_other.sum(axis=1)[has_both]).tolist()
        patients += rows.filter(pl.Series(has_both))["patient_id"].to_list()
    if not statistics:
        return None
    observed, null = float(np.mean(statistics)), np.mean(permuted, axis=0)
    return {
        **_distances(same, other, patients, ("same_organ", "other_organ")),
        "statistic": observed,
        "p_value": float((1 + (null >= observed - 1e-9).sum()) / (1 + NUM_PERMUTATIONS)),
        "num_permutations": NUM_PERMUTATIONS,
        "num_scans": len(statistics),
    }


def _over_seeds(looks: Sequence[ScanLooks], measure: Any, rows_of: Any) -> list[tuple[Float, pl.DataFrame]]:
    """A measure of every scan, averaged over its seeds, with the rows of its questions."""
    groups: dict[str, list[ScanLooks]] = {}
    for look in looks:
        groups.setdefault(look.rows["scan_id"][0], []).append(look)
    return [(np.mean([measure(look) for look in group], axis=0), rows_of(group[0])) for group in groups.values()]


def _gap(pairs: Float, is_same: Bool) -> Float:
    """Mean distance of the pairs [P] that are not the same minus that of those that are, for each row of [R, P]."""
    num_same = is_same.sum(axis=1)
    total_same = is_same @ pairs
    gaps: Float = (pairs.sum() - total_same) / (pairs.size - num_same) - total_same / num_same
    return gaps


def _distances(
    same: Sequence[float], other: Sequence[float], patients: Sequence[str], names: tuple[str, str]
) -> dict[str, Score]:
    gap = np.subtract(other, same)
    return {
        names[0]: mean_interval(same, patients),
        names[1]: mean_interval(other, patients),
        "difference": mean_interval(gap, patients, bounds=(-1.0, 1.0)),
    }


def _masks(lists: Any, num_tokens: int) -> Bool:
    masks = np.zeros((len(lists), num_tokens), dtype=bool)
    for row, tokens in enumerate(lists):
        if tokens is not None:
            masks[row, np.asarray(tokens, dtype=np.int64)] = True
    return masks
