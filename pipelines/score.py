"""The score stage: an archive of scans in, one row a scan and question out.

One scan at a time is preprocessed, asked and written as an atomic part; a run that was killed goes on after
its last whole part, and a scan that cannot be read costs its own rows alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from photon.errors import PhotonError
from pipelines.answers import Answer, Answerer
from pipelines.files import lock_output, prepare_output_folder
from pipelines.questions import EVERY_SCAN, Question, read_questions, select
from pipelines.results import ScoreRecord
from pipelines.scans.find import Source, find_scans, read_source, source_sha256
from pipelines.score_store import (
    folder_digest,
    join_parts,
    part_key,
    read_part,
    score_frame,
    write_part,
)
from pipelines.volumes import Volume, VolumeSpec, read_volume, resample, write_volume

TABLE_FILE = "scores.parquet"
RECORD_FILE = "score.json"
VOLUMES_FOLDER = "volumes"
PARTS_FOLDER = "parts"
FAILED = "SCORING_FAILED"

OnProgress = Callable[[int, int, str], None]


class ScoringModel(Answerer, Protocol):
    """An answerer that says what volumes it wants and what it was trained on."""

    volume_spec: VolumeSpec
    config_digest: str
    data_version: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Job:
    """One scan and what is asked of it; ``scan`` is None for one that is not in the archive."""

    scan_id: str
    scan: Source | None
    questions: tuple[Question, ...]

    @property
    def source(self) -> str:
        """Where the scan lies in the archive."""
        return self.scan.relative if self.scan else ""


def score(
    archive: Path,
    questions: Path,
    model: Path,
    output: Path,
    *,
    model_version: str | None = None,
    question_ids: Sequence[str] | None = None,
    modality: str = "auto",
    answerer: ScoringModel | None = None,
    on_progress: OnProgress | None = None,
) -> ScoreRecord:
    """Ask every scan of an archive its questions; write ``scores.parquet`` and ``score.json`` to ``output``.

    The columns are those of :data:`pipelines.score_store.SCORE_SCHEMA`, ordered by scan and question.
    ``output/volumes`` gets every scan as the model saw it. Rows of finished scans live in ``output/parts``: a
    run with the same scans, questions and model takes them from there instead of asking again; parts of other
    models or questions are left alone and never mixed in. A refused scan is asked again only when its file
    has changed or could not be read; one that failed unexpectedly is always tried again.

    Args:
        archive: folder, searched with its sub-folders.
        questions: JSON lines file; a question with scan_id ``*`` is asked of every scan.
        model: exported model folder.
        output: folder to write to.
        model_version: what the rows call the model; without it, the start of the digest of its files.
        question_ids: ask these alone.
        modality: ``auto``, ``ct`` or ``mr``.
        answerer: what answers; default :class:`pipelines.runtime.OnnxAnswerer` of ``model``.
        on_progress: called with scans done, scans in all and the last scan's id.

    Raises:
        PhotonError: ``OUTPUT_UNWRITABLE``, ``OUTPUT_BUSY``, ``INPUT_MISSING``, ``ARCHIVE_EMPTY``,
            ``QUESTIONS_UNREADABLE``, ``UNKNOWN_QUESTION``, ``QUESTIONS_MISMATCH`` when no question is about
            any scan of the archive, ``MODALITY_UNKNOWN``, and what opening the model raises.
    """
    started = time.perf_counter()
    if modality not in ("auto", "ct", "mr"):
        raise PhotonError("MODALITY_UNKNOWN", modality, "it is not auto, ct or mr.", "Use one of these.")
    prepare_output_folder(output)
    with lock_output(output):
        jobs = _plan_jobs(archive, questions, question_ids)
        run = _Run(model, output, model_version, modality, answerer or _open_model(model))
        for number, job in enumerate(jobs, start=1):
            run.finish(job)
            if on_progress:
                on_progress(number, len(jobs), job.scan_id)
        record = ScoreRecord(
            table=str(join_parts(run.parts, output / TABLE_FILE)),
            num_scans=sum(job.scan is not None for job in jobs),
            rows=run.num_rows,
            failed_rows=run.num_failed,
            refused_scans=run.num_refused,
            resumed_rows=run.num_resumed,
            seconds=time.perf_counter() - started,
            model_version=run.model_version,
            data_version=run.answerer.data_version,
        )
        record.write(output / RECORD_FILE)
    return record


def _open_model(model: Path) -> ScoringModel:
    from pipelines.runtime import OnnxAnswerer

    return OnnxAnswerer(model)


def _plan_jobs(archive: Path, questions: Path, question_ids: Sequence[str] | None) -> list[_Job]:
    """One job for every scan that is asked something, in the archive or not, by scan id."""
    scans = {scan.scan_id: scan for scan in find_scans(archive)}
    asked = read_questions(questions)
    if question_ids is not None:
        asked = select(asked, list(dict.fromkeys(question_ids)))
    by_scan: dict[str, list[Question]] = defaultdict(list)
    for question in asked:
        for scan_id in scans if question.scan_id == EVERY_SCAN else (question.scan_id,):
            by_scan[scan_id].append(question)
    if not scans.keys() & by_scan.keys():
        raise PhotonError(
            "QUESTIONS_MISMATCH",
            questions,
            f"none of its {len(asked)} questions is about one of the {len(scans)} scans in {archive}.",
            "A question's scan_id is a scan's file name without .nii or .nii.gz, or * for every scan.",
        )
    return [
        _Job(
            scan_id=scan_id,
            scan=scans.get(scan_id),
            questions=tuple(sorted(by_scan[scan_id], key=lambda question: question.question_id)),
        )
        for scan_id in sorted(by_scan)
    ]


def _source_digest(job: _Job) -> str | None:
    """sha256 of the scan's bytes; None when they cannot be read, which may be another matter next time."""
    if job.scan is None:
        return ""
    try:
        return source_sha256(job.scan)
    except (OSError, PhotonError):
        return None


