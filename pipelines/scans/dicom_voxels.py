"""The voxels of one DICOM series: every file read once, values scaled, padding replaced, copies compared."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from photon.errors import PhotonError
from pipelines.scans.checks import BLANK_SCAN, EXPORT_AGAIN, MAX_VALUE
from pipelines.scans.dicom_files import GET_AGAIN, Pixels
from pipelines.scans.dicom_headers import Slice
from pipelines.scans.dicom_pixels import pixel_bytes, scaling_of, stored_range, stored_values
from pipelines.scans.dicom_series import Series

_PET_UNITS = ("BQML", "CNTS", "PROPCNTS", "PROPCPS", "GML", "CM2ML", "NONE", "MGMINML", "UMOLMINML", "MLMINML")
AIR_HU = -1000
MAX_AIR_HU = -900
"""Padding above this is not trusted: tissue has such values."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Voxels:
    """What :func:`read_voxels` found.

    Args:
        array: int16 or float32 [place, row, column]: int16 where all values are whole numbers that fit.
        digests: sha256 of every file.
    """

    array: np.ndarray
    digests: tuple[str, ...]
    notes: tuple[str, ...]


def read_voxels(series: Series) -> Voxels:
    """Read the files of a series that is not refused.

    Raises:
        PhotonError: ``SCAN_UNREADABLE``, ``SCAN_TRUNCATED``, ``PIXELS_CORRUPT``, ``SLICES_CONFLICT``,
            ``SCALING_INVALID`` or ``SCAN_CONSTANT``.
    """
    builder = _Builder(series)
    by_path: dict[Path, list[tuple[int, Slice]]] = defaultdict(list)
    for index, place in enumerate(series.stack.places if series.stack else ()):
        for image in place:
            by_path[image.path].append((index, image))
    digests = []
    for path, images in by_path.items():
        try:
            content = path.read_bytes()
        except OSError as error:
            fact = f"the file cannot be read ({error.strerror})."
            raise PhotonError("SCAN_UNREADABLE", path, fact, "Check its permissions.") from error
        digests.append(hashlib.sha256(content).hexdigest())
        pixels = images[0][1].pixels
        if pixels is None:
            raise PhotonError("PIXELS_MISSING", path, "it has no pixel data.", GET_AGAIN)
        value = pixel_bytes(content, pixels, path)
        for index, image in images:
            builder.put(index, image, pixels, value)
    return Voxels(array=builder.finished(), digests=tuple(digests), notes=builder.notes())


