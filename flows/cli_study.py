"""The study as a command of `photon`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flows.cli_support import command, show_log, show_results, show_table
from flows.cli_training import Device, Precision
from flows.progress import show_progress


@command
def study(
    data: Annotated[
        Path | None,
        typer.Option(
            help="Data folder: questions.jsonl, volumes/, raw/labels/; an empty one is filled with PhantomVQA. Default "
            "out/ and the benchmark's name."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; default out/study and the preset's name.")
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="quick (minutes on two cores), small (hours), medium, full (wants a GPU), real, ablations (photon "
            "with one thing different each) or smoke."
        ),
    ] = "small",
    seeds: Annotated[str | None, typer.Option(help="Seeds, e.g. 0,1,2; default the preset's.")] = None,
    variants: Annotated[
        str | None, typer.Option(help="Only these, e.g. photon,all,fixed; default all of the preset.")
    ] = None,
    keep_ratio: Annotated[
        float | None,
        typer.Option(min=0.01, max=1.0, help="Share of tokens of the policies that keep a set number; default 0.38."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trainings that run at a time; default two on a CPU, one on a GPU.")
    ] = None,
    device: Device = "auto",
    precision: Precision = "float32",
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat parts that are finished and unchanged.")] = False,
    prefect: Annotated[bool, typer.Option("--prefect/--no-prefect", help="Run the study as a Prefect flow.")] = False,
) -> None:
    """Train ways of choosing tokens side by side, and measure what each scores, costs, and where it looks.

    From every seed a vision tower and a decoder are trained with all tokens until they answer better than a model that
    only reads the question. From there each policy goes on for the same number of steps: photon (a threshold for every
    question, scores that learn), published (scores that get no gradient), all (every token), fixed (as many of the
    highest scores for every question), fixed-blind (scores that do not see the question), slices and pooled (fewer
    tokens from the start). Then each answers the questions about the test patients; photon also with its tokens taken
    away, exchanged with another question's, and drawn at random.

    Without data of your own the benchmark PhantomVQA is made first (docs/phantom-vqa.md). Your own scans: a folder that
    `photon questions` or `photon import` made and `photon preprocess` filled, with questions in the splits train, val
    and test, and `--preset real`. Label maps in raw/labels are needed for what is said about regions.

    Writes study.html (read this), study.json (every number), and folders such as seed-0/photon/ with checkpoint,
    history.jsonl and answers.parquet. Every training is a run in MLflow. Killed, the same command goes on where it was;
    with one more seed or variant it trains only that one.

    Example: `photon study --preset quick --output out/study`
    """
    folder = output or Path("out") / f"study-{preset}"
    chosen: dict[str, Any] = {
        "preset": preset,
        "data": data or _default_data(preset),
        "output": folder,
        "seeds": _numbers(seeds),
        "variants": [name.strip() for name in variants.split(",")] if variants else None,
        "keep_ratio": keep_ratio,
        "workers": workers,
        "device": device,
        "precision": precision,
        "is_fresh": fresh,
    }
    with show_log():
        if prefect:
            from flows.study import run_study_flow

            result = run_study_flow(**chosen)
        else:
            from pipelines.study.run import run_preset

            with show_progress("study") as on_progress:
                result = run_preset(**chosen, on_progress=on_progress)
    _show(result)
    show_results(page=result.with_suffix(".html"), numbers=result)


def _default_data(preset: str) -> Path:
    from pipelines.study.spec import StudySpec

    return Path("out") / (StudySpec.preset(preset).phantoms or "data")


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 0,1,2") from error


def _show(result: Path) -> None:
    """Accuracy, tokens and the region asked about, one row a policy."""
    import json

    from pipelines.study.report import table_of

    show_table("study", *table_of(json.loads(result.read_text(encoding="utf-8"))))
