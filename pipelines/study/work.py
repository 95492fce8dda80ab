"""The pieces of a study that compute, each a function that may run in a process of its own.

All take ``tracker`` and ``on_progress`` and return plain values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from pipelines.dataset import Draw
from pipelines.study.answer_table import TRAINED
from pipelines.study.memory import peak_memory, reset_peak
from pipelines.study.region_table import write_regions
from pipelines.study.spec import StudySpec
from pipelines.study.starts import write_vision_start
from pipelines.study.what_if import answer_split
from pipelines.tracking import Tracker
from pipelines.train import train
from pipelines.train_history import read_history
from pipelines.train_spec import TrainSpec

Progress = Callable[[int, int, str], None]


def find_regions(
    data: Path, target: Path, split: str, max_scans: int | None, *, tracker: Tracker, on_progress: Progress
) -> dict[str, Any]:
    """:func:`pipelines.study.region_table.write_regions`, with how many questions have a region."""
    table = write_regions(data, target, split=split, max_scans=max_scans, on_progress=on_progress)
    return {
        "num_questions": len(table),
        "num_with_organ": len(table) - table["organ_region"].null_count(),
        "num_with_lesion": len(table) - table["lesion_region"].null_count(),
    }


def make_vision_start(
    spec: StudySpec, data: Path, folder: Path, seed: int, device: str, *, tracker: Tracker, on_progress: Progress
) -> dict[str, Any]:
    """:func:`pipelines.study.starts.write_vision_start`, with its last loss and time."""
    started, last = time.perf_counter(), [0.0]

    def on_step(step: int, loss: float) -> None:
        last[0] = loss
        tracker.log({"naming_loss": loss}, step=step)
        on_progress(step + 1, spec.lengths.naming, f"vision pretraining, loss {loss:.3f}")

    write_vision_start(spec, data, folder, seed=seed, device=device, on_step=on_step)
    return {"final_loss": last[0], "seconds": time.perf_counter() - started}


def train_model(
    training: TrainSpec,
    data: Path,
    output: Path,
    data_version: str,
    start_from: Path,
    train_blind: bool,
    device: str,
    *,
    tracker: Tracker,
    on_progress: Progress,
) -> dict[str, Any]:
    """:func:`pipelines.train.train`, with what it took."""
    reset_peak()
    record = train(
        training,
        data,
        output,
        data_version=data_version,
        start_from=start_from,
        train_blind=train_blind,
        device=device,
        tracker=tracker,
        on_progress=on_progress,
    )
    history = read_history(Path(record.history))
    return {
        "checkpoint": record.checkpoint,
        "blind_checkpoint": record.blind_checkpoint,
        "history": record.history,
        "num_steps": len(history),
        "kept_fraction": float(history[-1]["kept_fraction"]),
        "train_seconds": record.elapsed_s,
        **speed(history, training),
        **{f"train_{name}": value for name, value in peak_memory().items()},
    }


def answer_questions(
    checkpoint: Path,
    data: Path,
    target: Path,
    regions: Path,
    variant: str,
    seed: int,
    conditions: Sequence[str],
    split: str,
    has_volume: bool,
    max_scans: int | None,
    device: str,
    *,
    tracker: Tracker,
    on_progress: Progress,
) -> dict[str, Any]:
    """:func:`pipelines.study.what_if.answer_split`, with the means of its table and what it took."""
    reset_peak()
    table = answer_split(
        checkpoint,
        data,
        target,
        regions=regions,
        variant=variant,
        seed=seed,
        conditions=conditions,
        split=split,
        has_volume=has_volume,
        max_scans=max_scans,
        device=device,
        on_progress=lambda done, total, scan_id: on_progress(done, total, f"answering about {scan_id}"),
    )
    own = table.filter(condition=TRAINED)
    scans = own.unique("scan_id")
    by_family = own.group_by("family").agg(pl.col("score").mean())
    tracker.log_summary({f"accuracy/{family}".replace(" ", "_"): score for family, score in by_family.iter_rows()})
    others = table.filter(pl.col("condition") != TRAINED).group_by("condition").agg(pl.col("score").mean())
    tracker.log_summary({f"what_if/{name}".replace(" ", "_"): score for name, score in others.iter_rows()})
    return {
        "accuracy": _mean(own["score"].to_list()),
        "num_kept": _mean(own["num_kept"].to_list()),
        "num_tokens": _mean(own["num_tokens"].to_list()),
        "answer_seconds": _mean(own["seconds"].to_list()),
        "encode_seconds": _mean(scans["encode_seconds"].to_list()),
        **{f"answer_{name}": value for name, value in peak_memory().items()},
    }


def speed(history: Sequence[dict[str, Any]], training: TrainSpec) -> dict[str, float]:
    """Median seconds of a step of the last stage, and questions a second at that pace."""
    last = history[-1]["stage"]
    seconds = statistics.median(float(row["elapsed_s"]) for row in history if row["stage"] == last)
    draw: Draw = training.pruned_draw if last in ("soft", "hard") else training.draw
    questions = draw.scans_per_step * draw.questions_per_scan
    return {"step_seconds": seconds, "questions_per_second": questions / seconds}


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
