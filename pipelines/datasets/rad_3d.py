"""3D-RAD: six tasks of questions about the scans of CT-RATE.

``{train,test}/Task<n>_<name>/<subtask>.csv``; a row names task, subtask, volume, question, answer, type and choices.
``QuestionType`` alone decides what is closed and what is open.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines.datasets.base import Draft, ImportOptions, Refusal, RowError, ScanFile
from pipelines.datasets.ct_rate_scans import find_ct_rate_scans, scan_name, split_of_name
from pipelines.datasets.tables import Row, csv_rows, files_below, header_of, nothing_found, words
from pipelines.datasets.texts import quantity
from pipelines.questions import Question

TASKS = {
    1: ("image observation", "recognition"),
    2: ("anomaly detection", "recognition"),
    3: ("medical computation", "measurement"),
    4: ("existence detection", "recognition"),
    5: ("static temporal diagnosis", "medical reasoning"),
    6: ("longitudinal temporal diagnosis", "medical reasoning"),
}
"""Task -> its name and our family. The folders' order is the truth; some texts about the dataset swap 1 and 2."""

_NEEDED = {"task", "subtask", "volumename", "question", "answer", "questiontype", "answerchoice"}
_LETTERS = "abcd"
_HISTORY = re.compile(r"\[([01](?:,\s*[01])*)\]")


class Rad3D:
    """Reader of 3D-RAD."""

    name = "3d-rad"
    title = "3D-RAD, six tasks of questions about chest CT of CT-RATE"
    notes: tuple[str, ...] = (
        "Scans are CT-RATE's (give their folder as images); what 3D-RAD calls test_12_a_1 is CT-RATE's valid_12_a_1.",
        "QuestionType decides: open questions are texts and closed ones have the choices as options. Open answers that "
        "are one number with a unit keep it as value and unit, but are compared as texts: units differ.",
        "Tasks 5 and 6 show one scan each: earlier visits are told in words (task 6) or not at all (task 5).",
        "The question of task 6 gives its answer away: any 1 in the history leaves two of the four choices, none the "
        "other two. Compare every score with the answers without the scan.",
        "Questions are MIT or Apache-2.0; the scans have CT-RATE's licence.",
    )

    def drafts(self, folder: Path, options: ImportOptions) -> Iterator[Draft | Refusal]:
        """Rows of all tables with the dataset's header."""
        tables = [path for path in files_below(folder, ".csv") if set(header_of(path)) >= _NEEDED]
        if not tables:
            raise nothing_found(folder, "no CSV with Task, Subtask, VolumeName, Question, Answer, QuestionType ...")
        for path in tables:
            for row in csv_rows(path, folder):
                if isinstance(row, Refusal):
                    yield row
                    continue
                try:
                    yield _draft(row, words(path.stem))
                except RowError as error:
                    yield Refusal(place=row.place, reason=error.reason, detail=error.detail)

    def scan_files(self, folder: Path, wanted: frozenset[str], options: ImportOptions) -> Iterator[ScanFile | Refusal]:
        """Scans by their CT-RATE names below the images folder."""
        return find_ct_rate_scans(folder, wanted, options)


def history_answer(question: Question) -> str | None:
    """What the history in a question of task 6 suggests, without looking at the scan; None where there is none.

    The last visit had the finding: it persists. An earlier one had: it resolved. None had: no abnormality.
    """
    found = _HISTORY.search(question.question)
    if found is None or len(question.options) != 4:
        return None
    history = found[1].replace(" ", "").split(",")
    persists, resolved, _, absent = question.options
    return persists if history[-1] == "1" else resolved if "1" in history else absent


def history_narrows(questions: Sequence[Question]) -> tuple[int, int]:
    """Of the questions with a history, in how many it halves the choices as described; and how many there are."""
    counts: Counter[bool] = Counter()
    for question in questions:
        found = _HISTORY.search(question.question)
        if found is not None and len(question.options) == 4:
            counts[("1" in found[1]) == (question.answer in question.options[:2])] += 1
    return counts[True], counts.total()


def _draft(row: Row, subtask_name: str) -> Draft:
    task = row.text("task")
    if task not in map(str, TASKS):
        raise RowError("the task is not one of 1 to 6", repr(task))
    name, family = TASKS[int(task)]
    volume = row.text("volumename")
    scan_id, patient_id, visit = scan_name(volume)
    split = split_of_name(scan_id)
    question, answer = row.text("question"), row.text("answer")
    kind = row.text("questiontype").casefold()
    # A closed question has one right answer; of open ones several may be asked in the same words.
    identity: tuple[str, ...] = (task, row.text("subtask"), split, scan_id, question)
    options: tuple[str, ...] = ()
    value, unit = None, ""
    if kind.startswith("close"):
        options = _options(row, answer)
    elif kind.startswith("open"):
        identity = (*identity, answer)
        value, unit = quantity(answer) or (None, "")
    else:
        raise RowError("QuestionType is neither Open nor Close", repr(kind))
    return Draft(
        place=row.place,
        identity=identity,
        scan_id=scan_id,
        patient_id=patient_id,
        split=split,
        family=family,
        subtype=f"{name} {f'visit {visit}' if int(task) > 4 else subtask_name}",
        kind="closed" if options else "text",
        question=question,
        options=options,
        answer=answer,
        value=value,
        unit=unit,
    )


def _options(row: Row, answer: str) -> tuple[str, ...]:
    choices = {letter: row.optional(f"choice {letter}") for letter in _LETTERS}
    choices = {letter: choice for letter, choice in choices.items() if choice not in ("", "-")}
    letter = row.text("answerchoice").casefold()
    if choices.get(letter) != answer:
        detail = f"{letter.upper()} is {choices.get(letter)!r}, the answer is {answer!r}"
        raise RowError("the answer is not the text of its choice", detail)
    return tuple(choices.values())
