"""Which images of a folder belong together.

A series, as DICOM numbers them, is often more than one scan: a localiser beside it, several echoes or time
points at the same places, two frames of reference. Here it falls apart into groups that can each be one grid.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from photon.errors import PhotonError
from pipelines.scans.dicom_geometry import Stack, check_plane, heights_of, places_of, stacked
from pipelines.scans.dicom_headers import Slice
from pipelines.scans.dicom_pixels import check_pixels, scaling_of

MODALITIES = {"CT": "ct", "MR": "mr", "PT": "pt"}

_SCAN_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "enhanced CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "converted enhanced CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "enhanced MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "converted enhanced MR",
    "1.2.840.10008.5.1.4.1.1.128": "PET",
    "1.2.840.10008.5.1.4.1.1.128.1": "converted enhanced PET",
    "1.2.840.10008.5.1.4.1.1.130": "enhanced PET",
}
_OTHER_CLASSES = (
    ("1.2.840.10008.5.1.4.1.1.7", "a secondary capture"),
    ("1.2.840.10008.5.1.4.1.1.88", "a report"),
    ("1.2.840.10008.5.1.4.1.1.66", "a segmentation or registration"),
    ("1.2.840.10008.5.1.4.1.1.481", "an object of radiotherapy"),
    ("1.2.840.10008.5.1.4.1.1.11", "a presentation state"),
    ("1.2.840.10008.5.1.4.1.1.104", "a document"),
)
_OTHER_MODALITIES = ("NM", "US", "XA", "RF", "MG", "CR", "DX", "OT", "ECG")
_AXES_TOLERANCE = 1e-3
_SPACING_TOLERANCE = 1e-3
_HASH_LENGTH = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """Images that make one scan, or are refused together.

    Args:
        key: names the series within its folder, e.g. ``ct-3-5f2c0a91be``: modality, series number and a
            checksum of the DICOM UIDs and of what tells it apart from others of the same UID. It depends
            neither on file names nor on what else is in the folder and holds nothing about the patient.
        modality: ``ct``, ``mr`` or ``pt``, else None.
        images: the slices, in no order that matters.
        stack: how they lie; None when refused.
        refusal: why it cannot be read, as far as headers tell.
        notes: what was unusual in its folder but acceptable.
    """

    key: str
    folder: Path
    modality: str | None
    images: tuple[Slice, ...]
    stack: Stack | None
    refusal: PhotonError | None
    notes: tuple[str, ...] = ()

    @property
    def subject(self) -> Path:
        """What errors call it: its folder and key."""
        return self.folder / self.key

    @property
    def paths(self) -> tuple[Path, ...]:
        """Its files, sorted."""
        return tuple(sorted({image.path for image in self.images}))

    @property
    def heights_mm(self) -> tuple[float, ...]:
        """Where its slices lie along the stack, to a tenth; none where they do not say so."""
        try:
            for image in self.images:
                check_plane(image, self.subject)
        except PhotonError:
            return ()
        return tuple(sorted({round(height, 1) for height in heights_of(self.images)}))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows and places, as the scan's array has them; zeros when refused."""
        pixels = self.images[0].pixels
        return (pixels.columns, pixels.rows, len(self.stack.places)) if self.stack and pixels else (0, 0, 0)


def grouped(images: Sequence[Slice], folder: Path) -> list[Series]:
    """Sort the images of a folder into series, ordered by key."""
    spoilt: dict[str, Slice] = {}
    groups: dict[tuple[object, ...], list[Slice]] = defaultdict(list)
    for image in images:
        if _is_incomplete(image):
            spoilt[image.series_uid] = image
        else:
            groups[_sure_differences(image)].append(image)
    parts = [part for group in groups.values() for alike in _same_planes(group) for part in _separated(alike)]
    num_parts = Counter(part[0].series_uid for part in parts)
    strays = [[image] for uid, image in spoilt.items() if uid not in num_parts]
    series: dict[str, Series] = {}
    for part in parts + strays:
        uid = part[0].series_uid
        notes = []
        if num_parts[uid] > 1:
            notes.append(f"its DICOM series holds images of {num_parts[uid]} scans, told apart by their headers")
        if strays:
            notes.append("its folder holds incomplete images of no known series: a slice at an end may be missing")
        one = _series(part, spoilt.get(uid), folder, tuple(notes))
        while one.key in series:  # alike but for tiny differences of axes or spacing
            one = dataclasses.replace(one, key=f"{one.key}x")
        series[one.key] = one
    return [series[key] for key in sorted(series)]


def _is_incomplete(image: Slice) -> bool:
    """Whether it ought to be a slice, and cannot be put beside the others: its series then lacks one."""
    if _kind(image):
        return False
    try:
        check_plane(image, image.path)
    except PhotonError:
        return True
    return image.pixels is None


def _sure_differences(image: Slice) -> tuple[object, ...]:
    size = (image.pixels.rows, image.pixels.columns, image.pixels.samples) if image.pixels else None
    return (image.series_uid, image.sop_class_uid, image.frame_of_reference_uid, "LOCALIZER" in image.image_type, size)


