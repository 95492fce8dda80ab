"""Nightly scoring of an archive with the champion."""

from __future__ import annotations

from pathlib import Path

from flows import settings

settings.apply()

from prefect import flow  # noqa: E402

from flows.progress import show_progress  # noqa: E402
from pipelines.nightly import score_with_registered_model  # noqa: E402


@flow(name="score-archive", persist_result=False)
def score_archive_flow(
    archive: Path,
    questions: Path,
    output: Path,
    model: str = "models:/photon@champion",
    modality: str = "auto",
) -> str:
    """Score an archive with a registered model. Returns the path of the table of scores.

    Refused scans are counted, not fatal; the flow fails when nothing could be scored.

    Args:
        archive: folder of scans.
        questions: JSON lines file of questions; scan id ``*`` asks every scan.
        output: folder for ``scores.parquet``; a repeated call goes on where the last one stopped.
        model: ``models:/<name>@<alias>``, ``models:/<name>/<version>`` or an export folder.
        modality: ``auto``, ``ct`` or ``mr``.
    """
    with show_progress("score") as on_progress:
        record = score_with_registered_model(
            archive,
            questions,
            output,
            model=model,
            modality=modality,
            models=settings.state_folder() / "models",
            on_progress=on_progress,
        )
    return record.table
