"""DICOM series that are whole: geometry and voxels are those of another reader."""

from __future__ import annotations

import locale
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    RLELossless,
)

from pipelines.scans.dicom import list_series, read_series, series_sha256
from pipelines.scans.scan import Scan

REAL_SCANS = Path(os.environ.get("PHOTON_REAL_SCANS", "no such folder"))
OBLIQUE = (0.8, 0.6, 0.0, -0.48, 0.64, 0.6)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


def only_scan(folder: Path) -> Scan:
    (series,) = list_series(folder)
    return read_series(series)


def read_by_itk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels [i, j, k] and matrix to RAS as ITK's reader of series gives them."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def assert_as_itk(folder: Path) -> Scan:
    scan = only_scan(folder)
    array, affine = read_by_itk(folder)
    np.testing.assert_array_equal(scan.array, array)
    np.testing.assert_allclose(scan.affine, affine, rtol=0, atol=1e-5)
    return scan


@pytest.mark.parametrize("axes", [(1, 0, 0, 0, 1, 0), CORONAL, OBLIQUE, (0, 1, 0, 0, 0, -1)])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_grid_and_voxels_are_those_of_itk(tmp_path: Path, dicom: Any, axes: tuple[float, ...], dtype: type) -> None:
    step = -1.7 * np.cross(axes[:3], axes[3:])
    dicom.write_series(tmp_path, dicom.random_stored(dtype=dtype), axes=axes, step=step)
    scan = assert_as_itk(tmp_path)
    assert scan.array.dtype == np.int16 and scan.modality == "ct" and scan.notes == ()
    assert scan.array.shape == (9, 7, 6) and scan.spacing_mm == (0.8, 0.9, 1.7)


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_uncompressed_transfer_syntaxes(tmp_path: Path, dicom: Any, syntax: str) -> None:
    stored = dicom.random_stored()
    dicom.write_series(tmp_path, stored, syntax=syntax)
    assert_as_itk(tmp_path)
    np.testing.assert_array_equal(only_scan(tmp_path).array, stored.transpose(2, 1, 0).astype(np.int16) - 1024)


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless])
def test_compressed_by_pydicom(tmp_path: Path, dicom: Any, syntax: str) -> None:
    stored = dicom.random_stored(shape=(3, 33, 40))
    dicom.write_series(tmp_path, stored, compress=syntax)
    scan = assert_as_itk(tmp_path)
    np.testing.assert_array_equal(scan.array, stored.transpose(2, 1, 0).astype(np.int16) - 1024)


