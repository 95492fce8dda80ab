"""The import stage: a public dataset, in the user's own copy, into a data folder."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from photon.errors import PhotonError
from pipelines.datasets.base import Adapter, Assembled, ImportOptions, Refusal, ScanFile, assemble
from pipelines.datasets.catalogue import DATASETS
from pipelines.datasets.leaks import BLOCKING, CHECKS, find_leaks, without_leaks
from pipelines.datasets.placing import MODES, SCANS_SCHEMA, Progress, place_scans
from pipelines.datasets.splits import SPLITS, SplitRule
from pipelines.files import atomic_path, check_apart, lock_output, prepare_output_folder, write_text
from pipelines.questions import Question, read_questions, write_questions
from pipelines.results import ImportRecord

REFUSED_SCHEMA: dict[str, Any] = {
    "file": pl.String,
    "row": pl.Int64,
    "reason": pl.String,
    "detail": pl.String,
}
"""One row a refused row or scan: file and line (or element) in the dataset's folder, why, and what was found."""

_QUESTIONS = "questions.jsonl"
_REPORT_ROWS = 20


def import_dataset(
    dataset: str,
    input: Path,
    output: Path,
    *,
    scans: str = "link",
    options: ImportOptions = ImportOptions(),
    rule: SplitRule = SplitRule(),
    drop_leaks: bool = False,
    on_progress: Progress | None = None,
    num_workers: int | None = None,
) -> ImportRecord:
    """Write the questions of a dataset to ``output/questions.jsonl`` and its scans to ``output/raw/images``.

    Questions of other datasets in that file stay, those of an earlier import of this one are replaced; leaks are
    looked for in all of them together. ``output/import/<dataset>/`` gets ``refused.parquet``, ``scans.parquet``,
    ``leaks.parquet``, ``report.txt`` and ``record.json``.

    Args:
        scans: ``link``, ``copy`` or ``none``.
        drop_leaks: leave out what would be learnt and tested; see :func:`pipelines.datasets.leaks.without_leaks`.

    Raises:
        PhotonError: ``DATASET_UNKNOWN``, ``DATASET_UNREADABLE``, ``DATASET_EMPTY`` when no row is a question,
            ``OPTION_UNKNOWN``, ``INPUT_MISSING``, ``OUTPUT_UNWRITABLE``, ``OUTPUT_BUSY``, or
            ``QUESTIONS_UNREADABLE`` for a questions file that is there already.
    """
    adapter = _adapter(dataset)
    if scans not in MODES:
        raise PhotonError("OPTION_UNKNOWN", "--scans", f"'{scans}' is not {', '.join(MODES)}.", "Use one of these.")
    check_apart(output, input, options.images or input)
    assembled = assemble(adapter.name, adapter.drafts(input, options), rule)
    if not assembled.questions:
        counts = Counter(refusal.reason for refusal in assembled.refusals).most_common(3)
        fact = f"no row is a question ({'; '.join(f'{reason}: {count}' for reason, count in counts) or 'no rows'})."
        raise PhotonError("DATASET_EMPTY", input, fact, "Check that this is the dataset, and its options.")
    own = prepare_output_folder(output) / "import" / adapter.name
    prepare_output_folder(own)
    with lock_output(output):
        others = _others(output / _QUESTIONS, adapter.name)
        wanted = frozenset(question.scan_id for question in assembled.questions)
        table = pl.DataFrame(schema=SCANS_SCHEMA)
        missed: list[Refusal] = []
        if scans != "none":
            found, missed = _scan_files(adapter, input, wanted, options)
            images = output / "raw" / "images"
            table = place_scans(found, images, own / "scans.parquet", scans, on_progress, num_workers)
        refusals = [*assembled.refusals, *missed]
        voxels = _voxels(output / "import")
        questions = [*others, *assembled.questions]
        leaks = find_leaks(questions, voxels)
        kept = without_leaks(questions, voxels) if drop_leaks else questions
        write_questions(sorted(kept, key=lambda q: (q.scan_id, q.question_id)), output / _QUESTIONS)
        _write_parquet(leaks, own / "leaks.parquet")
        _write_parquet(_refused_table(refusals), own / "refused.parquet")
        num_asked = len(wanted) if scans != "none" else 0
        record = _record(adapter, output, Assembled(questions=kept, refusals=refusals), num_asked, table, leaks)
        record = dataclasses.replace(record, num_dropped=len(questions) - len(kept))
        record.write(own / "record.json")
        write_text(own / "report.txt", report_text(adapter, record, leaks, refusals, table))
    return record


