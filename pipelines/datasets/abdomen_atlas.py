"""AbdomenAtlas 3.0 Mini: questions computed from the measured columns of its table.

A row is a scan; columns such as ``liver volume (cm^3)`` or ``number of liver lesion instances`` say what was measured
on its masks. What a column asks is read from its name, so that copies with more or fewer columns are read too.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.datasets.abdomen_atlas_scans import find_atlas_scans, ids_in, patients_of, scan_name
from pipelines.datasets.base import Draft, ImportOptions, Place, Refusal, RowError, ScanFile
from pipelines.datasets.tables import Row, csv_rows, files_below, header_of, nothing_found

SPLIT_SCHEME = "iid"
"""Of the two divisions that the dataset has, by patients (IID) and by hospitals (OOD), the one that is taken."""

_EMPTY = ("", "nan", "none", "null", "n/a", "u", "unknown")
_ROW_START = r'"?BDMAP_'
_ORGANS = {"pancreatic": "pancreas"}
_VOLUME = re.compile(r"(total )?(?P<thing>(?!largest ).+) volume \(cm\^3\)")
_COUNT = re.compile(r"number of (?P<thing>.+) instances")
_DIAMETER = re.compile(r"largest (?P<thing>.+) diameter \(cm\)")
_PLACE = re.compile(r"largest (?P<thing>.+) (?P<what>location|attenuation) \((?P<options>.+)\)")
_STAGE = re.compile(r"(?P<thing>.+) staging \(t1 t4\)")


class AbdomenAtlas:
    """Reader of AbdomenAtlas 3.0 Mini."""

    name = "abdomenatlas"
    title = "AbdomenAtlas 3.0 Mini, abdominal CT with measured organs and lesions"
    notes: tuple[str, ...] = (
        "Questions are computed from columns of AbdomenAtlas3.0MiniWithMeta.csv. Sex, age and reports are not read.",
        "From the masks themselves more can be asked: `photon questions` with the images {scan}/ct and the masks "
        "{scan}/segmentations/{structure}.",
        "An empty number of lesions is not asked, as it may be none or not reported (empty-counts zero takes it for "
        "none where the organ was measured). With none of them known, existence questions are all answered yes.",
        "Splits are those of TrainTestIDS/IID_*.csv where they are there, else by a checksum of the id; the other "
        "division (OOD) contradicts them and is not used. val is taken out of train.",
        "Measurements come from masks that a model predicted and people revised; the column `shape` is not that of "
        "the file, and is not read.",
        "The same scan is known to hide under two BDMAP ids: import the scans too, and see the leaks.",
    )

    def drafts(self, folder: Path, options: ImportOptions) -> Iterator[Draft | Refusal]:
        """Questions of every row of the measured table."""
        csv_files = files_below(folder, ".csv")
        tables = [path for path in csv_files if "bdmap id" in header_of(path) and any(map(_asker, header_of(path)))]
        if not tables:
            raise nothing_found(folder, "no table with BDMAP ID and measured columns such as liver volume (cm^3)")
        patients, splits = patients_of(folder), _splits(csv_files)
        for path in tables:
            for row in csv_rows(path, folder, row_start=_ROW_START):
                if isinstance(row, Refusal):
                    yield row
                    continue
                try:
                    scan_id = scan_name(row.text("bdmap id"))
                except RowError as error:
                    yield Refusal(place=row.place, reason=error.reason, detail=error.detail)
                    continue
                if splits and scan_id not in splits:
                    yield Refusal(place=row.place, reason="no file of TrainTestIDS names the scan", detail=scan_id)
                    continue
                for asked in _asked(row, options.empty_counts == "zero"):
                    if isinstance(asked, Refusal):
                        yield asked
                        continue
                    yield Draft(
                        identity=(asked.subtype, asked.about, scan_id),
                        scan_id=scan_id,
                        patient_id=patients.get(scan_id, scan_id),
                        split=splits.get(scan_id, ""),
                        **{k: v for k, v in dataclasses.asdict(asked).items() if k != "about"} | {"place": row.place},
                    )

    def scan_files(self, folder: Path, wanted: frozenset[str], options: ImportOptions) -> Iterator[ScanFile | Refusal]:
        """``image_only/<id>/ct.nii.gz`` below the images folder."""
        return find_atlas_scans(options.images or folder, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """A question of one column."""

    place: Place
    about: str
    family: str
    subtype: str
    organ: str
    kind: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    value: float | None = None
    unit: str = ""


def _asked(row: Row, is_empty_zero: bool) -> Iterator[_Asked | Refusal]:
    """Questions of a row, column by column; a column that says nothing asks nothing."""
    for column, value in row.content.items():
        asker = _asker(column)
        if asker is None:
            continue
        text = " ".join(value.split())
        if text.casefold() in _EMPTY:
            counted = _COUNT.fullmatch(column)
            organ_volume = f"{_organ(counted['thing'])} volume (cm^3)" if counted else ""
            if not (is_empty_zero and row.optional(organ_volume).casefold() not in _EMPTY):
                continue
            text = "0"
        try:
            yield from asker(row.place, column, text)
        except RowError as error:
            yield Refusal(place=row.place, reason=error.reason, detail=f"{column}: {error.detail}")


def _asker(column: str) -> Callable[[Place, str, str], Iterator[_Asked]] | None:
    for pattern, asker in _ASKERS:
        if pattern.fullmatch(column):
            return asker
    return None


def _ask_volume(place: Place, column: str, text: str) -> Iterator[_Asked]:
    thing = _VOLUME.fullmatch(column)["thing"]  # type: ignore[index]
    value = _number(text)
    is_lesion = column.startswith("total ")
    if is_lesion and value == 0:
        return  # how many there are is asked by another column
    yield _Asked(
        place=place,
        about=thing,
        family="measurement",
        subtype="lesion volume measurement" if is_lesion else "organ volume measurement",
        organ=_organ(thing),
        kind="number",
        question=f"What is the total volume of all {_plural(thing)} in cm^3?"
        if is_lesion
        else f"What is the volume of the {thing} in cm^3?",
        answer=f"{value:g} cm^3",
        value=value,
        unit="cm^3",
    )


def _ask_count(place: Place, column: str, text: str) -> Iterator[_Asked]:
    thing = _COUNT.fullmatch(column)["thing"]  # type: ignore[index]
    value = _number(text)
    if value != int(value):
        raise RowError("a number of lesions is not whole", repr(text))
    yield _Asked(
        place=place,
        about=thing,
        family="recognition",
        subtype=f"{thing} existence",
        organ=_organ(thing),
        kind="closed",
        question=f"Is there a {thing}?",
        options=("yes", "no"),
        answer="yes" if value else "no",
    )
    yield _Asked(
        place=place,
        about=thing,
        family="visual reasoning",
        subtype="lesion counting",
        organ=_organ(thing),
        kind="number",
        question=f"How many {_plural(thing)} are there?",
        answer=f"{value:g}",
        value=value,
    )


def _ask_diameter(place: Place, column: str, text: str) -> Iterator[_Asked]:
    thing = _DIAMETER.fullmatch(column)["thing"]  # type: ignore[index]
    value = _number(text.strip("[]"))
    if value == 0:
        return
    yield _Asked(
        place=place,
        about=thing,
        family="visual reasoning",
        subtype="largest lesion diameter",
        organ=_organ(thing),
        kind="number",
        question=f"What is the diameter of the largest {thing} in cm?",
        answer=f"{value:g} cm",
        value=value,
        unit="cm",
    )


def _ask_place(place: Place, column: str, text: str) -> Iterator[_Asked]:
    found = _PLACE.fullmatch(column)
    assert found is not None
    thing, what = found["thing"], found["what"]
    options = tuple("12345678") if found["options"] == "1 8" else tuple(found["options"].split(", "))
    given = [part.strip().casefold() for part in re.split(r"[,/]", text) if part.strip()]
    if not given or not set(given) <= set(options):
        raise RowError("a location or attenuation is not one of those that its column lists", repr(text))
    named = "segment of the liver" if options[0] == "1" else "part" if "head" in options else "side"
    yield _Asked(
        place=place,
        about=thing,
        family="visual reasoning",
        subtype=f"largest lesion {what}",
        organ=_organ(thing),
        # A lesion may lie in two segments: such answers are no options.
        kind="closed" if len(given) == 1 else "text",
        question=f"In which {named} is the largest {thing}?"
        if what == "location"
        else f"How does the largest {thing} attenuate?",
        options=options if len(given) == 1 else (),
        answer=", ".join(sorted(given)),
    )


def _ask_stage(place: Place, column: str, text: str) -> Iterator[_Asked]:
    thing = _STAGE.fullmatch(column)["thing"]  # type: ignore[index]
    options = ("T1", "T2", "T3", "T4")
    stage = text.upper() if text.upper().startswith("T") else f"T{text}"
    if stage not in options:
        raise RowError("a stage is not one of T1 to T4", repr(text))
    yield _Asked(
        place=place,
        about=thing,
        family="medical reasoning",
        subtype=f"{thing} staging",
        organ=_organ(thing),
        kind="closed",
        question=f"What is the T stage of the {thing}?",
        options=options,
        answer=stage,
    )


_ASKERS: tuple[tuple[re.Pattern[str], Callable[[Place, str, str], Iterator[_Asked]]], ...] = (
    (_VOLUME, _ask_volume),
    (_COUNT, _ask_count),
    (_DIAMETER, _ask_diameter),
    (_PLACE, _ask_place),
    (_STAGE, _ask_stage),
)


def _organ(thing: str) -> str:
    """The organ of ``left kidney`` or ``pancreatic tumor``: what is left without the lesion."""
    name = re.sub(r" (lesion|tumor|cyst|pdac|pnet)$", "", thing)
    return _ORGANS.get(name, name)


def _plural(thing: str) -> str:
    return f"{thing}s"


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise RowError("a measured value is no number", repr(text)) from error
    if not 0 <= value < 1e6:
        raise RowError("a measured value is negative or too large", repr(text))
    return value


def _splits(csv_files: list[Path]) -> dict[str, str]:
    """Scan id -> train or test; an id in both is test."""
    splits: dict[str, str] = {}
    for split in ("train", "test"):
        for path in csv_files:
            if path.stem.casefold() == f"{SPLIT_SCHEME}_{split}":
                splits |= dict.fromkeys(ids_in(path), split)
    return splits
