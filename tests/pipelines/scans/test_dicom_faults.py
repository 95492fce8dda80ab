"""DICOM series with something wrong: refused with the reason, or repaired with a note."""

from __future__ import annotations

import logging
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless

from photon.errors import PhotonError
from pipelines.scans import dicom_files
from pipelines.scans.dicom import list_series, read_series
from pipelines.scans.dicom_series import Series
from pipelines.scans.scan import Scan


def only(folder: Path) -> Series:
    (series,) = list_series(folder)
    return series


def only_scan(folder: Path) -> Scan:
    return read_series(only(folder))


def refusal(folder: Path) -> PhotonError:
    """Why the only series of a folder cannot be read."""
    with pytest.raises(PhotonError) as caught:
        only_scan(folder)
    assert caught.value.fact and caught.value.remedy
    return caught.value


def edit(path: Path, **values: Any) -> None:
    """Set elements of a file; None removes one."""
    image = pydicom.dcmread(path)
    for keyword, value in values.items():
        if value is None:
            delattr(image, keyword)
        else:
            setattr(image, keyword, value)
    pydicom.dcmwrite(path, image)


# Where slices lie


def test_a_missing_slice_is_told_with_its_place(tmp_path: Path, dicom: Any) -> None:
    paths = dicom.write_series(tmp_path, dicom.random_stored(shape=(9, 4, 5)))
    paths[3].unlink()
    error = refusal(tmp_path)
    assert error.code == "SLICES_MISSING"
    assert "1 of 9 slices" in error.fact and "after slice 3" in error.fact and "5 mm" in error.fact


@pytest.mark.parametrize("gone", [(1,), (7,), (2, 3), (2, 5), (1, 3, 5)])
def test_gaps_anywhere_are_found(tmp_path: Path, dicom: Any, gone: tuple[int, ...]) -> None:
    paths = dicom.write_series(tmp_path, dicom.random_stored(shape=(9, 4, 5)))
    for index in gone:
        paths[index].unlink()
    error = refusal(tmp_path)
    assert error.code == "SLICES_MISSING" and f"{len(gone)} of 9 slices" in error.fact


def test_uneven_spacing_is_refused(tmp_path: Path, dicom: Any) -> None:
    def widen(image: Dataset, index: int) -> None:
        image.ImagePositionPatient = [0, 0, 2 * index + (0.7 * (index - 3) if index > 3 else 0)]

    dicom.write_series(tmp_path, dicom.random_stored(shape=(9, 4, 5)), change=widen)
    error = refusal(tmp_path)
    assert error.code == "SLICES_UNEVEN" and "2 to 2.7 mm" in error.fact


def test_rounded_positions_are_even(tmp_path: Path, dicom: Any) -> None:
    def round_off(image: Dataset, index: int) -> None:
        image.ImagePositionPatient = [0, 0, round(0.625 * index, 1)]

    dicom.write_series(tmp_path, dicom.random_stored(shape=(40, 4, 5)), change=round_off)
    scan = only_scan(tmp_path)
    assert scan.spacing_mm[2] == pytest.approx(0.625, abs=1e-3) and "from even spacing" in scan.notes[0]


def test_a_slice_beside_the_line_is_refused(tmp_path: Path, dicom: Any) -> None:
    paths = dicom.write_series(tmp_path, dicom.random_stored(shape=(9, 4, 5)))
    edit(paths[4], ImagePositionPatient=[-9, -20, -20])
    error = refusal(tmp_path)
    assert error.code == "SLICES_UNEVEN" and "1.00 mm beside" in error.fact and "slice 5" in error.fact


