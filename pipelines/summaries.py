"""From the table of answers to the numbers of an evaluation. Every score carries a patient-level interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import polars as pl

from pipelines import metrics
from pipelines.answers import POLICIES
from pipelines.statistics import (
    Score,
    balanced_accuracy_interval,
    mean_interval,
    paired_difference_interval,
    ratio_interval,
)

DIFFERENCES = (("photon", "all_tokens"), ("photon", "blind"), ("photon", "majority"), ("all_tokens", "blind"))
GROUPS = ("family", "subtype", "kind")


def score_of(answers: pl.DataFrame, column: str = "score") -> Score:
    """Mean of ``column`` over rows of the answers table, within [0, 1]; null rows take no part."""
    rows = answers.filter(pl.col(column).is_not_null())
    return mean_interval(rows[column].to_numpy(), rows["patient_id"].to_list())


def accuracy_by_policy(answers: pl.DataFrame) -> dict[str, Score]:
    """Mean score over all questions, for every policy."""
    return {policy: score_of(_of_policy(answers, policy)) for policy in POLICIES}


def differences(answers: pl.DataFrame) -> dict[str, Score]:
    """Paired differences of the mean score, question by question, named ``first - second``."""
    scores = answers.pivot("policy", index=["question_id", "patient_id"], values="score").sort("question_id")
    patients = scores["patient_id"].to_list()
    return {
        f"{first} - {second}": paired_difference_interval(scores[first].to_numpy(), scores[second].to_numpy(), patients)
        for first, second in DIFFERENCES
    }


def breakdown(answers: pl.DataFrame) -> list[dict[str, Any]]:
    """Mean score of every policy within every family, subtype and kind of question."""
    rows = []
    for group in GROUPS:
        for name in sorted(answers[group].unique().to_list()):
            members = answers.filter(pl.col(group) == name)
            rows += [
                {"group": group, "name": name, "policy": policy, **score_of(_of_policy(members, policy))}
                for policy in POLICIES
            ]
    return rows


def diagnostics(answers: pl.DataFrame) -> dict[str, dict[str, float]]:
    """For every policy the other usual metrics of the same answers, as plain fractions.

    Closed accuracy raw and without final punctuation, thresholded relative accuracy in floats and in exact
    decimals, linear relative accuracy, BLEU-1 and ROUGE-1 of free text raw and normalised, the unweighted
    mean over subtypes and the share of answers that are not of the question's kind. 0 where a kind is not
    asked.
    """
    return {policy: _diagnostics_of(_of_policy(answers, policy)) for policy in POLICIES}


def findings(answers: pl.DataFrame) -> list[dict[str, Any]]:
    """Sensitivity, specificity and balanced accuracy of every policy for every yes/no subtype, with the
    counts."""
    closed = answers.filter(pl.col("kind") == "closed")
    rows = []
    for subtype in sorted(closed["subtype"].unique().to_list()):
        members = closed.filter(pl.col("subtype") == subtype)
        if any(metrics.parse_presence(gold) is None for gold in members["gold"].unique()):
            continue
        rows += [_finding(subtype, policy, _of_policy(members, policy)) for policy in POLICIES]
    return rows


def regions(answers: pl.DataFrame) -> list[dict[str, Any]]:
    """How much of the organ asked about was kept, a row an organ and first one for all organs.

    Scores are means over questions whose organ is in the scan: `organ_share` of the organ's tokens,
    `overall_share` of all tokens in the same questions, `unasked_share` of the organ's tokens in questions
    about other things in the same scan, and the paired differences `above_overall` and `above_unasked`.
    """
    asked = _of_policy(answers, "photon").filter(pl.col("organ_tokens") > 0)
    asked = asked.with_columns(
        organ_share=pl.col("organ_tokens_kept") / pl.col("organ_tokens"),
        overall_share=pl.col("num_kept") / pl.col("num_tokens"),
    )
    if asked.is_empty():
        return []
    groups = [("all organs", asked)]
    groups += [(organ, asked.filter(pl.col("organ") == organ)) for organ in sorted(asked["organ"].unique())]
    return [{"organ": organ, **_region(rows)} for organ, rows in groups]


def tokens(answers: pl.DataFrame) -> dict[str, Any]:
    """Visual tokens before and after pruning: over all questions, by subtype and by organ asked about."""
    photon = _of_policy(answers, "photon")
    kept = photon["num_kept"].to_numpy()
    return {
        **_token_means(photon),
        "kept_by_question_min": int(kept.min()),
        "kept_by_question_max": int(kept.max()),
        "kept_fraction_interval": ratio_interval(kept, photon["num_tokens"].to_numpy(), photon["patient_id"].to_list()),
        "by_subtype": _by(photon, "subtype", _token_means),
        "by_organ": _by(photon.filter(pl.col("organ") != ""), "organ", _token_means),
        "seconds_mean": {policy: _mean(_of_policy(answers, policy)["seconds"]) for policy in POLICIES},
    }


def flat_metrics(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation that a tracker should compare, under names such as
    ``accuracy/photon/low``."""
    flat: dict[str, float] = {}
    scores = {f"accuracy/{policy}": score for policy, score in record["accuracy"].items()}
    scores |= {f"difference/{name.replace(' - ', '_minus_')}": s for name, s in record["differences"].items()}
    for name, score in scores.items():
        flat |= {name: score["value"], f"{name}/low": score["low"], f"{name}/high": score["high"]}
    for row in record["breakdown"]:
        if row["group"] == "family" or row["policy"] == "photon":
            flat[f"{row['group']}/{row['name']}/{row['policy']}"] = row["value"]
    for row in record["findings"]:
        if row["policy"] == "photon":
            for name in ("sensitivity", "specificity", "balanced_accuracy"):
                flat[f"finding/{row['subtype']}/{name}"] = row[name]["value"]
    for row in record["regions"]:
        flat[f"organ_kept/{row['organ']}"] = row["organ_share"]["value"]
    for name in ("before", "kept_mean", "kept_by_question_min", "kept_by_question_max"):
        flat[f"tokens/{name}"] = record["tokens"][name]
    flat["kept_fraction"] = record["tokens"]["kept_fraction"]
    flat |= {f"parse_failure_rate/{policy}": row["parse_failure_rate"] for policy, row in
             record["diagnostics"].items()}  # fmt: skip
    return {name.replace(" ", "_"): float(value) for name, value in flat.items()}


