"""The stage: a folder of images and a folder of masks to a data folder with questions."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from photon.errors import PhotonError
from pipelines.datasets.splits import SPLITS, SplitRule
from pipelines.files import check_apart, lock_output, prepare_output_folder, write_json, write_text
from pipelines.mask_questions.ask import Asked, Identity, ask
from pipelines.mask_questions.candidates import NotAsked
from pipelines.mask_questions.data_folder import prepare_data_folder, put_scan
from pipelines.mask_questions.names import Description, read_description
from pipelines.mask_questions.pairs import Pair, find_pairs
from pipelines.mask_questions.rules import Reason, Rules
from pipelines.mask_questions.segmentation import combine, label_values
from pipelines.mask_questions.wording import in_words_of_train
from pipelines.questions import Question, write_questions
from pipelines.results import Record
from pipelines.scans.find import read_source
from pipelines.scans.nifti import write_scan
from pipelines.scans.scan import Scan
from pipelines.volumes import DARK_HU, infer_modality
from pipelines.workers import run_in_processes

Progress = Callable[[int, int, str], None]

AIR_HU = -900
"""A scan of unknown modality is taken for CT only if it reaches down to air."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskQuestionsRecord(Record):
    """What `photon questions` made of images and masks.

    `not_asked` counts the questions that were considered and left out, by reason; `same_everywhere` lists subtype
    and structure of questions that were asked of several scans and have one answer in all of them.
    """

    folder: str
    num_scans: int
    num_refused: int
    refused_by_code: dict[str, int]
    num_patients: int
    num_questions: int
    num_questions_by_split: dict[str, int]
    num_questions_by_family: dict[str, int]
    num_questions_by_subtype: dict[str, int]
    not_asked: dict[str, int]
    same_everywhere: list[str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Choices of a run.

    Args:
        rules: when a question may be asked.
        split: how patients are divided.
        is_size_told: say in questions about millimetres how large the scan is.
        drops_same: leave out questions that have one answer in all of several scans.
    """

    rules: Rules = dataclasses.field(default_factory=Rules)
    split: SplitRule = dataclasses.field(default_factory=SplitRule)
    is_size_told: bool = False
    drops_same: bool = False


COLUMNS = ("scan_id", "patient_id", "split", "modality", "unit", "status", "message")
"""Of ``raw/scans.csv``."""


def make_questions(
    images: Path,
    masks: Path,
    names: Path,
    output: Path,
    options: Options | None = None,
    *,
    on_progress: Progress | None = None,
    num_workers: int = 1,
) -> MaskQuestionsRecord:
    """Compute questions from segmentations, as a data folder that preprocessing and training read.

    Writes ``raw/images/`` (the scans themselves: hard links, or copies on another disk), ``raw/labels/<scan_id>.nii``,
    ``raw/labels.json``, ``raw/scans.csv`` (every scan, usable or not), ``raw/not_asked.csv`` (every question that was
    left out, with its reason) and ``questions.jsonl``. The result does not depend on ``num_workers``.

    Args:
        names: the names file, see :func:`pipelines.mask_questions.names.read_description`.

    Raises:
        PhotonError: ``NAMES_INVALID``, ``INPUT_MISSING``, ``ARCHIVE_EMPTY``, ``PAIRS_MISSING``,
            ``OUTPUT_UNWRITABLE``, ``OUTPUT_MISPLACED``, ``OUTPUT_BUSY``, ``QUESTIONS_UNREADABLE`` for a questions file
            that is there already, ``DATA_FOREIGN`` when the data folder holds other scans.
            What is wrong with one scan or its masks becomes the ``status`` of its row.
    """
    options = options or Options()
    check_apart(output, images, masks)
    description = read_description(names)
    pairs = find_pairs(images, masks, description)
    with lock_output(prepare_output_folder(output)):
        prepare_data_folder(output, {pair.scan_id for pair in pairs})
        jobs = [_Job(pair, description, output, options) for pair in pairs]
        return _make(jobs, description, output, options, on_progress, num_workers)


def _make(
    jobs: Sequence[_Job],
    description: Description,
    output: Path,
    options: Options,
    on_progress: Progress | None,
    num_workers: int,
) -> MaskQuestionsRecord:
    results = []
    for result in _each(jobs, num_workers):
        results.append(result)
        if on_progress:
            on_progress(len(results), len(jobs), result.row["scan_id"])
    results.sort(key=lambda result: result.row["scan_id"])
    wordings = {key: texts for result in results for key, texts in result.asked.wordings.items()}
    questions, wordless = in_words_of_train([q for result in results for q in result.asked.questions], wordings)
    left_out = [(result.row["scan_id"], one) for result in results for one in result.asked.not_asked]
    left_out += [_left_out(question, "words not in train") for question in wordless]
    same = _same_everywhere(questions)
    if options.drops_same:
        left_out += [_left_out(q, "same answer everywhere") for q in questions if _without_scan(q) in same]
        questions = [question for question in questions if _without_scan(question) not in same]
    write_json(output / "raw" / "labels.json", label_values(description))
    write_text(output / "raw" / "scans.csv", _table(COLUMNS, (list(result.row.values()) for result in results)))
    rows = ((scan_id, one.subtype, one.about, one.reason) for scan_id, one in left_out)
    write_text(output / "raw" / "not_asked.csv", _table(("scan_id", "subtype", "about", "reason"), rows))
    write_questions(questions, output / "questions.jsonl")
    refused = Counter(result.row["status"] for result in results if result.row["status"] != "ok")
    return MaskQuestionsRecord(
        folder=str(output),
        num_scans=len(results) - sum(refused.values()),
        num_refused=sum(refused.values()),
        refused_by_code=dict(sorted(refused.items())),
        num_patients=len({question.patient_id for question in questions}),
        num_questions=len(questions),
        num_questions_by_split={split: sum(q.split == split for q in questions) for split in SPLITS},
        num_questions_by_family=_counts(question.family for question in questions),
        num_questions_by_subtype=_counts(question.subtype for question in questions),
        not_asked=_counts(one.reason for _, one in left_out),
        same_everywhere=same,
    )


@dataclasses.dataclass(frozen=True)
class _Job:
    pair: Pair
    description: Description
    output: Path
    options: Options


@dataclasses.dataclass(frozen=True)
class _Result:
    row: dict[str, str]
    asked: Asked


_NOTHING = Asked(questions=[], wordings={}, not_asked=[])


def _each(jobs: Sequence[_Job], num_workers: int) -> Iterator[_Result]:
    if num_workers == 1:
        yield from map(_result, jobs)
        return
    for job, result in run_in_processes(_result, jobs, num_workers):
        message = "The process reading it was killed, perhaps for want of memory. Try it with fewer workers."
        yield result or _Result(_row(job) | {"status": "WORKER_KILLED", "message": message}, _NOTHING)


def _row(job: _Job) -> dict[str, str]:
    pair = job.pair
    split = job.options.split.split_of(pair.patient_id, "", False)
    return dict.fromkeys(COLUMNS, "") | {"scan_id": pair.scan_id, "patient_id": pair.patient_id, "split": split}


def _result(job: _Job) -> _Result:
    """Questions about one scan; its label map and the scan itself are put into the data folder on the way."""
    row = _row(job)
    try:
        return _asked(job, row)
    except PhotonError as error:
        if error.code == "OUTPUT_UNWRITABLE":
            raise
        return _Result(row | {"status": error.code, "message": f"{error.fact} {error.remedy}"}, _NOTHING)


def _asked(job: _Job, row: dict[str, str]) -> _Result:
    pair, description = job.pair, job.description
    if not pair.masks:
        remedy = "Leave it out, or outline it too."
        raise PhotonError("MASK_MISSING", pair.scan_id, "the scan has no mask.", remedy)
    scan = read_source(pair.image)
    who, notes = _identity(scan, pair, description, row["split"])
    segmentation = combine(scan, _masks(pair, description), description, is_ct=who.modality == "ct")
    asked = ask(segmentation, description, who, job.options.rules, is_size_told=job.options.is_size_told)
    folder = job.output / "raw"
    try:
        write_scan(segmentation.labels, scan.affine, folder / "labels" / f"{pair.scan_id}.nii")
        put_scan(scan, pair, folder / "images")
    except OSError as error:
        fact = f"the scan cannot be written ({error.strerror or error})."
        raise PhotonError("OUTPUT_UNWRITABLE", folder, fact, "Free space, or choose another folder.") from error
    message = "; ".join([*notes, *segmentation.notes])
    return _Result(row | {"modality": who.modality, "unit": who.unit, "status": "ok", "message": message}, asked)


def _identity(scan: Scan, pair: Pair, description: Description, split: str) -> tuple[Identity, list[str]]:
    """Whose scan it is and what its values are; the scan's own word on its modality goes before the names file's."""
    told = description.modality.get(pair.modality, "")
    notes = []
    if scan.modality and told and scan.modality != told:
        notes.append(f"the file says {scan.modality}, the names file {told}; the file is believed")
    modality = scan.modality or told
    if not modality and infer_modality(scan.array) == "ct" and float(scan.array.min()) <= AIR_HU:
        modality = "ct"
        notes.append("modality inferred")
    unit = ""
    if modality == "ct" and float(scan.array.min()) < DARK_HU:
        unit = "HU"
    elif modality == "pt":
        unit = description.pet_unit
    return Identity(scan_id=pair.scan_id, patient_id=pair.patient_id, split=split, modality=modality, unit=unit), notes


def _masks(pair: Pair, description: Description) -> Iterator[tuple[str, Scan]]:
    keys = [""] if description.is_label_map else [s.key for s in description.structures if s.key in pair.masks]
    for key in keys:
        try:
            mask = read_source(pair.masks[key], is_labels=True)
        except PhotonError as error:
            fact = f"the mask {pair.masks[key].relative}: {error.fact}"
            raise PhotonError(error.code, error.subject, fact, error.remedy) from error
        yield key, mask


def _same_everywhere(questions: Iterable[Question]) -> list[str]:
    """Questions asked of several scans that have one answer: a model can answer them without looking."""
    answers: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        answers[_without_scan(question)].append(question.answer)
    return sorted(name for name, given in answers.items() if len(given) > 1 and len(set(given)) == 1)


def _without_scan(question: Question) -> str:
    return question.question_id.removeprefix(f"{question.scan_id}.")


def _left_out(question: Question, reason: Reason) -> tuple[str, NotAsked]:
    return question.scan_id, NotAsked(subtype=question.subtype, about=question.organ, reason=reason)


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()
