"""``summary.json``: the numbers of a whole run in one file."""

from __future__ import annotations

from typing import Any

from pipelines.registry import RegisteredModel
from pipelines.results import (
    EvaluateRecord,
    ExportRecord,
    PreprocessRecord,
    ScoreRecord,
    TrainRecord,
    VersionRecord,
)
from pipelines.stages import Job


def summarise(
    job: Job,
    version: VersionRecord,
    prepared: PreprocessRecord,
    trained: TrainRecord,
    evaluated: EvaluateRecord,
    exported: ExportRecord,
    registered: RegisteredModel,
    scored: ScoreRecord,
) -> dict[str, Any]:
    """The content of ``summary.json``: the numbers of all stages and where their runs are."""
    names = ("before", "kept_mean", "kept_by_question_min", "kept_by_question_max")
    return {
        "data_version": version.data_version,
        "data_version_status": version.status,
        "data_version_message": version.message,
        "mlflow": {
            "tracking_uri": job.store.uri,
            "experiment": job.store.experiment,
            "parent_run_id": job.parent.run_id,
        },
        "preprocess": {"num_ok": prepared.num_ok, "num_refused": prepared.num_refused},
        "training": {
            "num_steps": trained.num_steps,
            "elapsed_s": trained.elapsed_s,
            "kept_fraction": trained.kept_fraction,
        },
        "accuracy": evaluated.accuracy,
        "tokens": {name: evaluated.tokens[name] for name in names},
        "onnx": {
            "max_abs_logit_diff": exported.max_abs_logit_diff,
            "kept_sets_equal": exported.kept_sets_equal,
            "answers_equal": exported.answers_equal,
            "token_counts_checked": exported.token_counts_checked,
        },
        "scoring": {"rows": scored.rows, "failed_rows": scored.failed_rows, "seconds": scored.seconds},
        "registered_model": {
            "name": registered.name,
            "version": registered.version,
            "alias": registered.alias,
            "decision": registered.decision,
        },
        "report": "report.html",
    }


def headline(content: dict[str, Any]) -> dict[str, float]:
    """The numbers by which two retrainings are compared."""
    accuracy = {f"accuracy.{name}": float(score["value"]) for name, score in content["accuracy"].items()}
    tokens = {f"tokens.{name}": float(value) for name, value in content["tokens"].items()}
    return {**accuracy, **tokens, "scoring.rows": content["scoring"]["rows"]}
