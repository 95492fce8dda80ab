"""The charts of a study, as SVG in the style of `pipelines/figures.py`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipelines.figures import INK, PAGE_WIDTH_IN, STYLE, percent_axis, svg_bytes

COLOURS = {
    "photon": "#2b7fd9",
    "published": "#12a5a5",
    "all": "#8456c9",
    "fixed": "#2e9e6b",
    "fixed-blind": "#b7a21d",
    "slices": "#c2562d",
    "pooled": "#c94f93",
    "blind": "#d9822b",
    "majority": "#8b939c",
}
FURTHER = ("#2e9e6b", "#8456c9", "#c2562d", "#b7a21d", "#c94f93", "#3aa0a8", "#7a6a58", "#5563c1", "#8b939c", "#a83b3b")
"""Colours of variants that are none of the policies, in their order."""

History = Sequence[Mapping[str, Any]]


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for every variant."""
    others = [name for name in names if name not in COLOURS]
    more = {name: FURTHER[place % len(FURTHER)] for place, name in enumerate(others)}
    return {name: COLOURS.get(name) or more[name] for name in names}


def accuracy_over_tokens(
    accuracy: Mapping[str, Mapping[str, Any]],
    shares: Mapping[str, Mapping[str, Any]],
    lines: Mapping[str, float],
    *,
    fixed: Collection[str] = (),
) -> bytes:
    """Score over the share of visual tokens, a point with both intervals for every policy.

    Args:
        accuracy, shares: by policy, scores with intervals.
        lines: scores to be drawn as lines, by their names.
        fixed: policies whose share is no finding, so that it has no interval.
    """
    colours = colours_of(list(accuracy))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "tokens"}):
        figure = Figure(figsize=(PAGE_WIDTH_IN, 4.2), layout="constrained")
        axes = figure.subplots()
        for name, score in accuracy.items():
            share = shares[name]
            axes.errorbar(
                share["value"],
                score["value"],
                xerr=None if name in fixed else _arms(share),
                yerr=_arms(score),
                fmt="o",
                markersize=7,
                elinewidth=2,
                color=colours[name],
                label=name,
            )
        for dash, (name, value) in zip(((1, 1.5), (4, 2), (8, 3)), lines.items(), strict=False):
            axes.axhline(value, color=INK, alpha=0.5, linewidth=1.1, linestyle=(0, dash), label=name)
        percent_axis(axes)
        axes.set_xlim(0, 1.02)
        axes.spines["left"].set_visible(True)
        axes.grid(axis="y", alpha=0.15, color=INK, linewidth=0.6)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_xlabel("visual tokens that an answer is given from")
        axes.set_ylabel("right answers")
        figure.legend(loc="outside right upper")
        return svg_bytes(figure)


def shares_by_row(rows: Sequence[tuple[str, Mapping[str, Mapping[str, Any]]]], labels: Mapping[str, str]) -> bytes:
    """Several shares with intervals in every row, such as the tokens kept of the region asked about and of all.

    Args:
        rows: name of the row, and its scores by key.
        labels: what the keys stand for, in the order in which they are drawn.
    """
    colours = (COLOURS["photon"], COLOURS["majority"], COLOURS["blind"])
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "shares"}):
        figure = Figure(figsize=(PAGE_WIDTH_IN, 0.9 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, (key, label) in enumerate(labels.items()):
            found = [(row, scores[key]) for row, (_, scores) in enumerate(rows) if scores[key]["num_questions"]]
            if not found:
                continue
            heights = [row + (place - (len(labels) - 1) / 2) * 0.22 for row, _ in found]
            values = np.array([score["value"] for _, score in found])
            arms = np.concatenate([_arms(score) for _, score in found], axis=1)
            axes.errorbar(
                values, heights, xerr=arms, fmt="o", markersize=5, elinewidth=2, color=colours[place], label=label
            )
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        for row in range(1, len(rows)):
            axes.axhline(row - 0.5, color=INK, alpha=0.1, linewidth=0.6)
        percent_axis(axes)
        figure.legend(loc="outside upper center", ncols=len(labels))
        return svg_bytes(figure)


def variant_curves(histories: Mapping[str, Sequence[History]]) -> bytes:
    """Validation accuracy and share of tokens kept over the steps of every variant, a line a seed.

    Args:
        histories: by variant, one history a seed: rows with ``step``, ``kept_fraction`` and now and then
            ``validation_accuracy``; steps count through from the warm-up.
    """
    colours = colours_of(list(histories))
    panels = {"validation_accuracy": "Validation accuracy", "kept_fraction": "Visual tokens kept in training"}
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "curves"}):
        figure = Figure(figsize=(PAGE_WIDTH_IN, 3.6), layout="constrained")
        for axes, (column, title) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for name, seeds in histories.items():
                for place, history in enumerate(seeds):
                    _draw(axes, history, column, colours[name], name if place == 0 else None)
            axes.set_title(title)
            axes.set_xlabel("step")
            axes.set_ylim(0, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
            axes.grid(axis="y", alpha=0.15, color=INK, linewidth=0.6)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7))
        return svg_bytes(figure)


def _draw(axes: Axes, history: History, column: str, colour: str, label: str | None) -> None:
    points = [(row["step"], row[column]) for row in history if isinstance(row.get(column), int | float)]
    if not points:
        return
    steps, values = np.array(points, dtype=np.float64).T
    if len(values) > 60:  # single steps of a curve are noise
        width = max(len(values) // 40, 1)
        kernel = np.ones(width) / width
        steps, values = (np.convolve(line, kernel, mode="valid") for line in (steps, values))
    axes.plot(steps, values, color=colour, linewidth=1.5, alpha=0.8, label=label)


def _arms(score: Mapping[str, Any]) -> np.ndarray:
    """Lengths of an interval's two arms, [2, 1]."""
    return np.abs([[score["value"] - score["low"]], [score["high"] - score["value"]]])
