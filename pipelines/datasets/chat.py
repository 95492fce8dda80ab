"""Conversations as the public Photon is trained on: ``{"messages": [...], "videos": [...]}``, a list or lines.

``<video>`` in a message stands for the scan. ``video`` is taken for ``videos``, and one path for a list of one.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.datasets.base import Draft, ImportOptions, Place, Refusal, RowError, ScanFile
from pipelines.datasets.ct_rate_scans import scan_name as ct_rate_name
from pipelines.datasets.splits import split_in_name
from pipelines.datasets.tables import Row, files_below, json_rows, nothing_found, plain, words
from pipelines.datasets.texts import AnswerShape, quantity, split_choices, yes_no_options
from pipelines.questions import FAMILIES
from pipelines.scans.find import scan_id_of

VIDEO = "<video>"
_ENDINGS = (".nii", ".nii.gz")
_USUAL = ("ct", "image", "volume", "scan", "img")
_MAX_PATH = 2000

Names = dict[str, tuple[str, str] | None]
"""Path of a scan as rows have it -> its scan id and patient id; None where it cannot be told from another."""


class Chat:
    """Reader of chat JSON."""

    name = "chat"
    title = "conversations about scans, in the JSON of the public Photon (messages, videos)"
    notes: tuple[str, ...] = (
        "The file does not say which patient a scan is of. Names of CT-RATE tell; of other files each name counts as a "
        "patient of its own, so give one name to one patient before splitting by it. Where files in several folders "
        "have one name, scans are called by folder and name, and a folder is a patient.",
        "The split is the first word of the file's name that is train, val or test, else by a checksum of the patient.",
        "Answers that are yes or no become closed questions, as do those that are a choice listed in the question; "
        "bare numbers become numbers; all others are texts. Family and subtype are read where rows have them.",
        "Conversations of more than one question are refused: later ones lean on earlier answers. System "
        "messages are left out; words before <video> come after the scan, as all words do here.",
        "Conversations about two scans or none are refused.",
    )

    def drafts(self, folder: Path, options: ImportOptions) -> Iterator[Draft | Refusal]:
        """Samples of every .json and .jsonl file of which a row has messages."""
        is_found = False
        names = _names(folder)
        for path in files_below(folder, ".json", ".jsonl"):
            rows = json_rows(path, folder)
            before = []
            for row in rows:
                before.append(row)
                if isinstance(row, Row) and "messages" in row.content:
                    break
            else:
                continue
            is_found = True
            for row in itertools.chain(before, rows):
                if isinstance(row, Refusal):
                    yield row
                    continue
                try:
                    yield _draft(row, path, names)
                except RowError as error:
                    yield Refusal(place=row.place, reason=error.reason, detail=error.detail)
        if not is_found:
            raise nothing_found(folder, "no .json or .jsonl file of messages and videos")

    def scan_files(self, folder: Path, wanted: frozenset[str], options: ImportOptions) -> Iterator[ScanFile | Refusal]:
        """Scans by the paths that the rows name: as they are, below the folder, or below the images folder."""
        images = options.images or folder
        by_name: defaultdict[str, list[Path]] = defaultdict(list)
        for path in files_below(images, *_ENDINGS):
            relative = path.relative_to(images).as_posix()
            for own in {_scan_name(relative)[0], _with_folder(relative)[0]}:
                by_name[own].append(path)
        named: dict[str, str] = {}
        for video, name in sorted(_names(folder).items()):
            if name is not None and name[0] in wanted:
                named.setdefault(name[0], video)
        for scan_id, video in sorted(named.items()):
            candidates = [path for path in (folder / video, images / video, Path(video)) if path.is_file()]
            same_name = by_name[scan_id]
            if candidates or len(same_name) == 1:
                yield ScanFile(scan_id=scan_id, path=(candidates or same_name)[0])
            elif same_name:
                place = Place(file=video, row=0)
                yield Refusal(place=place, reason="two files have the scan's name", detail=scan_id)


def _names(folder: Path) -> Names:
    """Names of every scan below a folder, by its path as the rows have it."""
    videos = set()
    for path in files_below(folder, ".json", ".jsonl"):
        for row in json_rows(path, folder):
            if isinstance(row, Refusal) or "messages" not in row.content:
                continue
            try:
                videos.add(_video(row))
            except RowError:
                continue
    without_ending = {video: _without_ending(video) for video in videos}
    names = _told_apart(set(without_ending.values()))
    return {video: names[path] for video, path in without_ending.items()}


def _without_ending(video: str) -> str:
    path = PurePosixPath(video)
    return str(path.with_name(scan_id_of(Path(path.name))))


def _told_apart(videos: Iterable[str]) -> Names:
    """Path -> scan id and patient id; None for a path that may be two scans.

    Where the last part of a path does for a name, it is the name. Where different paths have the same last part, as
    ``P1/CT.nii.gz`` and ``P2/CT.nii.gz``, one more folder is put before it. A path that another one ends in is the
    same path, as ``P1/CT.nii.gz`` of ``/data/P1/CT.nii.gz``.
    """
    groups: defaultdict[str, set[str]] = defaultdict(set)
    for video in videos:
        groups[_scan_name(video)[0]].add(video)
    names: Names = {}
    for group in groups.values():
        endings: defaultdict[str, set[str]] = defaultdict(set)
        for video in group:
            parts = PurePosixPath(video).parts
            for start in range(1, len(parts)):
                endings["/".join(parts[start:])].add(video)
        whole = {video for video in group if not endings[video]}
        if len(whole) == 1 or any(_is_ct_rate(video) for video in group):
            names |= {video: _scan_name(video) for video in group}
            continue
        for video in group:
            owners = {_with_folder(owner) for owner in ({video} if video in whole else endings[video] & whole)}
            names[video] = owners.pop() if len(owners) == 1 else None
        taken = [names[video] for video in whole]
        names |= {video: None for video in group if taken.count(names[video]) > 1}
    return names


def _draft(row: Row, path: Path, names: Names) -> Draft:
    video = _video(row)
    asked, answer = _first_turn(row.content.get("messages"))
    name = names[video]
    if name is None:
        raise RowError("two scans have the path", repr(video[-80:]))
    scan_id, patient_id = name
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
        split=split_in_name(path.stem),
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
    video = str(paths[0]).replace("\\", "/")
    if len(video) > _MAX_PATH or any(len(part.encode("utf-8", "replace")) > 255 for part in video.split("/")):
        raise RowError("the path of its scan is too long", repr(video[-80:]))
    path = PurePosixPath(video)
    if not scan_id_of(Path(path.name)):
        raise RowError("it is about no scan", repr(video[-80:]))
    return str(path)


def _scan_name(video: str) -> tuple[str, str]:
    """Scan id and patient id of a path by itself.

    Files that are called alike in every folder (``ct.nii.gz``, ``image.nii.gz``) are called by their folder.
    """
    path = PurePosixPath(video)
    name = scan_id_of(Path(path.name))
    if name in _USUAL and path.parent.name:
        return path.parent.name, path.parent.name
    try:
        scan_id, patient_id, _ = ct_rate_name(name)
    except RowError:
        return name, name
    return scan_id, patient_id


def _with_folder(video: str) -> tuple[str, str]:
    """Scan id and patient id of a path with one more folder before its name."""
    path = PurePosixPath(video)
    name = _scan_name(video)[0]
    is_folder = scan_id_of(Path(path.name)) in _USUAL
    before = (path.parent.parent if is_folder else path.parent).name
    return f"{before}_{name}" if before else name, path.parent.name or name


def _is_ct_rate(video: str) -> bool:
    try:
        ct_rate_name(scan_id_of(Path(PurePosixPath(video).name)))
    except RowError:
        return False
    return True


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
