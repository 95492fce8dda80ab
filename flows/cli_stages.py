"""The stages as commands of `photon`, one function each; `flows/cli.py` makes the command line of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from flows import settings
from flows.cli_support import (
    EXIT_SOME_FAILED,
    choose,
    command,
    rows_by_code,
    show_counts,
    show_results,
    show_table,
    tracked,
)
from flows.progress import show_progress

Data = Annotated[Path, typer.Option(help="Data folder: questions.jsonl and volumes/ (see docs/architecture.md).")]
Checkpoint = Annotated[Path, typer.Option(help="Checkpoint folder of `photon train`.")]
Modality = Annotated[str, typer.Option(help="auto, ct (values are HU) or mr (values have no unit).")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where models run; auto: a GPU if there is one.")]
Track = Annotated[bool, typer.Option("--track/--no-track", help="Log the run to MLflow.")]


@command
def retrain(
    preset: Annotated[str, typer.Option(help="demo (minutes) or smoke (a quick check of every stage).")] = "demo",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; default out/ and the preset's name.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Data folder; default the preset's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of phantoms and training.")] = 0,
    more_scans: Annotated[Path | None, typer.Option(help="Folder of your own scans to score at the end too.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Repeat stages that are finished and unchanged.")] = False,
    prefect: Annotated[bool, typer.Option("--prefect/--no-prefect", help="Run stages as Prefect flows.")] = True,
) -> None:
    """Run all stages: data, training, evaluation, ONNX, scoring, report.

    Writes train/checkpoint/, evaluate/, export/, score/, report.html and summary.json to the output folder and logs
    every stage to MLflow. After an interruption the same command skips what is finished.

    Example: `photon retrain --preset demo --output out/demo`
    """
    from pipelines.retrain_spec import RetrainSpec

    folder = output or Path("out") / preset
    spec = RetrainSpec.preset(preset, output=folder, data=data, seed=seed, more_scans=more_scans)
    if prefect:
        from flows.retrain import run_retrain

        summary = run_retrain(preset=preset, output=folder, data=data, seed=seed, more_scans=more_scans, is_fresh=fresh)
    else:
        from pipelines.retraining import retrain as run_stages

        summary = run_stages(spec, show_progress=show_progress, is_fresh=fresh)
    show_results(report=summary.with_name("report.html"), summary=summary)


@command
def generate(
    output: Annotated[Path, typer.Option(help="Data folder to fill.")] = Path("data"),
    preset: Annotated[str, typer.Option(help="How many patients: demo or smoke.")] = "demo",
    seed: Annotated[int, typer.Option(help="Another seed, other patients.")] = 0,
) -> None:
    """Make an archive of CT phantoms with label maps and questions.

    Writes raw/ (scans, label maps, scans.csv) and questions.jsonl. One preset and seed give the same bytes
    everywhere.

    Example: `photon generate --preset smoke --output data-smoke`
    """
    import dataclasses

    from pipelines.phantoms import PHANTOM_SPECS
    from pipelines.phantoms import generate as make_phantoms

    spec = dataclasses.replace(choose(PHANTOM_SPECS, preset), seed=seed)
    with show_progress("generate") as on_progress:
        record = make_phantoms(spec, output, on_progress)
    show_results(
        scans=f"{record.num_scans} of {record.num_patients} patients in {output / 'raw'}",
        questions=f"{record.num_questions} in {output / 'questions.jsonl'}",
    )


@command
def preprocess(
    input: Annotated[Path, typer.Option(help="Folder of scans, searched with its sub-folders.")],
    output: Annotated[Path, typer.Option(help="Folder for the volumes and manifest.parquet.")],
    preset: Annotated[str, typer.Option(help="Grid: demo, smoke, iso1mm or photon.")] = "demo",
    modality: Modality = "auto",
) -> None:
    """Bring a folder of scans onto one grid: orientation, spacing, size, window.

    Reads NIfTI (.nii, .nii.gz). Writes one .safetensors file for every scan that can be used and
    manifest.parquet with a row for every scan, refused or not. What is done and unchanged is not done again.
    Exit code 3 says that scans were refused.

    Example: `photon preprocess --input data/raw/images --output data/volumes`
    """
    from pipelines.preprocess import preprocess as run_stage
    from pipelines.volumes import VOLUME_SPECS

    spec = choose(VOLUME_SPECS, preset)
    with show_progress("preprocess") as on_progress:
        record = run_stage(input, output, spec, modality=modality, on_progress=on_progress)
    show_counts("scans", {"ok": record.num_ok} | record.refused_by_code)
    show_results(volumes=record.folder, manifest=record.manifest)
    if record.num_refused:
        raise typer.Exit(EXIT_SOME_FAILED)


@command
def train(
    data: Data = Path("data"),
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and history.")] = Path("out/train"),
    preset: Annotated[str, typer.Option(help="Size and length of the training: demo or smoke.")] = "demo",
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = 0,
    start_from: Annotated[
        Path | None, typer.Option(help="Checkpoint folder to start from, with its tokenizer; default: from scratch.")
    ] = None,
    naming_steps: Annotated[
        int | None,
        typer.Option(
            min=0, help="Steps of vision pretraining on label maps; default the preset's, 0 from a checkpoint."
        ),
    ] = None,
    device: Device = "auto",
    track: Track = True,
) -> None:
    """Train Photon, and the text-only model it has to beat.

    Reads questions.jsonl and volumes/ of the data folder; writes checkpoints (safetensors and JSON). After an
    interruption the same command goes on from the last checkpoint. `--start-from` takes a checkpoint of Photon or a
    plain Qwen2.5-VL, whose patch embedding and pruning parameters then start fresh, and the published training's
    learning rates.

    Example: `photon train --data data --output out/train --preset demo`
    """
    from pipelines.train import TrainSpec
    from pipelines.train import train as run_stage
    from pipelines.versioning import folder_version

    spec = TrainSpec.preset(preset, seed=seed, is_pretrained=start_from is not None, naming_steps=naming_steps)
    version = folder_version(data)
    with tracked("train", track, version) as tracker, show_progress("train") as on_progress:
        record = run_stage(
            spec,
            data,
            output,
            data_version=version,
            start_from=start_from,
            device=device,
            tracker=tracker,
            on_progress=on_progress,
        )
    show_results(
        checkpoint=record.checkpoint,
        blind_checkpoint=record.blind_checkpoint,
        history=record.history,
        final_loss=f"{record.final_loss:.4f} after {record.num_steps} steps",
    )


@command
def evaluate(
    checkpoint: Checkpoint = Path("out/train/checkpoint"),
    blind_checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint of the text-only model; default: blind/ beside the other.")
    ] = None,
    data: Data = Path("data"),
    output: Annotated[Path, typer.Option(help="Folder for answers and scores.")] = Path("out/evaluate"),
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    closed_by: Annotated[
        Literal["generation", "likelihood"],
        typer.Option(help="Answer closed questions in the model's own words, or by the likeliest option."),
    ] = "generation",
    device: Device = "auto",
    track: Track = True,
) -> None:
    """Score a checkpoint beside all tokens, text alone and the majority answer.

    Writes answers.parquet (one row a policy and question) and evaluation.json; every score has its
    patient-level 95 % interval.

    Example: `photon evaluate --checkpoint out/train/checkpoint --data data --output out/evaluate`
    """
    from pipelines.evaluate import evaluate as run_stage
    from pipelines.versioning import folder_version

    version = folder_version(data)
    with tracked("evaluate", track, version) as tracker, show_progress("evaluate") as on_progress:
        record = run_stage(
            checkpoint,
            data,
            output,
            blind_checkpoint=blind_checkpoint or checkpoint.with_name("blind"),
            split=split,
            data_version=version,
            closed_by=closed_by,
            device=device,
            tracker=tracker,
            on_progress=on_progress,
        )
    rows = [
        (name, f"{score['value']:.3f}", f"{score['low']:.3f} to {score['high']:.3f}")
        for name, score in record.accuracy.items()
    ]
    show_table(f"accuracy on {split}", ("policy", "accuracy", "95 % interval"), rows)
    show_results(answers=record.answers, scores=output / "evaluation.json")


@command
def export(
    checkpoint: Checkpoint = Path("out/train/checkpoint"),
    data: Data = Path("data"),
    output: Annotated[Path, typer.Option(help="Folder for the ONNX model.")] = Path("out/export"),
) -> None:
    """Export a checkpoint to ONNX and accept it only if it answers as PyTorch does.

    The pruning is inside the graph. Volumes of the data folder are the samples on which both are compared.

    Example: `photon export --checkpoint out/train/checkpoint --output out/export`
    """
    from pipelines.export import export as run_stage
    from pipelines.versioning import folder_version

    record = run_stage(checkpoint, data, output, data_version=folder_version(data))
    show_results(
        model=record.folder,
        checked_at=f"{len(record.token_counts_checked)} token counts",
        max_abs_logit_diff=f"{record.max_abs_logit_diff:.1e}",
    )


@command
def score(
    archive: Annotated[Path, typer.Option(help="Folder of scans, searched with its sub-folders.")],
    questions: Annotated[Path, typer.Option(help="JSON lines file; scan_id * asks every scan.")],
    model: Annotated[str, typer.Option(help="Export folder, or models:/photon@champion.")],
    output: Annotated[Path, typer.Option(help="Folder for scores.parquet.")] = Path("out/score"),
    question_id: Annotated[list[str] | None, typer.Option(help="Ask this one alone; may be repeated.")] = None,
    modality: Modality = "auto",
) -> None:
    """Ask every scan of an archive its questions, with onnxruntime.

    Writes scores.parquet: one row a scan and question with answer, confidence, kept tokens, time, model and
    data version, or an error code. After an interruption the same command goes on where it stopped. Exit code
    3 says that rows have an error; the others are complete.

    Example: `photon score --archive scans --questions data/questions.jsonl --model out/demo/export/model`
    """
    from pipelines.registry import SCHEME, resolve_model
    from pipelines.score import score as run_stage

    folder, version = Path(model), None
    if model.startswith(SCHEME):
        folder, version = resolve_model(model, settings.state_folder() / "models")
    with show_progress("score") as on_progress:
        record = run_stage(
            archive,
            questions,
            folder,
            output,
            model_version=version,
            question_ids=question_id,
            modality=modality,
            on_progress=on_progress,
        )
    show_counts("rows", rows_by_code(record.table))
    show_results(
        scores=record.table,
        rows=f"{record.rows}, {record.resumed_rows} of them from an earlier start",
        scans=f"{record.num_scans}, {record.refused_scans} of them refused",
        model_version=record.model_version,
    )
    if record.failed_rows:
        raise typer.Exit(EXIT_SOME_FAILED)


@command
def report(
    run: Annotated[Path, typer.Option(help="Output folder of `photon retrain`.")],
    data: Data = Path("data"),
) -> None:
    """Write the HTML report of a run: numbers, curves, pictures of the kept tokens.

    Reads summary.json and the stages' folders; writes report.html, which needs no other file.

    Example: `photon report --run out/demo`
    """
    from pipelines.report import build_report

    show_results(report=build_report(run, data))
