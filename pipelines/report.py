"""The report stage: one HTML file that tells what a run found, made from the records in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from photon.errors import PhotonError
from pipelines import report_evaluation
from pipelines.answers import read_answers
from pipelines.contact_sheet import write_contact_sheet
from pipelines.figures import stage_starts, training_curves
from pipelines.files import prepare_output_folder, read_json, write_text
from pipelines.page import Markup, definitions, drawing, join, page, row, table, tag
from pipelines.provenance import code_version
from pipelines.report_pictures import contact_sheet, question_gallery
from pipelines.results import EvaluateRecord, ExportRecord, Record, ScoreRecord, TrainRecord
from pipelines.score_store import validate_scores

REPORT_FILE = "report.html"
SCANS_FILE = "scans.html"

STAGE_NAMES = {"soft": "soft masking", "hard": "hard pruning"}

AnyRecord = TypeVar("AnyRecord", bound=Record)
Section = tuple[str, Markup]

PLACES = {
    "train": ("train/record.json", "checkpoint/record.json", "records/train.json"),
    "evaluate": ("evaluate/evaluation.json", "records/evaluate.json"),
    "export": ("export/record.json", "records/export.json"),
    "score": ("score/score.json", "score/record.json", "records/score.json"),
}
"""Where in a run's folder the record of a stage may lie, the first that is there."""


def build_report(run: Path, data: Path, provenance: Mapping[str, str] | None = None) -> Path:
    """Write ``report.html``: self-contained, without scripts, asking nothing of the network; and ``scans.html``, the
    contact sheet of the data, to which it has a link.

    A part of the run that is missing or unreadable costs its own section, which says so in a sentence.

    Args:
        run: the run's folder with the records, tables and volumes that its stages wrote.
        data: the data folder of the run, for pictures of held-out scans.
        provenance: further names and values for the last section.

    Returns:
        Path of the file.

    Raises:
        PhotonError: ``OUTPUT_UNWRITABLE`` when the report cannot be written.
    """
    prepare_output_folder(run)
    summary = _read_summary(run)
    sections: list[Section] = [
        *_evaluation_sections(run, data),
        ("Training", _or_note("training", lambda: _training(run))),
        ("Export", _or_note("export", lambda: _export(run))),
        ("Data", _or_note("contact sheet of the data", lambda: _data(run, data))),
        ("Archive scoring", _or_note("archive scoring", lambda: _scoring(run))),
        ("Provenance", _provenance(run, summary, provenance or {})),
    ]
    version = next((record.data_version for record in _all_records(run)), "unknown")
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    header = join(
        tag("h1", f"Photon run “{run.resolve().name}”"),
        tag("p", f"Question-conditioned token pruning for 3D scans. Data version {version[:12]}, {made}.",
            class_="soft"),
    )  # fmt: skip
    footer = tag("span", "For research. Not a medical device; not for use in diagnosis or treatment.")
    target = run / REPORT_FILE
    write_text(target, page(f"Photon run {run.resolve().name}", header, sections, footer))
    return target


def _evaluation_sections(run: Path, data: Path) -> list[Section]:
    def build() -> list[Section]:
        record = _read_record(EvaluateRecord, run, "evaluate")
        answers = read_answers(_existing(Path(record.answers), run / "evaluate" / "answers.parquet"))
        sections = list(report_evaluation.sections(record, answers))
        pictures = _or_note("pictures", lambda: question_gallery(answers, data))
        heading, body = sections[-1]
        sections[-1] = (heading, join(body, tag("h3", "The same scan, several questions"), pictures))
        return sections

    try:
        return build()
    except PhotonError as error:
        return [("In short", _missing("evaluation", error))]


