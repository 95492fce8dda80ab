"""Conversations as the public Photon is trained on: ``{"messages": [...], "videos": [...]}``, a list or lines.

``<video>`` in a message stands for the scan. ``video`` is taken for ``videos``, and one path for a list of one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.datasets.base import Draft, ImportOptions, Place, Refusal, RowError, ScanFile
from pipelines.datasets.ct_rate_scans import scan_name as ct_rate_name
from pipelines.datasets.tables import Row, files_below, json_rows, nothing_found, plain, words
from pipelines.datasets.texts import AnswerShape, quantity, split_choices, yes_no_options
from pipelines.questions import FAMILIES
from pipelines.scans.find import scan_id_of

VIDEO = "<video>"
_ENDINGS = (".nii", ".nii.gz")


class Chat:
    """Reader of chat JSON."""

    name = "chat"
    title = "conversations about scans, in the JSON of the public Photon (messages, videos)"
    notes: tuple[str, ...] = (
        "The file does not say which patient a scan is of. Names of CT-RATE tell; of other files each folder and name "
        "counts as a patient of its own, so give one name to one patient before splitting by it.",
        "The split is the first of train, val and test that the file's name holds, else by a checksum of the patient.",
        "Answers that are yes or no become closed questions, as do those that are a choice listed in the question; "
        "bare numbers become numbers; all others are texts. Family and subtype are read where rows have them.",
        "Conversations of more than one question are refused: later ones lean on earlier answers. System "
        "messages are left out; words before <video> come after the scan, as all words do here.",
        "Conversations about two scans or none are refused.",
    )

    def drafts(self, folder: Path, options: ImportOptions) -> Iterator[Draft | Refusal]:
        """Samples of every .json and .jsonl file whose first row has messages."""
        is_found = False
        for path in files_below(folder, ".json", ".jsonl"):
            rows = json_rows(path, folder)
            first = next(rows, None)
            if not isinstance(first, Row) or "messages" not in first.content:
                continue
            is_found = True
            for row in (first, *rows):
                if isinstance(row, Refusal):
                    yield row
                    continue
                try:
                    yield _draft(row, path)
                except RowError as error:
                    yield Refusal(place=row.place, reason=error.reason, detail=error.detail)
        if not is_found:
            raise nothing_found(folder, "no .json or .jsonl file of messages and videos")

    def scan_files(self, folder: Path, wanted: frozenset[str], options: ImportOptions) -> Iterator[ScanFile | Refusal]:
        """Scans by the paths that the rows name: as they are, below the folder, or below the images folder."""
        images = options.images or folder
        by_name: dict[str, list[Path]] = {}
        for path in files_below(images, *_ENDINGS):
            by_name.setdefault(_scan_name(path.relative_to(images).as_posix())[0], []).append(path)
        for scan_id, named in sorted(_named_paths(self, folder, options, wanted).items()):
            candidates = [path for path in (Path(named), folder / named, images / named) if path.is_file()]
            same_name = by_name.get(scan_id, [])
            if candidates or len(same_name) == 1:
                yield ScanFile(scan_id=scan_id, path=(candidates or same_name)[0])
            elif same_name:
                place = Place(file=named, row=0)
                yield Refusal(place=place, reason="two files have the scan's name", detail=scan_id)


def _named_paths(reader: Chat, folder: Path, options: ImportOptions, wanted: frozenset[str]) -> dict[str, str]:
    """Wanted scan id -> the path that the rows have for it."""
    named: dict[str, str] = {}
    for path in files_below(folder, ".json", ".jsonl"):
        for row in json_rows(path, folder):
            if isinstance(row, Refusal) or "messages" not in row.content:
                continue
            try:
                video = _video(row)
            except RowError:
                continue
            scan_id = _scan_name(video)[0]
            if scan_id in wanted:
                named.setdefault(scan_id, video)
    return named


def _draft(row: Row, path: Path) -> Draft:
    video = _video(row)
    scan_id, patient_id = _scan_name(video)
    asked, answer = _first_turn(row.content["messages"])
    if asked.count(VIDEO) > 1:
        raise RowError("it is about more than one scan", f"{asked.count(VIDEO)} {VIDEO} tags")
    question = " ".join(asked.replace(VIDEO, " ").split())
    kind, options, value, unit = _answer_shape(question, answer)
    family = words(row.optional("family", "question type"))
    return Draft(
        place=row.place,
        identity=(row.optional("question id", "qid", "id"), scan_id, question, *([] if kind == "closed" else [answer])),
        scan_id=scan_id,
        patient_id=patient_id,
        split=_split(path),
        family=family if family in FAMILIES else "recognition",
        subtype=words(row.optional("subtype", "question subtype")) or "conversation",
        kind=kind,
        question=question,
        options=options,
        answer=answer,
        value=value,
        unit=unit,
    )


def _video(row: Row) -> str:
    """The one scan of a row, as its path is written there."""
    given = row.content.get("videos", row.content.get("video"))
    paths = [given] if isinstance(given, str) else given
    if not paths:
        raise RowError("it is about no scan")
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise RowError("videos is no list of paths", json.dumps(given)[:80])
    if len(paths) > 1:
        raise RowError("it is about more than one scan", f"{len(paths)} videos")
    return str(paths[0]).replace("\\", "/")


def _scan_name(video: str) -> tuple[str, str]:
    """Scan id and patient id of a path.

    Files that are called alike in every folder (``ct.nii.gz``, ``image.nii.gz``) are called by their folder too.
    """
    path = PurePosixPath(video)
    name = scan_id_of(Path(path.name))
    if name in ("ct", "image", "volume", "scan", "img") and path.parent.name:
        return path.parent.name, path.parent.name
    try:
        scan_id, patient_id, _ = ct_rate_name(name)
    except RowError:
        return name, name
    return scan_id, patient_id


def _first_turn(messages: Any) -> tuple[str, str]:
    """The first question and its answer."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError("messages is no list of messages")
    said = [message for message in messages if message.get("role") != "system"]
    turns = [(str(message.get("role")), message.get("content")) for message in said]
    if [role for role, _ in turns[:2]] != ["user", "assistant"]:
        raise RowError("it does not begin with a question and its answer", " ".join(role for role, _ in turns[:2]))
    if len(turns) > 2:
        raise RowError("it has more than one question and answer", f"{len(turns)} messages")
    return plain(turns[0][1], "content"), plain(turns[1][1], "content")


def _answer_shape(question: str, answer: str) -> AnswerShape:
    if pair := yes_no_options(answer):
        return "closed", pair, None, ""
    for mark in (":", "."):
        try:
            choices = split_choices(question, mark)[1]
        except RowError:
            continue
        for options in (tuple(choices), tuple(choices.values())):
            if answer in options and len(set(options)) == len(options):
                return "closed", options, None, ""
    if number := quantity(answer):
        return "number", (), *number
    return "text", (), None, ""


def _split(path: Path) -> str:
    found = re.search(r"train|val|test", path.stem.casefold())
    return found[0] if found else ""
