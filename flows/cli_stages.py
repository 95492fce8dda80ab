"""The stages as commands of `photon`, one function each; `flows/cli.py` makes the command line of them."""

from __future__ import annotations

import enum
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from flows import settings
from flows.cli_support import (
    EXIT_SOME_FAILED,
    Checkpoint,
    Data,
    Modality,
    choose,
    command,
    rows_by_code,
    show_counts,
    show_results,
)
from flows.cli_versions import record_version
from flows.progress import show_progress


class Trusted(enum.StrEnum):
    """What may count in a header that contradicts itself."""

    sform = "sform"
    pixdim = "pixdim"


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
    preset: Annotated[
        str,
        typer.Option(
            help="Patients: demo, smoke; of PhantomVQA: vqa-quick, vqa-small, vqa-medium, vqa-full, vqa-smoke."
        ),
    ] = "demo",
    seed: Annotated[int, typer.Option(help="Another seed, other patients.")] = 0,
) -> None:
    """Make an archive of CT phantoms with label maps and questions.

    Writes raw/ (scans, label maps, scans.csv) and questions.jsonl. One preset and seed give the same bytes
    everywhere. PhantomVQA (docs/phantom-vqa.md) is the benchmark form: balanced closed questions, rare findings.

    Example: `photon generate --preset smoke --output data-smoke`
    """
    import dataclasses

    from pipelines.phantom_vqa import stage as phantom_vqa
    from pipelines.phantom_vqa.cohort import PHANTOM_VQA_SPECS, PhantomVqaSpec
    from pipelines.phantoms import PHANTOM_SPECS, PhantomSpec
    from pipelines.phantoms import generate as make_phantoms

    specs: dict[str, PhantomSpec | PhantomVqaSpec] = {**PHANTOM_SPECS, **PHANTOM_VQA_SPECS}
    spec = dataclasses.replace(choose(specs, preset), seed=seed)
    with show_progress("generate") as on_progress:
        if isinstance(spec, PhantomVqaSpec):
            record = phantom_vqa.generate(spec, output, on_progress)
        else:
            record = make_phantoms(spec, output, on_progress)
    show_results(
        scans=f"{record.num_scans} of {record.num_patients} patients in {output / 'raw'}",
        questions=f"{record.num_questions} in {output / 'questions.jsonl'}",
    )


