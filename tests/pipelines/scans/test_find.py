"""Which scans a folder holds, and what they are called."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines.scans.find import find_scans, read_source, source_sha256
from pipelines.scans.nifti import write_scan

AFFINE = np.diag([3.0, 3.0, 4.0, 1.0])


def put_scan(path: Path, seed: int = 0) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.RandomState(seed).randint(-900, 900, (9, 10, 11)).astype(np.int16)
    write_scan(array, AFFINE, path)
    return array


def put_metaimage(path: Path, seed: int = 0) -> None:
    array = np.random.RandomState(seed).randint(-900, 900, 120).astype("<i2")
    header = "NDims = 3\nDimSize = 4 5 6\nElementType = MET_SHORT\nElementSpacing = 1 1 1\n"
    path.write_text(header + f"ElementDataFile = {path.stem}.raw\n")
    path.with_suffix(".raw").write_bytes(array.tobytes())


def test_every_format_is_found_and_other_files_are_passed_over(tmp_path: Path) -> None:
    put_scan(tmp_path / "a.NII.GZ")
    put_metaimage(tmp_path / "b.mhd")
    for name in ("c.mgz", "d.7z", "notes.txt", "e.raw", ".hidden.nii", ".git/f.nii", "photo.img"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    sources = find_scans(tmp_path)
    assert [source.scan_id for source in sources] == ["a", "b", "c.mgz", "d.7z"]
    assert [source.refusal.code if source.refusal else "" for source in sources] == [
        "",
        "",
        *["FORMAT_UNSUPPORTED"] * 2,
    ]
    with pytest.raises(PhotonError, match="FORMAT_UNSUPPORTED"):
        read_source(sources[2])


def test_twins_are_two_scans_and_each_is_read_as_itself(tmp_path: Path) -> None:
    """Some readers open a.nii when they are asked for a.nii.gz."""
    first, second = put_scan(tmp_path / "a.nii", 1), put_scan(tmp_path / "a.nii.gz", 2)
    plain, packed = find_scans(tmp_path)
    assert (plain.relative, packed.relative) == ("a.nii", "a.nii.gz") and plain.scan_id != packed.scan_id
    assert np.array_equal(read_source(plain).array, first)
    assert np.array_equal(read_source(packed).array, second)


def test_ids_that_differ_by_case_alone_are_made_different(tmp_path: Path) -> None:
    for name in ("x/Scan.nii", "y/scan.nii", "z/other.nii"):
        put_scan(tmp_path / name)
    assert [source.scan_id for source in find_scans(tmp_path)] == ["x_Scan", "y_scan", "other"]


def test_the_checksum_of_a_source_is_that_of_its_scan(tmp_path: Path) -> None:
    put_scan(tmp_path / "a.nii.gz")
    put_scan(tmp_path / "b.nii")
    put_metaimage(tmp_path / "c.mhd")
    checksums = []
    for source in find_scans(tmp_path):
        assert source_sha256(source) == read_source(source).sha256
        checksums.append(source_sha256(source))
    (tmp_path / "c.raw").write_bytes(bytes(239) + b"x")
    assert source_sha256(find_scans(tmp_path)[2]) not in checksums
    content = (tmp_path / "b.nii").read_bytes()
    (tmp_path / "b.nii").write_bytes(content[:-1])  # no scan any more, but bytes
    assert source_sha256(find_scans(tmp_path)[1]) not in checksums
    assert gzip.decompress((tmp_path / "a.nii.gz").read_bytes()) == content


@pytest.mark.parametrize("name", ["a.nii.gz", "B.NII", "c.mhd"])
def test_a_scan_file_is_a_folder_of_one(tmp_path: Path, name: str) -> None:
    put_scan(tmp_path / "other.nii")
    path = tmp_path / name
    if name.endswith(".mhd"):
        put_metaimage(path)
    else:
        put_scan(path)
    (source,) = find_scans(path)
    assert (source.scan_id, source.relative) == (name.split(".")[0], name)
    assert source_sha256(source) == read_source(source).sha256


def test_a_file_that_is_no_scan_in_place_of_a_folder(tmp_path: Path) -> None:
    for name, content, word in (
        ("a.txt", b"text", "a file"),
        (".a.nii", b"text", "a file"),
        ("IM0001", bytes(128) + b"DICM", "one DICOM file"),
        ("a.dcm", b"", "one DICOM file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PhotonError, match="INPUT_MISSING") as caught:
            find_scans(tmp_path / name)
        assert word in caught.value.fact and "folder" in caught.value.remedy


@pytest.mark.parametrize("name", ["a.tar.bz2", "a.TXZ", "a.tar.zst", "a.7z", "a.rar"])
def test_archives_that_are_not_read_say_which_are(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    for place in (tmp_path, tmp_path / name):
        (source,) = find_scans(place)
        assert source.refusal is not None and source.refusal.code == "FORMAT_UNSUPPORTED"
        assert f"{name.lower()[1:]} files" in source.refusal.fact
        assert ".tar, .tar.gz or .zip" in source.refusal.remedy
    (tmp_path / "b.nii.bz2").write_bytes(b"x")
    (source,) = find_scans(tmp_path / "b.nii.bz2")
    assert source.refusal is not None and "Convert it to .nii.gz" in source.refusal.remedy


def test_folders_that_cannot_be_searched(tmp_path: Path) -> None:
    for path, code in ((tmp_path / "none", "INPUT_MISSING"), (tmp_path, "ARCHIVE_EMPTY")):
        with pytest.raises(PhotonError, match=code):
            find_scans(path)


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_scan(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4), tmp_path / "open.nii")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    closed, readable = find_scans(tmp_path)
    assert closed.refusal is not None and closed.refusal.code == "SCAN_UNREADABLE" and closed.relative == "closed"
    assert readable.refusal is None
