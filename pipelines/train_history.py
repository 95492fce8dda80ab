"""The history of a training run: a JSON row a step."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from photon.training.loop import StepReport


def history_row(report: StepReport) -> dict[str, float | int | str]:
    """What the history tells about a step."""
    return {
        "step": report.step,
        "stage": report.stage,
        "loss": float(report.result.loss.detach()),
        "answer_loss": report.result.answer_loss,
        "band_loss": report.result.band_loss,
        "kept_fraction": report.result.kept_fraction,
        "tokens_per_sample": report.result.tokens_per_branch,
        "answer_token_accuracy": report.result.correct,
        "learning_rate": report.learning_rate,
        "grad_norm": report.grad_norm,
        "elapsed_s": report.elapsed_s,
    }


def append_row(path: Path, row: Mapping[str, float | int | str], *, is_forced: bool) -> None:
    """Add a row; with ``is_forced`` it is on the disk afterwards, as a state that follows it will be."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row) + "\n")
        if is_forced:
            stream.flush()
            os.fsync(stream.fileno())


def read_history(path: Path) -> list[dict[str, float]]:
    """All rows, in order of their steps."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def truncate_history(path: Path, num_steps: int) -> None:
    """Drop rows of steps that were done after the state a resumed run continues from."""
    lines = path.read_text(encoding="utf-8").splitlines()[:num_steps] if path.exists() else []
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