def _coded(error: Exception) -> tuple[str, str]:
    """Code and message of a row."""
    if isinstance(error, PhotonError):
        return error.code, f"{error.fact} {error.remedy}"
    return FAILED, f"{type(error).__name__}: {error}"


def _fault(answer: Answer, question: Question) -> str | None:
    """What is wrong with an answer, or None."""
    if answer.question_id != question.question_id:
        return f"the model answered {answer.question_id} instead."
    if not 0 <= answer.confidence <= 1 + 1e-6:  # NaN is neither; a float32 softmax may end just above 1
        return f"its confidence is {answer.confidence}, not a probability."
    if any(not 0 <= index < answer.num_tokens for index in answer.kept):
        return f"it kept a token that is not one of the scan's {answer.num_tokens}."
    return None


class _Run:
    """The scans of one run, finished one by one, and their counts."""

    def __init__(
        self, model: Path, output: Path, model_version: str | None, modality: str, answerer: ScoringModel
    ) -> None:
        self.answerer, self.modality, self.output = answerer, modality, output
        self.model_digest = folder_digest(model)
        self.model_version = model_version or f"sha256:{self.model_digest[:12]}"
        for folder in (VOLUMES_FOLDER, PARTS_FOLDER):
            prepare_output_folder(output / folder)
        # Half-written files of a killed run: the lock says that nobody is writing them.
        for leftover in output.glob("*/.*.tmp"):
            leftover.unlink(missing_ok=True)
        self.parts: list[Path] = []
        self.num_rows = self.num_failed = self.num_refused = self.num_resumed = 0

    def finish(self, job: _Job) -> None:
        """See that the part of this job exists and count its rows."""
        source_digest = _source_digest(job)
        part = self.output / PARTS_FOLDER / f"{self._key(job, source_digest)}.parquet"
        rows = read_part(part) if source_digest is not None else None
        if rows is not None and self._is_done(job, rows, source_digest):
            self.num_resumed += rows.height
        else:
            rows = self._rows(job)
            write_part(part, rows)
        self.parts.append(part)
        self.num_rows += rows.height
        self.num_failed += rows["error"].count()
        self.num_refused += job.scan is not None and rows["error"].null_count() == 0

    def _key(self, job: _Job, source_digest: str | None) -> str:
        return part_key(
            scan=[job.scan_id, job.source, source_digest],
            questions=[question.as_dict() for question in job.questions],
            model=[
                self.model_digest,
                self.model_version,
                self.answerer.data_version,
                self.answerer.config_digest,
            ],
            volume=[self.answerer.volume_spec.digest(), self.modality],
        )

    def _volume_path(self, job: _Job) -> Path:
        return self.output / VOLUMES_FOLDER / f"{job.scan_id}.safetensors"

    def _is_done(self, job: _Job, rows: pl.DataFrame, source_digest: str | None) -> bool:
        if (rows["error"] == FAILED).any():
            return False
        if rows["error"].null_count() == 0:
            return True
        try:
            volume = read_volume(self._volume_path(job), self.answerer.volume_spec)
        except PhotonError:
            return False
        return bool(volume.metadata["source_sha256"] == source_digest)

    def _rows(self, job: _Job) -> pl.DataFrame:
        """The rows of a job, whatever happens to it; only an interrupt ends the run."""
        if job.scan is None:
            return score_frame(self._failed(job, job.questions, "SCAN_MISSING", "the archive has no such scan."))
        try:
            self._volume_path(job).unlink(missing_ok=True)
            volume = resample(read_source(job.scan), self.answerer.volume_spec, self.modality)
            write_volume(volume, self._volume_path(job))
        except Exception as error:  # one scan must not cost the archive; its rows tell what happened
            return score_frame(self._failed(job, job.questions, *_coded(error)))
        return score_frame(self._ask(job, volume, job.questions))

    def _ask(self, job: _Job, volume: Volume, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Ask all at once; if that fails, one by one, so that a bad question costs its own row alone."""
        try:
            answers = self.answerer.answer(volume, questions)
            rows = [self._row(job, *pair) for pair in zip(questions, answers, strict=True)]
            score_frame(rows)
        except Exception as error:
            if len(questions) == 1:
                return self._failed(job, questions, *_coded(error))
            return [row for question in questions for row in self._ask(job, volume, [question])]
        return rows

    def _row(self, job: _Job, question: Question, answer: Answer) -> dict[str, Any]:
        if fault := _fault(answer, question):
            raise ValueError(fault)
        return self._identity(job, question) | {
            "answer": answer.text,
            "confidence": min(float(answer.confidence), 1.0),
            "num_tokens": answer.num_tokens,
            "num_kept": len(answer.kept),
            "kept": [int(index) for index in answer.kept],
            "seconds": float(answer.seconds),
        }

    def _failed(self, job: _Job, questions: Sequence[Question], code: str, message: str) -> list[dict[str, Any]]:
        return [self._identity(job, question) | {"error": code, "message": message} for question in questions]

    def _identity(self, job: _Job, question: Question) -> dict[str, Any]:
        return {
            "scan_id": job.scan_id,
            "source": job.source,
            "question_id": question.question_id,
            "question": question.question,
            "model_version": self.model_version,
            "data_version": self.answerer.data_version,
        }
