"""Cells of a study's tables: scores, differences, distances and p values as markup."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.page import Markup, join, tag
from pipelines.report_evaluation import interval_text, minus, percent

Content = Mapping[str, Any]
"""What a study found, as ``study.json`` has it."""


def card(name: str, score: Mapping[str, Any], class_: str = "card") -> Markup:
    """A number with its interval, for the top of the page."""
    return tag(
        "div",
        tag("span", name, class_="name"),
        tag("b", percent(score["value"])),
        tag("span", interval_text(score), class_="more"),
        class_=class_,
    )


def seed_values(score: Mapping[str, Any], form: str = ".1f") -> str:
    """The value of every seed, in percent or points."""
    # Adding 0.0 takes the sign from a rounded zero.
    return minus(", ".join(f"{round(100 * value, 1) + 0.0:{form}}" for value in score["by_seed"]))


def points(score: Mapping[str, Any] | None) -> Markup:
    """A difference in percentage points with its interval in small print."""
    if score is None or not score["num_questions"]:
        return tag("span", "–", class_="soft")
    value, low, high = (100 * score[name] for name in ("value", "low", "high"))
    return join(minus(f"{value:+.1f}"), tag("small", minus(f"{low:+.0f} to {high:+.0f}")))


def distance(test: Mapping[str, Any] | None, key: str) -> Markup:
    """A mean distance of a test with its interval; a dash where nothing was tested."""
    if test is None:
        return tag("span", "–", class_="soft")
    score = test[key]
    return join(f"{score['value']:.2f}", tag("small", f"{score['low']:.2f}–{score['high']:.2f}"))


def p_value(test: Mapping[str, Any] | None) -> str:
    """A p value, or the least that so many permutations can show."""
    if test is None:
        return "–"
    least = 1 / (1 + test["num_permutations"])
    return f"≤ {least:.4f}" if test["p_value"] <= least else f"{test['p_value']:.3f}"


def region_of(content: Content, variant: str) -> Mapping[str, Any] | None:
    """Shares of the region asked about over all questions; None where nothing tells where things are."""
    return next((entry for entry in content["regions"].get(variant, []) if entry["group"] == "all"), None)
