"""Rows of CSV and JSON files, read so that a damaged row costs itself alone."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from photon.errors import PhotonError
from pipelines.datasets.base import Place, Refusal, RowError

UNREADABLE = "the row cannot be read"
MAX_LINES = 2000
"""A quoted field with more lines than this is taken for a stray quotation mark."""

csv.field_size_limit(1 << 24)

_MASK_WORDS = frozenset(
    ("annotation", "annotations", "label", "labels", "labelstr", "labelsts", "mask", "masks", "seg")
    + ("segmentation", "segmentations")
)


@dataclass(frozen=True)
class Row:
    """A row of a source. Keys are column names after :func:`words`; text values have no white space at their ends."""

    place: Place
    content: Mapping[str, Any]

    def text(self, *names: str) -> str:
        """The first of these columns that the row has, with runs of white space made one space.

        Raises:
            RowError: it has none of them, or what it has is no text or number.
        """
        for name in names:
            if name in self.content:
                return plain(self.content[name], name)
        raise RowError("a column is missing", names[0])

    def optional(self, *names: str) -> str:
        """As :meth:`text`; "" where the row has none of them or no value."""
        for name in names:
            if self.content.get(name) is not None:
                return plain(self.content[name], name)
        return ""


def plain(value: Any, name: str) -> str:
    """Text of a value; numbers as JSON writes them."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError("a value is no text", f"{name} is {type(value).__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise RowError("a value is no number", f"{name} is {value}")
    return json.dumps(value)


def words(name: str) -> str:
    """A name as we compare it: lower case, ``_`` and ``-`` as spaces, single spaces."""
    return " ".join(name.replace("_", " ").replace("-", " ").split()).casefold()


def header_of(path: Path) -> tuple[str, ...]:
    """Column names of a CSV file after :func:`words`; () when its first line is no such row."""
    with path.open("rb") as stream:
        line = stream.readline(1 << 20)
    try:
        return tuple(words(name) for name in _parsed(line.decode("utf-8-sig")) or ())
    except UnicodeDecodeError:
        return ()


def csv_rows(path: Path, folder: Path, *, row_start: str | None = None) -> Iterator[Row | Refusal]:
    """Rows of a CSV file with a header line.

    Args:
        folder: what the places of rows are relative to.
        row_start: pattern that every row, and nothing inside a field, begins with. It allows line breaks inside
            quoted fields: without it a quoted field that does not end on its line is damage.
    """
    name = _relative(path, folder)
    header = header_of(path)
    if len(set(header)) != len(header) or not header:
        raise _unreadable(path, f"its header {header!r} has no columns, or one twice")
    start = re.compile(row_start) if row_start else None
    with path.open("rb") as stream:
        stream.readline()
        lines = [line for line in stream]
    index = 0
    while index < len(lines):
        place = Place(file=name, row=index + 2)
        taken, fields = _record(lines, index, len(header), start)
        if fields is None:
            yield Refusal(place=place, reason=UNREADABLE, detail=f"it is not {len(header)} columns of UTF-8 text")
        elif fields:
            yield Row(place, dict(zip(header, (field.strip() for field in fields), strict=True)))
        index += taken


def json_rows(path: Path, folder: Path, *, list_key: str = "") -> Iterator[Row | Refusal]:
    """Objects of a JSON list, or of JSON lines.

    Args:
        list_key: where the file is one object, the key of the list in it.

    Raises:
        PhotonError: ``DATASET_UNREADABLE`` when a file that is one JSON value is broken or is no list.
    """
    name = _relative(path, folder)
    if _is_one_value(path):
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise _unreadable(path, f"it is not JSON ({error})") from error
        elements = content.get(list_key, [content]) if isinstance(content, dict) else content
        if not isinstance(elements, list):
            raise _unreadable(path, "it holds no list of rows")
        for number, element in enumerate(elements, start=1):
            yield _json_row(element, Place(file=name, row=number))
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = Place(file=name, row=number)
            try:
                element = json.loads(line)
            except (ValueError, RecursionError):
                yield Refusal(place=place, reason=UNREADABLE, detail="it is not JSON")
                continue
            yield _json_row(element, place)


def files_below(folder: Path, *endings: str) -> list[Path]:
    """Files with these endings below a folder, sorted; hidden ones are passed over.

    Raises:
        PhotonError: ``INPUT_MISSING`` when the folder is not there.
    """
    if not folder.is_dir():
        raise PhotonError("INPUT_MISSING", folder, "there is no such folder.", "Check the path.")
    found = (path for path in folder.rglob("*") if path.name.lower().endswith(endings) and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def is_of_masks(path: Path, folder: Path) -> bool:
    """Whether a folder on the way from ``folder`` to a file says that it holds masks: they are often named as scans."""
    return any(not _MASK_WORDS.isdisjoint(words(part).split()) for part in path.relative_to(folder).parts[:-1])


def nothing_found(folder: Path, wanted: str) -> PhotonError:
    """The error of a folder that does not hold the dataset."""
    remedy = "Give the folder of your copy of the dataset; `photon import --help` tells how it looks."
    return PhotonError("DATASET_UNREADABLE", folder, f"it holds {wanted}.", remedy)


def _unreadable(path: Path, fact: str) -> PhotonError:
    return PhotonError("DATASET_UNREADABLE", path, f"{fact}.", "Get the file again from its source.")


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()


def _is_one_value(path: Path) -> bool:
    """Whether a file is one JSON value rather than lines of them."""
    if path.suffix.lower() == ".jsonl":
        return False
    with path.open("rb") as stream:
        first = next((line for line in stream if line.strip()), b"")
        has_more = any(line.strip() for line in stream)
    try:
        return not isinstance(json.loads(first), dict) or not has_more
    except ValueError:
        return True


def _json_row(element: Any, place: Place) -> Row | Refusal:
    if not isinstance(element, dict):
        return Refusal(place=place, reason=UNREADABLE, detail=f"it is {type(element).__name__}, no object")
    content = {words(key): value for key, value in element.items()}
    if len(content) != len(element):
        return Refusal(place=place, reason=UNREADABLE, detail="two of its keys are the same name")
    return Row(place, content)


def _record(
    lines: Sequence[bytes], index: int, num_columns: int, start: re.Pattern[str] | None
) -> tuple[int, list[str] | None]:
    """How many lines the record at ``index`` takes, and its fields: none of an empty line, None of a damaged one.

    A record that cannot be completed is one damaged line; reading goes on with the line after it.
    """
    text = ""
    for taken, line in enumerate(lines[index : index + (MAX_LINES if start else 1)], start=1):
        try:
            decoded = line.decode("utf-8")
        except UnicodeDecodeError:
            return 1, None
        if taken > 1 and start is not None and start.match(decoded):
            return 1, None
        text += decoded
        if taken == 1 and not text.strip():
            return 1, []
        if text.count('"') % 2 == 0:
            fields = _parsed(text)
            return (taken, fields) if fields is not None and len(fields) == num_columns else (1, None)
    return 1, None


def _parsed(text: str) -> list[str] | None:
    try:
        records = list(csv.reader([text], strict=True))
    except csv.Error:
        return None
    return records[0] if len(records) == 1 else None
