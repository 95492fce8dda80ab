"""Rows of CSV and JSON files: a damaged row costs itself and never moves another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from photon.errors import PhotonError
from pipelines.datasets.base import Refusal, RowError
from pipelines.datasets.tables import Row, csv_rows, header_of, json_rows, words
from pipelines.datasets.texts import quantity, split_choices, yes_no_options

GOOD = b'x%d,"asks, %d",yes\n'


def table(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"Image ID,Question,Answer\n" + b"".join(lines))
    return path


@pytest.mark.parametrize(
    "bad",
    [
        b'x9,"a stray quote,yes\n',
        b'x9,a stray" quote,yes\n',
        b"x9,one column too many,yes,no\n",
        b"x9,one too few\n",
        b"x9,caf\xe9,yes\n",
        b'"x9"tail,asks,yes\n',
        b'x9,asks,"',
    ],
)
@pytest.mark.parametrize("place", [0, 3, 6])
def test_a_damaged_line_costs_itself(tmp_path: Path, bad: bytes, place: int) -> None:
    lines = [GOOD % (number, number) for number in range(6)]
    lines.insert(place, bad if bad.endswith(b"\n") else bad + b"\n")
    rows = list(csv_rows(table(tmp_path / "t.csv", lines), tmp_path))
    good = [row for row in rows if isinstance(row, Row)]
    assert [row.text("image id") for row in good] == [f"x{number}" for number in range(6)]
    assert [row.text("question") for row in good] == [f"asks, {number}" for number in range(6)]
    (refused,) = [row for row in rows if isinstance(row, Refusal)]
    assert (refused.place.file, refused.place.row) == ("t.csv", place + 2)


def test_lines_inside_quotes_only_where_rows_can_be_told_apart(tmp_path: Path) -> None:
    lines = [b'x1,"two\nlines",yes\n', b'x2,"never closed,yes\n', b"x3,asks,no\n", b'x4,"it, too ""\n', b"x5,asks,no\n"]
    path = table(tmp_path / "t.csv", lines)
    rows = list(csv_rows(path, tmp_path, row_start=r"x\d"))
    assert [row.text("image id") for row in rows if isinstance(row, Row)] == ["x1", "x3", "x5"]
    assert [row.place.row for row in rows if isinstance(row, Refusal)] == [4, 6]
    assert [row.text("image id") for row in csv_rows(path, tmp_path) if isinstance(row, Row)] == ["x3", "x5"]


def test_headers_are_compared_without_case_and_marks(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfImage_ID,question-type, Question  Subtype \r\nx1,a,b\r\n\r\n")
    assert header_of(path) == ("image id", "question type", "question subtype")
    (row,) = csv_rows(path, tmp_path)
    assert isinstance(row, Row) and row.content == {"image id": "x1", "question type": "a", "question subtype": "b"}
    assert words(" organ_HU-measurement ") == "organ hu measurement"
    path.write_bytes(b"Image ID,image_id\nx1,x2\n")
    with pytest.raises(PhotonError, match="DATASET_UNREADABLE"):
        list(csv_rows(path, tmp_path))


def test_what_a_row_says(tmp_path: Path) -> None:
    row = next(
        iter(json_rows(jsonl(tmp_path, ['{"Question": " a \\n b", "n": 3, "f": 2.5, "x": [1], "t": true}']), tmp_path))
    )
    assert isinstance(row, Row)
    assert [row.text("question"), row.text("n"), row.text("no", "f")] == ["a b", "3", "2.5"]
    assert row.optional("no") == ""
    for name in ("x", "t", "no"):
        with pytest.raises(RowError):
            row.text(name)


def jsonl(folder: Path, lines: list[str]) -> Path:
    path = folder / "t.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_damaged_json_lines_cost_themselves(tmp_path: Path) -> None:
    rows = list(
        json_rows(jsonl(tmp_path, ['{"a": 1}', '{"a": 2', "[1]", "", '{"a": 3, "A": 4}', '{"a": 5}']), tmp_path)
    )
    assert [row.place.row for row in rows if isinstance(row, Refusal)] == [2, 3, 5]
    assert [row.text("a") for row in rows if isinstance(row, Row)] == ["1", "5"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("is_wrapped", [False, True])
def test_json_lists(tmp_path: Path, indent: int | None, is_wrapped: bool) -> None:
    rows: list[object] = [{"a": 1}, "no object", {"a": 2}]
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"version": "2", "questions": rows} if is_wrapped else rows, indent=indent))
    read = list(json_rows(path, tmp_path, list_key="questions"))
    assert [isinstance(row, Row) for row in read] == [True, False, True]
    path.write_text(path.read_text()[:-4])
    with pytest.raises(PhotonError, match="DATASET_UNREADABLE"):
        list(json_rows(path, tmp_path, list_key="questions"))


def test_lines_in_a_file_called_json(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert [row.text("a") for row in json_rows(path, tmp_path) if isinstance(row, Row)] == ["1", "2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12 mm", (12.0, "mm")),
        ("2.5cm", (2.5, "cm")),
        ("7 mm.", (7.0, "mm")),
        ("-3", (-3.0, "")),
        ("812.4 cm^3", (812.4, "cm^3")),
        ("15%", (15.0, "%")),
        ("55x19 mm", None),
        ("7-8 mm", None),
        ("Less than 5 mm.", None),
        ("1,234 mm", None),
        ("", None),
    ],
)
def test_quantities(text: str, expected: tuple[float, str] | None) -> None:
    assert quantity(text) == expected


def test_choices_in_one_string() -> None:
    stem, choices = split_choices("Which is larger? A: left lobe B: segment V: the upper part C: both")[0:2]
    assert stem == "Which is larger?"
    assert choices == {"A": "left lobe", "B": "segment V: the upper part", "C": "both"}


def test_choices_that_cannot_be_told_apart() -> None:
    for text in ("no list", "only A: one", "Is A: x B: y or A: z B: w", "A: x C: y", "B: x C: y", "A: B: y"):
        with pytest.raises(RowError):
            split_choices(text)


def test_yes_and_no_keep_their_spelling() -> None:
    assert yes_no_options("Yes") == ("Yes", "No") and yes_no_options("no") == ("yes", "no")
    assert yes_no_options("Yes.") is None