def joined_sha256(digests: Iterable[str]) -> str:
    """One checksum of several files, in whatever order and under whatever names they come."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


class _Builder:
    """Takes the images of a series one by one and puts each at its place."""

    def __init__(self, series: Series) -> None:
        images = series.images
        self._series = series
        self._scaling = {scaling_of(image, series.subject) for image in images}
        is_whole = all(slope == 1 and intercept.is_integer() for slope, intercept in self._scaling)
        columns, rows, num_places = series.shape
        self._array = np.empty((num_places, rows, columns), np.int16 if is_whole else np.float32)
        self._is_filled = [False] * num_places
        self._padded: dict[int, np.ndarray] = {}
        self._num_images: Counter[str] = Counter()
        self._num_padded = 0

    def put(self, index: int, image: Slice, pixels: Pixels, value: bytes | memoryview) -> None:
        """Decode an image into its place, or compare it with the one that is there."""
        whole, values = stored_values(value, pixels, image.frame, image.path)
        padding = self._padding(whole, values, image)
        if whole is not values and not np.array_equal(
            whole, values if padding is None else np.where(padding, whole, values)
        ):
            self._num_images["have bits set beyond those that hold values: cut off"] += 1
        slope, intercept = scaling_of(image, image.path)
        if pixels.photometric == "MONOCHROME1" and self._series.modality == "mr":
            values = sum(stored_range(pixels)) - values.astype(np.int64)
        plane = self._fitting(values, slope, intercept)
        if padding is not None and self._series.modality == "ct":
            plane[padding] = AIR_HU
        if not self._is_filled[index]:
            self._array[index] = plane
            self._is_filled[index] = True
            if padding is not None:
                self._num_padded += int(np.count_nonzero(padding))
                self._padded[index] = padding
        elif np.array_equal(self._array[index], plane.astype(self._array.dtype)):
            self._num_images["are copies of others: dropped"] += 1
        else:
            fact = f"different images lie at place {index + 1} of {len(self._is_filled)}, and nothing tells them apart."
            raise PhotonError("SLICES_CONFLICT", self._series.subject, fact, "Give one image for each place.")

    def finished(self) -> np.ndarray:
        """The whole array, once every image is in its place."""
        array, subject = self._array, self._series.subject
        if self._padded and self._series.modality != "ct":
            self._fill_padding()
        low, high = float(array.min()), float(array.max())
        if low == high:
            fact = f"all its voxels have the value {low:g}: the image is blank."
            raise PhotonError("SCAN_CONSTANT", subject, fact, BLANK_SCAN)
        if not max(-low, high) <= MAX_VALUE:
            raise PhotonError("SCALING_INVALID", subject, f"its values run from {low:g} to {high:g}.", EXPORT_AGAIN)
        return array

    def notes(self) -> tuple[str, ...]:
        """What was unusual in the pixels or their description."""
        first, modality = self._series.images[0], self._series.modality
        notes = [f"{count} images {what}" for what, count in sorted(self._num_images.items())]
        if self._num_padded:
            target = f"{AIR_HU} HU" if modality == "ct" else "the lowest other value"
            notes.append(f"{self._num_padded} voxels of padding: set to {target}")
        if len(self._scaling) > 1:
            notes.append(f"{len(self._scaling)} different slopes and intercepts: each slice has its own applied")
        if any(image.pixels and image.pixels.photometric == "MONOCHROME1" for image in self._series.images):
            notes.append("MONOCHROME1: " + ("turned so that more is brighter" if modality == "mr" else "values kept"))
        if any(image.is_lossy for image in self._series.images):
            notes.append("compressed with loss at some time")
        if first.image_type[:1] == ("DERIVED",):
            notes.append("derived from other images, not measured")
        if modality == "ct" and first.rescale_type not in ("", "HU"):
            notes.append("its values are not called HU: taken as HU")
        if modality == "pt":
            unit = first.units if first.units in _PET_UNITS else "no known unit"
            notes.append(f"its values are in {unit}, not converted to uptake (SUV)")
        return tuple(notes)

    def _padding(self, whole: np.ndarray, values: np.ndarray, image: Slice) -> np.ndarray | None:
        """Where an image says that it shows nothing; None where nowhere."""
        if image.padding is None or image.pixels is None:
            return None
        low, high = image.padding
        mask = (whole >= low) & (whole <= high)
        if not mask.any():
            return None
        slope, intercept = scaling_of(image, image.path)
        lowest, highest = stored_range(image.pixels)
        is_air = max(low * slope, high * slope) + intercept <= MAX_AIR_HU or low > highest or high < lowest
        if self._series.modality == "ct" and not is_air:
            self._num_images[f"declare padding {high}, a value that tissue has: kept"] += 1
            return None
        return mask

    def _fitting(self, values: np.ndarray, slope: float, intercept: float) -> np.ndarray:
        """Scaled values of the array's type, which becomes float32 at the first image that int16 cannot hold."""
        if self._array.dtype == np.int16:
            low, high = int(values.min()) + int(intercept), int(values.max()) + int(intercept)
            if low >= -32768 and high <= 32767:
                return (values.astype(np.int32) + np.int32(intercept)).astype(np.int16)
            self._array = self._array.astype(np.float32)
        return (values.astype(np.float64) * slope + intercept).astype(np.float32)

    def _fill_padding(self) -> None:
        """Set padding to the lowest other value, unless it lies among the others."""
        lows, highs, pads = [], [], []
        for index, plane in enumerate(self._array):
            mask = self._padded.get(index)
            others = plane if mask is None else plane[~mask]
            if others.size:
                lows.append(others.min())
                highs.append(others.max())
            if mask is not None:
                pads.append((plane[mask].min(), plane[mask].max()))
        if not lows:
            return
        low, high = min(lows), max(highs)
        if any(last >= low and first <= high for first, last in pads):
            self._num_images["declare padding that other voxels have as a value: kept"] = len(pads)
            self._num_padded = 0
            return
        for index, mask in self._padded.items():
            self._array[index][mask] = low
