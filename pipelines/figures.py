"""Charts and pictures as bytes: beside `study/figures.py` the only module that knows matplotlib, without pyplot.

Charts are SVG whose ink is ``currentColor`` and whose font is the page's, so that they follow a light or dark
page. Pictures of slices are PNG in the radiological convention: the patient's left is on the right of the
image.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MultipleLocator, PercentFormatter
from matplotlib.transforms import blended_transform_factory
from numpy.typing import NDArray

from pipelines.slices import Plane
from pipelines.statistics import Score

Array = NDArray[np.float64]

INK = "#0b0c0d"  # stands for currentColor
COLOURS = {"photon": "#2b7fd9", "all_tokens": "#8456c9", "blind": "#d9822b", "majority": "#8b939c"}
LABELS = {
    "photon": "Photon (pruned)",
    "all_tokens": "All tokens",
    "blind": "Blind (text only)",
    "majority": "Majority",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
}
PAGE_WIDTH_IN = 10.0
MAX_RAW_POINTS = 400
PICTURE_PLANE_IN = 3.2


def training_curves(history: Sequence[Mapping[str, Any]]) -> bytes:
    """Loss, kept fraction and accuracy over training steps, with the stages numbered, as SVG.

    Args:
        history: rows with ``step`` and ``stage`` and any of ``loss``, ``answer_loss``, ``kept_fraction``,
            ``validation_accuracy`` and ``answer_token_accuracy``; a row may lack or leave empty what was not
            measured then.
    """
    panels = {
        "Loss": {"loss": "total", "answer_loss": "answer"},
        "Visual tokens kept": {"kept_fraction": "kept"},
        "Accuracy": {"validation_accuracy": "validation", "answer_token_accuracy": "training, by token"},
    }
    shown = {title: names for title, names in panels.items() if any(_curve(history, n)[0].size for n in names)}
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "training"}):
        figure = Figure(figsize=(PAGE_WIDTH_IN, 2.9), layout="constrained")
        for axes, (title, names) in zip(
            np.atleast_1d(figure.subplots(1, max(len(shown), 1))), shown.items(), strict=False
        ):
            for colour, (name, label) in zip((COLOURS["photon"], COLOURS["blind"]), names.items(), strict=False):
                _draw_curve(axes, *_curve(history, name), colour=colour, label=label)
            _finish_curve_axes(axes, title, history, is_share=title != "Loss")
        return svg_bytes(figure)


def stage_starts(history: Sequence[Mapping[str, Any]]) -> list[tuple[int, str]]:
    """The first step of every stage, in order; :func:`training_curves` numbers them from 1."""
    starts: list[tuple[int, str]] = []
    for row in history:
        stage = str(row.get("stage", ""))
        if stage and (not starts or starts[-1][1] != stage):
            starts.append((row["step"], stage))
    return starts


def accuracy_intervals(groups: Mapping[str, Mapping[str, Score]]) -> bytes:
    """Score of every policy with its 95 % interval, one row a group, as SVG.

    Args:
        groups: for each row's name the score of each policy; policies that are missing are not drawn.
    """
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "accuracy"}):
        figure = Figure(figsize=(PAGE_WIDTH_IN, 0.75 + 0.62 * len(groups)), layout="constrained")
        axes = figure.subplots()
        for index, policy in enumerate(COLOURS):
            rows = [(row, scores[policy]) for row, scores in enumerate(groups.values()) if policy in scores]
            if not rows:
                continue
            heights = [row + (index - 1.5) * 0.19 for row, _ in rows]
            values = np.array([score["value"] for _, score in rows])
            ends = np.array([[score["low"], score["high"]] for _, score in rows]).T
            axes.errorbar(
                values,
                heights,
                xerr=np.abs(ends - values),
                fmt="o",
                markersize=5.5,
                capsize=0,
                elinewidth=2.2,
                color=COLOURS[policy],
                label=LABELS[policy],
            )
        axes.set_yticks(range(len(groups)), list(groups))
        axes.set_ylim(len(groups) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        for row in range(1, len(groups)):
            axes.axhline(row - 0.5, color=INK, alpha=0.12, linewidth=0.7)
        percent_axis(axes)
        figure.legend(loc="outside upper center", ncols=len(COLOURS))
        return svg_bytes(figure)


def kept_histograms(fractions: Mapping[str, Sequence[float]]) -> bytes:
    """Distribution of the share of visual tokens kept, one small histogram a subtype, as SVG.

    Args:
        fractions: for each row's name the share kept by each of its questions, 0 to 1.
    """
    edges = np.linspace(0, 1, 41)
    ordered = sorted(fractions.items(), key=lambda item: float(np.mean(item[1])))
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "kept"}):
        figure = Figure(figsize=(PAGE_WIDTH_IN, 0.6 + 0.25 * len(ordered)), layout="constrained")
        axes = figure.subplots()
        for row, (_, values) in enumerate(ordered):
            counts = np.histogram(values, bins=edges)[0] / len(values)
            heights = row + 0.4 - 0.8 * counts / counts.max()
            axes.stairs(
                heights,
                edges,
                baseline=row + 0.4,
                fill=True,
                color=COLOURS["photon"],
                alpha=0.45,
                linewidth=0,
            )
            mean = float(np.mean(values))
            axes.plot([mean, mean], [row - 0.4, row + 0.4], color=INK, linewidth=1.4)
        axes.set_yticks(range(len(ordered)), [f"{name} ({len(values)})" for name, values in ordered])
        axes.set_ylim(len(ordered) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        percent_axis(axes)
        axes.set_xlabel("visual tokens kept (bar: mean; in brackets: questions)")
        return svg_bytes(figure)


def planes_picture(planes: Sequence[Plane], plane_in: float = PICTURE_PLANE_IN) -> bytes:
    """Slices side by side at one scale in mm, with the patient's directions written at the edges, as PNG.

    Args:
        planes: of :func:`pipelines.slices.make_planes`.
        plane_in: mean width of a plane in inches of 100 pixels.
    """
    gap_mm = 0.02 * sum(plane.width_mm for plane in planes)
    width_mm = sum(plane.width_mm for plane in planes) + gap_mm * (len(planes) - 1)
    height_mm = max(plane.height_mm for plane in planes)
    width_in = plane_in * len(planes)
    with matplotlib.rc_context({**STYLE, "font.size": 13}):
        figure = Figure(figsize=(width_in, width_in * height_mm / width_mm), facecolor="black")
        left = 0.0
        for plane in planes:
            box = (
                left / width_mm,
                (1 - plane.height_mm / height_mm) / 2,
                plane.width_mm / width_mm,
                plane.height_mm / height_mm,
            )
            axes = figure.add_axes(box)
            axes.imshow(plane.pixels, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            _write_sides(axes, plane.sides)
            left += plane.width_mm + gap_mm
        stream = io.BytesIO()
        FigureCanvasAgg(figure).print_png(stream, metadata={"Software": ""})
        return stream.getvalue()


def _curve(history: Sequence[Mapping[str, Any]], name: str) -> tuple[Array, Array]:
    """Steps and values of the rows that hold a finite number under ``name``."""
    points = [(row["step"], row[name]) for row in history if isinstance(row.get(name), int | float)]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def _draw_curve(axes: Axes, steps: Array, values: Array, *, colour: str, label: str) -> None:
    if not values.size:
        return
    width = max(1, len(values) // 40)
    if width == 1:
        marker = "o" if len(values) < 40 else ""
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=label)
        return
    thin = max(1, len(values) // MAX_RAW_POINTS)
    axes.plot(steps[::thin], values[::thin], color=colour, linewidth=0.6, alpha=0.3)
    edges = np.pad(values, (width // 2, width - 1 - width // 2), mode="edge")
    smooth = np.convolve(edges, np.ones(width) / width, mode="valid")
    axes.plot(steps[::thin], smooth[::thin], color=colour, linewidth=1.8, label=label)


def _finish_curve_axes(axes: Axes, title: str, history: Sequence[Mapping[str, Any]], *, is_share: bool) -> None:
    axes.set_title(title, pad=18)
    axes.set_xlabel("step")
    axes.grid(axis="y", alpha=0.15, color=INK, linewidth=0.6)
    axes.set_ylim(bottom=0)
    if is_share:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if len(axes.get_lines()) and len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="lower right" if is_share else "upper right")
    in_data_by_axes = blended_transform_factory(axes.transData, axes.transAxes)
    for number, (step, _) in enumerate(stage_starts(history), start=1):
        axes.axvline(step, color=INK, alpha=0.35, linewidth=0.8, linestyle=(0, (3, 2)))
        axes.text(step, 1.02, f"{number}", transform=in_data_by_axes, fontsize=8, ha="center", alpha=0.75)


def percent_axis(axes: Axes) -> None:
    """Make the horizontal axis run from 0 to 100 %."""
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MultipleLocator(0.2))
    axes.grid(axis="x", alpha=0.15, color=INK, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)


def _write_sides(axes: Axes, sides: tuple[str, str, str, str]) -> None:
    top, bottom, left, right = sides
    outline = [withStroke(linewidth=2.5, foreground="black")]
    for x, y, letter in ((0.5, 0.94, top), (0.5, 0.06, bottom), (0.05, 0.5, left), (0.95, 0.5, right)):
        axes.text(
            x,
            y,
            letter,
            transform=axes.transAxes,
            color="white",
            ha="center",
            va="center",
            path_effects=outline,
        )


def svg_bytes(figure: Figure) -> bytes:
    """The figure without creation date, metadata, fixed ink or fixed font."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"font: ([^;\"]*?)([0-9.]+px) [^;\"]*", r"font: \1\2 inherit", text)
    return text.replace(INK, "currentColor").encode()