def test_gantry_tilt_is_kept_in_the_matrix(tmp_path: Path, dicom: Any) -> None:
    tilt = math.radians(20)
    axes = (1, 0, 0, 0, math.cos(tilt), -math.sin(tilt))
    stored = dicom.random_stored()
    dicom.write_series(tmp_path, stored, axes=axes)  # the table moves along z, the slices lean
    scan = only_scan(tmp_path)
    assert scan.notes == ("gantry tilt of 20.0 degrees: the voxel grid is sheared",)
    np.testing.assert_allclose(scan.affine[:3, 2], [0, 0, 2.5], atol=1e-9)
    for index in range(6):
        position = (scan.affine @ [0, 0, index, 1])[:3]
        np.testing.assert_allclose(position, [10, 20, -30 + 2.5 * index], atol=1e-9)
        np.testing.assert_array_equal(scan.array[:, :, index], stored[index].T.astype(int) - 1024)


def test_wrong_slice_spacing_in_the_header_is_noted(tmp_path: Path, dicom: Any) -> None:
    def declare(image: Dataset, index: int) -> None:
        image.SpacingBetweenSlices = 5

    dicom.write_series(tmp_path, dicom.random_stored(), change=declare)
    scan = only_scan(tmp_path)
    assert scan.spacing_mm[2] == 2.5 and "declares slices 5 mm apart" in scan.notes[0]


def test_a_place_beyond_any_scanner_is_noted_or_refused(tmp_path: Path, dicom: Any) -> None:
    dicom.write_series(tmp_path / "far", dicom.random_stored(), position=(0.0, 20_000.0, 0.0))
    assert "its first voxel lies 20 m from the origin: taken as it is" in only_scan(tmp_path / "far").notes
    dicom.write_series(tmp_path / "nowhere", dicom.random_stored(), position=(0.0, 2e6, 0.0))
    assert refusal(tmp_path / "nowhere").code == "AFFINE_INVALID"


def test_one_slice_is_no_scan(tmp_path: Path, dicom: Any) -> None:
    dicom.write_series(tmp_path, dicom.random_stored(shape=(1, 4, 5)))
    assert refusal(tmp_path).code == "SCAN_NOT_3D"


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"ImagePositionPatient": None}, "AFFINE_INVALID"),
        ({"ImageOrientationPatient": None}, "AFFINE_INVALID"),
        ({"ImageOrientationPatient": [1, 0, 0, 0.5, 1, 0]}, "AFFINE_INVALID"),
        ({"ImageOrientationPatient": [0, 0, 0, 0, 0, 0]}, "AFFINE_INVALID"),
        ({"PixelSpacing": None}, "SPACING_INVALID"),
        ({"PixelSpacing": [0, 0]}, "SPACING_INVALID"),
        ({"RescaleSlope": None}, "SCALING_INVALID"),
        ({"RescaleSlope": 0}, "SCALING_INVALID"),
        ({"RescaleSlope": 1e30}, "SCALING_INVALID"),
    ],
)
@pytest.mark.parametrize("which", [slice(None), slice(5, 6)])
def test_nonsense_in_all_or_the_last_header(
    tmp_path: Path, dicom: Any, values: dict[str, Any], code: str, which: slice
) -> None:
    paths = dicom.write_series(tmp_path, dicom.random_stored())
    for path in paths[which]:
        edit(path, **values)
    series = list_series(tmp_path)
    assert all(one.refusal is not None for one in series)  # the last slice is not lost in silence
    assert code in {one.refusal.code for one in series if one.refusal}


@pytest.mark.parametrize("keyword", [b"DS", b"IS"])
def test_numbers_that_are_none(tmp_path: Path, dicom: Any, keyword: bytes) -> None:
    paths = dicom.write_series(tmp_path, dicom.random_stored())
    content = paths[2].read_bytes()
    at = content.index(b"\x20\x00\x32\x00DS" if keyword == b"DS" else b"\x20\x00\x11\x00IS") + 8
    paths[2].write_bytes(content[:at] + b"x" + content[at + 1 :])
    if keyword == b"DS":
        assert refusal(tmp_path).code == "AFFINE_INVALID"
    else:
        only_scan(tmp_path)  # the series number only names


# Slices that repeat


