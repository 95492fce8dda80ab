"""What the readers of public datasets share: a draft of a question, a refused row, a scan's file, and their ids.

A reader turns each row of its source into a :class:`Draft` or a :class:`Refusal`, one by one, so that a bad row costs
itself alone. What a draft is worth is decided here for all of them: :func:`assemble`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from photon.errors import PhotonError
from pipelines.datasets.splits import SPLITS, SplitRule
from pipelines.questions import Question

REPEATED = "the row repeats another"
CONTRADICTED = "another row answers the same question otherwise"
HELD_OUT = "the row is in a more held-out split too"
MAX_NAME_BYTES = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a row stands: the file below the dataset's folder, and its line or element, counted from 1."""

    file: str
    row: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "file", printable(self.file))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draft:
    """A question as its dataset has it, before it has an id and its final split.

    Args:
        identity: what names the row for good: columns of the source, never a line number.
        split: the dataset's own: ``train``, ``val``, ``test``, or "" where it has none.
        kind, options, answer, value, unit: as :class:`pipelines.questions.Question` has them.
    """

    place: Place
    identity: tuple[str, ...]
    scan_id: str
    patient_id: str
    split: str
    family: str
    subtype: str
    kind: str
    question: str
    answer: str
    organ: str = ""
    options: tuple[str, ...] = ()
    value: float | None = None
    unit: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refusal:
    """A row, or a scan, that is left out.

    Args:
        reason: the same words for every row with this fault; what is counted.
        detail: what was found in this one.
    """

    place: Place
    reason: str
    detail: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", printable(self.detail))


