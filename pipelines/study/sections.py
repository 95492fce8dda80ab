"""The page of a study: scores, findings and costs in plain words, tables and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from pipelines.figures import kept_histograms
from pipelines.page import Markup, definitions, drawing, join, row, table, tag
from pipelines.report_evaluation import difference_text, interval_text, percent, score_cell
from pipelines.study.analysis import BASELINES
from pipelines.study.answer_table import TRAINED
from pipelines.study.cells import Content, card, p_value, points, region_of, seed_values
from pipelines.study.figures import History, accuracy_over_tokens, variant_curves

WHAT_IT_IS = {
    "photon": "a threshold for every question, from scores that learn from later attention and the task",
    "published": "the same as published: no gradient reaches the scores",
    "all": "every token",
    "fixed": "the same number of highest scores for every question",
    "fixed-blind": "the same, with scores that do not see the question",
    "slices": "evenly spaced slabs of the scan",
    "pooled": "tokens averaged over neighbouring blocks",
    "blind": "no scan: a model trained on the text alone",
    "majority": "no model: the training questions' most frequent answer",
}


def headline(content: Content) -> Markup:
    """The numbers that matter, and what they say."""
    main = content["main"]
    accuracy, tokens, asked = content["accuracy"][main]["all"], content["tokens"][main], content["questions"]
    seeds = len(asked["seeds"])
    words = [
        f"{asked['num_questions']} questions about {asked['num_scans']} scans of {asked['num_patients']} patients, "
        f"none of whom was trained on, answered by models from {seeds} {'seed' if seeds == 1 else 'seeds'}. "
        f"Guessing among the options scores {percent(asked['chance'])}.",
        f"With {tokens['mean']:.0f} of {tokens['of']:.0f} visual tokens on average ({tokens['min']} to {tokens['max']} "
        f"by question) {main} scores {percent(accuracy['value'])} ({interval_text(accuracy)}).",
    ]
    words += [
        f"Against {name}: {difference_text(content['differences'][f'{main} - {name}']['all'])}."
        for name in ("all", "blind")
        if f"{main} - {name}" in content["differences"]
    ]
    cards = [card(f"{main}: right answers", accuracy, "card main"), card(f"{main}: tokens kept", tokens["share"])]
    cards += [
        card(f"{name}: right answers", content["accuracy"][name]["all"])
        for name in ("all", "blind")
        if name in content["accuracy"]
    ]
    if region := region_of(content, main):
        kept = region["ratio"]
        words.append(
            f"Of the region asked about it keeps {percent(region['asked_share']['value'], 0)}, of all tokens "
            f"{percent(region['overall_share']['value'], 0)}: {kept['value']:.2f} times as much "
            f"({kept['low']:.2f} to {kept['high']:.2f})."
        )
    if looked := content["instructions"].get(main, {}).get("wording"):
        words.append(
            f"The tokens kept for one question in two wordings are {looked['same_question']['value']:.2f} apart "
            f"(Jaccard distance), those kept for two questions about one scan {looked['other_question']['value']:.2f} "
            f"(p {p_value(looked)}, paraphrases exchanged among the questions of a scan)."
        )
    if removed := content["what_if"][main].get("removed"):
        words.append(
            f"Answering from all tokens but those that it keeps, the same weights score "
            f"{percent(removed['all']['score']['value'])}; a change of {difference_text(removed['all']['change'])}."
        )
    how = (
        "Intervals are 95 % bootstrap intervals that resample patients, of the mean over seeds: they do not say what "
        "other seeds would have given. The value of each seed stands beside them."
    )
    return join(tag("div", *cards, class_="cards"), *(tag("p", text) for text in words), tag("p", how, class_="soft"))


def policies(content: Content) -> Markup:
    """Every policy's score and tokens, and the paired differences."""
    main, names = content["main"], [*content["variants"], *(name for name in BASELINES if name in content["accuracy"])]
    families = list(content["accuracy"][main]["family"])
    rows = []
    for name in names:
        scores, tokens = content["accuracy"][name], content["tokens"].get(name)
        rows.append(
            row(
                name,
                WHAT_IT_IS.get(name, ""),
                score_cell(scores["all"]),
                seed_values(scores["all"]),
                *(score_cell(scores["family"][family]) for family in families),
                f"{tokens['mean']:.0f} ± {tokens['sd']:.0f}" if tokens else "–",
                num_text=2,
            )
        )
    accuracy = {name: content["accuracy"][name]["all"] for name in content["variants"]}
    shares = {name: content["tokens"][name]["share"] for name in content["variants"]}
    fixed = [name for name in content["variants"] if content["tokens"][name]["min"] == content["tokens"][name]["max"]]
    lines = {"guessing": content["questions"]["chance"]}
    lines |= {name: content["accuracy"][name]["all"]["value"] for name in BASELINES if name in content["accuracy"]}
    chart = drawing(
        accuracy_over_tokens(accuracy, shares, lines, fixed=fixed),
        "Right answers over the share of visual tokens, by policy",
        "Right answers over the share of visual tokens that they were given from, with 95 % intervals.",
    )
    differences = [
        row(
            name.replace(" - ", " − "),
            difference_text(gaps["all"]),
            seed_values(gaps["all"], "+.1f"),
            *(points(gaps["family"].get(family)) for family in families),
        )
        for name, gaps in content["differences"].items()
    ]
    return join(
        chart,
        table(["Policy", "Tokens ", "Right, %", "by seed", *families, "Tokens kept, mean ± sd"], rows),
        tag("h3", "Paired differences"),
        tag("p", "The same questions, so that what is hard for both cancels. By family in points.", class_="soft"),
        table(["First − second", "All questions", "by seed", *families], differences),
    )


