"""From a study's tables to its record: what each policy scores, keeps, costs, and where it looks.

Every interval is a 95 % patient-level bootstrap interval of the mean over seeds; ``by_seed`` and ``seed_sd`` beside it
say how far the seeds are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polars as pl

from pipelines.metrics import parse_presence
from pipelines.study.answer_table import TRAINED
from pipelines.study.looking import ScanLooks, place_test, region_shares, scan_looks, wording_test
from pipelines.study.records import RunRecord
from pipelines.study.seeded import Seeded, seeded_difference, seeded_finding, seeded_mean, seeded_ratio

BASELINES = ("blind", "majority")
MAIN = "photon"
COSTS = (
    "questions_per_second",
    "step_seconds",
    "train_seconds",
    "train_peak_mib",
    "train_cuda_peak_mib",
    "answer_peak_mib",
    "answer_cuda_peak_mib",
    "encode_seconds",
    "answer_seconds",
)

Rows = pl.DataFrame


def analyse(answers: Rows, runs: Sequence[RunRecord], *, rare_subtypes: Sequence[str] = ()) -> dict[str, Any]:
    """The numbers of a study as JSON values.

    Args:
        answers: all tables of a study, :data:`pipelines.study.looking.JOINED_SCHEMA`, the variants "blind" and
            "majority" among them.
        runs: one a variant and seed.
        rare_subtypes: reported by themselves, and together as "rare findings".

    Returns:
        ``questions`` (how many, the chance level), ``accuracy``, ``differences``, ``findings``, ``tokens``,
        ``regions``, ``region_differences``, ``instructions``, ``what_if``, ``rare`` and ``cost``; docs/evidence.md says
        what each number means.
    """
    variants = list(dict.fromkeys(run.variant for run in runs))
    own = answers.filter(condition=TRAINED)
    of = {name: own.filter(variant=name) for name in [*variants, *BASELINES]}
    of = {name: rows for name, rows in of.items() if len(rows)}
    looks = {name: list(scan_looks(answers.filter(variant=name))) for name in variants}
    shares = {name: region_shares(found) for name, found in looks.items() if found}
    shares = {name: rows for name, rows in shares.items() if len(rows)}
    main = MAIN if MAIN in variants else variants[0]
    return {
        "main": main,
        "variants": variants,
        "questions": _questions(of[main]),
        "accuracy": {name: _by_group(rows, seeded_mean) for name, rows in of.items()},
        "differences": {f"{main} - {name}": _differences(of[main], rows) for name, rows in of.items() if name != main},
        "findings": _findings(of, rare_subtypes),
        "tokens": {name: _tokens(of[name]) for name in variants},
        "regions": {name: _regions(rows, rare_subtypes) for name, rows in shares.items()},
        "region_differences": {
            f"{main} - {name}": seeded_difference(_above(shares[main]), _above(rows), "above")
            for name, rows in shares.items()
            if main in shares and name != main
        },
        "instructions": {name: _instructions(found) for name, found in looks.items() if found},
        "what_if": {name: _what_if(answers.filter(variant=name)) for name in variants},
        "rare": _rare(answers, variants, rare_subtypes),
        "cost": _costs(runs, variants),
    }


def _questions(rows: Rows) -> dict[str, Any]:
    """How many, and what guessing among the options scores; questions without options count as 0."""
    asked = rows.unique("question_id")
    chance = asked.select(pl.when(pl.col("num_options") > 0).then(1 / pl.col("num_options")).otherwise(0.0)).to_series()
    return {
        "num_questions": len(asked),
        "num_patients": asked["patient_id"].n_unique(),
        "num_scans": asked["scan_id"].n_unique(),
        "by_family": dict(sorted(asked["family"].value_counts().iter_rows())),
        "chance": float(chance.mean()),  # type: ignore[arg-type]
        "seeds": sorted(rows["seed"].unique().to_list()),
    }


def _by_group(rows: Rows, score: Callable[[Rows], Seeded]) -> dict[str, Any]:
    """A score over all rows, by family and by subtype."""
    return {
        "all": score(rows),
        "family": {name: score(part) for name, part in _parts(rows, "family")},
        "subtype": {name: score(part) for name, part in _parts(rows, "subtype")},
    }


def _differences(first: Rows, second: Rows) -> dict[str, Any]:
    """Paired, over all questions and by family. The second may have one seed only, as the majority has."""
    theirs = dict(_parts(second, "family"))
    return {
        "all": seeded_difference(first, second),
        "family": {
            name: seeded_difference(part, theirs[name]) for name, part in _parts(first, "family") if name in theirs
        },
    }


def _findings(of: Mapping[str, Rows], rare_subtypes: Sequence[str]) -> list[dict[str, Any]]:
    """Sensitivity, specificity and balanced accuracy of the yes/no questions, together and by subtype."""
    found = []
    for variant, rows in of.items():
        asked = rows.filter(pl.col("kind") == "closed")
        asked = asked.filter(pl.Series([parse_presence(gold) is not None for gold in asked["gold"]], dtype=pl.Boolean))
        groups = {"all yes/no questions": asked}
        groups["existence"] = asked.filter(pl.col("subtype").str.ends_with("existence"))
        groups["rare findings"] = asked.filter(pl.col("subtype").is_in(list(rare_subtypes)))
        groups |= dict(_parts(asked, "subtype"))
        for name, part in groups.items():
            if len(part):
                found.append({"variant": variant, "name": name, **_finding(part)})
    return found


def _finding(rows: Rows) -> dict[str, Any]:
    present = pl.Series([parse_presence(gold) is True for gold in rows["gold"]], dtype=pl.Boolean)
    said = [parse_presence(text) for text in rows["predicted"]]
    right = pl.Series([answer is truth for answer, truth in zip(said, present, strict=True)], dtype=pl.Boolean)
    once = rows.with_columns(present=present).unique("question_id")["present"]
    counts = {"num_present": int(once.sum()), "num_absent": int((~once).sum())}
    return {**counts, **seeded_finding(rows, present, right)}


def _tokens(rows: Rows) -> dict[str, Any]:
    """Visual tokens that answers were given from: over all questions and seeds, by family and by subtype."""
    shared = rows.with_columns(share=pl.col("num_kept") / pl.col("num_tokens"))
    kept = shared["num_kept"].to_numpy()
    return {
        "of": float(shared["num_tokens"].mean()),  # type: ignore[arg-type]
        "share": seeded_mean(shared, "share"),
        **_spread(shared),
        "min": int(kept.min()),
        "max": int(kept.max()),
        "family": {name: _spread(part) for name, part in _parts(shared, "family")},
        "subtype": {name: _spread(part) for name, part in _parts(shared, "subtype")},
    }


def _spread(rows: Rows) -> dict[str, float]:
    kept = rows["num_kept"].to_numpy()
    return {
        "mean": float(kept.mean()),
        "sd": float(kept.std(ddof=1)) if len(kept) > 1 else 0.0,
        "mean_share": float(rows["share"].mean()),  # type: ignore[arg-type]
    }


def _regions(shares: Rows, rare_subtypes: Sequence[str]) -> list[dict[str, Any]]:
    """How much of the region asked about was kept, against everything and against other questions."""
    groups: list[tuple[str, str, Rows]] = [("all", "all", shares)]
    groups += [("about", name, part) for name, part in _parts(shares, "about")]
    groups += [("family", name, part) for name, part in _parts(shares, "family")]
    groups += [("subtype", name, part) for name, part in _parts(shares, "subtype")]
    rare = shares.filter(pl.col("subtype").is_in(list(rare_subtypes)))
    groups += [("rare", "rare findings", rare)] if len(rare) else []
    return [{"group": group, "name": name, **_region(rows)} for group, name, rows in groups]


def _region(rows: Rows) -> dict[str, Seeded]:
    compared = rows.drop_nulls(["unasked_share"])
    most = 1 / max(float(rows["overall_share"].mean()), 1e-9)  # type: ignore[arg-type]
    return {
        "asked_share": seeded_mean(rows, "asked_share"),
        "overall_share": seeded_mean(rows, "overall_share"),
        "unasked_share": seeded_mean(compared, "unasked_share"),
        "ratio": seeded_ratio(rows, "asked_share", "overall_share", (0.0, most)),
        "above_overall": seeded_mean(_above(rows), "above", (-1.0, 1.0)),
        "above_unasked": seeded_mean(
            compared.with_columns(above=pl.col("asked_share") - pl.col("unasked_share")), "above", (-1.0, 1.0)
        ),
    }


def _above(shares: Rows) -> Rows:
    return shares.with_columns(above=pl.col("asked_share") - pl.col("overall_share"))


def _instructions(looks: Sequence[ScanLooks]) -> dict[str, Any]:
    return {"wording": wording_test(looks), "place": place_test(looks)}


def _what_if(answers: Rows) -> dict[str, Any]:
    """Score and right option's probability in every condition, and how far they are from the trained condition's.

    ``about a lesion`` are the questions of the subtypes that ask about lesions, ``lesion present`` those of them whose
    lesion is there, so that the tokens that matter are few; a model that says yes to everything is right there.
    """
    own = answers.filter(condition=TRAINED)
    subtypes = own.filter(pl.col("lesion_region").is_not_null())["subtype"].unique().to_list()
    found: dict[str, Any] = {}
    for condition in answers["condition"].unique(maintain_order=True).to_list():
        rows = answers.filter(condition=condition)
        groups = {"all": rows, "about a lesion": rows.filter(pl.col("subtype").is_in(subtypes))}
        groups["lesion present"] = rows.filter(pl.col("lesion_region").is_not_null())
        groups |= dict(_parts(rows, "family"))
        found[condition] = {
            name: {
                "score": seeded_mean(part),
                "gold_probability": seeded_mean(part, "gold_probability"),
                "num_kept": float(part["num_kept"].mean()),  # type: ignore[arg-type]
                "change": None if condition == TRAINED else seeded_difference(part, own),
                "probability_change": None
                if condition == TRAINED
                else seeded_difference(part, own, "gold_probability"),
            }
            for name, part in groups.items()
            if len(part)
        }
    return found


def _rare(answers: Rows, variants: Sequence[str], rare_subtypes: Sequence[str]) -> dict[str, Any]:
    """Recall of rare findings: of every variant, and under pruning against all tokens of the same weights."""
    asked = answers.filter(pl.col("subtype").is_in(list(rare_subtypes)))
    asked = asked.filter(pl.Series([parse_presence(gold) is True for gold in asked["gold"]], dtype=pl.Boolean))
    found: dict[str, Any] = {}
    for name in variants:
        mine = asked.filter(variant=name)
        own, everything = mine.filter(condition=TRAINED), mine.filter(condition="all tokens")
        if len(own):
            found[name] = {"recall": seeded_mean(own)}
        if len(own) and len(everything):
            found[name]["recall_all_tokens"] = seeded_mean(everything)
            found[name]["difference"] = seeded_difference(own, everything)
    return found


def _costs(runs: Sequence[RunRecord], variants: Sequence[str]) -> dict[str, dict[str, float]]:
    """Means over seeds."""
    found = {}
    for name in variants:
        mine = [run for run in runs if run.variant == name]
        found[name] = {cost: sum(getattr(run, cost) for run in mine) / len(mine) for cost in COSTS}
    return found


def _parts(rows: Rows, column: str) -> list[tuple[str, Rows]]:
    return [(name, rows.filter(pl.col(column) == name)) for name in sorted(rows[column].unique().to_list())]
