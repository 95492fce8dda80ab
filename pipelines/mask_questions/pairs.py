"""Which masks belong to which image."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from pathlib import Path

from photon.errors import PhotonError
from pipelines.mask_questions.names import PLACEHOLDERS, Description
from pipelines.scans.find import Source, find_scans, scan_id_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """An image and its masks.

    Args:
        scan_id: what the placeholders of the image's pattern stand for, joined by ``_``.
        patient_id: what ``{patient}`` stands for; without it, the scan_id.
        modality: what ``{modality}`` stands for, or "".
        masks: the source of the label map under "", or of each structure's mask under its key; empty where the
            image has none.
    """

    scan_id: str
    patient_id: str
    modality: str
    image: Source
    masks: dict[str, Source]


def find_pairs(images: Path, masks: Path, description: Description) -> list[Pair]:
    """Every image with the masks that have the same placeholders, sorted by scan_id.

    Files that fit neither pattern are passed over; the two folders may be the same: a mask of another image is no
    image then, as ``a_seg`` where images are ``{scan}`` and masks ``{scan}_seg``.

    Raises:
        PhotonError: ``INPUT_MISSING``, ``ARCHIVE_EMPTY``; ``PAIRS_MISSING`` when no image fits its pattern, two
            get one scan_id, or no image has a mask.
    """
    image_fields = _fitting(images, description.image)
    mask_fields = _fitting(masks, description.mask)
    own_names = {name for name in PLACEHOLDERS if f"{{{name}}}" in description.mask} - {"structure"}
    by_place: dict[tuple[str, ...], dict[str, Source]] = {}
    known = {structure.key for structure in description.structures}
    for source, fields in mask_fields:
        key = fields.get("structure", "")
        if description.is_label_map or key in known:
            by_place.setdefault(_place(fields, own_names), {})[key] = source
    of_others = {
        _file(mask)
        for source, fields in image_fields
        for mask in by_place.get(_place(fields, own_names), {}).values()
        if _file(mask) != _file(source)
    }
    pairs: dict[str, Pair] = {}
    for source, fields in image_fields:
        if _file(source) in of_others:
            continue
        scan_id = "_".join(fields.values()).replace("/", "_")
        if scan_id in pairs:
            fact = f"{pairs[scan_id].image.relative} and {source.relative} would both be the scan {scan_id}."
            raise _missing(images, fact)
        pairs[scan_id] = Pair(
            scan_id=scan_id,
            patient_id=fields.get("patient", scan_id),
            modality=fields.get("modality", ""),
            image=source,
            masks=by_place.get(_place(fields, own_names), {}),
        )
    if not pairs:
        raise _missing(images, f"no image has a path like {description.image!r}.")
    if not any(pair.masks for pair in pairs.values()):
        raise _missing(masks, f"no mask like {description.mask!r} belongs to any of the {len(pairs)} images.")
    return [pairs[scan_id] for scan_id in sorted(pairs)]


def _fitting(folder: Path, pattern: str) -> list[tuple[Source, dict[str, str]]]:
    """Sources whose path without ending fits a pattern, and what its placeholders stand for there."""
    sources = find_scans(folder)
    places = Counter((source.path, source.member) for source in sources)
    expression = _expression(pattern)
    found = []
    for source in sources:
        match = expression.fullmatch(_path(source, is_alone=places[source.path, source.member] == 1))
        if match:
            found.append((source, match.groupdict()))
    return found


def _path(source: Source, *, is_alone: bool) -> str:
    """Path without ending; of a DICOM series that has its folder to itself, the folder."""
    relative = Path(source.relative)
    if source.series:
        return (relative.parent if is_alone and relative.name == source.series else relative).as_posix()
    return relative.with_name(scan_id_of(relative)).as_posix()


def _expression(pattern: str) -> re.Pattern[str]:
    """``{scan}`` may stand for a path, the other placeholders for a part between slashes."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    text = "".join(
        re.escape(part) if index % 2 == 0 else f"(?P<{part}>{'.+' if part == 'scan' else '[^/]+'})"
        for index, part in enumerate(parts)
    )
    return re.compile(text)


def _file(source: Source) -> tuple[Path, str, str]:
    return source.path.resolve(), source.member or "", source.series or ""


def _place(fields: dict[str, str], names: set[str]) -> tuple[str, ...]:
    return tuple(fields[name] for name in sorted(names))


def _missing(folder: Path, fact: str) -> PhotonError:
    remedy = "Give the patterns of the paths in the names file (`image`, `mask`)."
    return PhotonError("PAIRS_MISSING", folder, fact, remedy)
