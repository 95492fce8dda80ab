"""The evaluate stage: one split's questions answered with pruning, without, blind and by majority, then
scored."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from photon.errors import PhotonError
from pipelines import summaries
from pipelines.answers import POLICIES, Answer, Answerer, question_columns, write_answers
from pipelines.baselines import MajorityAnswerer
from pipelines.files import prepare_output_folder
from pipelines.manifest import MANIFEST_NAME, read_manifest
from pipelines.metrics import is_parse_failure, score_answer
from pipelines.questions import Question, read_questions
from pipelines.regions import BoolArray, Retention, organ_tokens, read_organ_masks, retention
from pipelines.results import EvaluateRecord
from pipelines.tracking import NullTracker, Tracker
from pipelines.volumes import read_volume

if TYPE_CHECKING:
    from photon.ops.backend import Backend
    from photon.training.optimiser import Precision
    from pipelines.predict import ClosedBy

ANSWERS_FILE = "answers.parquet"
RECORD_FILE = "evaluation.json"

Progress = Callable[[int, int, str], None]

OpenAnswerer = Callable[[Path, str], Answerer]
"""From a checkpoint folder and a policy (photon, all_tokens or blind) to what answers with it."""


def evaluate(
    checkpoint: Path,
    data: Path,
    output: Path,
    *,
    blind_checkpoint: Path,
    split: str = "test",
    data_version: str,
    closed_by: ClosedBy = "generation",
    device: str = "cpu",
    precision: Precision = "float32",
    backend: Backend = "auto",
    tracker: Tracker | None = None,
    on_progress: Progress | None = None,
    open_answerer: OpenAnswerer | None = None,
) -> EvaluateRecord:
    """Answer and score every question of ``split``.

    Writes ``answers.parquet`` (:data:`pipelines.answers.ANSWER_SCHEMA`) and ``evaluation.json`` to
    ``output``.

    Args:
        checkpoint: trained model, answering once with pruning and once with all tokens.
        data: folder with ``questions.jsonl``, ``volumes/`` and, for the organ tables, ``raw/labels/``.
        output: folder for the two files.
        blind_checkpoint: model trained on the questions alone, answering without a volume.
        split: which questions.
        data_version: DVC version of ``data``, copied into the record.
        closed_by: whether models answer closed questions in their own words or by the likeliest option.
        device: where models run: "cpu", "cuda" or "auto".
        precision: of weights and arithmetic, "float32" or "bfloat16".
        backend: implementation of the pruning operators, "auto", "reference" or "triton".
        tracker: gets the summary numbers and the record; default none.
        on_progress: called with scans done, scans in all and the scan just done.
        open_answerer: what opens a model; default :class:`pipelines.predict.TorchAnswerer`.

    Raises:
        PhotonError: ``SPLIT_EMPTY`` when no accepted scan has questions in ``split``, and what reading
        questions, manifest, volumes and
            checkpoints and writing ``output`` raise.
    """
    prepare_output_folder(output)
    questions = read_questions(data / "questions.jsonl")
    volumes = _volume_paths(data / "volumes")
    in_split = sorted((q for q in questions if q.split == split), key=lambda q: (q.scan_id, q.question_id))
    asked = [q for q in in_split if q.scan_id in volumes]
    if not asked:
        known = ", ".join(sorted({q.split for q in questions}))
        raise PhotonError(
            "SPLIT_EMPTY",
            data,
            f"no accepted scan has questions in split {split!r} ({len(in_split)} questions; known: {known}).",
            "Choose a split that has questions, and preprocess its scans first.",
        )
    open_answerer = open_answerer or functools.partial(
        _open_torch_answerer, closed_by=closed_by, device=device, precision=precision, backend=backend
    )
    answerers: dict[str, Answerer] = {
        "photon": open_answerer(checkpoint, "photon"),
        "all_tokens": open_answerer(checkpoint, "all_tokens"),
        "blind": open_answerer(blind_checkpoint, "blind"),
        "majority": MajorityAnswerer([q for q in questions if q.split == "train"]),
    }
    rows: list[dict[str, Any]] = []
    num_scans = len({q.scan_id for q in asked})
    for num_done, (scan_id, group) in enumerate(groupby(asked, key=lambda q: q.scan_id), start=1):
        rows += _answer_scan(data, volumes[scan_id], list(group), answerers)
        if on_progress:
            on_progress(num_done, num_scans, scan_id)
    table = write_answers(rows, output / ANSWERS_FILE)
    record = EvaluateRecord(
        accuracy=dict(summaries.accuracy_by_policy(table)),
        differences=dict(summaries.differences(table)),
        tokens=summaries.tokens(table),
        breakdown=summaries.breakdown(table),
        findings=summaries.findings(table),
        regions=summaries.regions(table),
        diagnostics=summaries.diagnostics(table),
        answers=str(output / ANSWERS_FILE),
        num_questions_skipped=len(in_split) - len(asked),
        split=split,
        closed_by=closed_by,
        data_version=data_version,
    )
    path = record.write(output / RECORD_FILE)
    tracker = tracker or NullTracker()
    tracker.log_summary(summaries.flat_metrics(record.as_dict()))
    tracker.log_artifact(path, "evaluate")  # not the table: it names patients
    return record


def _volume_paths(folder: Path) -> dict[str, Path]:
    """The volume file of every scan that preprocessing accepted."""
    accepted = read_manifest(folder / MANIFEST_NAME).filter(status="ok")
    return {scan_id: folder / name for scan_id, name in accepted.select("scan_id", "volume").iter_rows()}


def _answer_scan(
    data: Path, volume_path: Path, questions: Sequence[Question], answerers: Mapping[str, Answerer]
) -> Iterator[dict[str, Any]]:
    """Rows of :data:`pipelines.answers.ANSWER_SCHEMA` for questions about one scan, all policies."""
    scan_id = questions[0].scan_id
    volume = read_volume(volume_path)
    organs = read_organ_masks(data, scan_id, volume.spec, {q.organ for q in questions})
    masks = {organ: organ_tokens(mask) for organ, mask in organs.items()}
    for policy in POLICIES:
        is_seeing = policy in ("photon", "all_tokens")
        answers = answerers[policy].answer(volume if is_seeing else None, questions)
        if [answer.question_id for answer in answers] != [q.question_id for q in questions]:
            raise ValueError(f"policy {policy} did not answer the questions of {scan_id} in their order")
        unasked = _unasked_shares(questions, answers, masks) if is_seeing else {}
        for question, answer in zip(questions, answers, strict=True):
            mask = masks.get(question.organ) if is_seeing else None
            counts = retention(answer.kept, answer.num_tokens, mask)
            yield _row(policy, question, answer, counts if mask is not None else None, counts.num_kept) | {
                "organ_share_unasked": unasked.get(question.organ)
            }


def _row(policy: str, question: Question, answer: Answer, organ: Retention | None, num_kept: int) -> dict[str, Any]:
    return {
        "policy": policy,
        **question_columns(question),
        "predicted": answer.text,
        "score": score_answer(question, answer.text),
        "is_unparsed": is_parse_failure(question, answer.text),
        "confidence": answer.confidence,
        "num_tokens": answer.num_tokens,
        "num_kept": num_kept,
        "kept": list(answer.kept) if policy == "photon" else [],
        "organ_tokens": organ.organ_tokens if organ else None,
        "organ_tokens_kept": organ.organ_tokens_kept if organ else None,
        "seconds": answer.seconds,
    }


def _unasked_shares(
    questions: Sequence[Question], answers: Sequence[Answer], masks: Mapping[str, BoolArray]
) -> dict[str, float]:
    """Mean share of each organ's tokens that questions about something else kept in the same scan."""
    shares = {}
    for organ, mask in masks.items():
        counts = [
            retention(answer.kept, answer.num_tokens, mask).organ_share
            for question, answer in zip(questions, answers, strict=True)
            if question.organ != organ
        ]
        known = [share for share in counts if share is not None]
        if known:
            shares[organ] = float(np.mean(known))
    return shares


def _open_torch_answerer(
    checkpoint: Path, policy: str, *, closed_by: ClosedBy, device: str, precision: Precision, backend: Backend
) -> Answerer:
    from pipelines.predict import TorchAnswerer  # torch is slow to import, and tests need no model

    return TorchAnswerer(
        checkpoint, policy=policy, closed_by=closed_by, device=device, precision=precision, backend=backend
    )
