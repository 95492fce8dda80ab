"""DICOM series among the scans of a folder and of an archive."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian

from photon.errors import PhotonError
from pipelines.grids import VOLUME_SPECS
from pipelines.manifest import read_manifest
from pipelines.preprocess import preprocess
from pipelines.scans import kinds
from pipelines.scans.dicom import list_series, read_dicom
from pipelines.scans.find import find_scans, read_source
from pipelines.scans.nifti import write_scan


def localise(image: Dataset, index: int) -> None:
    image.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def write_study(folder: Path, dicom: Any) -> dict[str, np.ndarray]:
    """Two series and a localiser in one folder. Returns the voxels of the series by key."""
    dicom.write_series(folder, dicom.random_stored(1), series="one", prefix="a")
    dicom.write_series(folder, dicom.random_stored(2), series="two", prefix="b")
    dicom.write_series(folder, dicom.random_stored(3), series="scout", prefix="c", change=localise)
    return {one.key: read_dicom(folder, one.key).array for one in list_series(folder) if one.refusal is None}


def test_series_are_sources(tmp_path: Path, dicom: Any) -> None:
    expected = write_study(tmp_path / "patient" / "study", dicom)
    write_scan(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4), tmp_path / "other.nii.gz")
    sources = {source.scan_id: source for source in find_scans(tmp_path)}
    assert len(sources) == 4 and set(expected) < set(sources)
    for key, array in expected.items():
        np.testing.assert_array_equal(read_source(sources[key]).array, array)
    refused = [source for source in sources.values() if source.refusal]
    assert [source.refusal.code for source in refused if source.refusal] == ["SERIES_NOT_A_SCAN"]
    with pytest.raises(PhotonError):
        read_source(refused[0])


def test_series_in_an_archive_are_sources(tmp_path: Path, dicom: Any) -> None:
    expected = write_study(tmp_path / "study", dicom)
    (tmp_path / "in").mkdir()
    with zipfile.ZipFile(tmp_path / "in" / "study.zip", "w") as archive:
        for path in sorted((tmp_path / "study").iterdir()):
            archive.write(path, f"disc/{path.name}")
    sources = {source.scan_id: source for source in find_scans(tmp_path / "in")}
    assert set(expected) < set(sources) and len(sources) == 3
    for key, array in expected.items():
        np.testing.assert_array_equal(read_source(sources[key]).array, array)


def test_which_series_of_a_folder(tmp_path: Path, dicom: Any) -> None:
    expected = write_study(tmp_path, dicom)
    with pytest.raises(PhotonError) as caught:
        read_dicom(tmp_path)
    assert caught.value.code == "SERIES_AMBIGUOUS" and all(key in caught.value.fact for key in expected)
    with pytest.raises(PhotonError) as caught:
        read_dicom(tmp_path, "ct-3-no-such")
    assert caught.value.code == "SERIES_MISSING"


def test_the_only_usable_series_needs_no_name(tmp_path: Path, dicom: Any) -> None:
    dicom.write_series(tmp_path, dicom.random_stored())
    dicom.write_series(tmp_path, dicom.random_stored(), series="scout", prefix="c", change=localise)
    assert read_dicom(tmp_path).array.shape == (9, 7, 6)


def test_a_folder_without_series(tmp_path: Path) -> None:
    with pytest.raises(PhotonError) as caught:
        read_dicom(tmp_path)
    assert caught.value.code == "SERIES_MISSING"


def test_names_decide_no_more_in_an_archive_than_in_a_folder(tmp_path: Path, dicom: Any) -> None:
    paths = dicom.write_series(tmp_path / "in", dicom.random_stored())
    paths[0].rename(tmp_path / "in" / "first.img")
    paths[5].rename(tmp_path / "in" / "last.v2")
    (tmp_path / "in" / "thumbs.db").write_bytes(bytes(300))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in sorted((tmp_path / "in").iterdir()):
            archive.write(path, path.name)
    (one,), (other,) = find_scans(tmp_path / "in"), find_scans(tmp_path / "all.zip")
    assert one.scan_id == other.scan_id
    assert read_source(one).array.shape == read_source(other).array.shape == (9, 7, 6)


def test_a_damaged_slice_is_noted_in_an_archive_as_in_a_folder(tmp_path: Path, dicom: Any) -> None:
    paths = dicom.write_series(tmp_path / "in", dicom.random_stored())
    paths[5].write_bytes(paths[5].read_bytes()[:100])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for path in paths:
            archive.write(path, path.name)
    for place in (tmp_path / "in", tmp_path / "all.zip"):
        good, bad = find_scans(place)
        assert bad.refusal is not None and bad.refusal.code == "SCAN_UNREADABLE"
        assert "a slice at an end may be missing" in read_source(good).notes[0]


def test_files_without_preamble_are_found(tmp_path: Path, dicom: Any) -> None:
    for path in dicom.write_series(tmp_path, dicom.random_stored(), syntax=ImplicitVRLittleEndian):
        image = pydicom.dcmread(path)
        del image.file_meta
        image.preamble = None
        pydicom.dcmwrite(path, image, implicit_vr=True, little_endian=True)
    (source,) = find_scans(tmp_path)
    assert read_source(source).array.shape == (9, 7, 6)


@pytest.mark.parametrize("step", [1, 2])
def test_a_series_in_parts_is_refused(tmp_path: Path, dicom: Any, step: int) -> None:
    """Half of the slices, or every other one, is a regular stack by itself."""
    paths = dicom.write_series(tmp_path / "a", dicom.random_stored())
    (tmp_path / "b").mkdir()
    for path in paths[3:] if step == 1 else paths[::2]:
        path.rename(tmp_path / "b" / path.name)
    first, second = find_scans(tmp_path)
    for source, other in ((first, second), (second, first)):
        assert source.refusal is not None and source.refusal.code == "SERIES_SCATTERED"
        assert other.relative in source.refusal.fact


def test_copies_of_a_series_are_scans(tmp_path: Path, dicom: Any) -> None:
    for folder in "ab":
        dicom.write_series(tmp_path / folder, dicom.random_stored())
    dicom.write_series(tmp_path / "c", dicom.random_stored()[:3])
    sources = find_scans(tmp_path)
    assert len({source.scan_id for source in sources}) == 3
    assert [read_source(source).array.shape[2] for source in sources] == [6, 6, 3]


def test_slices_that_no_archive_can_hold_are_not_unpacked(
    tmp_path: Path, dicom: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each entry is small enough by itself."""
    paths = dicom.write_series(tmp_path / "in", np.zeros((4, 512, 512), np.uint16))
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in paths:
            archive.write(path, path.name)
    monkeypatch.setattr(kinds, "MAX_UNPROVEN_BYTES", 1 << 21)
    (source,) = find_scans(tmp_path / "all.zip")
    assert source.refusal is not None and source.refusal.code == "ARCHIVE_TOO_LARGE"


def test_pipes_are_passed_over(tmp_path: Path, dicom: Any) -> None:
    dicom.write_series(tmp_path, dicom.random_stored())
    for name in ("pipe", "pipe.nii", "pipe.tar"):
        os.mkfifo(tmp_path / name)
    assert len(find_scans(tmp_path)) == 1


def test_the_manifest_names_the_file_of_a_series_that_is_at_fault(tmp_path: Path, dicom: Any) -> None:
    paths = dicom.write_series(tmp_path / "in" / "study", dicom.random_stored())
    paths[2].write_bytes(paths[2].read_bytes()[:-9])
    record = preprocess(tmp_path / "in", tmp_path / "out", VOLUME_SPECS["smoke"])
    (row,) = read_manifest(Path(record.manifest)).iter_rows(named=True)
    assert row["status"] == "SCAN_TRUNCATED" and row["message"].startswith(f"{paths[2].name}: ")