def _training(run: Path) -> Markup:
    record = _read_record(TrainRecord, run, "train")
    source = _existing(Path(record.history), run / "checkpoint" / "history.jsonl", run / "train" / "history.jsonl")
    history = _read_history(source)
    stages = stage_starts(history)
    names = ", ".join(
        f"{number} {STAGE_NAMES.get(stage, stage)} (from step {step:,})"
        for number, (step, stage) in enumerate(stages, start=1)
    )
    chart = drawing(
        training_curves(history),
        "Loss, share of visual tokens kept and accuracy over training steps",
        f"Thin lines are single steps, thick lines running means. Stages: {names}.",
    )
    facts = [
        ("Steps", f"{record.num_steps:,}"),
        ("Time", _duration(record.elapsed_s)),
        ("Last loss of the answers", f"{record.final_loss:.3f}"),
        ("Visual tokens kept at the end", report_evaluation.percent(record.kept_fraction)),
    ]
    return join(chart, definitions(facts))


def _export(run: Path) -> Markup:
    record = _read_record(ExportRecord, run, "export")
    is_accepted = record.kept_sets_equal and record.answers_equal
    counts = ", ".join(f"{count:,}" for count in record.token_counts_checked)
    words = (
        "The exported ONNX model prunes inside the graph. It was held against PyTorch at several numbers of visual "
        "tokens and " + ("accepted." if is_accepted else "does not agree with it.")
    )
    facts = [
        ("Same tokens kept", "yes" if record.kept_sets_equal else "no"),
        ("Same answers", "yes" if record.answers_equal else "no"),
        ("Largest difference of a logit", f"{record.max_abs_logit_diff:.1e}"),
        ("Token counts checked", counts),
        ("Files", ", ".join(sorted(Path(file).name for file in record.files.values()))),
    ]
    return join(tag("p", words), definitions(facts))


def _data(run: Path, data: Path) -> Markup:
    """How many scans the data holds, and a link to their contact sheet, which is written beside the report."""
    record = write_contact_sheet(data / "volumes", run / SCANS_FILE)
    link = tag("a", "contact sheet", href=SCANS_FILE)
    words = f": {record.num_shown:,} scans in three planes each, and why {record.num_refused:,} were refused."
    if record.unread:
        words += f" Volumes that cannot be read: {len(record.unread):,}."
    return tag("p", "The ", link, words)


def _scoring(run: Path) -> Markup:
    record = _read_record(ScoreRecord, run, "score")
    scores = _read_scores(_existing(run / "score" / Path(record.table).name, Path(record.table)))
    words = (
        f"{record.num_scans} scans were found and {record.rows:,} rows written, one a scan and question, in "
        f"{_duration(record.seconds)}. {record.refused_scans} scans were refused and {record.failed_rows:,} rows hold "
        "an error code instead of an answer."
    )
    if record.resumed_rows:
        words += f" {record.resumed_rows:,} rows were taken over from an earlier run."
    failed = scores.filter(pl.col("error").is_not_null())
    refusals: Markup = tag("p", "No scan was refused and every question has an answer.")
    if len(failed):
        by_code = failed.group_by("error").agg(
            pl.col("scan_id").unique().sort(), pl.len().alias("rows"), pl.col("message").sort().first()
        )
        rows = [
            row(tag("code", found["error"]), _listed(found["scan_id"]), found["message"], str(found["rows"]),
                num_text=3)
            for found in by_code.sort("error").iter_rows(named=True)
        ]  # fmt: skip
        refusals = table(["Code ", "Scans ", "What was found, for example ", "Rows"], rows)
    sheet = _or_note("the contact sheet", lambda: contact_sheet(scores, run / "score" / "volumes"))
    return join(
        tag("p", words), tag("h3", "Refused or failed"), refusals, tag("h3", "Every scan that was scored"), sheet
    )