def test_identical_copies_are_dropped(tmp_path: Path, dicom: Any) -> None:
    stored = dicom.random_stored()
    paths = dicom.write_series(tmp_path, stored)
    expected = only_scan(tmp_path).array
    shutil.copy(paths[2], tmp_path / "the same file again")
    shutil.copy(paths[4], tmp_path / "sent again")
    edit(tmp_path / "sent again", SOPInstanceUID=dicom.uid("again"))
    scan = only_scan(tmp_path)
    np.testing.assert_array_equal(scan.array, expected)
    assert scan.notes == ("2 images are copies of others: dropped",)


@pytest.mark.parametrize("same_uid", [True, False])
def test_different_images_at_one_place_are_refused(tmp_path: Path, dicom: Any, same_uid: bool) -> None:
    stored = dicom.random_stored()
    dicom.write_series(tmp_path, stored)
    other = dicom.make_slice(stored[0], index=2, position=(-10, -20, -25))
    if not same_uid:
        other.SOPInstanceUID = dicom.uid("other")
    pydicom.dcmwrite(tmp_path / "other", other, enforce_file_format=True)
    error = refusal(tmp_path)
    assert error.code == "SLICES_CONFLICT" and "place 3 of 6" in error.fact


@pytest.mark.parametrize("keyword", ["EchoTime", "AcquisitionNumber", "TemporalPositionIdentifier", "TriggerTime"])
def test_repeated_places_fall_apart_by_what_tells_them_apart(tmp_path: Path, dicom: Any, keyword: str) -> None:
    stored = dicom.random_stored(shape=(12, 4, 5))

    def repeat(image: Dataset, index: int) -> None:
        image.ImagePositionPatient = [0, 0, 3 * (index // 2)]
        setattr(image, keyword, index % 2 + 1)

    dicom.write_series(tmp_path, stored, modality="MR", change=repeat)
    scans = [read_series(series) for series in list_series(tmp_path)]
    assert len(scans) == 2
    found = {tuple(scan.array[0, 0]) for scan in scans}
    assert found == {tuple(stored[first::2, 0, 0]) for first in (0, 1)}


def test_echoes_within_time_points(tmp_path: Path, dicom: Any) -> None:
    def repeat(image: Dataset, index: int) -> None:
        image.ImagePositionPatient = [0, 0, 3 * (index // 4)]
        image.TemporalPositionIdentifier, image.EchoTime = index % 4 // 2 + 1, index % 2 + 1
        image.AcquisitionNumber = index  # numbered slice by slice, as some scanners do

    dicom.write_series(tmp_path, dicom.random_stored(shape=(12, 4, 5)), modality="MR", change=repeat)
    series = list_series(tmp_path)
    assert len(series) == len({one.key for one in series}) == 4
    assert [read_series(one).array.shape for one in series] == [(5, 4, 3)] * 4


def test_acquisitions_that_make_one_stack_stay_together(tmp_path: Path, dicom: Any) -> None:
    def number(image: Dataset, index: int) -> None:
        image.AcquisitionNumber = index % 2 + 1

    dicom.write_series(tmp_path, dicom.random_stored(), change=number)
    assert only_scan(tmp_path).array.shape == (9, 7, 6)


def test_acquisitions_apart_are_two_scans(tmp_path: Path, dicom: Any) -> None:
    def number(image: Dataset, index: int) -> None:
        image.AcquisitionNumber = index // 3 + 1
        image.ImagePositionPatient = [0, 0, 3 * index + 50 * (index // 3)]

    dicom.write_series(tmp_path, dicom.random_stored(), change=number)
    assert [read_series(series).array.shape for series in list_series(tmp_path)] == [(9, 7, 3)] * 2


# Series that are mixed


def test_series_and_localiser_fall_apart(tmp_path: Path, dicom: Any) -> None:
    def localise(image: Dataset, index: int) -> None:
        image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]

    stored = dicom.random_stored()
    dicom.write_series(tmp_path, stored)
    dicom.write_series(tmp_path, stored + 5, series="b", prefix="b")
    coronal = (1, 0, 0, 0, 0, -1)
    dicom.write_series(tmp_path, stored[:2], series="a", prefix="l", axes=coronal, change=localise, step=(0, 0, 0))
    by_code = {series.refusal.code if series.refusal else series.key: series for series in list_series(tmp_path)}
    assert len(by_code) == 3
    refused = by_code.pop("SERIES_NOT_A_SCAN")
    assert refused.refusal and "localiser" in refused.refusal.fact
    firsts = {read_series(series).array[0, 0, 0] for series in by_code.values()}
    assert firsts == {int(stored[0, 0, 0]) - 1024, int(stored[0, 0, 0]) - 1019}


def test_an_unnamed_localiser_falls_apart_by_its_axes(tmp_path: Path, dicom: Any) -> None:
    dicom.write_series(tmp_path, dicom.random_stored())
    dicom.write_series(tmp_path, dicom.random_stored()[:1], prefix="l", axes=(1, 0, 0, 0, 0, -1))
    codes = sorted(series.refusal.code if series.refusal else "ok" for series in list_series(tmp_path))
    assert codes == ["SCAN_NOT_3D", "ok"]


@pytest.mark.parametrize("change", ["frame of reference", "axes", "size", "spacing"])
def test_two_grids_in_one_series_fall_apart(tmp_path: Path, dicom: Any, change: str) -> None:
    def move(image: Dataset, index: int) -> None:
        image.SOPInstanceUID = dicom.uid("second", index)
        if change == "frame of reference":
            image.FrameOfReferenceUID = dicom.uid("second")

    options: dict[str, Any] = {"axes": (0, 1, 0, 0, 0, -1), "step": (2, 0, 0)} if change == "axes" else {}
    options |= {"spacing": (0.5, 0.5)} if change == "spacing" else {}
    dicom.write_series(tmp_path, dicom.random_stored())
    shape = (6, 5, 5) if change == "size" else (6, 7, 9)
    dicom.write_series(tmp_path, dicom.random_stored(1, shape), prefix="second", change=move, **options)
    series = list_series(tmp_path)
    assert len({one.key for one in series}) == 2
    assert sorted(read_series(one).array.shape[2] for one in series) == [6, 6]


@pytest.mark.parametrize(
    ("sop_class", "modality", "word"),
    [
        ("1.2.840.10008.5.1.4.1.1.88.67", "SR", "report"),
        ("1.2.840.10008.5.1.4.1.1.7", "OT", "secondary capture"),
        ("1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT", "radiotherapy"),
        ("1.2.840.10008.5.1.4.1.1.66.4", "SEG", "segmentation"),
        ("1.2.840.10008.5.1.4.1.1.6.1", "US", "modality US"),
    ],
)
def test_what_is_no_scan(tmp_path: Path, dicom: Any, sop_class: str, modality: str, word: str) -> None:
    def turn(image: Dataset, index: int) -> None:
        image.SOPClassUID, image.Modality = sop_class, modality
        image.file_meta.MediaStorageSOPClassUID = sop_class
        if modality in ("SR", "RTSTRUCT"):
            del image.PixelData

    dicom.write_series(tmp_path, dicom.random_stored(), change=turn)
    error = refusal(tmp_path)
    assert error.code == "SERIES_NOT_A_SCAN" and word in error.fact


def test_colours_are_refused(tmp_path: Path, dicom: Any) -> None:
    def paint(image: Dataset, index: int) -> None:
        image.SamplesPerPixel, image.PhotometricInterpretation, image.PlanarConfiguration = 3, "RGB", 0
        image.PixelData = image.PixelData * 3

    dicom.write_series(tmp_path, dicom.random_stored(dtype=np.uint8), change=paint)
    assert refusal(tmp_path).code == "SCAN_RGB"


def test_the_directory_of_a_disc_is_passed_over(tmp_path: Path, dicom: Any) -> None:
    dicom.write_series(tmp_path, dicom.random_stored())
    image = dicom.make_slice(dicom.random_stored()[0])
    del image.PixelData
    image.SOPClassUID = "1.2.840.10008.1.3.10"
    image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    pydicom.dcmwrite(tmp_path / "DICOMDIR", image, enforce_file_format=True)
    assert only_scan(tmp_path).notes == ()


# Files that are damaged


def test_no_pixel_data(tmp_path: Path, dicom: Any) -> None:
    paths = dicom.write_series(tmp_path, dicom.random_stored())
    edit(paths[5], PixelData=None)
    assert refusal(tmp_path).code == "PIXELS_MISSING"


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless, DeflatedExplicitVRLittleEndian])
def test_truncation_anywhere_is_refused(tmp_path: Path, dicom: Any, syntax: str | None) -> None:
    options = {"syntax": syntax} if syntax == DeflatedExplicitVRLittleEndian else {"compress": syntax}
    paths = dicom.write_series(tmp_path, dicom.random_stored(shape=(3, 33, 40)), **options)
    only_scan(tmp_path)
    content = paths[2].read_bytes()
    for percent in range(100):
        paths[2].write_bytes(content[: len(content) * percent // 100])
        series = list_series(tmp_path)
        for one in series:
            try:
                scan = read_series(one)
            except PhotonError:
                continue
            # A file too short to say whose it is cannot spoil a series: it is listed, and noted with the others.
            assert scan.array.shape[2] == 2 and len(series) == 2
            assert "a slice at an end may be missing" in scan.notes[0]


def test_more_pixels_than_declared(tmp_path: Path, dicom: Any) -> None:
    paths = dicom.write_series(tmp_path, dicom.random_stored())
    edit(paths[5], Rows=6)
    good, bad = sorted(list_series(tmp_path), key=lambda series: series.refusal is not None)
    assert bad.refusal and bad.refusal.code == "SCAN_TRAILING_DATA"
    assert "images of 2 scans" in read_series(good).notes[0]  # a slice less, and said so


def test_every_row_too_few(tmp_path: Path, dicom: Any) -> None:
    for path in dicom.write_series(tmp_path, dicom.random_stored()):
        edit(path, Rows=6)
    assert refusal(tmp_path).code == "SCAN_TRAILING_DATA"


def test_declared_size_beyond_the_file(tmp_path: Path, dicom: Any) -> None:
    for path in dicom.write_series(tmp_path, dicom.random_stored()):
        edit(path, Rows=60000, Columns=60000)
    assert refusal(tmp_path).code == "SCAN_TRUNCATED"


def test_a_compressed_stream_of_another_size_is_not_decoded(tmp_path: Path, dicom: Any) -> None:
    paths = dicom.write_series(tmp_path, dicom.random_stored(shape=(3, 33, 40)), compress=JPEG2000Lossless)
    content = paths[1].read_bytes()
    at = content.index(b"\xff\x4f\xff\x51") + 8
    paths[1].write_bytes(content[:at] + struct.pack(">II", 60000, 60000) + content[at + 8 :])
    error = refusal(tmp_path)
    assert error.code == "PIXELS_CORRUPT" and "60000 x 60000" in error.fact


def test_a_compressed_stream_of_many_channels_is_not_decoded(tmp_path: Path, dicom: Any) -> None:
    paths = dicom.write_series(tmp_path, dicom.random_stored(shape=(3, 33, 40)), compress=JPEG2000Lossless)
    content = paths[1].read_bytes()
    at = content.index(b"\xff\x4f\xff\x51") + 40
    assert content[at : at + 2] == b"\0\1"
    paths[1].write_bytes(content[:at] + struct.pack(">H", 16384) + content[at + 2 :])
    error = refusal(tmp_path)
    assert error.code == "PIXELS_CORRUPT" and "16384 channels" in error.fact


def test_a_compressed_stream_that_is_none(tmp_path: Path, dicom: Any) -> None:
    paths = dicom.write_series(tmp_path, dicom.random_stored(shape=(3, 33, 40)), compress=RLELossless)
    content = bytearray(paths[1].read_bytes())
    at = content.index(b"\xfe\xff\x00\xe0", content.index(b"\xe0\x7f\x10\x00OB") + 20) + 8
    content[at : at + 64] = b"\xff" * 64
    paths[1].write_bytes(content)
    assert refusal(tmp_path).code == "PIXELS_CORRUPT"


def test_an_unknown_transfer_syntax(tmp_path: Path, dicom: Any) -> None:
    paths = dicom.write_series(tmp_path, dicom.random_stored(shape=(3, 33, 40)), compress=JPEG2000Lossless)
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.4.99"))
    assert refusal(tmp_path).code == "FORMAT_UNSUPPORTED"


def test_a_deflate_bomb_is_refused(tmp_path: Path, dicom: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = np.zeros((2, 512, 512), np.uint16)
    dicom.write_series(tmp_path, stored, syntax=DeflatedExplicitVRLittleEndian)
    monkeypatch.setattr(dicom_files, "MAX_INFLATED", 1 << 18)
    assert refusal(tmp_path).code == "SCAN_TOO_LARGE"


def test_too_many_voxels_are_refused_before_they_are_read(tmp_path: Path, dicom: Any) -> None:
    dicom.write_series(tmp_path, dicom.random_stored())
    with pytest.raises(PhotonError) as caught:
        read_series(only(tmp_path), max_voxels=377)
    assert caught.value.code == "SCAN_TOO_LARGE"


def test_one_value_everywhere(tmp_path: Path, dicom: Any) -> None:
    dicom.write_series(tmp_path, np.full((3, 4, 5), 1000, np.uint16))
    assert refusal(tmp_path).code == "SCAN_CONSTANT"


def test_unreadable_files_are_listed_and_noted(tmp_path: Path, dicom: Any) -> None:
    dicom.write_series(tmp_path, dicom.random_stored())
    (tmp_path / "empty.dcm").write_bytes(b"")
    (tmp_path / "text.IMA").write_text("this is text")
    good, bad = list_series(tmp_path)
    assert bad.key == "unreadable" and bad.refusal and "2 files" in bad.refusal.fact
    assert read_series(good).array.shape == (9, 7, 6) and "2 other files" in read_series(good).notes[0]


def test_a_lookup_table_is_refused(tmp_path: Path, dicom: Any) -> None:
    def look_up(image: Dataset, index: int) -> None:
        table = Dataset()
        table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [2, 0, 16], "HU", [0, 1]
        table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
        image.ModalityLUTSequence = pydicom.Sequence([table])

    dicom.write_series(tmp_path, dicom.random_stored(), change=look_up)
    assert refusal(tmp_path).code == "FORMAT_UNSUPPORTED"


def test_frames_without_places_are_refused(tmp_path: Path, dicom: Any) -> None:
    stored = dicom.random_stored()
    image = dicom.make_slice(stored[0])
    image.NumberOfFrames, image.PixelData = 6, stored.astype("<u2").tobytes()
    pydicom.dcmwrite(tmp_path / "frames", image, enforce_file_format=True)
    assert refusal(tmp_path).code == "FORMAT_UNSUPPORTED"


def test_notes_on_what_the_values_are(tmp_path: Path, dicom: Any) -> None:
    def describe(image: Dataset, index: int) -> None:
        image.LossyImageCompression, image.RescaleType = "01", "US"
        image.ImageType = ["DERIVED", "SECONDARY", "MPR"]

    dicom.write_series(tmp_path, dicom.random_stored(), change=describe)
    notes = " ".join(only_scan(tmp_path).notes)
    assert "loss" in notes and "derived" in notes and "not called HU" in notes


def test_nothing_about_the_patient_comes_out(
    tmp_path: Path, dicom: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    paths = dicom.write_series(tmp_path, dicom.random_stored(), prefix="x")
    content = paths[3].read_bytes()
    said = only(tmp_path).key + repr(only_scan(tmp_path))
    for start in range(132, len(content), 5):  # damage every element in turn, those about the patient too
        paths[3].write_bytes(content[:start] + b"\xff\xfe" + content[start + 2 :])
        for series in list_series(tmp_path):
            said += series.key
            try:
                said += repr(read_series(series))
            except PhotonError as error:
                said += str(error)
    out, err = capfd.readouterr()
    for secret in dicom.secrets:
        assert secret not in said + caplog.text + out + err
