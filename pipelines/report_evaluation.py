"""The evaluation sections of a run's report: what was measured, in plain words and in tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from pipelines.answers import POLICIES
from pipelines.figures import LABELS, accuracy_intervals, kept_histograms
from pipelines.page import Markup, drawing, group_row, join, row, table, tag
from pipelines.questions import FAMILIES
from pipelines.results import EvaluateRecord
from pipelines.statistics import Score

METRIC_NAMES = {
    "closed_accuracy": "Closed questions, exact text",
    "closed_accuracy_normalised": "Closed questions, final punctuation ignored",
    "text_accuracy": "Free text, exact text",
    "bleu1": "Free text, BLEU-1 (13a)",
    "bleu1_normalised": "Free text, BLEU-1, normalised",
    "rouge1": "Free text, ROUGE-1 (mean F)",
    "mra_threshold_photon": "Numbers, mean relative accuracy at ten thresholds",
    "mra_threshold_photon_exact": "Numbers, the same in exact decimals",
    "mra_linear_v2": "Numbers, linear relative accuracy",
    "mean_over_subtypes": "All, unweighted mean over subtypes",
    "parse_failure_rate": "Answers that are not of the question's kind",
}


def percent(value: float, digits: int = 1) -> str:
    """A fraction as ``12.3 %``."""
    return f"{100 * value:.{digits}f} %"


def interval_text(score: Mapping[str, Any]) -> str:
    """The interval of a fraction as ``10.1 to 14.9 %``."""
    return f"{100 * score['low']:.1f} to {100 * score['high']:.1f} %"


def score_cell(score: Mapping[str, Any]) -> Markup:
    """A fraction with its interval in small print; a dash where nothing was asked."""
    if not score["num_questions"]:
        return tag("span", "–", class_="soft")
    return join(f"{100 * score['value']:.1f}", tag("small", f"{100 * score['low']:.0f}–{100 * score['high']:.0f}"))


def difference_text(score: Mapping[str, Any]) -> str:
    """A paired difference in percentage points with its interval."""
    value, low, high = (100 * score[name] for name in ("value", "low", "high"))
    return minus(f"{value:+.1f} points (95 % interval {low:+.1f} to {high:+.1f})")


def minus(text: str) -> str:
    """``text`` with its hyphens, all of them signs, as minus signs."""
    return text.replace("-", "−")


def headline(record: EvaluateRecord) -> Markup:
    """The four numbers that matter, and what they mean."""
    accuracy, tokens = record.accuracy, record.tokens
    kept = tokens["kept_fraction_interval"]
    cards = tag(
        "div",
        _card("Score with pruning", accuracy["photon"], "card main"),
        _card("Score with all tokens", accuracy["all_tokens"]),
        _card("Score without the scan", accuracy["blind"]),
        _card("Visual tokens kept", kept),
        class_="cards",
    )
    photon = accuracy["photon"]
    words = (
        f"The model was asked {photon['num_questions']} questions about scans of {photon['num_patients']} patients "
        f"it was not trained on (split “{record.split}”). Keeping {percent(tokens['kept_fraction'], 0)} of the visual "
        f"tokens – on average {tokens['kept_mean']:.0f} of {tokens['before']:.0f}, from "
        f"{tokens['kept_by_question_min']} to {tokens['kept_by_question_max']} depending on the question – it scores "
        f"{percent(photon['value'])} ({interval_text(photon)})."
    )
    paragraphs = [words, _blind_words(record), _pruning_words(record)]
    if record.num_questions_skipped:
        paragraphs.append(
            f"{record.num_questions_skipped} further questions are about scans that preprocessing refused; they were "
            "not asked."
        )
    how = (
        "A question scores 1 or 0 by exact text, whatever its case and spacing; a number scores its mean relative "
        "accuracy over ten thresholds. Every interval is a 95 % bootstrap interval that resamples patients, not "
        "questions."
    )
    return join(cards, *(tag("p", text) for text in paragraphs), tag("p", how, class_="soft"))


def baselines(record: EvaluateRecord) -> Markup:
    """All four ways to answer side by side, overall and by family."""
    families = _scores_by_name(record, "family")
    groups = {"All questions": record.accuracy, **{_capital(name): scores for name, scores in families.items()}}
    chart = drawing(
        accuracy_intervals(groups),
        "Scores of four ways to answer with intervals, over all questions and by family",
        "Score and 95 % interval of four ways to answer the same questions. “Blind” is a model trained on the "
        "questions alone; “majority” answers what scored best on the training questions of the same text.",
    )
    rows = [
        row(name.replace("_", " ").replace(" - ", " − "), difference_text(score))
        for name, score in record.differences.items()
    ]
    return join(
        chart,
        tag("h3", "Paired differences"),
        tag("p", "Question by question, so that what makes a question hard for both cancels.", class_="soft"),
        table(["First − second", "Difference in score"], rows),
    )


def by_subtype(record: EvaluateRecord, answers: pl.DataFrame) -> Markup:
    """One row a subtype, grouped by family."""
    subtypes = _scores_by_name(record, "subtype")
    families = _scores_by_name(record, "family")
    members = answers.select("family", "subtype").unique().sort("family", "subtype").rows()
    rows: list[Markup] = []
    headings = ["Subtype", "Questions", *(LABELS[policy] for policy in POLICIES), "Kept"]
    kept = record.tokens["by_subtype"]
    for family, scores in families.items():
        rows.append(group_row(_capital(family), len(headings)))
        rows += [
            _policy_row(name, subtypes[name], percent(kept[name]["kept_fraction"], 0), "indent")
            for owner, name in members
            if owner == family
        ]
        rows.append(_policy_row("together", scores, "", "indent"))
    more = [
        row(title, *(f"{100 * record.diagnostics[policy][name]:.1f}" for policy in POLICIES))
        for name, title in METRIC_NAMES.items()
    ]
    return join(
        tag("p", "Scores in percent with 95 % intervals; the last column is the share of visual tokens kept.",
            class_="soft"),
        table(headings, rows),
        tag(
            "details",
            tag("summary", "The same answers by other metrics"),
            table(["Metric, in percent", *(LABELS[policy] for policy in POLICIES)], more),
        ),
    )  # fmt: skip


def findings(record: EvaluateRecord) -> Markup:
    """Sensitivity and specificity of every yes/no finding."""
    if not record.findings:
        return tag("p", "This split asks no yes/no questions.", class_="note")
    blind = {r["subtype"]: r["balanced_accuracy"] for r in record.findings if r["policy"] == "blind"}
    full = {r["subtype"]: r["balanced_accuracy"] for r in record.findings if r["policy"] == "all_tokens"}
    rows = []
    for found in (r for r in record.findings if r["policy"] == "photon"):
        has_both = bool(found["tp"] + found["fn"]) and bool(found["tn"] + found["fp"])
        balanced = [
            scores[found["subtype"]] for scores in ({found["subtype"]: found["balanced_accuracy"]}, full, blind)
        ]
        rows.append(
            row(
                found["subtype"],
                f"{found['tp'] + found['fn']} / {found['tn'] + found['fp']}",
                score_cell(found["sensitivity"]),
                score_cell(found["specificity"]),
                *(score_cell(score) if has_both else tag("span", "–", class_="soft") for score in balanced),
                percent(found["unparsed_rate"], 0),
            )
        )
    headings = ["Finding", "Present / absent", "Sensitivity", "Specificity", "Balanced accuracy", "… all tokens",
                "… blind", "Not yes or no"]  # fmt: skip
    words = (
        "In percent, with 95 % intervals. A balanced accuracy of 50 is chance, and what the blind model gets is what "
        "the wording alone gives away. An answer that is neither yes nor no counts as wrong."
    )
    return join(tag("p", words, class_="soft"), table(headings, rows))


def attention(record: EvaluateRecord, answers: pl.DataFrame) -> Markup:
    """How much of the organ asked about was kept, and how the number of kept tokens varies."""
    photon = answers.filter(pl.col("policy") == "photon").with_columns(
        fraction=pl.col("num_kept") / pl.col("num_tokens")
    )
    fractions = {name[0]: rows["fraction"].to_list() for name, rows in photon.group_by("subtype")}
    chart = drawing(
        kept_histograms({str(name): values for name, values in sorted(fractions.items())}),
        "Distribution of the share of visual tokens kept, by subtype of question",
        "How many visual tokens a question keeps, by subtype.",
    )
    if not record.regions:
        note = "No label map tells where the organs are, so what was kept of them is not known."
        return join(chart, tag("p", note, class_="note"))
    rows = [
        row(
            region["organ"],
            str(region["organ_share"]["num_questions"]),
            score_cell(region["organ_share"]),
            score_cell(region["overall_share"]),
            score_cell(region["unasked_share"]),
            _points_cell(region["above_overall"]),
            _points_cell(region["above_unasked"]),
        )
        for region in record.regions
    ]
    headings = ["Organ", "Questions about it", "Its tokens kept when asked", "All tokens kept then",
                "Its tokens kept when not asked", "Asked minus all", "Asked minus not asked"]  # fmt: skip
    words = (
        "If pruning were blind to the question, an organ would be kept as much as everything else, and as much when it "
        "is asked about as when it is not. In percent and percentage points, with 95 % intervals; an organ's tokens "
        "are those that hold at least one of its voxels."
    )
    return join(tag("p", words), table(headings, rows), chart)


def _card(name: str, score: Mapping[str, Any], class_: str = "card") -> Markup:
    return tag(
        "div",
        tag("span", name, class_="name"),
        tag("b", percent(score["value"])),
        tag("span", interval_text(score), class_="more"),
        class_=class_,
    )


def _blind_words(record: EvaluateRecord) -> str:
    photon, blind = record.accuracy["photon"], record.accuracy["blind"]
    difference = record.differences["photon - blind"]
    apart = (
        "The two intervals do not overlap."
        if photon["low"] > blind["high"]
        else "The two intervals overlap, so seeing the scan is not shown to help."
    )
    return (
        f"A model trained on the questions alone, without any scan, scores {percent(blind['value'])} "
        f"({interval_text(blind)}), and answering by majority {percent(record.accuracy['majority']['value'])}. Seeing "
        f"the scan makes a difference of {difference_text(difference)}. {apart}"
    )


def _pruning_words(record: EvaluateRecord) -> str:
    difference = record.differences["photon - all_tokens"]
    if difference["low"] > 0:
        verdict = "Pruning makes the answers better."
    elif difference["high"] < 0:
        verdict = "Pruning makes the answers worse."
    else:
        verdict = "These patients do not tell the two apart."
    return (
        f"The same model with all its tokens scores {percent(record.accuracy['all_tokens']['value'])}; pruning makes a "
        f"difference of {difference_text(difference)}. {verdict}"
    )


def _scores_by_name(record: EvaluateRecord, group: str) -> dict[str, dict[str, Score]]:
    """For every name of a group of the breakdown, the score of each policy."""
    found: dict[str, dict[str, Score]] = {}
    for entry in record.breakdown:
        if entry["group"] == group:
            score = {key: entry[key] for key in Score.__annotations__}
            found.setdefault(entry["name"], {})[entry["policy"]] = score  # type: ignore[assignment]
    order = {name: place for place, name in enumerate(FAMILIES)}
    return dict(sorted(found.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _policy_row(name: str, scores: Mapping[str, Score], kept: str, class_: str) -> Markup:
    cells = [score_cell(scores[policy]) for policy in POLICIES]
    return row(name, str(scores["photon"]["num_questions"]), *cells, kept, class_=class_)


def _points_cell(score: Mapping[str, Any]) -> Markup:
    if not score["num_questions"]:
        return tag("span", "–", class_="soft")
    value, low, high = (100 * score[name] for name in ("value", "low", "high"))
    return join(minus(f"{value:+.1f}"), tag("small", minus(f"{low:+.0f} to {high:+.0f}")))


def sections(record: EvaluateRecord, answers: pl.DataFrame) -> Sequence[tuple[str, Markup]]:
    """Heading and body of every section that needs the evaluation alone."""
    return [
        ("In short", headline(record)),
        ("Against the baselines", baselines(record)),
        ("By kind of question", by_subtype(record, answers)),
        ("Findings", findings(record)),
        ("Where it looks", attention(record, answers)),
    ]