@pytest.fixture
def locale_kept() -> Iterator[None]:
    """ITK's JPEG codec leaves the C locale behind, in which no other test could read UTF-8."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


@pytest.mark.usefixtures("locale_kept")
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
@pytest.mark.parametrize("name", ["JPEG", "JPEGLS", "JPEG2000"])
def test_compressed_by_itk(tmp_path: Path, dicom: Any, name: str, dtype: type) -> None:
    stored = dicom.random_stored(shape=(3, 33, 40), dtype=dtype)
    paths = dicom.write_series(tmp_path / "plain", stored, modality="MR")
    expected = only_scan(tmp_path / "plain")
    (tmp_path / "packed").mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.UseCompressionOn()
    writer.SetCompressor(name)
    for path in paths:
        writer.SetFileName(str(tmp_path / "packed" / f"{path.name}.dcm"))
        writer.Execute(sitk.ReadImage(str(path)))
    syntaxes = {pydicom.dcmread(path).file_meta.TransferSyntaxUID for path in (tmp_path / "packed").iterdir()}
    assert all(syntax.is_encapsulated for syntax in syntaxes)
    scan = only_scan(tmp_path / "packed")
    np.testing.assert_array_equal(scan.array, expected.array)
    np.testing.assert_allclose(scan.affine, expected.affine, atol=1e-5)


def test_a_voxel_is_where_its_file_says(tmp_path: Path, dicom: Any) -> None:
    stored = np.zeros((4, 5, 6), np.uint16)
    stored[2, 1, 4] = 2000
    dicom.write_series(tmp_path, stored, axes=OBLIQUE, step=3 * np.cross(OBLIQUE[:3], OBLIQUE[3:]))
    scan = only_scan(tmp_path)
    index = np.argwhere(scan.array == 976)[0]
    position = np.array([-10, -20, -30]) + 2 * 3 * np.cross(OBLIQUE[:3], OBLIQUE[3:])
    lps = position + 4 * 0.8 * np.array(OBLIQUE[:3]) + 1 * 0.9 * np.array(OBLIQUE[3:])
    np.testing.assert_allclose((scan.affine @ [*index, 1])[:3], lps * [-1, -1, 1], atol=1e-6)


def test_every_slice_has_its_own_slope(tmp_path: Path, dicom: Any) -> None:
    def scale(image: Dataset, index: int) -> None:
        image.RescaleSlope, image.RescaleIntercept = 0.5 + index / 4, index

    stored = dicom.random_stored()
    dicom.write_series(tmp_path, stored, modality="PT", change=scale)
    scan = only_scan(tmp_path)
    assert scan.array.dtype == np.float32 and scan.modality == "pt"
    assert any("BQML" in note for note in scan.notes) and any("6 different slopes" in note for note in scan.notes)
    for index in range(6):
        np.testing.assert_allclose(scan.array[:, :, index], stored[index].T * (0.5 + index / 4) + index, rtol=1e-6)


def test_values_that_int16_cannot_hold_become_float32(tmp_path: Path, dicom: Any) -> None:
    stored = dicom.random_stored()
    stored[3, 0, 0] = 65535
    dicom.write_series(tmp_path, stored)
    scan = assert_as_itk(tmp_path)
    assert scan.array.dtype == np.float32 and scan.array.max() == 65535 - 1024


def test_mr_needs_no_slope(tmp_path: Path, dicom: Any) -> None:
    stored = dicom.random_stored()
    dicom.write_series(tmp_path, stored, modality="MR")
    scan = assert_as_itk(tmp_path)
    assert scan.modality == "mr" and scan.array.dtype == np.int16


@pytest.mark.parametrize("compress", [None, RLELossless])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_bits_beyond_those_stored_do_not_count(tmp_path: Path, dicom: Any, dtype: type, compress: str | None) -> None:
    def mark(image: Dataset, index: int) -> None:
        image.BitsStored, image.HighBit = 12, 11
        values = np.frombuffer(image.PixelData, "<u2").copy()
        values[0] |= 0x8000  # as an overlay in a high bit leaves it
        image.PixelData = values.tobytes()

    values = np.random.RandomState(0).randint(0 if dtype == np.uint16 else -2000, 2000, (3, 4, 5)).astype(dtype)
    dicom.write_series(tmp_path, values & np.array(0xFFF, np.uint16).astype(dtype), change=mark, compress=compress)
    scan = only_scan(tmp_path)
    np.testing.assert_array_equal(scan.array, values.transpose(2, 1, 0).astype(np.int16) - 1024)
    assert any("bits set beyond" in note for note in scan.notes)


def test_pixels_in_the_high_bits(tmp_path: Path, dicom: Any) -> None:
    def shift(image: Dataset, index: int) -> None:
        image.BitsStored, image.HighBit = 12, 15

    values = dicom.random_stored()
    dicom.write_series(tmp_path, values << 4, change=shift)
    np.testing.assert_array_equal(only_scan(tmp_path).array, values.transpose(2, 1, 0).astype(np.int16) - 1024)


def test_padding_of_ct_becomes_air(tmp_path: Path, dicom: Any) -> None:
    def pad(image: Dataset, index: int) -> None:
        image.add_new("PixelPaddingValue", "SS", -2000)
        image.RescaleIntercept = 0

    stored = dicom.random_stored(dtype=np.int16)
    stored[:, :2] = -2000
    dicom.write_series(tmp_path, stored, change=pad)
    scan = only_scan(tmp_path)
    assert (scan.array[:, :2] == -1000).all()
    np.testing.assert_array_equal(scan.array[:, 2:], stored.transpose(2, 1, 0)[:, 2:])
    assert scan.notes == ("108 voxels of padding: set to -1000 HU",)


@pytest.mark.parametrize("compress", [None, RLELossless])
def test_padding_that_needs_more_bits_than_the_values(tmp_path: Path, dicom: Any, compress: str | None) -> None:
    def pad(image: Dataset, index: int) -> None:
        image.BitsStored, image.HighBit = 12, 11
        image.add_new("PixelPaddingValue", "SS", -2000)  # cut to twelve bits it would be bone

    stored = dicom.random_stored()
    stored[:, :2] = 65536 - 2000
    dicom.write_series(tmp_path, stored, change=pad, compress=compress)
    scan = only_scan(tmp_path)
    assert (scan.array[:, :2] == -1000).all() and scan.array[:, 2:].max() < 1500


def test_padding_range(tmp_path: Path, dicom: Any) -> None:
    def pad(image: Dataset, index: int) -> None:
        image.add_new("PixelPaddingValue", "US", 0)
        image.add_new("PixelPaddingRangeLimit", "US", 10)

    stored = np.clip(dicom.random_stored(), 11, None)
    stored[0, 0, :3] = (0, 5, 10)
    stored[0, 0, 3] = 11
    dicom.write_series(tmp_path, stored, change=pad)
    np.testing.assert_array_equal(only_scan(tmp_path).array[:4, 0, 0], [-1000, -1000, -1000, -1013])


def test_padding_like_tissue_is_kept(tmp_path: Path, dicom: Any) -> None:
    def pad(image: Dataset, index: int) -> None:
        image.add_new("PixelPaddingValue", "US", 1064)

    stored = dicom.random_stored()
    stored[0, 0, 0] = 1064
    dicom.write_series(tmp_path, stored, change=pad)
    scan = only_scan(tmp_path)
    assert scan.array[0, 0, 0] == 40 and any("tissue" in note for note in scan.notes)


def test_padding_of_mr_becomes_the_lowest_value(tmp_path: Path, dicom: Any) -> None:
    def pad(image: Dataset, index: int) -> None:
        image.add_new("PixelPaddingValue", "SS", -32768)

    stored = np.clip(dicom.random_stored(dtype=np.int16), 5, None)
    stored[1, 1, 1] = 5
    stored[:, 0] = -32768
    dicom.write_series(tmp_path, stored, modality="MR", change=pad)
    scan = only_scan(tmp_path)
    assert scan.array.min() == 5 and (scan.array[:, 0] == 5).all()


def test_monochrome1(tmp_path: Path, dicom: Any) -> None:
    def invert(image: Dataset, index: int) -> None:
        image.PhotometricInterpretation = "MONOCHROME1"
        image.BitsStored, image.HighBit = 12, 11

    stored = dicom.random_stored()
    dicom.write_series(tmp_path / "ct", stored, change=invert)
    dicom.write_series(tmp_path / "mr", stored, modality="MR", change=invert)
    ct, mr = only_scan(tmp_path / "ct"), only_scan(tmp_path / "mr")
    np.testing.assert_array_equal(ct.array, stored.transpose(2, 1, 0).astype(np.int16) - 1024)
    np.testing.assert_array_equal(mr.array, 4095 - stored.transpose(2, 1, 0).astype(np.int16))
    assert any("MONOCHROME1" in note for note in ct.notes) and any("MONOCHROME1" in note for note in mr.notes)


def test_names_and_company_do_not_matter(tmp_path: Path, dicom: Any) -> None:
    stored = dicom.random_stored()
    paths = dicom.write_series(tmp_path / "a", stored)
    (tmp_path / "b").mkdir()
    for number, path in enumerate(paths):
        shutil.copy(path, tmp_path / "b" / f"{number}{'.dcm' if number % 2 else ''}")
    (tmp_path / "b" / "notes.txt").write_text("no image")
    (tmp_path / "b" / "thumbs.db").write_bytes(bytes(3000))
    (tmp_path / "b" / ".hidden.dcm").write_bytes(b"")
    dicom.write_series(tmp_path / "b", dicom.random_stored(1), series="other", prefix="o")
    (alone,) = list_series(tmp_path / "a")
    among = {series.key: series for series in list_series(tmp_path / "b")}
    assert len(among) == 2 and alone.key in among and alone.key.startswith("ct-3-")
    one, other = read_series(alone), read_series(among[alone.key])
    np.testing.assert_array_equal(one.array, other.array)
    assert one.sha256 == other.sha256 == series_sha256(alone) and other.notes == ()


def test_files_without_preamble(tmp_path: Path, dicom: Any) -> None:
    paths = dicom.write_series(tmp_path / "a", dicom.random_stored(), syntax=ImplicitVRLittleEndian)
    expected = only_scan(tmp_path / "a").array
    for path in paths:
        image = pydicom.dcmread(path)
        del image.file_meta
        image.preamble = None
        pydicom.dcmwrite(path, image, implicit_vr=True, little_endian=True)
        assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(only_scan(tmp_path / "a").array, expected)


def write_enhanced(path: Path, stored: np.ndarray, dicom: Any, times: int = 1) -> None:
    """An enhanced CT of frames in reversed order, each time point over all places."""
    image = dicom.make_slice(stored[0])
    image.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1"
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope"):
        delattr(image, keyword)
    del image.RescaleIntercept
    shared, frames = Dataset(), []
    shared.PixelMeasuresSequence = Sequence([Dataset()])
    shared.PixelMeasuresSequence[0].PixelSpacing = [0.9, 0.8]
    shared.PlaneOrientationSequence = Sequence([Dataset()])
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    order = list(reversed(range(len(stored))))
    for index in order:
        frame = Dataset()
        frame.PlanePositionSequence = Sequence([Dataset()])
        frame.PlanePositionSequence[0].ImagePositionPatient = [-10, -20, -30 + 2.5 * (index // times)]
        frame.PixelValueTransformationSequence = Sequence([Dataset()])
        values = frame.PixelValueTransformationSequence[0]
        values.RescaleSlope, values.RescaleIntercept, values.RescaleType = 1, -1000 - index, "HU"
        frame.FrameContentSequence = Sequence([Dataset()])
        frame.FrameContentSequence[0].TemporalPositionIndex = index % times + 1
        frames.append(frame)
    image.SharedFunctionalGroupsSequence = Sequence([shared])
    image.PerFrameFunctionalGroupsSequence = Sequence(frames)
    image.NumberOfFrames = len(stored)
    image.PixelData = np.ascontiguousarray(stored[order]).astype("<u2").tobytes()
    pydicom.dcmwrite(path, image, enforce_file_format=True)


def test_enhanced_multi_frame(tmp_path: Path, dicom: Any) -> None:
    stored = dicom.random_stored()
    write_enhanced(tmp_path / "frames", stored, dicom)
    scan = only_scan(tmp_path)
    expected = stored.astype(np.int16) - 1000 - np.arange(6, dtype=np.int16)[:, None, None]
    np.testing.assert_array_equal(scan.array, expected.transpose(2, 1, 0))
    np.testing.assert_allclose(scan.affine, [[-0.8, 0, 0, 10], [0, -0.9, 0, 20], [0, 0, 2.5, -30], [0, 0, 0, 1]])


def test_time_points_of_an_enhanced_file_are_scans(tmp_path: Path, dicom: Any) -> None:
    stored = dicom.random_stored()
    write_enhanced(tmp_path / "frames", stored, dicom, times=2)
    scans = [read_series(series) for series in list_series(tmp_path)]
    assert [scan.array.shape for scan in scans] == [(9, 7, 3)] * 2
    firsts = {tuple(scan.array[:, 0, 0]) for scan in scans}
    assert firsts == {tuple(stored[index, 0].astype(int) - 1000 - index) for index in (0, 1)}


@pytest.mark.skipif(not REAL_SCANS.is_dir(), reason="PHOTON_REAL_SCANS names no folder")
def test_a_real_series_is_as_itk_reads_it() -> None:
    scan = assert_as_itk(REAL_SCANS / "wasserth+TotalSegmentator" / "derived" / "example_ct_dicom_stripped")
    assert scan.array.shape == (512, 512, 20) and scan.modality == "ct"
