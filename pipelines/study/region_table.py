"""The table of what every question asks about, in visual tokens: made once a study, joined to all answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from photon.errors import PhotonError
from pipelines.manifest import MANIFEST_NAME, read_manifest
from pipelines.parquet import read_table, write_table
from pipelines.questions import Question, read_questions
from pipelines.regions import BoolArray
from pipelines.study.asked import AskedRegion, read_asked_regions
from pipelines.volumes import read_volume

REGIONS = "regions.parquet"
REGION_SCHEMA: dict[str, Any] = {
    "question_id": pl.String,
    "organ_region": pl.List(pl.Int32),
    "lesion_region": pl.List(pl.Int32),
    "place": pl.List(pl.Int32),
}
"""`organ_region` and `lesion_region` list the visual tokens, as numbers in the scan's whole grid, that hold the organ
and the lesion asked about, null where the label map shows no such thing. `place` lists the values of the label map that
the question is about, so that questions without a common one are about different places, null where they are not
known."""

Progress = Callable[[int, int, str], None]
AskedScan = tuple[str, Path, list[Question]]
"""A scan's id, its volume and the questions about it in order of their ids."""


def asked_scans(data: Path, split: str, max_scans: int | None = None) -> list[AskedScan]:
    """Scans of a split that preprocessing accepted, in order of their ids, the first ``max_scans`` of them.

    Raises:
        PhotonError: ``SPLIT_EMPTY`` when there is none; what reading questions and manifest raises.
    """
    accepted = read_manifest(data / "volumes" / MANIFEST_NAME).filter(status="ok")
    volumes = {scan_id: data / "volumes" / name for scan_id, name in accepted.select("scan_id", "volume").iter_rows()}
    by_scan: dict[str, list[Question]] = defaultdict(list)
    for question in read_questions(data / "questions.jsonl"):
        if question.split == split and question.scan_id in volumes:
            by_scan[question.scan_id].append(question)
    if not by_scan:
        fact = f"no accepted scan has questions in split {split!r}."
        raise PhotonError("SPLIT_EMPTY", data, fact, "Choose a split that has questions, and preprocess its scans.")
    return [
        (scan_id, volumes[scan_id], sorted(asked, key=lambda question: question.question_id))
        for scan_id, asked in sorted(by_scan.items())
    ][:max_scans]


def write_regions(
    data: Path, target: Path, *, split: str, max_scans: int | None = None, on_progress: Progress | None = None
) -> pl.DataFrame:
    """Find what every question of a split asks about and write the table :data:`REGION_SCHEMA`.

    Raises:
        PhotonError: as :func:`asked_scans` and :func:`pipelines.study.asked.read_asked_regions`.
    """
    scans = asked_scans(data, split, max_scans)
    rows: list[dict[str, object]] = []
    for done, (scan_id, path, questions) in enumerate(scans, start=1):
        volume = read_volume(path)
        regions = read_asked_regions(data, scan_id, volume.spec, volume.affine, questions)
        rows += [_row(question, regions.get(question.question_id)) for question in questions]
        if on_progress:
            on_progress(done, len(scans), f"regions of {scan_id}")
    return write_table(rows, REGION_SCHEMA, target)


def read_regions(source: Path) -> pl.DataFrame:
    """Read a table written by :func:`write_regions`.

    Raises:
        PhotonError: ``TABLE_UNREADABLE``, see :func:`read_table`.
    """
    return read_table(source, REGION_SCHEMA, "Run `photon study` again.")


def elsewhere(organs: Sequence[str], places: Sequence[Sequence[int] | None]) -> BoolArray:
    """Bool [Q, Q]: whether two questions about a scan are about different places.

    They are when they share no label value. Without label values a different organ's name is taken for another place.

    Args:
        organs: [Q] names; places: [Q] label values.
    """
    known = [set(place) if place else set() for place in places]

    def differ(first: int, second: int) -> bool:
        if not known[first] or not known[second]:
            return organs[first] != organs[second]
        return not known[first] & known[second]

    count = len(organs)
    return np.array([[differ(first, second) for second in range(count)] for first in range(count)], dtype=bool)


def _row(question: Question, region: AskedRegion | None) -> dict[str, object]:
    def listed(mask: BoolArray | None) -> list[int] | None:
        return None if mask is None else [int(place) for place in np.flatnonzero(mask)]

    is_known = region is not None and bool(region.labels.any())
    return {
        "question_id": question.question_id,
        "organ_region": listed(region.organ) if region else None,
        "lesion_region": listed(region.lesion) if region else None,
        "place": listed(region.labels) if region and is_known else None,
    }
