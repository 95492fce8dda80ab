"""The main job: from phantoms to a registered model, a scored archive and a report, stage by stage.

:func:`retrain` is the whole sequence and needs no Prefect. A scheduler passes its own ``call`` to run each
stage in its own way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from photon.errors import PhotonError
from pipelines.data_changes import record_data
from pipelines.files import write_json
from pipelines.provenance import environment_tags
from pipelines.registry import RegisteredModel, register_model
from pipelines.results import (
    DataRecord,
    EvaluateRecord,
    ExportRecord,
    PreprocessRecord,
    ScoreRecord,
    TrainRecord,
    VersionRecord,
)
from pipelines.retrain_spec import RetrainSpec
from pipelines.run_summary import headline, summarise
from pipelines.stages import Job, ShowProgress, content_digest, no_progress, open_job
from pipelines.tracking import open_store

Result = TypeVar("Result")
Call = Callable[..., Any]


def call_plainly(stage: Callable[..., Result], *arguments: Any) -> Result:
    """Just call it."""
    return stage(*arguments)


def retrain(
    spec: RetrainSpec,
    *,
    call: Call = call_plainly,
    show_progress: ShowProgress = no_progress,
    is_fresh: bool = False,
) -> Path:
    """Run all stages and return the path of ``summary.json``.

    Run again after an interruption, it skips what is finished and unchanged.

    Args:
        spec: what to do.
        call: runs one stage: ``call(function, *arguments)``.
        show_progress: makes a progress callback for a stage's name.
        is_fresh: do every stage again.

    Raises:
        PhotonError: whatever a stage finds wrong.
    """
    with open_job(
        spec.output,
        open_store(spec.tracking_uri, spec.experiment),
        name=f"retrain-{spec.name}",
        settings=spec.settings(),
        show_progress=show_progress,
        is_fresh=is_fresh,
    ) as job:
        if spec.phantoms is not None:
            call(generate_data, job, spec)
        prepared = call(preprocess_data, job, spec)
        version = call(record_version, job, spec)
        trained = call(train_model, job, spec, version)
        evaluated = call(evaluate_model, job, spec, version, trained)
        exported = call(export_model, job, spec, version, trained)
        registered = call(register_export, job, spec, evaluated, exported)
        scored = call(score_archive, job, spec, version, exported, registered)
        content = summarise(job, version, prepared, trained, evaluated, exported, registered, scored)
        return call(write_report, job, spec, content)


def generate_data(job: Job, spec: RetrainSpec) -> DataRecord:
    """Make the phantom archive and its questions in the data folder.

    Raises:
        PhotonError: ``DATA_FOREIGN`` when the folder holds scans this preset does not make.
    """
    from pipelines.phantoms import PHANTOM_SPECS, generate, plan_visits

    phantoms = dataclasses.replace(PHANTOM_SPECS[str(spec.phantoms)], seed=spec.seed)
    images = spec.data / "raw" / "images"
    planned = {visit.scan_id for visit in plan_visits(phantoms)}
    foreign = sorted({path.name for path in images.glob("*")} - {f"{scan_id}.nii" for scan_id in planned})
    foreign = [name for name in foreign if not name.startswith(".")]
    if foreign:
        fact = f"it holds {len(foreign)} scans that preset {spec.phantoms!r} does not make: {foreign[0]} ..."
        remedy = "Choose another data folder, or move this one away."
        raise PhotonError("DATA_FOREIGN", images, fact, remedy)
    return job.run_stage(
        "data",
        DataRecord,
        lambda _, on_progress: generate(phantoms, spec.data, on_progress),
        inputs={"phantoms": dataclasses.asdict(phantoms)},
        outputs=[spec.data / "raw", spec.data / "questions.jsonl"],
    )


def preprocess_data(job: Job, spec: RetrainSpec) -> PreprocessRecord:
    """Bring every raw scan onto the patch grid."""
    from pipelines.preprocess import preprocess
    from pipelines.resample import VOLUME_SPECS

    volumes = VOLUME_SPECS[spec.volumes]
    images, target = spec.data / "raw" / "images", spec.data / "volumes"
    return job.run_stage(
        "preprocess",
        PreprocessRecord,
        lambda _, on_progress: preprocess(images, target, volumes, modality="ct", on_progress=on_progress),
        inputs={"volumes": volumes.as_dict(), "images": content_digest(images)},
        outputs=[target],
        scratch=[target],
    )


def record_version(job: Job, spec: RetrainSpec) -> VersionRecord:
    """Version the data folder and tag every run with it. Never skipped: it tells whether the data changed."""
    with job.open_stage("version") as tracker:
        record, _ = record_data(spec.data, tracker)
        tracker.log_artifact(record.write(spec.output / "records" / "version.json"), "records")
    job.tag_all({"data_version": record.data_version})
    job.parent.log_dataset("data", record.data_version, f"{spec.data.name}.dvc")
    return record


def train_model(job: Job, spec: RetrainSpec, version: VersionRecord) -> TrainRecord:
    """Train the model and its text-only twin."""
    from pipelines.train import train
    from pipelines.train_spec import TrainSpec

    training = TrainSpec.preset(spec.training, seed=spec.seed)
    target = spec.output / "train"
    return job.run_stage(
        "train",
        TrainRecord,
        lambda tracker, on_progress: train(
            training,
            spec.data,
            target,
            data_version=version.data_version,
            tracker=tracker,
            on_progress=on_progress,
        ),
        inputs={"training": dataclasses.asdict(training), "data_version": version.data_version},
        outputs=[target / "checkpoint", target / "blind", target / "history.jsonl"],
        scratch=[target],
    )


def evaluate_model(job: Job, spec: RetrainSpec, version: VersionRecord, trained: TrainRecord) -> EvaluateRecord:
    """Score the model on the held-out patients."""
    from pipelines.evaluate import evaluate

    target = spec.output / "evaluate"
    inputs = _checkpoint_inputs(version, trained)
    inputs["blind"] = content_digest(Path(trained.blind_checkpoint))
    return job.run_stage(
        "evaluate",
        EvaluateRecord,
        lambda tracker, on_progress: evaluate(
            Path(trained.checkpoint),
            spec.data,
            target,
            blind_checkpoint=Path(trained.blind_checkpoint),
            data_version=version.data_version,
            tracker=tracker,
            on_progress=on_progress,
        ),
        inputs=inputs,
        outputs=[target],
        scratch=[target],
    )


def export_model(job: Job, spec: RetrainSpec, version: VersionRecord, trained: TrainRecord) -> ExportRecord:
    """Export to ONNX; refused unless it answers as the checkpoint does."""
    from pipelines.export import export

    target = spec.output / "export"
    return job.run_stage(
        "export",
        ExportRecord,
        lambda _, on_progress: export(
            Path(trained.checkpoint),
            spec.data,
            target,
            data_version=version.data_version,
            on_progress=on_progress,
        ),
        inputs=_checkpoint_inputs(version, trained),
        outputs=[target],
        scratch=[target],
    )


def register_export(job: Job, spec: RetrainSpec, evaluated: EvaluateRecord, exported: ExportRecord) -> RegisteredModel:
    """Give the export a version, and decide whether it becomes the champion."""
    from pipelines.champion import accuracy_of

    accuracy = float(evaluated.accuracy["photon"]["value"])
    folder = Path(exported.folder)
    return job.run_stage(
        "register",
        RegisteredModel,
        lambda tracker, _: register_model(
            job.store,
            tracker,
            folder,
            name=spec.model_name,
            accuracy=accuracy,
            data_version=evaluated.data_version,
            config_digest=exported.config_digest,
            measure=lambda rival: accuracy_of(rival, spec.data),
        ),
        inputs={
            "model": content_digest(folder),
            "accuracy": accuracy,
            "data_version": evaluated.data_version,
            "name": spec.model_name,
            "store": [job.store.uri, job.store.created_ms],
        },
    )


def score_archive(
    job: Job, spec: RetrainSpec, version: VersionRecord, exported: ExportRecord, registered: RegisteredModel
) -> ScoreRecord:
    """Ask the exported model about an archive of held-out scans, damaged copies of one, and further scans."""
    from pipelines.archive import make_archive
    from pipelines.score import score

    target, archive = spec.output / "score", spec.output / "archive"

    def work(_tracker: Any, on_progress: Any) -> ScoreRecord:
        make_archive(spec.data, archive, more_scans=spec.more_scans)
        return score(
            archive / "scans",
            archive / "questions.jsonl",
            Path(exported.folder),
            target,
            model_version=f"{registered.name}/{registered.version}",
            on_progress=on_progress,
        )

    inputs = {"model": content_digest(Path(exported.folder)), "data_version": version.data_version}
    inputs["model_version"] = registered.version
    inputs["more_scans"] = content_digest(spec.more_scans) if spec.more_scans else ""
    scratch = [target, archive]
    return job.run_stage("score", ScoreRecord, work, inputs=inputs, outputs=[target], scratch=scratch)


def write_report(job: Job, spec: RetrainSpec, content: dict[str, Any]) -> Path:
    """Write ``summary.json`` and the HTML report, give both to MLflow, and return the summary's path."""
    from pipelines.report import build_report

    with job.open_stage("report") as tracker:
        content["mlflow"]["runs"] = dict(job.run_ids)
        summary = spec.output / "summary.json"
        write_json(summary, content)
        report = build_report(spec.output, spec.data, environment_tags())
        tracker.log_artifact(report)
    job.parent.log_summary(headline(content))
    job.parent.log_artifact(summary)
    job.parent.log_artifact(report)
    return summary


def _checkpoint_inputs(version: VersionRecord, trained: TrainRecord) -> dict[str, Any]:
    checkpoint = content_digest(Path(trained.checkpoint))
    return {"checkpoint": checkpoint, "data_version": version.data_version}