def report_text(
    adapter: Adapter, record: ImportRecord, leaks: pl.DataFrame, refusals: Sequence[Refusal], scans: pl.DataFrame
) -> str:
    """What was imported, what was not and why, and what a reader of later scores has to know."""
    bad_scans = scans.filter(pl.col("status") != "ok")
    lines = [
        adapter.title,
        "",
        f"{record.num_questions} questions ({_counts(record.num_questions_by_split)}).",
        f"They ask about {record.num_scans_asked} scans: {record.num_scans_ok} are there, {record.num_scans_refused} "
        f"were refused, {record.num_scans_missing} were not found."
        if record.num_scans_asked
        else "Scans were not looked for.",
        f"By kind: {_counts(record.num_questions_by_kind)}.",
        *([f"{record.num_dropped} questions were left out because of leaks."] if record.num_dropped else []),
        "",
        f"Refused rows: {len(refusals)}",
        *(f"  {count:8} {reason}" for reason, count in record.refused_by_reason.items()),
        *_examples(f"{r.place.file}, row {r.place.row}: {r.reason}. {r.detail}".rstrip(". ") for r in refusals),
        "",
        f"Refused scans: {len(bad_scans)}",
        *_examples(f"{row['scan_id']}: [{row['status']}] {row['message']}" for row in bad_scans.to_dicts()),
        "",
        "Leaks and giveaways, of all questions in this data folder:",
        *_leak_lines(leaks),
        "",
        "To know about this dataset:",
        *(f"  * {note}" for note in adapter.notes),
    ]
    return "\n".join(lines) + "\n"


def _leak_lines(leaks: pl.DataFrame) -> Iterable[str]:
    for check, meaning in CHECKS.items():
        rows = leaks.filter(check=check).to_dicts()
        if not rows:
            continue
        yield f"  {check}: {len(rows)} ({meaning})"
        shown = (
            f"  {row['subject']}"
            + (f" in {' and '.join(row['splits'])}" if row["splits"] else "")
            + f", {row['num_questions']} questions"
            + ("" if row["value"] is None else f": {row['value']:.1%}")
            + (f" ({row['detail']})" if row["detail"] else "")
            for row in rows
        )
        yield from _examples(shown)
    if leaks.is_empty():
        yield "  none found"


def _examples(lines: Iterable[str]) -> Iterable[str]:
    whole = list(lines)
    yield from (f"    {line}" for line in whole[:_REPORT_ROWS])
    if len(whole) > _REPORT_ROWS:
        yield f"    ... and {len(whole) - _REPORT_ROWS} more in the table"


def _adapter(dataset: str) -> Adapter:
    if dataset not in DATASETS:
        known = ", ".join(DATASETS)
        raise PhotonError("DATASET_UNKNOWN", dataset, "there is no such dataset.", f"Choose one of: {known}.")
    return DATASETS[dataset]


def _scan_files(
    adapter: Adapter, folder: Path, wanted: frozenset[str], options: ImportOptions
) -> tuple[list[ScanFile], list[Refusal]]:
    found: list[ScanFile] = []
    missed: list[Refusal] = []
    for scan in adapter.scan_files(folder, wanted, options):
        if isinstance(scan, Refusal):
            missed.append(scan)
        else:
            found.append(scan)
    return found, missed


def _others(path: Path, dataset: str) -> list[Question]:
    """Questions of other datasets in a questions file that is there already."""
    if not path.is_file():
        return []
    return [q for q in read_questions(path) if not q.question_id.startswith(f"{dataset}.")]


def _voxels(folder: Path) -> dict[str, str]:
    """Scan id -> checksum of its voxels, over all imports into a data folder."""
    voxels: dict[str, str] = {}
    for path in sorted(folder.glob("*/scans.parquet")):
        for row in pl.read_parquet(path, memory_map=False).filter(status="ok").iter_rows(named=True):
            voxels[row["scan_id"]] = row["voxels_sha256"]
    return voxels


def _refused_table(refusals: Sequence[Refusal]) -> pl.DataFrame:
    rows = [{"file": r.place.file, "row": r.place.row, "reason": r.reason, "detail": r.detail} for r in refusals]
    return pl.DataFrame(rows, schema=REFUSED_SCHEMA, orient="row")


def _write_parquet(table: pl.DataFrame, path: Path) -> None:
    with atomic_path(path) as temporary:
        table.write_parquet(temporary, compression="uncompressed", statistics=False)


def _record(
    adapter: Adapter, output: Path, assembled: Assembled, num_asked: int, scans: pl.DataFrame, leaks: pl.DataFrame
) -> ImportRecord:
    own = [q for q in assembled.questions if q.question_id.startswith(f"{adapter.name}.")]
    statuses = Counter(scans["status"].to_list())
    reasons = Counter(refusal.reason for refusal in assembled.refusals)
    return ImportRecord(
        dataset=adapter.name,
        folder=str(output),
        report=str(output / "import" / adapter.name / "report.txt"),
        num_questions=len(own),
        num_questions_by_split=_ordered(Counter(q.split for q in own), SPLITS),
        num_questions_by_kind=dict(sorted(Counter(q.kind for q in own).items())),
        num_dropped=0,
        num_rows_refused=reasons.total(),
        refused_by_reason=dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        num_scans_asked=num_asked,
        num_scans_ok=statuses["ok"],
        num_scans_refused=len(scans) - statuses["ok"],
        num_scans_missing=num_asked - len(scans),
        scans_refused_by_code=dict(sorted((code, n) for code, n in statuses.items() if code != "ok")),
        num_leaks=leaks.filter(pl.col("check").is_in(BLOCKING)).height,
        leaks_by_check=dict(sorted(Counter(leaks["check"].to_list()).items())),
    )


def _ordered(counts: Counter[str], names: Iterable[str]) -> dict[str, int]:
    return {name: counts[name] for name in names if counts[name]}


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