def _same_planes(group: list[Slice]) -> list[list[Slice]]:
    """Split by direction of axes and pixel spacing, forgiving the last digits."""
    alike: list[list[Slice]] = []
    for image in sorted(group, key=lambda image: (image.instance_uid, image.frame)):
        for others in alike:
            if _is_close(image.axes, others[0].axes, _AXES_TOLERANCE) and _is_close(
                image.pixel_spacing, others[0].pixel_spacing, _SPACING_TOLERANCE
            ):
                others.append(image)
                break
        else:
            alike.append([image])
    return alike


def _is_close(first: tuple[float, ...] | None, second: tuple[float, ...] | None, tolerance: float) -> bool:
    if first is None or second is None:
        return first is second
    return all(not abs(a - b) > tolerance for a, b in zip(first, second, strict=True))


def _separated(images: list[Slice]) -> list[list[Slice]]:
    """Split images that lie at the same places by what tells them apart: echo, time point, acquisition ...

    Only where places repeat: many scanners number acquisitions or trigger times slice by slice. A stack
    without repetitions is split by acquisition alone, and only if that makes every part even.
    """
    if _kind(images[0]):
        return [images]
    num_places, num_copies = _repetition(images)
    if num_copies == 1:
        parts = _parts(images, "acquisition")
        is_better = len(parts) > 1 and not _is_even(images) and all(map(_is_even, parts))
        return parts if is_better else [images]
    candidates = []
    for order, name in enumerate(images[0].phase):
        parts = _parts(images, name)
        if len(parts) < 2 or min(map(len, parts)) < 2:
            continue
        repetitions = [_repetition(part) for part in parts]
        is_complete = all(places == num_places for places, _ in repetitions)
        candidates.append((not is_complete, max(copies for _, copies in repetitions), order, parts))
    if not candidates:
        return [images]
    best = min(candidates, key=lambda candidate: candidate[:3])[3]
    return [part for half in best for part in _separated(half)]


def _parts(images: list[Slice], phase: str) -> list[list[Slice]]:
    parts: dict[str, list[Slice]] = defaultdict(list)
    for image in images:
        parts[image.phase[phase]].append(image)
    return [parts[value] for value in sorted(parts)]


def _repetition(images: list[Slice]) -> tuple[int, int]:
    """Number of places, and of different images at the fullest of them; a file given twice counts once."""
    places = places_of(images)
    copies = max(len({(image.instance_uid or image.path, image.frame) for image in place}) for place in places)
    return len(places), copies


def _is_even(images: list[Slice]) -> bool:
    try:
        stacked(images, images[0].path)
    except PhotonError:
        return False
    return True


def _series(images: list[Slice], spoilt: Slice | None, folder: Path, notes: tuple[str, ...]) -> Series:
    first = images[0]
    modality = MODALITIES.get(first.modality)
    key = f"{modality or 'other'}-{first.series_number}-{_checksum(images)}"
    subject = folder / key
    stack, refusal = None, _refusal([*images, spoilt] if spoilt else images, subject)
    if refusal is None:
        try:
            stack = stacked([*images, spoilt] if spoilt else images, subject)
        except PhotonError as error:
            refusal = error
    return Series(
        key=key,
        folder=folder,
        modality=modality,
        images=tuple(images),
        stack=stack,
        refusal=refusal,
        notes=notes,
    )


def _checksum(images: list[Slice]) -> str:
    """Of the series UID and of what tells its groups apart."""
    first = images[0]
    phase = {name: value for name, value in first.phase.items() if all(image.phase[name] == value for image in images)}
    axes = [round(value, 1) + 0.0 for value in first.axes or ()]
    facts = (_sure_differences(first), axes, sorted(phase.items()))
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:_HASH_LENGTH]


def _refusal(images: list[Slice], subject: Path) -> PhotonError | None:
    """What rules a series out before its geometry is looked at."""
    first = images[0]
    kind = _kind(first)
    if kind:
        remedy = "Leave it out: only CT, MR and PET series are scans."
        return PhotonError("SERIES_NOT_A_SCAN", subject, f"it is {kind}.", remedy)
    for image in images:
        if image.fault is not None:
            return PhotonError(image.fault.code, image.path, image.fault.fact, image.fault.remedy)
        pixels = image.pixels
        if pixels is None or pixels.samples != 1 or not pixels.photometric.startswith("MONOCHROME"):
            return PhotonError(
                "SCAN_RGB", subject, "its pixels are colours.", "Give the grey series, not a picture of it."
            )
        try:
            check_pixels(pixels, image.path)
            scaling_of(image, subject)
        except PhotonError as error:
            return error
    return None


def _kind(image: Slice) -> str:
    """What an image is, if not a slice of a scan."""
    if "LOCALIZER" in image.image_type:
        return "a localiser"
    for prefix, kind in _OTHER_CLASSES:
        if image.sop_class_uid == prefix or image.sop_class_uid.startswith(prefix + "."):
            return kind
    if image.sop_class_uid not in _SCAN_CLASSES or image.modality not in MODALITIES:
        return f"of the modality {image.modality if image.modality in _OTHER_MODALITIES else 'unknown'}"
    return ""
