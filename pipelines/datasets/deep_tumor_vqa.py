"""DeepTumorVQA, versions 1 and 2: questions about abdominal CT of AbdomenAtlas.

Column names differ between the two versions and between their copies (``image_id``, ``Image ID``, ``question type``),
so they are compared without case, ``_`` and ``-``. Whether an answer is a number, yes or no, or a word is told by its
subtype and by the answer itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pipelines.datasets.abdomen_atlas_scans import find_atlas_scans, patients_of, scan_name
from pipelines.datasets.base import Draft, ImportOptions, Refusal, RowError, ScanFile
from pipelines.datasets.tables import Row, csv_rows, files_below, header_of, json_rows, nothing_found, words
from pipelines.datasets.texts import AnswerShape, quantity, split_choices, yes_no_options

NUMERIC = frozenset(
    {
        "organ volume",
        "organ hu",
        "organ hu ratio",
        "lesion volume",
        "tumor burden percentage",
        "lesion counting",
        "lesion count by location",
        "largest lesion diameter",
        "largest lesion slice",
        "organ aggregation",
        "tumor organ hu difference",
    }
)
"""Subtypes, without the word measurement, whose answers are numbers."""

_NEEDED = ({"image id", "bdmap id"}, {"question"}, {"question type"}, {"question subtype"})
_CHOICES = ("multiple choice question", "mc question")
_LETTER = re.compile(r"\(?([A-Fa-f])\)?(?:[.:].*)?")
_NOTHING = ("", "-", "nan", "none", "null", "n/a")


class DeepTumorVqa:
    """Reader of one version of DeepTumorVQA.

    Version 1 has train and validation; the latter is what results are reported on, and so our test split. Version 2
    has all three.
    """

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = f"deeptumorvqa-v{version}"
        self.title = f"DeepTumorVQA {version}.0, questions about tumours in abdominal CT"
        splits = "its validation rows are the test split, and val is taken out of train by patient"
        self.notes: tuple[str, ...] = (
            f"Splits: {splits if version == 1 else 'train, the val pool and the benchmark, as they are'}.",
            "Free text questions are imported, or the multiple choice form with letters as answers (form choice). "
            "Numbers are scored by mean relative accuracy, of which the dataset and the Photon paper have different "
            "definitions: mra_linear_v2 and mra_threshold_photon.",
            "Volumes and diameters are in the scan's millimetres: ask them on a grid of fixed spacing, not on one that "
            "stretches every scan. The slice number of a lesion counts slices of the original file; after resampling "
            "no model can see it.",
            "Sex and age are not read.",
            "Every BDMAP id counts as a patient, save where AbdomenAtlas_ID_mapping.csv is there and gives two ids one "
            "origin. The same scan is known to hide under two ids: import the scans too, and see the leaks.",
        )

    def drafts(self, folder: Path, options: ImportOptions) -> Iterator[Draft | Refusal]:
        """Rows of every CSV, JSON or JSONL file with the dataset's columns."""
        patients = patients_of(folder)
        is_found = False
        for path in _tables(folder):
            rows = csv_rows(path, folder) if path.suffix == ".csv" else json_rows(path, folder, list_key="questions")
            for row in rows:
                is_found = True
                if isinstance(row, Refusal):
                    yield row
                    continue
                try:
                    yield self._draft(row, path, patients, options.form)
                except RowError as error:
                    yield Refusal(place=row.place, reason=error.reason, detail=error.detail)
        if not is_found:
            raise nothing_found(folder, "no table with image_id, question, question_type and question_subtype")

    def scan_files(self, folder: Path, wanted: frozenset[str], options: ImportOptions) -> Iterator[ScanFile | Refusal]:
        """``<id>/ct.nii.gz`` or ``<id>.nii.gz`` below the images folder."""
        return find_atlas_scans(options.images or folder, wanted)

    def _draft(self, row: Row, path: Path, patients: dict[str, str], form: str) -> Draft:
        scan_id = scan_name(row.text("image id", "bdmap id"))
        subtype, family = words(row.text("question subtype")), words(row.text("question type"))
        if form == "choice":
            question, answer = row.text(*_CHOICES), _letter(row.text("correct option"))
            shape: AnswerShape = ("closed", tuple(split_choices(question)[1]), None, "")
        else:
            question, answer = row.text("question"), row.text("answer")
            shape = _answer_shape(row, subtype, answer)
        kind, choices, value, unit = shape
        organ = words(row.optional("organ"))
        return Draft(
            place=row.place,
            # Both the number and the words: the tables of a version may number their rows each from 1.
            identity=(form, row.optional("question id", "qid"), question, scan_id),
            scan_id=scan_id,
            patient_id=patients.get(scan_id, scan_id),
            split=self._split(row, path),
            family=family,
            subtype=subtype,
            organ="" if organ in _NOTHING else organ,
            kind=kind,
            question=question,
            options=choices,
            answer=answer,
            value=value,
            unit=unit,
        )

    def _split(self, row: Row, path: Path) -> str:
        given = words(row.optional("split")) or words(path.stem)
        first = given.split()[0] if given else ""
        names = {"train": "train", "training": "train", "test": "test"}
        names |= dict.fromkeys(("val", "valid", "validation"), "test" if self.version == 1 else "val")
        if first not in names:
            raise RowError("neither the row nor the file's name says the split", path.name)
        return names[first]


def _tables(folder: Path) -> Iterator[Path]:
    """Tables of the dataset; of a ``.json`` and a ``.jsonl`` file of one name, which hold the same, the latter."""
    found = files_below(folder, ".csv", ".json", ".jsonl")
    names = set(found)
    for path in found:
        if path.suffix == ".csv":
            columns = set(header_of(path))
            if all(columns & needed for needed in _NEEDED):
                yield path
        elif path.with_suffix(".jsonl") not in names - {path} or path.suffix == ".jsonl":
            first = next(iter(json_rows(path, folder, list_key="questions")), None)
            if isinstance(first, Refusal) or (first and all(set(first.content) & needed for needed in _NEEDED)):
                yield path


def _letter(text: str) -> str:
    """The letter of an option, as ``B``, ``(b)`` or ``B: liver``."""
    found = _LETTER.fullmatch(text)
    if found is None:
        raise RowError("the correct option is no letter", repr(text[:80]))
    return found[1].upper()


def _answer_shape(row: Row, subtype: str, answer: str) -> AnswerShape:
    if subtype.removesuffix(" measurement") in NUMERIC:
        value, unit = quantity(answer) or (None, "")
        return "number", (), value, unit
    if pair := yes_no_options(answer):
        return "closed", pair, None, ""
    text = row.optional(*_CHOICES)
    if text:
        try:
            choices = tuple(split_choices(text)[1].values())
        except RowError:
            return "text", (), None, ""
        if answer in choices and len(set(choices)) == len(choices):
            return "closed", choices, None, ""
    return "text", (), None, ""
