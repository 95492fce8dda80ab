"""Reading NIfTI files, whole ones and broken ones."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines.scans.checks import scaled
from pipelines.scans.nifti import sample_scans, write_scan
from pipelines.scans.scan import read_scan


def write_small(path: Path, seed: int = 0, dtype: type = np.int16) -> np.ndarray:
    """A 9 x 10 x 11 scan of 3 x 3 x 4 mm voxels."""
    array = np.random.RandomState(seed).randint(-900, 900, (9, 10, 11)).astype(dtype)
    write_scan(array, np.diag([3.0, 3.0, 4.0, 1.0]), path)
    return array


def patched(path: Path, offset: int, fmt: str, *values: float) -> Path:
    """Overwrite header fields of an uncompressed file."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<" + fmt, content, offset, *values)
    path.write_bytes(content)
    return path


def refusal(path: Path, **options: Any) -> PhotonError:
    with pytest.raises(PhotonError) as caught:
        read_scan(path, **options)
    assert caught.value.fact and caught.value.remedy
    return caught.value


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_scan_round_trip(tmp_path: Path, name: str) -> None:
    array = write_small(tmp_path / name)
    scan = read_scan(tmp_path / name)
    assert np.array_equal(scan.array, array) and scan.array.dtype == np.int16
    assert (scan.spacing_mm, scan.orientation, scan.notes) == ((3.0, 3.0, 4.0), "RAS", ())