def _provenance(run: Path, summary: Mapping[str, Any], extra: Mapping[str, str]) -> Markup:
    facts: dict[str, str] = {"Code version of this report": code_version()}
    records = _all_records(run)
    for name, title in (("data_version", "Data version"), ("config_digest", "Configuration"),
                        ("model_version", "Model version")):  # fmt: skip
        values = sorted({str(getattr(record, name)) for record in records if hasattr(record, name)})
        if values:
            facts[title] = ", ".join(values)
        if len(values) > 1:
            facts[title] += " (the stages of this run differ)"
    if "data_version_message" in summary:
        facts["Data version, compared"] = str(summary["data_version_message"])
    if isinstance(model := summary.get("registered_model"), Mapping):
        facts["Registered model"] = f"{model.get('name')}, version {model.get('version')}, alias {model.get('alias')}"
    if isinstance(mlflow := summary.get("mlflow"), Mapping):
        facts["MLflow experiment"] = str(mlflow.get("experiment", ""))
        facts["MLflow run"] = str(mlflow.get("parent_run_id", ""))
        runs = mlflow.get("runs")
        for stage, run_id in runs.items() if isinstance(runs, Mapping) else ():
            facts[f"MLflow run of {stage}"] = str(run_id)
    facts |= extra
    return definitions([(name, tag("code", value)) for name, value in facts.items() if value])


def _or_note(name: str, build: Callable[[], Markup]) -> Markup:
    """What ``build`` makes, or a sentence on why it is missing."""
    try:
        return build()
    except PhotonError as error:
        return _missing(name, error)


def _missing(name: str, error: PhotonError) -> Markup:
    subject = Path(error.subject).name  # without the folders, which may tell who ran this
    return tag("p", f"This run shows no {name.removeprefix('the ')}: {subject}: {error.fact}", class_="note")


def _read_record(kind: type[AnyRecord], run: Path, stage: str) -> AnyRecord:
    found = next((run / place for place in PLACES[stage] if (run / place).exists()), None)
    if found is None:
        raise PhotonError("RECORD_MISSING", stage, "the stage has left no record.", f"Run `photon {stage}`.")
    return kind.read(found)


def _all_records(run: Path) -> list[Any]:
    """The records of those stages that left a readable one."""
    kinds: dict[str, type[Record]] = {
        "train": TrainRecord, "evaluate": EvaluateRecord, "export": ExportRecord, "score": ScoreRecord,
    }  # fmt: skip
    records: list[Any] = []
    for stage, kind in kinds.items():
        try:
            records.append(_read_record(kind, run, stage))
        except PhotonError:
            continue  # its own section says so
    return records


def _read_summary(run: Path) -> Mapping[str, Any]:
    try:
        content = read_json(run / "summary.json", "SUMMARY_UNREADABLE", "Run the retraining again.")
    except PhotonError:
        return {}
    return content if isinstance(content, Mapping) else {}


def _read_history(source: Path) -> list[dict[str, Any]]:
    """Rows of a training history; a last line cut off by an interruption is left out.

    Raises:
        PhotonError: ``HISTORY_UNREADABLE`` when the file is missing or holds no row.
    """
    rows: list[dict[str, Any]] = []
    lines = source.read_text(encoding="utf-8", errors="replace").splitlines() if source.is_file() else []
    for line in lines:
        try:
            content = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(content, dict) and isinstance(content.get("step"), int):
            rows.append(content)
    if not rows:
        raise PhotonError("HISTORY_UNREADABLE", source, "it holds no training step.", "Train again.")
    return rows


def _read_scores(source: Path) -> pl.DataFrame:
    """The table of an archive run.

    Raises:
        PhotonError: ``TABLE_UNREADABLE`` when it is missing, is not Parquet or breaks its schema.
    """
    try:
        return validate_scores(pl.read_parquet(source))
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        fact = f"it is not a table of scores ({str(error).splitlines()[0]})."
        raise PhotonError("TABLE_UNREADABLE", source, fact, "Run `photon score` again.") from error


def _existing(*candidates: Path) -> Path:
    """The first path that exists, else the first: a run's folder may have moved since its records were
    written."""
    return next((path for path in candidates if path.exists()), candidates[0])


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
