"""Pages that show every scan of a folder of volumes at a glance: three planes, grid, notes; and what was refused, why.

A wrong orientation, spacing or modality is seen where hundreds of scans stand side by side. A page needs no other file;
beyond `SCANS_PER_PAGE` scans there are several, linked to each other.
"""

from __future__ import annotations

import base64
import dataclasses
import itertools
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


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """The figure of a card; `error` is why it holds no picture."""

    figure: Markup
    error: PhotonError | None = None


def write_contact_sheet(volumes: Path, output: Path, *, on_progress: Progress | None = None) -> ContactSheetRecord:
    """Write the contact sheet of a folder that ``photon preprocess`` filled.

    Args:
        volumes: folder with ``manifest.parquet`` and volumes.
        output: the first page; further ones get ``-2``, ``-3`` ... before the ending.

    Raises:
        PhotonError: ``MANIFEST_INVALID``, ``OUTPUT_UNWRITABLE``. A volume that cannot be read is shown as that, and
            listed in the record.
    """
    manifest = read_manifest(volumes / MANIFEST_NAME)
    prepare_output_folder(output.parent)
    shown = manifest.filter(status="ok").sort("modality", "scan_id").to_dicts()
    cards = _draw([_Card(row, volumes) for row in shown], on_progress)
    unread = [_unread(row, error) for row in shown if (error := cards[row["scan_id"]].error)]
    pages = [shown[start : start + SCANS_PER_PAGE] for start in range(0, len(shown), SCANS_PER_PAGE)] or [[]]
    paths = [_page_path(output, number) for number in range(len(pages))]
    for number, (path, scans) in enumerate(zip(paths, pages, strict=True)):
        sections = _sections(scans, cards)
        if number == 0:
            sections = [*_refused_sections(manifest, unread), *sections]
        header = _header(volumes, manifest, unread, paths, number, pages)
        footer = tag("span", "For research. Not a medical device; not for use in diagnosis or treatment.")
        write_text(path, page(f"Scans of {volumes.resolve().name}", header, sections, footer))
    _remove_further_pages(output, len(paths))
    return ContactSheetRecord(
        pages=[str(path) for path in paths],
        num_shown=len(shown) - len(unread),
        num_refused=len(manifest) - len(shown),
        unread=unread,
    )


def _draw(cards: Sequence[_Card], on_progress: Progress | None) -> dict[str, _Drawn]:
    """Every card's figure by scan id."""
    if len(cards) < FEW_SCANS:
        drawn: Iterable[tuple[_Card, _Drawn | None]] = ((card, _figure(card)) for card in cards)
    else:
        drawn = run_in_processes(_figure, cards, default_num_workers())
    figures = {}
    for card, figure in drawn:
        figures[card.row["scan_id"]] = _killed(card) if figure is None else figure
        if on_progress:
            on_progress(len(figures), len(cards), card.row["scan_id"])
    return figures


def _figure(card: _Card) -> _Drawn:
    try:
        volume = read_volume(card.folder / card.row["volume"])
    except PhotonError as error:
        return _without_picture(card, error)
    planes = centre_planes(volume.voxels, volume_spacing_mm(volume))
    pictures = tag("div", *(_plane(plane) for plane in planes), class_="planes")
    kind = "scan noted" if card.row["notes"] else "scan"
    return _Drawn(tag("figure", pictures, _caption(card.row, volume), class_=kind))


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


def _killed(card: _Card) -> _Drawn:
    fact = "the process drawing it was killed, perhaps for want of memory."
    remedy = "Draw the sheet again, or use a machine with more memory."
    return _without_picture(card, PhotonError("WORKER_KILLED", card.row["volume"], fact, remedy))


def _without_picture(card: _Card, error: PhotonError) -> _Drawn:
    words = f"{UNREAD}: {error.fact} {error.remedy} ({error.code})"
    caption = tag("figcaption", tag("strong", card.row["scan_id"]), Markup("<br>"), words)
    return _Drawn(tag("figure", caption, class_="scan refused"), error)


def _unread(row: dict[str, Any], error: PhotonError) -> dict[str, str]:
    return {
        "scan_id": row["scan_id"], "volume": row["volume"], "code": error.code,
        "message": f"{error.fact} {error.remedy}",
    }  # fmt: skip


def _sections(scans: Sequence[dict[str, Any]], cards: dict[str, _Drawn]) -> list[tuple[str, Markup]]:
    """One gallery for each modality."""
    kinds: dict[str, list[Markup]] = {}
    for scan in scans:
        kinds.setdefault(scan["modality"], []).append(cards[scan["scan_id"]].figure)
    return [(kind.upper(), tag("div", *figures, class_="scans")) for kind, figures in kinds.items()]


def _refused_sections(manifest: pl.DataFrame, unread: Sequence[dict[str, str]]) -> list[tuple[str, Markup]]:
    """Scans that preprocessing refused, and those whose volumes cannot be read."""
    refused = list(manifest.filter(pl.col("status") != "ok").select("status", "scan_id", "source", "message").rows())
    refused += [(scan["code"], scan["scan_id"], scan["volume"], scan["message"]) for scan in unread]
    if not refused:
        return []
    rows = []
    for code, scans in itertools.groupby(sorted(refused), key=lambda scan: scan[0]):
        listed = [row(*scan[1:], num_text=3, class_="indent") for scan in scans]
        rows += [group_row(f"{code}: {len(listed)}", 3), *listed]
    body = table(("scan", "file ", "why "), rows)
    return [("Refused", body if len(refused) <= 40 else tag("details", tag("summary", f"{len(refused)} scans"), body))]


def _header(
    volumes: Path,
    manifest: pl.DataFrame,
    unread: Sequence[dict[str, str]],
    paths: Sequence[Path],
    number: int,
    pages: Sequence[Sequence[dict[str, Any]]],
) -> Markup:
    counts = Counter(manifest["status"])
    num_noted = manifest.filter((pl.col("status") == "ok") & (pl.col("notes").list.len() > 0)).height
    refused = ", ".join(f"{count} {code}" for code, count in sorted(counts.items()) if code != "ok")
    words = (
        f"{len(manifest)} scans: {counts['ok']} on the grid, {num_noted} of them with notes, "
        f"{len(manifest) - counts['ok']} refused{f' ({refused})' if refused else ''}. "
        f"{f'Volumes that cannot be read: {len(unread)}. ' if unread else ''}"
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
