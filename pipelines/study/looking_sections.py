"""The page of a study: where a policy looks, and what it would have answered had it looked elsewhere."""

from __future__ import annotations

from pipelines.page import Markup, drawing, join, row, table, tag
from pipelines.report_evaluation import score_cell
from pipelines.study.answer_table import TRAINED
from pipelines.study.cells import Content, distance, p_value, points, region_of, seed_values
from pipelines.study.figures import shares_by_row

CONDITIONS = {
    TRAINED: "its own tokens",
    "all tokens": "all tokens",
    "removed": "all but its own tokens",
    "none": "no token",
    "swapped": "tokens kept for a question about another place",
    "random": "as many tokens, drawn at random",
    "paraphrase": "the question in other words",
}


def looking(content: Content) -> Markup:
    """How much of the region asked about is kept, and whether other questions keep other tokens."""
    main = content["main"]
    rows = []
    for name in content["variants"]:
        if region := region_of(content, name):
            ratio = region["ratio"]
            rows.append(
                row(
                    name,
                    score_cell(region["asked_share"]),
                    score_cell(region["overall_share"]),
                    score_cell(region["unasked_share"]),
                    join(f"{ratio['value']:.2f}", tag("small", f"{ratio['low']:.2f}–{ratio['high']:.2f}")),
                    points(region["above_overall"]),
                    points(region["above_unasked"]),
                    seed_values(region["above_unasked"], "+.1f"),
                )
            )
    if not rows:
        return tag("p", "No label map tells where things are, so what was kept of them is not known.", class_="note")
    headings = ["Policy", "Region asked about", "All tokens", "The region when not asked about", "Asked / all",
                "Asked − all", "Asked − not asked", "by seed"]  # fmt: skip
    words = (
        "Tokens kept, in percent, of the lesion asked about where it is there, else of the organ. A policy blind to "
        "the question keeps a region as often when it is asked about as when it is not; one that keeps at random "
        "keeps it as often as everything else."
    )
    parts = [tag("p", words), table(headings, rows), _tests(content)]
    found = [entry for entry in content["regions"].get(main, []) if entry["group"] in ("about", "subtype")]
    if found:
        keys = {"asked_share": "region asked about", "overall_share": "all tokens", "unasked_share": "when not asked"}
        chart = shares_by_row([(entry["name"], entry) for entry in found], keys)
        parts.append(drawing(chart, "Tokens kept by kind of question", f"Tokens kept by {main}, by kind of question."))
    return join(*parts)


def what_if(content: Content) -> Markup:
    """Answers of the same weights from other tokens."""
    found = content["what_if"][content["main"]]
    rows = []
    for condition, name in CONDITIONS.items():
        for group, words in (
            ("all", name),
            ("about a lesion", "… questions about a lesion"),
            ("lesion present", "… that is there"),
        ):
            if entry := found.get(condition, {}).get(group):
                rows.append(
                    row(
                        words,
                        f"{entry['num_kept']:.0f}",
                        score_cell(entry["score"]),
                        "" if entry["change"] is None else points(entry["change"]),
                        score_cell(entry["gold_probability"]),
                        "" if entry["probability_change"] is None else points(entry["probability_change"]),
                        class_="" if group == "all" else "indent",
                    )
                )
    words = (
        f"The same weights of {content['main']}, answering from other visual tokens than those that it keeps. If the "
        "kept tokens hold what the answer needs, then the rest, or those of another question, must not do. Whatever is "
        "kept, the question's words have seen the whole scan in the layers before pruning: what is right without any "
        "token came through them."
    )
    headings = ["Answered from", "Tokens", "Right, %", "Change", "Right option's probability, %", "Change"]
    return join(tag("p", words), table(headings, rows))


def _tests(content: Content) -> Markup:
    rows = []
    for name, found in content["instructions"].items():
        wording, place = found["wording"], found["place"]
        rows.append(
            row(
                name,
                *(distance(wording, key) for key in ("same_question", "other_question")),
                p_value(wording),
                *(distance(place, key) for key in ("same_organ", "other_organ")),
                p_value(place),
            )
        )
    headings = ["Policy", "Same question, other words", "Other question", "p", "Same organ", "Other organ", "p"]
    words = (
        "Do two questions about one scan keep different tokens? Mean Jaccard distance of the kept sets (0 same, 1 "
        "disjoint). The first p: paraphrases exchanged among the questions of a scan; the second: organs exchanged "
        "among them."
    )
    return join(tag("h3", "Different questions, different tokens"), tag("p", words), table(headings, rows))
