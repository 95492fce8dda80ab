"""CT-RATE: chest CT with findings and conversations.

Read are the label tables (``VolumeName`` and a 0/1 column for each of 18 findings), as one yes/no question a finding,
and the conversation files (a JSON list of ``{"image", "conversations"}``), as a text question a turn. Reports are not
asked about: they are longer than any answer that is generated here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.datasets.base import Draft, ImportOptions, Refusal, RowError, ScanFile
from pipelines.datasets.ct_rate_scans import find_ct_rate_scans, scan_name, split_of_name
from pipelines.datasets.tables import Row, csv_rows, files_below, header_of, json_rows, nothing_found, plain, words

FINDINGS = (
    "medical material",
    "arterial wall calcification",
    "cardiomegaly",
    "pericardial effusion",
    "coronary artery wall calcification",
    "hiatal hernia",
    "lymphadenopathy",
    "emphysema",
    "atelectasis",
    "lung nodule",
    "lung opacity",
    "pulmonary fibrotic sequela",
    "pleural effusion",
    "mosaic attenuation pattern",
    "peribronchial thickening",
    "consolidation",
    "bronchiectasis",
    "interlobular septal thickening",
)
_TAG = re.compile(r"<(?:image|video|long_answer|short_answer|multiple_choice|report_generation)>")
_REPORT = "<report_generation>"
_PLACEHOLDERS = ("<image>", "<video>")


class CtRate:
    """Reader of CT-RATE."""

    name = "ct-rate"
    title = "CT-RATE, chest CT with 18 labelled findings and conversations"
    notes: tuple[str, ...] = (
        "CT-RATE's valid patients are the test split; val is taken out of train by patient.",
        "The original files have blank headers: spacing, orientation and rescaling come from *_metadata.csv, into a "
        "copy of each scan with the same voxels. Files below a folder ending in _fixed are taken as they are.",
        "Slices of the original files are taken to follow each other towards the head when the table's orientation is "
        "the usual one; the table does not say.",
        "Every chest CT is checked for air near -1000 HU, which fails when rescaling is applied twice or not at all.",
        "Labels are those that a text classifier found in reports. Reports themselves are not asked about.",
        "The licence (CC BY-NC-SA 4.0) and the card of the dataset forbid passing on any part of it.",
    )

    def drafts(self, folder: Path, options: ImportOptions) -> Iterator[Draft | Refusal]:
        """Yes/no questions of the label tables, then turns of the conversations."""
        tables = [path for path in files_below(folder, ".csv") if _finding_columns(header_of(path))]
        conversations = [path for path in files_below(folder, ".json", ".jsonl") if "vqa" in path.as_posix().lower()]
        if not tables and not conversations:
            raise nothing_found(folder, "no table with VolumeName and findings and no conversations (*vqa*.json)")
        for path in tables:
            findings = _finding_columns(header_of(path))
            for row in csv_rows(path, folder):
                yield from [row] if isinstance(row, Refusal) else _label_drafts(row, findings)
        for path in conversations:
            for row in json_rows(path, folder):
                yield from [row] if isinstance(row, Refusal) else _conversation_drafts(row)

    def scan_files(self, folder: Path, wanted: frozenset[str], options: ImportOptions) -> Iterator[ScanFile | Refusal]:
        """Scans by their names below the images folder."""
        return find_ct_rate_scans(folder, wanted, options)


def _finding_columns(header: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in header if name in FINDINGS) if "volumename" in header else ()


def _label_drafts(row: Row, findings: tuple[str, ...]) -> Iterator[Draft | Refusal]:
    try:
        scan_id, patient_id, _ = scan_name(row.text("volumename"))
    except RowError as error:
        yield Refusal(place=row.place, reason=error.reason, detail=error.detail)
        return
    for finding in findings:
        value = row.content[finding]
        if value not in ("0", "1", "0.0", "1.0"):
            yield Refusal(place=row.place, reason="a label is neither 0 nor 1", detail=f"{finding}: {value!r}")
            continue
        yield Draft(
            place=row.place,
            identity=("label", scan_id, finding),
            scan_id=scan_id,
            patient_id=patient_id,
            split=split_of_name(scan_id),
            family="recognition",
            subtype=f"{finding} existence",
            kind="closed",
            question=f"Is there {finding} in this chest CT?",
            options=("yes", "no"),
            answer="yes" if float(value) else "no",
        )


def _conversation_drafts(row: Row) -> Iterator[Draft | Refusal]:
    try:
        scan_id, patient_id, _ = scan_name(row.text("image").rsplit("/", 1)[-1])
        turns = [_turn(turn) for turn in _list(row.content.get("conversations"))]
        if len(turns) % 2 or any(turn[0] != ("human", "gpt")[place % 2] for place, turn in enumerate(turns)):
            raise RowError("a conversation is no sequence of question and answer")
    except RowError as error:
        yield Refusal(place=row.place, reason=error.reason, detail=error.detail)
        return
    for (_, asked), (_, answer) in zip(turns[::2], turns[1::2], strict=True):
        if _REPORT in asked:
            yield Refusal(place=row.place, reason="it asks for a whole report")
            continue
        question = " ".join(_TAG.sub(" ", asked).split())
        yield Draft(
            place=row.place,
            identity=("conversation", scan_id, question, answer),
            scan_id=scan_id,
            patient_id=patient_id,
            split=split_of_name(scan_id),
            family="recognition",
            subtype=words(next((tag[1:-1] for tag in _TAG.findall(asked) if tag not in _PLACEHOLDERS), "turn")),
            kind="text",
            question=question,
            answer=answer,
        )


def _turn(turn: Any) -> tuple[str, str]:
    if not isinstance(turn, dict):
        raise RowError("a conversation is no sequence of question and answer")
    return plain(turn.get("from"), "from"), plain(turn.get("value"), "value")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RowError("there is no conversation")
    return value
