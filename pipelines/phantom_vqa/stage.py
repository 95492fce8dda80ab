"""The PhantomVQA archive on disk: a data folder like any other, made by several processes, always the same bytes."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

from photon.errors import PhotonError
from pipelines.files import prepare_output_folder, write_json, write_text
from pipelines.phantom_vqa.ask import questions_about
from pipelines.phantom_vqa.cohort import VQA_LABELS, PhantomVqaSpec, Subject, plan_cohort
from pipelines.phantom_vqa.scans import make_scan
from pipelines.questions import Question, write_questions
from pipelines.results import DataRecord
from pipelines.scans.nifti import write_scan
from pipelines.workers import default_num_workers, run_in_processes

Progress = Callable[[int, int, str], None]

SPEC_FILE = "phantom_vqa.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Work:
    subject: Subject
    spec: PhantomVqaSpec
    raw: Path


def generate(
    spec: PhantomVqaSpec, output: Path, on_progress: Progress | None = None, *, num_workers: int | None = None
) -> DataRecord:
    """Write ``raw/images``, ``raw/labels``, ``raw/labels.json``, ``raw/scans.csv``, ``raw/phantom_vqa.json`` (the spec)
    and ``questions.jsonl``.

    Args:
        num_workers: processes; default one a core that has memory. The bytes do not depend on it.

    Raises:
        PhotonError: ``OUTPUT_UNWRITABLE``; ``WORKER_KILLED`` when the system ended a process.
    """
    raw = output / "raw"
    for name in ("images", "labels"):
        prepare_output_folder(raw / name)
    subjects = plan_cohort(spec)
    jobs = [_Work(subject=subject, spec=spec, raw=raw) for subject in subjects]
    asked: dict[str, list[Question]] = {}
    for work, questions in run_in_processes(_do, jobs, num_workers or default_num_workers()):
        if questions is None:
            fact = "the process that made this scan was killed, as when memory runs out."
            raise PhotonError("WORKER_KILLED", work.subject.scan_id, fact, "Run it again with fewer workers.")
        asked[work.subject.scan_id] = questions
        if on_progress:
            on_progress(len(asked), len(jobs), work.subject.scan_id)
    write_json(raw / "labels.json", VQA_LABELS)
    write_json(raw / SPEC_FILE, dataclasses.asdict(spec))
    write_text(raw / "scans.csv", _scans_table(subjects))
    ordered = [question for subject in subjects for question in asked[subject.scan_id]]
    write_questions(ordered, output / "questions.jsonl")
    return DataRecord(
        folder=str(output),
        num_scans=len(subjects),
        num_patients=len(subjects),
        num_questions=len(ordered),
        num_questions_by_split={split: sum(q.split == split for q in ordered) for split in ("train", "val", "test")},
    )


def _do(work: _Work) -> list[Question]:
    subject = work.subject
    scan = make_scan(subject, work.spec)
    write_scan(scan.hu, scan.affine, work.raw / "images" / f"{subject.scan_id}.nii")
    write_scan(scan.labels, scan.affine, work.raw / "labels" / f"{subject.scan_id}.nii")
    questions = questions_about(
        scan.hu, scan.labels, scan.affine, scan_id=subject.scan_id, split=subject.split, asked=subject.asked
    )
    chosen = work.spec.subtypes
    return [question for question in questions if chosen is None or question.subtype in chosen]


def _scans_table(subjects: list[Subject]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("scan_id", "patient_id", "visit", "split"))
    writer.writerows((subject.scan_id, subject.scan_id, 1, subject.split) for subject in subjects)
    return text.getvalue()