def findings(content: Content) -> Markup:
    """Sensitivity and specificity of yes/no questions."""
    names = list(dict.fromkeys(entry["name"] for entry in content["findings"]))
    shown = [name for name in (content["main"], "all", "blind") if name in content["accuracy"]]
    by_key = {(entry["variant"], entry["name"]): entry for entry in content["findings"]}
    rows = []
    for name in names:
        first = by_key.get((content["main"], name))
        if first is None:
            continue
        cells = []
        for variant in shown:
            entry = by_key.get((variant, name))
            cells += [score_cell(entry[key]) if entry else "–" for key in _keys(variant)]
        rows.append(row(name, f"{first['num_present']} / {first['num_absent']}", *cells))
    headings = ["Question", "Present / absent"]
    headings += [f"{variant}: {key.split('_')[0]}" for variant in shown for key in _keys(variant)]
    parts = [tag("p", "In percent, with 95 % intervals.", class_="soft"), table(headings, rows)]
    rare = content["rare"].get(content["main"], {})
    if "difference" in rare:
        parts.append(
            tag(
                "p",
                f"Rare findings that are there: {content['main']} finds {percent(rare['recall']['value'])} "
                f"({interval_text(rare['recall'])}) from the tokens it keeps, "
                f"{percent(rare['recall_all_tokens']['value'])} from all tokens; "
                f"a difference of {difference_text(rare['difference'])}.",
            )
        )
    return join(*parts)


def amounts(content: Content, answers: pl.DataFrame) -> Markup:
    """How many tokens which kind of question keeps."""
    own = answers.filter(variant=content["main"], condition=TRAINED)
    shares = own.with_columns(share=pl.col("num_kept") / pl.col("num_tokens"))
    fractions = {str(name[0]): part["share"].to_list() for name, part in shares.group_by("subtype")}
    words = f"How many visual tokens a question keeps under {content['main']}, by kind of question; all seeds together."
    return drawing(kept_histograms(dict(sorted(fractions.items()))), "Share of tokens kept by kind of question", words)


def training(content: Content, histories: Mapping[str, Sequence[History]]) -> Markup:
    """Curves, and what training and answering cost."""
    chart = drawing(
        variant_curves(histories),
        "Validation accuracy and kept tokens over training steps",
        "A line a seed, running means. Policies that go on from the shared warm-up begin where it ended.",
    )
    rows = []
    for name, cost in content["cost"].items():
        gpu = cost["train_cuda_peak_mib"] > 0
        rows.append(
            row(
                name,
                f"{cost['questions_per_second']:.1f}",
                f"{1000 * cost['step_seconds']:.0f}",
                f"{cost['train_cuda_peak_mib' if gpu else 'train_peak_mib']:.0f}",
                f"{cost['answer_cuda_peak_mib' if gpu else 'answer_peak_mib']:.0f}",
                f"{1000 * cost['encode_seconds']:.1f}",
                f"{1000 * cost['answer_seconds']:.2f}",
            )
        )
    headings = ["Policy", "Questions trained on a second", "ms a step", "MiB in training", "MiB answering",
                "ms to encode a scan", "ms a question after that"]  # fmt: skip
    words = (
        "Training steps of the last stage without the making of batches. Where the vision tower is frozen a clean "
        "scan's tokens are computed once, so steps are the decoder's. Memory is the largest of the process, or on a "
        "GPU what PyTorch took."
    )
    return join(chart, tag("p", words, class_="soft"), table(headings, rows))


def provenance(content: Content) -> Markup:
    """What the study was made with."""
    facts = [("Study", content["study"]), ("Data version", content["data_version"]), ("Code", content["code_version"])]
    facts += [
        (
            f"Warm-up, seed {entry['seed']}",
            f"{entry['num_steps']} steps, validation {percent(entry['validation_accuracy'])}",
        )
        for entry in content["warm_up"]
    ]
    facts += list(content["environment"].items())
    return definitions([(name, tag("code", str(value))) for name, value in facts])


def _keys(variant: str) -> tuple[str, ...]:
    """What is told of a variant's findings; of a baseline whether it knows anything at all."""
    balanced = ("balanced_accuracy",)
    return balanced if variant in BASELINES else ("sensitivity", "specificity", *balanced)
