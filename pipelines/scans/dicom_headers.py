"""What the header of a DICOM file says about each of its images, single slices or frames of an enhanced one."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import BinaryIO

from pydicom.dataset import Dataset
from pydicom.uid import MediaStorageDirectoryStorage

from photon.errors import PhotonError
from pipelines.scans.dicom_files import (
    FIRST_BYTES,
    GET_AGAIN,
    Pixels,
    first_item,
    listed,
    located_pixels,
    number,
    numbers,
    parsed,
    text,
    value_of,
    whole_number,
)
from pipelines.scans.scan import is_dicom

_PHASES = {
    "acquisition": "AcquisitionNumber",
    "time point": "TemporalPositionIdentifier",
    "echo time": "EchoTime",
    "inversion time": "InversionTime",
    "trigger time": "TriggerTime",
    "b-value": "DiffusionBValue",
    "frame time": "FrameReferenceTime",
}
_FRAME_PHASES = {
    "acquisition": ("FrameContentSequence", "FrameAcquisitionNumber"),
    "time point": ("FrameContentSequence", "TemporalPositionIndex"),
    "stack": ("FrameContentSequence", "StackID"),
    "echo time": ("MREchoSequence", "EffectiveEchoTime"),
    "trigger time": ("CardiacSynchronizationSequence", "NominalCardiacTriggerDelayTime"),
    "b-value": ("MRDiffusionSequence", "DiffusionBValue"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """One image: a file, or a frame of one. Lengths are mm in the DICOM patient frame (LPS).

    Args:
        position: centre of the first pixel; None when absent, NaN when unreadable, as the other numbers.
        axes: direction along a row and along a column.
        pixel_spacing: distance between rows, between columns.
        padding: lowest and highest stored value that mean "outside the picture".
        phase: what may tell images at the same place apart, e.g. ``{"echo time": "80.0"}``.
        pixels: None when the file has none.
        fault: why the image cannot be used, as far as its file alone tells.
    """

    path: Path
    frame: int
    series_uid: str
    instance_uid: str
    frame_of_reference_uid: str
    sop_class_uid: str
    modality: str
    series_number: int
    image_type: tuple[str, ...]
    position: tuple[float, ...] | None
    axes: tuple[float, ...] | None
    pixel_spacing: tuple[float, ...] | None
    slice_spacing: float | None
    slope: float | None
    intercept: float | None
    rescale_type: str
    units: str
    padding: tuple[int, int] | None
    phase: dict[str, str]
    is_lossy: bool
    pixels: Pixels | None
    fault: PhotonError | None


def read_slices(path: Path) -> list[Slice] | None:
    """The images that a file announces; one without pixels, e.g. a dose report, counts as one. Empty when the
    file is only a directory of others, None when it is not DICOM.

    Raises:
        PhotonError: ``SCAN_UNREADABLE``, ``SCAN_TRUNCATED`` or ``SCAN_TOO_LARGE``.
    """
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first = stream.read(FIRST_BYTES)
            if not is_dicom(first):
                return None
            header, body = parsed(stream, first, path)
            if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
                return []
            if text(header, "SeriesInstanceUID") == "":
                fact = "its header does not say which series it belongs to, or ends before that."
                raise PhotonError("SCAN_UNREADABLE", path, fact, GET_AGAIN)
            return _slices(header, body, path)
    except OSError as error:
        fact = f"the file cannot be read ({error.strerror or type(error).__name__})."
        raise PhotonError("SCAN_UNREADABLE", path, fact, "Check its permissions, or copy it again.") from error
    except PhotonError:
        raise
    except Exception as error:  # pydicom raises nearly anything on damaged files; its words may quote values
        fact = f"its DICOM header is damaged ({type(error).__name__})."
        raise PhotonError("SCAN_UNREADABLE", path, fact, GET_AGAIN) from None


def _slices(header: Dataset, body: BinaryIO, path: Path) -> list[Slice]:
    pixels, fault = located_pixels(header, body, path)
    padding = _padding(header)
    num_frames = pixels.num_frames if pixels else 1
    shared = first_item(header, "SharedFunctionalGroupsSequence")
    frames = value_of(header, "PerFrameFunctionalGroupsSequence") or []
    if frames and len(frames) != num_frames and fault is None:
        fact = f"it declares {num_frames} frames and describes {len(frames)}."
        fault = PhotonError("SCAN_UNREADABLE", path, fact, GET_AGAIN)
    if not frames and num_frames > 1 and fault is None:
        fact = f"it holds {num_frames} frames and does not say where they lie."
        fault = PhotonError("FORMAT_UNSUPPORTED", path, fact, "Export it as single slices or as enhanced DICOM.")
    return [
        _slice(header, (frame, shared) if frame is not None else (), index, path, pixels, padding, fault)
        for index, frame in enumerate(frames or [None])
    ]


def _slice(
    header: Dataset,
    groups: tuple[Dataset, ...],
    index: int,
    path: Path,
    pixels: Pixels | None,
    padding: tuple[int, int] | None,
    fault: PhotonError | None,
) -> Slice:
    """One image; ``groups`` are its functional groups, its own before those it shares with other frames."""

    def owner(sequence: str) -> Dataset:
        found = (first_item(group, sequence) for group in groups)
        return next((item for item in found if len(item)), Dataset()) if groups else header

    scaling, measures = owner("PixelValueTransformationSequence"), owner("PixelMeasuresSequence")
    phase = {name: text(header, keyword) for name, keyword in _PHASES.items()}
    image_type = tuple(str(word) for word in listed(value_of(header, "ImageType")))
    if groups:
        phase = {name: text(owner(sequence), keyword) for name, (sequence, keyword) in _FRAME_PHASES.items()}
        for sequence in ("CTImageFrameTypeSequence", "MRImageFrameTypeSequence", "PETFrameTypeSequence"):
            image_type = tuple(str(word) for word in listed(value_of(owner(sequence), "FrameType"))) or image_type
    return Slice(
        path=path,
        frame=index,
        series_uid=text(header, "SeriesInstanceUID"),
        instance_uid=text(header, "SOPInstanceUID"),
        frame_of_reference_uid=text(header, "FrameOfReferenceUID"),
        sop_class_uid=text(header, "SOPClassUID") or text(header.file_meta, "MediaStorageSOPClassUID"),
        modality=text(header, "Modality"),
        series_number=whole_number(header, "SeriesNumber"),
        image_type=image_type,
        position=numbers(owner("PlanePositionSequence"), "ImagePositionPatient", 3),
        axes=numbers(owner("PlaneOrientationSequence"), "ImageOrientationPatient", 6),
        pixel_spacing=numbers(measures, "PixelSpacing", 2),
        slice_spacing=number(measures, "SpacingBetweenSlices"),
        slope=number(scaling, "RescaleSlope"),
        intercept=number(scaling, "RescaleIntercept"),
        rescale_type=text(scaling, "RescaleType"),
        units=text(header, "Units"),
        padding=padding,
        phase=phase | {"image type": "\\".join(image_type[2:])},
        is_lossy=text(header, "LossyImageCompression") == "01",
        pixels=pixels,
        fault=fault or _lookup_fault(header, path),
    )


def _padding(header: Dataset) -> tuple[int, int] | None:
    """Lowest and highest padding value, as numbers of the pixels' signedness."""
    value = value_of(header, "PixelPaddingValue")
    if not isinstance(value, int):
        return None
    other = value_of(header, "PixelPaddingRangeLimit")
    ends = [value, other if isinstance(other, int) else value]
    if value_of(header, "BitsAllocated") == 16:  # some writers store the bits of a number of the other signedness
        is_signed = value_of(header, "PixelRepresentation") == 1
        ends = [(end + (1 << 15)) % (1 << 16) - (1 << 15) if is_signed else end % (1 << 16) for end in ends]
    return min(ends), max(ends)


def _lookup_fault(header: Dataset, path: Path) -> PhotonError | None:
    if "ModalityLUTSequence" not in header:
        return None
    fact = "its values are given by a lookup table instead of slope and intercept."
    return PhotonError("FORMAT_UNSUPPORTED", path, fact, "Convert it to NIfTI.")