def _of_policy(answers: pl.DataFrame, policy: str) -> pl.DataFrame:
    return answers.filter(pl.col("policy") == policy)


def _by(rows: pl.DataFrame, column: str, summary: Callable[[pl.DataFrame], dict[str, float]]) -> dict[str, Any]:
    return {name: summary(rows.filter(pl.col(column) == name)) for name in sorted(rows[column].unique().to_list())}


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return math.fsum(known) / len(known) if known else 0.0


def _token_means(rows: pl.DataFrame) -> dict[str, float]:
    before, kept = int(rows["num_tokens"].sum()), int(rows["num_kept"].sum())
    return {
        "before": before / len(rows),
        "kept_mean": kept / len(rows),
        "kept_fraction": kept / before if before else 0.0,
    }


def _diagnostics_of(rows: pl.DataFrame) -> dict[str, float]:
    closed, numbers, texts = (
        list(rows.filter(pl.col("kind") == kind).select("predicted", "gold").iter_rows())
        for kind in ("closed", "number", "text")
    )
    predicted, gold = [said for said, _ in texts], [truth for _, truth in texts]
    plain = [[metrics.normalise_answer(text) for text in side] for side in (predicted, gold)]
    by_subtype = rows.group_by("subtype").agg(pl.col("score").mean())["score"]
    return {
        "closed_accuracy": _mean([metrics.closed_accuracy(*pair) for pair in closed]),
        "closed_accuracy_normalised": _mean([metrics.closed_accuracy_normalised(*pair) for pair in closed]),
        "mra_threshold_photon": _mean([metrics.mra_threshold_photon(*pair) for pair in numbers]),
        "mra_threshold_photon_exact": _mean(
            [metrics.mra_threshold_photon(said, truth, exact_decimal=True) for said, truth in numbers]
        ),
        "mra_linear_v2": _mean([metrics.mra_linear_v2(*pair) for pair in numbers]),
        "text_accuracy": _mean([metrics.closed_accuracy(*pair) for pair in texts]),
        "bleu1": metrics.bleu1(predicted, gold),
        "bleu1_normalised": metrics.bleu1(*plain),
        "rouge1": metrics.rouge1(predicted, gold),
        "mean_over_subtypes": _mean(by_subtype),
        "parse_failure_rate": _mean(rows["is_unparsed"]),
    }


def _finding(subtype: str, policy: str, rows: pl.DataFrame) -> dict[str, Any]:
    patients = rows["patient_id"].to_list()
    is_present = np.array([metrics.parse_presence(gold) is True for gold in rows["gold"]], dtype=bool)
    said = [metrics.parse_presence(predicted) for predicted in rows["predicted"]]
    is_right = np.array([answer is truth for answer, truth in zip(said, is_present.tolist(), strict=True)], dtype=bool)
    counts = metrics.confusion(rows["predicted"].to_list(), rows["gold"].to_list())
    return {
        "subtype": subtype,
        "policy": policy,
        "sensitivity": ratio_interval(is_present & is_right, is_present, patients),
        "specificity": ratio_interval(~is_present & is_right, ~is_present, patients),
        "balanced_accuracy": balanced_accuracy_interval(is_present, is_right, patients),
        "tp": counts.tp,
        "fp": counts.fp,
        "tn": counts.tn,
        "fn": counts.fn,
        "unparsed_rate": counts.unparsed_rate,
    }


def _region(rows: pl.DataFrame) -> dict[str, Score]:
    compared = rows.filter(pl.col("organ_share_unasked").is_not_null())
    return {
        "organ_share": score_of(rows, "organ_share"),
        "overall_share": score_of(rows, "overall_share"),
        "unasked_share": score_of(compared, "organ_share_unasked"),
        "above_overall": paired_difference_interval(
            rows["organ_share"].to_numpy(), rows["overall_share"].to_numpy(), rows["patient_id"].to_list()
        ),
        "above_unasked": paired_difference_interval(
            compared["organ_share"].to_numpy(),
            compared["organ_share_unasked"].to_numpy(),
            compared["patient_id"].to_list(),
        ),
    }
