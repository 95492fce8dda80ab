"""DICOM series written for the tests: an invented patient, whose name must never come out again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, RLELossless

CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
}
SECRETS = ("INVENTED", "19010203", "PID-4711")

Change = Callable[[Dataset, int], None]


def uid(*names: object) -> str:
    """A UID that depends on the names alone."""
    return f"2.25.{int(hashlib.sha256(repr(names).encode()).hexdigest()[:30], 16)}"


def make_slice(
    stored: np.ndarray,
    *,
    index: int = 0,
    series: str = "a",
    modality: str = "CT",
    position: Sequence[float] = (-10.0, -20.0, -30.0),
    axes: Sequence[float] = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
    spacing: Sequence[float] = (0.9, 0.8),
    syntax: str = ExplicitVRLittleEndian,
) -> Dataset:
    """One image of integers [rows, columns], not compressed."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = syntax
    image.PatientName, image.PatientBirthDate, image.PatientID = "INVENTED^PATIENT", "19010203", "PID-4711"
    image.SOPClassUID = CLASSES[modality]
    image.SOPInstanceUID = uid(series, index)
    image.StudyInstanceUID, image.SeriesInstanceUID = uid("study"), uid(series)
    image.FrameOfReferenceUID = uid("frame")
    image.Modality, image.SeriesNumber, image.InstanceNumber = modality, 3, index + 1
    image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    image.ImagePositionPatient = [float(f"{value:.10g}") for value in position]
    image.ImageOrientationPatient = [float(f"{value:.10g}") for value in axes]
    image.PixelSpacing = list(spacing)
    image.Rows, image.Columns = stored.shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated = image.BitsStored = 8 * stored.itemsize
    image.HighBit = image.BitsStored - 1
    image.PixelRepresentation = int(stored.dtype.kind == "i")
    if modality != "MR":
        image.RescaleSlope, image.RescaleIntercept = 1, -1024 if modality == "CT" else 0
    if modality == "PT":
        image.Units = "BQML"
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    image.PixelData = stored.astype(stored.dtype.newbyteorder(order)).tobytes()
    image["PixelData"].VR = "OW"
    return image


def write_series(
    folder: Path,
    stored: np.ndarray,
    *,
    change: Change | None = None,
    prefix: str = "",
    step: Sequence[float] = (0.0, 0.0, 2.5),
    position: Sequence[float] = (-10.0, -20.0, -30.0),
    compress: str | None = None,
    **options: Any,
) -> list[Path]:
    """Write stored values [slice, rows, columns], a file a slice, under names whose order says nothing.

    Args:
        change: called with every data set and its index before it is written.
        step: from one slice to the next, mm, LPS.
        compress: transfer syntax that pydicom can write.

    Returns:
        The files in the order of the slices.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for index, plane in enumerate(stored):
        place = np.add(position, np.multiply(step, index))
        image = make_slice(plane, index=index, position=place, **options)
        if change:
            change(image, index)
        if compress:
            image.compress(compress, encoding_plugin="pydicom" if compress == RLELossless else "pylibjpeg")
        path = folder / f"{prefix}{hashlib.sha256(f'{prefix}{index}'.encode()).hexdigest()[:8]}"
        pydicom.dcmwrite(path, image, enforce_file_format=True)
        paths.append(path)
    return paths


def random_stored(seed: int = 0, shape: tuple[int, int, int] = (6, 7, 9), dtype: type = np.uint16) -> np.ndarray:
    """Stored values [slice, rows, columns] of plausible CT."""
    return np.random.RandomState(seed).randint(0, 2500, shape).astype(dtype)


class DicomWriter:
    """The functions above, for tests."""

    write_series = staticmethod(write_series)
    make_slice = staticmethod(make_slice)
    random_stored = staticmethod(random_stored)
    uid = staticmethod(uid)
    secrets = SECRETS


@pytest.fixture(scope="session")
def dicom() -> type[DicomWriter]:
    """What writes DICOM files."""
    return DicomWriter
