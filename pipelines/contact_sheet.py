"""Pages that show every scan of a folder of volumes at a glance: three planes, grid, notes; and what was refused, why.

A wrong orientation, spacing or modality is seen where hundreds of scans stand side by side. A page needs no other file;
beyond `SCANS_PER_PAGE` scans there are several, linked to each other.
"""

from __future__ import annotations

import base64
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from photon.errors import PhotonError
from pipelines.files import prepare_output_folder, write_text
from pipelines.manifest import MANIFEST_NAME, read_manifest
from pipelines.page import Markup, group_row, join, page, row, table, tag
from pipelines.report_pictures import CONVENTION, volume_spacing_mm
from pipelines.results import ContactSheetRecord
from pipelines.slices import Plane
from pipelines.thumbnails import centre_planes, thumbnail
from pipelines.volumes import Volume, read_volume
from pipelines.workers import default_num_workers, run_in_processes

SCANS_PER_PAGE = 200
FEW_SCANS = 48
"""Fewer are drawn in this process."""
LINES_MM = 50
UNREAD = "The volume cannot be shown"
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class _Card:
    """A scan to be drawn: its manifest row, and where its volume is."""

    row: dict[str, Any]
    folder: Path


def write_contact_sheet(volumes: Path, output: Path, *, on_progress: Progress | None = None) -> ContactSheetRecord:
    """Write the contact sheet of a folder that ``photon preprocess`` filled.

    Args:
        volumes: folder with ``manifest.parquet`` and volumes.
        output: the first page; further ones get ``-2``, ``-3`` ... before the ending.

    Raises:
        PhotonError: ``MANIFEST_INVALID``, ``OUTPUT_UNWRITABLE``. A volume that cannot be read is shown as that.
    """
    manifest = read_manifest(volumes / MANIFEST_NAME)
    prepare_output_folder(output.parent)
    shown = manifest.filter(status="ok").sort("modality", "scan_id").to_dicts()
    cards = _draw([_Card(row, volumes) for row in shown], on_progress)
    pages = [shown[start : start + SCANS_PER_PAGE] for start in range(0, len(shown), SCANS_PER_PAGE)] or [[]]
    paths = [_page_path(output, number) for number in range(len(pages))]
    for number, (path, scans) in enumerate(zip(paths, pages, strict=True)):
        sections = _sections(scans, cards)
        if number == 0:
            sections = [*_refused_sections(manifest), *sections]
        header = _header(volumes, manifest, paths, number, pages)
        footer = tag("span", "For research. Not a medical device; not for use in diagnosis or treatment.")
        write_text(path, page(f"Scans of {volumes.resolve().name}", header, sections, footer))
    _remove_further_pages(output, len(paths))
    return ContactSheetRecord(
        pages=[str(path) for path in paths],
        num_shown=len(shown) - sum(UNREAD in card for card in cards.values()),
        num_refused=len(manifest) - len(shown),
    )


def _draw(cards: Sequence[_Card], on_progress: Progress | None) -> dict[str, Markup]:
    """Every card's figure by scan id."""
    if len(cards) < FEW_SCANS:
        drawn: Iterable[tuple[_Card, Markup | None]] = ((card, _figure(card)) for card in cards)
    else:
        drawn = run_in_processes(_figure, cards, default_num_workers())
    figures = {}
    for card, figure in drawn:
        words = "the process drawing it was killed."
        figures[card.row["scan_id"]] = _without_picture(card.row, words) if figure is None else figure
        if on_progress:
            on_progress(len(figures), len(cards), card.row["scan_id"])
    return figures


def _figure(card: _Card) -> Markup:
    try:
        volume = read_volume(card.folder / card.row["volume"])
    except PhotonError as error:
        return _without_picture(card.row, f"{error.fact} ({error.code})")
    planes = centre_planes(volume.voxels, volume_spacing_mm(volume))
    pictures = tag("div", *(_plane(plane) for plane in planes), class_="planes")
    return tag("figure", pictures, _caption(card.row, volume), class_="scan noted" if card.row["notes"] else "scan")


def _plane(plane: Plane) -> Markup:
    """A slice in true proportions with lines every 50 mm from its centre and the patient's directions at its edges."""
    data = base64.b64encode(thumbnail(plane)).decode()
    lines = f"background-size:{100 * LINES_MM / plane.width_mm:.3f}% {100 * LINES_MM / plane.height_mm:.3f}%"
    letters = (
        tag("b", side, class_=place)
        for side, place in zip(plane.sides, ("top", "bottom", "left", "right"), strict=True)
    )
    return tag(
        "div",
        Markup(f'<img src="data:image/png;base64,{data}" alt="{plane.name}" loading="lazy">'),
        tag("i", style=lines),
        *letters,
        class_="plane",
        style=f"flex:{plane.width_mm:.1f} 0 0;aspect-ratio:{plane.width_mm:.1f}/{plane.height_mm:.1f}",
    )