class RowError(ValueError):
    """A row cannot become a question; ``reason`` and ``detail`` as in :class:`Refusal`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        self.reason, self.detail = reason, detail
        super().__init__(reason, detail)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownHeader:
    """What a table of the dataset says about a scan whose own header does not.

    Args:
        affine: rows of the 4x4 matrix from array index to world RAS millimetres; None: the file's own.
        slope, intercept: stored value to HU; None: the file's own.
        shape: voxels (i, j, k) that the table promises; None where it does not say.
        source: name of the table.
    """

    affine: tuple[tuple[float, ...], ...] | None
    slope: float | None
    intercept: float | None
    shape: tuple[int, int, int] | None
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanFile:
    """The file of a scan.

    Args:
        header: what has to be put into a copy of the file; None: the file is good as it is.
        has_lung: a chest CT, so there is air in it, by which its HU can be checked.
        nominal_spacing: the file is an array without geometry (.npy); it gets 1 mm and an assumed orientation.
    """

    scan_id: str
    path: Path
    header: KnownHeader | None = None
    has_lung: bool = False
    nominal_spacing: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Choices of an import that the datasets leave open.

    Args:
        images: folder of the scan files; None: the dataset's folder.
        rescale: CT-RATE: where slope and intercept come from: ``header``, ``csv``, or ``auto``: the table for the
            original files, the header for the corrected copy (folders ending in ``_fixed``).
        form: DeepTumorVQA: ``free`` text questions or multiple ``choice``.
        empty_counts: AbdomenAtlas: an empty number of lesions is ``unknown`` (not asked) or ``zero``.
        nominal_geometry: M3D: take arrays without geometry for axial slices of 1 mm voxels.
    """

    images: Path | None = None
    rescale: str = "auto"
    form: str = "free"
    empty_counts: str = "unknown"
    nominal_geometry: bool = False

    def __post_init__(self) -> None:
        allowed = {
            "rescale": ("auto", "header", "csv"),
            "form": ("free", "choice"),
            "empty_counts": ("unknown", "zero"),
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            if value not in values:
                option = name.replace("_", "-")
                fact = f"'{value}' is not one of {', '.join(values)}."
                raise PhotonError("OPTION_UNKNOWN", f"--{option}", fact, "Use one of these.")


class Adapter(Protocol):
    """A reader of one dataset.

    Attributes:
        name: how the dataset is called on the command line, and what its question ids begin with.
        title: the dataset in a few words.
        notes: what a user has to know about the dataset, or about what is made of it.
    """

    name: str
    title: str
    notes: tuple[str, ...]

    def drafts(self, folder: Path, options: ImportOptions) -> Iterator[Draft | Refusal]:
        """Every row of the dataset below ``folder``.

        Raises:
            PhotonError: ``DATASET_UNREADABLE`` when no file of the dataset is there.
        """

    def scan_files(self, folder: Path, wanted: frozenset[str], options: ImportOptions) -> Iterator[ScanFile | Refusal]:
        """The files of the wanted scans that are there, each once, in order of their ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assembled:
    """Questions in order of their scans and ids, and the rows that became none."""

    questions: list[Question]
    refusals: list[Refusal]


def assemble(dataset: str, rows: Iterable[Draft | Refusal], rule: SplitRule) -> Assembled:
    """Give drafts their ids and splits, and refuse what is no question, comes twice or contradicts another.

    The result depends on what the rows hold and not on their order: an id is the checksum of the dataset's name and
    the row's identity, of rows that contradict each other none is kept, and a row that comes in two splits stays in
    the one that is held out most.
    """
    drafts: list[Draft] = []
    refusals: list[Refusal] = []
    for row in rows:
        (refusals if isinstance(row, Refusal) else drafts).append(row)  # type: ignore[arg-type]
    has_own_val = any(draft.split == "val" for draft in drafts)
    found: dict[str, dict[Question, Place]] = {}
    for draft in drafts:
        try:
            question = _question(dataset, draft, rule.split_of(draft.patient_id, draft.split, has_own_val))
        except RowError as error:
            refusals.append(Refusal(place=draft.place, reason=error.reason, detail=error.detail))
            continue
        same_id = found.setdefault(question.question_id, {})
        if question in same_id:
            refusals.append(Refusal(place=draft.place, reason=REPEATED))
        else:
            same_id[question] = draft.place
    kept = []
    for same_id in found.values():
        last = max(same_id, key=lambda question: SPLITS.index(question.split))
        is_same_but_split = all(dataclasses.replace(question, split=last.split) == last for question in same_id)
        if is_same_but_split:
            kept.append(last)
            del same_id[last]
        reason = HELD_OUT if is_same_but_split else CONTRADICTED
        refusals += [Refusal(place=place, reason=reason) for place in same_id.values()]
    return Assembled(
        questions=sorted(kept, key=lambda q: (q.scan_id, q.question_id)),
        refusals=sorted(refusals, key=lambda r: (r.place.file, r.place.row, r.reason)),
    )


def stable_id(dataset: str, identity: Sequence[str]) -> str:
    """The id of a question: the dataset's name and 16 hex digits of what identifies the row in it."""
    text = json.dumps([dataset, *identity], ensure_ascii=False, separators=(",", ":"))
    return f"{dataset}.{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"


def printable(text: str) -> str:
    """A text that can be written as UTF-8: what cannot (parts of a file's name, of a damaged row) as ``\\udc80``."""
    return text.encode("utf-8", "backslashreplace").decode()


def _question(dataset: str, draft: Draft, split: str) -> Question:
    texts = (draft.scan_id, draft.patient_id, draft.subtype, draft.organ, draft.question, draft.answer, *draft.options)
    if any(printable(text) != text for text in texts):
        raise RowError("a text is no Unicode")
    is_name = draft.scan_id.isprintable() and not draft.scan_id.startswith(".") and "/" not in draft.scan_id
    if not is_name or len(draft.scan_id.encode()) > MAX_NAME_BYTES:
        raise RowError("the scan's name cannot be that of a file", repr(draft.scan_id[:80]))
    if not draft.answer:
        raise RowError("there is no answer")
    if draft.kind == "closed":
        if len(set(draft.options)) < max(2, len(draft.options)):
            raise RowError("the options are not different answers", " | ".join(draft.options))
        if draft.answer not in draft.options:
            raise RowError("the answer is none of the options", f"{draft.answer!r} of {', '.join(draft.options)}")
    if draft.kind == "number" and draft.value is None:
        raise RowError("the answer is no number", repr(draft.answer))
    fields = {field.name: getattr(draft, field.name) for field in dataclasses.fields(draft)}
    fields = {name: value for name, value in fields.items() if name not in ("place", "identity", "split")}
    try:
        return Question(question_id=stable_id(dataset, draft.identity), split=split, **fields)
    except ValueError as error:
        raise RowError("it is no question", str(error)) from error