@command
def preprocess(
    input: Annotated[
        Path,
        typer.Option(
            help="Folder of scans, searched with its sub-folders and archives; or one scan, .tar, .tar.gz or .zip."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the volumes and manifest.parquet.")],
    preset: Annotated[
        str, typer.Option(help="Grid: demo, smoke, iso1mm, photon, vqa-small, vqa-medium or vqa-full.")
    ] = "demo",
    modality: Modality = "auto",
    trust: Annotated[
        Trusted | None, typer.Option(help="What counts where a NIfTI header contradicts itself; default: refuse it.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Scans done at once; default by cores and free memory.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where scans are resampled: cpu, cuda or auto. The volumes are the same.")
    ] = "cpu",
    prune: Annotated[
        bool, typer.Option("--prune", help="Delete volumes of scans that are gone or refused now.")
    ] = False,
    runner: Annotated[
        str, typer.Option(help="What does the scans: processes or threads of this machine, dask or ray.")
    ] = "processes",
    scans_per_task: Annotated[
        int | None, typer.Option(min=1, help="With threads, dask or ray: scans handed out at once; default 128.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="With dask or ray: a running cluster that sees the same files; default: start one here."),
    ] = None,
    record: Annotated[
        bool | None,
        typer.Option(
            "--record/--no-record", help="Record a version of the folder that holds OUTPUT; default: where it has one."
        ),
    ] = None,
) -> None:
    """Bring a folder of scans onto one grid: orientation, spacing, size, window.

    Writes one .safetensors file for every scan that can be used and manifest.parquet with a row for every scan, refused
    or not. What is done and unchanged is not done again, also after the command was killed; two of them share the work.
    A run into a folder of versioned data ends in a new version of it. Exit code 3 says that scans were refused.

    Example: `photon preprocess --input data/raw/images --output data/volumes`
    """
    from pipelines.volumes import VOLUME_SPECS

    if runner == "processes" and address is None and scans_per_task is None:
        from pipelines.preprocess import preprocess as run_stage
    else:
        from flows.preprocess import run_preprocess

        run_stage = functools.partial(run_preprocess, runner=runner, scans_per_task=scans_per_task, address=address)
    spec = choose(VOLUME_SPECS, preset)
    with show_progress("preprocess") as on_progress:
        done = run_stage(
            input,
            output,
            spec,
            modality=modality,
            trust=trust.value if trust else None,
            on_progress=on_progress,
            num_workers=workers,
            is_pruning=prune,
            device=device,
        )
    show_counts("scans", {"ok": done.num_ok} | done.refused_by_code)
    if done.num_refused:
        _show_refused(_refused_of(Path(done.manifest)))
        typer.echo("All of them: the column message of manifest.parquet, or `photon contact-sheet`.")
    show_results(
        volumes=done.folder,
        manifest=done.manifest,
        made=f"{done.num_new} now, {done.num_unchanged} earlier and unchanged",
        removed=f"{len(done.removed)} scans of the last manifest are gone",
        without_row=f"{done.num_without_row} volumes of scans gone or refused"
        + (" (--prune deletes them)" if done.num_without_row else ""),
    )
    data = output.resolve().parent
    if record or (record is None and data.with_name(f"{data.name}.dvc").is_file()):
        record_version(data, is_tracked=True)
    if done.num_refused:
        raise typer.Exit(EXIT_SOME_FAILED)


def _refused_of(manifest: Path) -> list[tuple[str, str, str]]:
    """Code, name and message of every refused scan."""
    from pipelines.manifest import read_manifest

    rows = read_manifest(manifest).select("status", "source", "scan_id", "message").iter_rows()
    return [(code, source or scan_id, message) for code, source, scan_id, message in rows if code != "ok"]


def _show_refused(refused: Sequence[tuple[str, str, str]], most: int = 10) -> None:
    """The first refusals with code, fact and remedy. On the screen alone: names of files may name patients."""
    for code, name, message in refused[:most]:
        typer.echo(f"[{code}] {name}: {message}")
    if len(refused) > most:
        typer.echo(f"... and {len(refused) - most} more.")


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
    archive: Annotated[
        Path,
        typer.Option(
            help="Folder of scans, searched with its sub-folders and archives; or one scan, .tar, .tar.gz or .zip."
        ),
    ],
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


@command
def contact_sheet(
    volumes: Annotated[Path, typer.Option(help="Folder that `photon preprocess` filled.")],
    output: Annotated[Path, typer.Option(help="HTML file; further pages lie beside it.")] = Path("out/scans.html"),
) -> None:
    """Show every scan of a folder of volumes: three planes, grid, notes; and the refused ones with the reason.

    Writes HTML pages that need no other file, at most 200 scans each. Exit code 3 says that volumes of the manifest are
    missing or damaged; the pages show which. Scans that `photon preprocess` refused do not count.

    Example: `photon contact-sheet --volumes data/volumes --output out/scans.html`
    """
    from pipelines.contact_sheet import write_contact_sheet

    with show_progress("contact-sheet") as on_progress:
        record = write_contact_sheet(volumes, output, on_progress=on_progress)
    if record.unread:
        _show_refused([(scan["code"], scan["volume"], scan["message"]) for scan in record.unread])
        typer.echo("All of them: the section Refused of the first page.")
    show_results(
        pages=f"{record.pages[0]}" + (f" and {len(record.pages) - 1} more" if len(record.pages) > 1 else ""),
        shown=record.num_shown,
        refused=record.num_refused,
        unread=len(record.unread),
    )
    if record.unread:
        raise typer.Exit(EXIT_SOME_FAILED)
