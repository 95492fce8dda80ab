"""Scans of AbdomenAtlas, which DeepTumorVQA asks about too: ids, files, and ids of the same origin."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pipelines.datasets.base import Place, Refusal, RowError, ScanFile
from pipelines.datasets.tables import csv_rows, files_below, header_of, is_of_masks
from pipelines.scans.find import scan_id_of

_ID = re.compile(r"BDMAP_[A-Za-z]*\d+")


def scan_name(text: str) -> str:
    """The scan id of a cell.

    Raises:
        RowError: it is none.
    """
    if not _ID.fullmatch(text):
        raise RowError("the image id is not one of AbdomenAtlas", repr(text))
    return text


def find_atlas_scans(images: Path, wanted: frozenset[str]) -> Iterator[ScanFile | Refusal]:
    """Files ``<id>/ct.nii.gz`` or, where there is none, ``<id>.nii.gz`` of the wanted scans, each once.

    Several files that may be the scan are copies if they are of one size; else which of them it is cannot be told.
    """
    found: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files_below(images, ".nii", ".nii.gz"):
        scan_id = path.parent.name if scan_id_of(path) == "ct" else scan_id_of(path)
        if scan_id in wanted and not is_of_masks(path, images):
            found[scan_id].append(path)
    for scan_id, paths in sorted(found.items()):
        likely = [path for path in paths if scan_id_of(path) == "ct"] or paths
        if len({path.stat().st_size for path in likely}) > 1:
            place = Place(file=likely[0].relative_to(images).as_posix(), row=0)
            yield Refusal(place=place, reason="two files have the scan's name", detail=scan_id)
        else:
            yield ScanFile(scan_id=scan_id, path=likely[0])


def patients_of(folder: Path) -> dict[str, str]:
    """Scan id -> patient id, for ids that the dataset's mapping table gives an origin that another id has too."""
    by_origin: defaultdict[str, set[str]] = defaultdict(set)
    for path in files_below(folder, ".csv"):
        if set(header_of(path)) != {"original id", "abdomenatlas id"}:
            continue
        for row in csv_rows(path, folder):
            if not isinstance(row, Refusal) and row.optional("original id"):
                by_origin[row.optional("original id")].add(row.optional("abdomenatlas id"))
    return {scan_id: min(group) for group in by_origin.values() if len(group) > 1 for scan_id in group}


def ids_in(path: Path) -> set[str]:
    """Every scan id that a text file mentions."""
    return set(_ID.findall(path.read_text(encoding="utf-8", errors="replace")))
