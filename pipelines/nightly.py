"""Scoring an archive with a model of the registry, in one MLflow run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from photon.errors import PhotonError
from pipelines.registry import SCHEME, resolve_model
from pipelines.results import ScoreRecord
from pipelines.tracking import open_store, terminate_abandoned_runs, tracked_run


def score_with_registered_model(
    archive: Path,
    questions: Path,
    output: Path,
    *,
    model: str,
    models: Path,
    modality: str = "auto",
    on_progress: Callable[[int, int, str], None] | None = None,
) -> ScoreRecord:
    """Resolve the model once, score the archive, and log counts, model version and time.

    Args:
        archive: folder of scans.
        questions: JSON lines file of questions.
        output: folder to write to.
        model: registry reference, or the path of an export folder.
        models: folder that keeps fetched model versions.
        modality: ``auto``, ``ct`` or ``mr``.
        on_progress: called with scans done, scans in all and the last scan's id.

    Raises:
        PhotonError: ``MODEL_UNKNOWN``, ``NOTHING_SCORED`` when every row failed, and what scoring raises.
    """
    from pipelines.score import score

    store = open_store(experiment="photon-archive")
    terminate_abandoned_runs(store)
    with tracked_run(store, "score-archive") as tracker:
        if model.startswith(SCHEME):
            folder, version = resolve_model(model, models, store)
        else:
            folder, version = Path(model), None
        record = score(
            archive,
            questions,
            folder,
            output,
            model_version=version,
            modality=modality,
            on_progress=on_progress,
        )
        tracker.log_tags({"model_version": record.model_version, "data_version": record.data_version})
        tracker.log_hyperparameters({"model": model, "modality": modality})
        counts = ("num_scans", "rows", "failed_rows", "refused_scans", "resumed_rows", "seconds")
        tracker.log_summary({name: float(getattr(record, name)) for name in counts})
        if record.rows == record.failed_rows:
            fact = f"none of {record.num_scans} scans could be scored ({record.refused_scans} refused)."
            raise PhotonError("NOTHING_SCORED", archive, fact, f"See the column `error` of {record.table}.")
    return record