def _caption(row: dict[str, Any], volume: Volume) -> Markup:
    how = {"declared": " as declared", "header": " by its header", "inferred": " by its values"}
    facts = (
        f"{row['modality'].upper()}{how.get(row['modality_source'], '')} · {_times(row['shape'])} at "
        f"{_times(round(s, 2) for s in row['spacing_mm'])} mm, {row['orientation']}"
    )
    if row["min_hu"] is not None and row["max_hu"] is not None:
        facts += f" · {row['min_hu']:g} to {row['max_hu']:g}"
    grid = (
        f"grid {_times(volume.voxels.shape)} at {_times(round(s, 2) for s in volume_spacing_mm(volume))} mm (Z, Y, X)"
    )
    notes = tag("ul", *(tag("li", note) for note in row["notes"])) if row["notes"] else Markup("")
    return tag("figcaption", tag("strong", row["scan_id"]), Markup("<br>"), facts, Markup("<br>"), grid, notes)


def _without_picture(row: dict[str, Any], why: str) -> Markup:
    caption = tag("figcaption", tag("strong", row["scan_id"]), Markup("<br>"), f"{UNREAD}: {why}")
    return tag("figure", caption, class_="scan refused")


def _sections(scans: Sequence[dict[str, Any]], cards: dict[str, Markup]) -> list[tuple[str, Markup]]:
    """One gallery for each modality."""
    kinds: dict[str, list[Markup]] = {}
    for scan in scans:
        kinds.setdefault(scan["modality"], []).append(cards[scan["scan_id"]])
    return [(kind.upper(), tag("div", *figures, class_="scans")) for kind, figures in kinds.items()]


def _refused_sections(manifest: pl.DataFrame) -> list[tuple[str, Markup]]:
    refused = manifest.filter(pl.col("status") != "ok").sort("status", "scan_id")
    if refused.is_empty():
        return []
    rows = []
    for (code,), scans in refused.group_by(["status"], maintain_order=True):
        rows.append(group_row(f"{code}: {len(scans)}", 3))
        rows += [
            row(scan["scan_id"], scan["source"], scan["message"], num_text=3, class_="indent")
            for scan in scans.iter_rows(named=True)
        ]
    body = table(("scan", "file ", "why "), rows)
    return [("Refused", body if len(refused) <= 40 else tag("details", tag("summary", f"{len(refused)} scans"), body))]


def _header(
    volumes: Path, manifest: pl.DataFrame, paths: Sequence[Path], number: int, pages: Sequence[Sequence[dict[str, Any]]]
) -> Markup:
    counts = Counter(manifest["status"])
    num_noted = manifest.filter((pl.col("status") == "ok") & (pl.col("notes").list.len() > 0)).height
    refused = ", ".join(f"{count} {code}" for code, count in sorted(counts.items()) if code != "ok")
    words = (
        f"{len(manifest)} scans: {counts['ok']} on the grid, {num_noted} of them with notes, "
        f"{len(manifest) - counts['ok']} refused{f' ({refused})' if refused else ''}. "
        f"Planes run through the centre of the grid; lines are {LINES_MM} mm apart. {CONVENTION}"
    )
    links = []
    for other, (path, scans) in enumerate(zip(paths, pages, strict=True)):
        span = f"{scans[0]['scan_id']} … {scans[-1]['scan_id']}" if scans else ""
        shown = f"{other + 1}: {span}"
        links.append(tag("strong", shown, " ") if other == number else join(tag("a", shown, href=path.name), " "))
    listed = tag("p", "Pages ", *links, class_="soft pages") if len(pages) > 1 else Markup("")
    return join(tag("h1", f"Scans of “{volumes.resolve().name}”"), tag("p", words, class_="soft"), listed)


def _page_path(first: Path, number: int) -> Path:
    return first if number == 0 else first.with_name(f"{first.stem}-{number + 1}{first.suffix}")


def _remove_further_pages(first: Path, number: int) -> None:
    """Pages of an earlier sheet that had more."""
    while (path := _page_path(first, number)).is_file():
        path.unlink()
        number += 1


def _times(values: Iterable[float]) -> str:
    return " × ".join(f"{value:g}" for value in values)
