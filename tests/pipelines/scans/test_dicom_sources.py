"""DICOM series among the scans of a folder and of an archive."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.dataset import Dataset

from photon.errors import PhotonError
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