def test_big_endian_slope_and_many_gzip_members(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    array = write_small(path)
    patched(path, 112, "ff", 2.0, -10.0)
    assert np.array_equal(read_scan(path).array, array.astype(np.float32) * 2 - 10)
    content = path.read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    assert np.array_equal(read_scan(tmp_path / "b.nii.gz").array, read_scan(path).array)
    anatomical = next(sample for sample in sample_scans() if sample.name == "anatomical.nii")
    assert read_scan(anatomical).array.dtype == np.int16  # a big-endian file


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_the_extremes_are_those_of_the_values(dtype: str) -> None:
    drawn = np.random.default_rng(0).standard_normal(1000) * 30
    raw = (drawn + 125 if dtype[0] == "u" else drawn).clip(-128, 255).astype(dtype)
    for slope, intercept in ((1.0, 0.0), (1.0, -1024.0), (1.0, 0.5), (-1.0, 0.0), (-0.3, 7.1), (371.7, -0.1)):
        values, extent, _ = scaled(raw.copy(), slope, intercept, Path("a"))
        assert extent == (float(values.min()), float(values.max()))


HEADER_FAULTS = {
    "4D": ((40, "8h", 4, 9, 10, 11, 2, 1, 1, 1), "SCAN_NOT_3D"),
    "2D": ((40, "8h", 2, 9, 110, 1, 1, 1, 1, 1), "SCAN_NOT_3D"),
    "one slice": ((40, "8h", 3, 99, 10, 1, 1, 1, 1, 1), "SCAN_NOT_3D"),
    "negative size": ((40, "8h", 3, -9, 10, 11, 1, 1, 1, 1), "SCAN_UNREADABLE"),
    "nine axes": ((40, "h", 9), "SCAN_UNREADABLE"),
    "huge": ((40, "8h", 3, 32767, 32767, 32767, 1, 1, 1, 1), "SCAN_TOO_LARGE"),
    "more than the file": ((40, "8h", 3, 9, 10, 12, 1, 1, 1, 1), "SCAN_TRUNCATED"),
    "less than the file": ((40, "8h", 3, 9, 10, 10, 1, 1, 1, 1), "SCAN_TRAILING_DATA"),
    "colours": ((70, "2h", 128, 24), "SCAN_RGB"),
    "complex": ((70, "2h", 32, 64), "FORMAT_UNSUPPORTED"),
    "unknown datatype": ((70, "2h", 77, 16), "SCAN_UNREADABLE"),
    "zero spacing": ((80, "f", 0.0), "SPACING_INVALID"),
    "NaN spacing": ((80, "f", float("nan")), "SPACING_INVALID"),
    "vast spacing": ((80, "f", 1e30), "SPACING_INVALID"),
    "spacing against matrix": ((80, "f", 3.1), "SPACING_CONFLICT"),
    "NaN matrix": ((280, "f", float("nan")), "AFFINE_INVALID"),
    "zero matrix": ((280, "12f", *[0.0] * 12), "AFFINE_INVALID"),
    "flat matrix": ((280, "12f", 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0), "AFFINE_INVALID"),
    "voxels in the header": ((108, "f", 0.0), "SCAN_UNREADABLE"),
    "voxels far away": ((108, "f", 1e9), "SCAN_UNREADABLE"),
    "voxels at NaN": ((108, "f", float("nan")), "SCAN_UNREADABLE"),
    "voxels at infinity": ((108, "f", float("inf")), "SCAN_UNREADABLE"),
    "voxels at half a byte": ((108, "f", 352.5), "SCAN_UNREADABLE"),
    "far from anywhere": ((292, "f", 1.1e6), "AFFINE_INVALID"),
    "voxels behind the end": ((108, "f", 1e6), "SCAN_TRUNCATED"),
    "no magic": ((344, "4B", 0, 0, 0, 0), "SCAN_UNREADABLE"),
    "slope NaN": ((112, "f", float("nan")), "SCALING_INVALID"),
    "slope infinite": ((112, "f", float("inf")), "SCALING_INVALID"),
    "slope vast": ((112, "f", 1e30), "SCALING_INVALID"),
    "values vast": ((112, "f", 1e5), "SCALING_INVALID"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_header_faults_are_refused(tmp_path: Path, fault: str) -> None:
    change, code = HEADER_FAULTS[fault]
    path = tmp_path / "a.nii"
    write_small(path)
    assert refusal(patched(path, *change)).code == code
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert refusal(tmp_path / "b.nii.gz").code == code


def test_a_small_gzip_cannot_make_us_take_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    write_small(path)
    patched(path, 40, "8h", 3, 2000, 2000, 120, 1, 1, 1, 1)
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert refusal(tmp_path / "bomb.nii.gz").code == "SCAN_TRUNCATED"
    assert refusal(tmp_path / "bomb.nii.gz", max_voxels=1000).code == "SCAN_TOO_LARGE"


def test_slope_zero_means_no_scaling(tmp_path: Path) -> None:
    array = write_small(tmp_path / "a.nii")
    scan = read_scan(patched(tmp_path / "a.nii", 112, "ff", 0.0, 5.0))
    assert np.array_equal(scan.array, array) and "slope is 0" in scan.notes[0]


def test_disagreeing_or_missing_orientation_is_noted(tmp_path: Path) -> None:
    write_small(tmp_path / "a.nii")
    patched(tmp_path / "a.nii", 280, "f", -3.0)  # sform mirrored, qform not
    assert any("qform and sform differ" in note for note in read_scan(tmp_path / "a.nii").notes)
    patched(tmp_path / "a.nii", 252, "2h", 0, 0)
    assert any("no orientation" in note for note in read_scan(tmp_path / "a.nii").notes)


def test_bitpix_against_datatype_is_noted(tmp_path: Path) -> None:
    array = write_small(tmp_path / "a.nii")
    for num_bits in (8, 0, -16):
        scan = read_scan(patched(tmp_path / "a.nii", 72, "h", num_bits))
        assert np.array_equal(scan.array, array)
        assert scan.notes == (f"bitpix {num_bits} contradicts datatype 4 of 16 bits: datatype counts",)


def in_unit(path: Path, code: int, *lengths: float) -> Path:
    """Declare a unit of length and give the voxels these edges in it."""
    write_small(path)
    patched(path, 80, "3f", *lengths)
    patched(path, 252, "2h", 0, 1)
    x, y, z = lengths
    patched(path, 280, "12f", x, 0, 0, -5 * x, 0, y, 0, 0, 0, 0, z, 0)
    return patched(path, 123, "B", code)


def test_units_of_length(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    for code, factor in ((0, 1), (2, 1), (1, 1e-3), (3, 1e3)):
        scan = read_scan(in_unit(path, code, 3 * factor, 3 * factor, 4 * factor))
        assert np.allclose(scan.affine, [[3, 0, 0, -15], [0, 3, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]], atol=1e-5)
        assert len(scan.notes) == (factor != 1) and all("unit of length" in note for note in scan.notes)
    for code in (1, 3):  # declared, but in use are millimetres
        for trust in (None, "sform", "pixdim"):
            scan = read_scan(in_unit(path, code, 3, 3, 4), trust=trust)
            assert scan.spacing_mm == (3, 3, 4) and len(scan.notes) == 1 and "taken as mm" in scan.notes[0]
    scan = read_scan(in_unit(path, 5, 3, 3, 4))
    assert scan.spacing_mm == (3, 3, 4) and "code 5" in scan.notes[0]
    for code, lengths in ((1, (3, 3, 0.004)), (3, (3, 3, 4000)), (1, (300, 300, 400)), (3, (0.03, 0.03, 0.03))):
        assert refusal(in_unit(path, code, *lengths)).code == "SPACING_INVALID"


def test_a_matrix_in_another_unit_than_the_spacing_is_refused(tmp_path: Path) -> None:
    path = in_unit(tmp_path / "a.nii", 1, 3, 3, 4)
    patched(path, 80, "3f", 0.003, 0.003, 0.004)
    assert refusal(path).code == "SPACING_INVALID"
    assert read_scan(path, trust="sform").spacing_mm == (3, 3, 4)
    right = [[3, 0, 0, -15], [0, 3, 0, 0], [0, 0, 4, 0], [0, 0, 0, 1]]
    scan = read_scan(path, trust="pixdim")
    assert np.allclose(scan.affine, right, atol=1e-5) and any("unit of length" in note for note in scan.notes)
    path = in_unit(tmp_path / "b.nii", 1, 0.003, 0.003, 0.004)  # the other way round
    patched(path, 80, "3f", 3, 3, 4)
    assert refusal(path).code == "SPACING_INVALID"
    scan = read_scan(path, trust="pixdim")
    assert np.allclose(scan.affine, right, atol=1e-5) and any("taken as mm" in note for note in scan.notes)


def test_an_origin_beyond_any_scanner_is_noted(tmp_path: Path) -> None:
    write_small(tmp_path / "a.nii")
    patched(tmp_path / "a.nii", 252, "2h", 0, 1)
    for distance_mm, num_notes in ((9_999, 0), (-10_001, 1), (999_999, 1)):
        scan = read_scan(patched(tmp_path / "a.nii", 292, "f", distance_mm))
        assert scan.affine[0, 3] == distance_mm and len(scan.notes) == num_notes
        assert all("from the origin" in note for note in scan.notes)


def test_numbers_without_end_are_refused(tmp_path: Path) -> None:
    """NIfTI-2 has room for numbers whose squares have no end."""
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    content = bytearray(nibabel.Nifti2Image(array, np.eye(4)).to_bytes())
    struct.pack_into("<d", content, 400, 1e200)  # the first number of the matrix
    for code in (2, 1):
        struct.pack_into("<i", content, 500, code)
        (tmp_path / "a.nii").write_bytes(content)
        for trust in (None, "sform", "pixdim"):
            assert refusal(tmp_path / "a.nii", trust=trust).code in ("AFFINE_INVALID", "SPACING_INVALID")


def test_bad_voxels_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    array = write_small(path, dtype=np.float32)
    for bad in (np.nan, np.inf):
        array[4, 5, 6] = bad
        write_scan(array, np.diag([3, 3, 4, 1]), path)
        error = refusal(path)
        assert error.code == "VOXELS_NOT_FINITE" and "1 of 990" in error.fact
    write_scan(np.full((9, 10, 11), 40, np.int16), np.diag([3, 3, 4, 1]), path)
    assert refusal(path).code == "SCAN_CONSTANT"


def test_files_that_are_no_scans_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.nii").code == "SCAN_MISSING"
    (tmp_path / "text.nii").write_text("this is a text, not a scan, however long it may be" * 20)
    assert refusal(tmp_path / "text.nii").code == "SCAN_UNREADABLE"
    (tmp_path / "text.nii.gz").write_text("plain text under a gzip name")
    assert refusal(tmp_path / "text.nii.gz").code == "GZIP_CORRUPT"
    (tmp_path / "empty.nii.gz").touch()
    assert refusal(tmp_path / "empty.nii.gz").code == "SCAN_TRUNCATED"
    (tmp_path / "slice.dcm").touch()
    assert refusal(tmp_path / "slice.dcm").code == "FORMAT_UNSUPPORTED"
    assert refusal(tmp_path).code == "SCAN_UNREADABLE"
