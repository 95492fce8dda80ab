"""MetaImage, NRRD and NIfTI, read as SimpleITK reads them where a file is good; and what only some headers say."""

from __future__ import annotations

import gzip
import os
import zlib
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from photon.errors import PhotonError
from pipelines.scans.scan import FORMAT_OF_ENDING, read_scan, scan_ending

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
VOXELS = np.random.RandomState(0).randint(-900, 900, 4 * 5 * 6).astype("<i2")
META = {
    "ObjectType": "Image",
    "NDims": "3",
    "BinaryData": "True",
    "DimSize": "4 5 6",
    "ElementSpacing": "0.7 0.8 2.5",
    "TransformMatrix": "1 0 0 0 1 0 0 0 1",
    "Offset": "-10 20 30",
    "ElementType": "MET_SHORT",
    "ElementDataFile": "LOCAL",
}
NRRD = {
    "type": "short",
    "dimension": "3",
    "space": "left-posterior-superior",
    "sizes": "4 5 6",
    "space directions": "(0.7,0,0) (0,0.8,0) (0,0,2.5)",
    "kinds": "domain domain domain",
    "endian": "little",
    "encoding": "raw",
    "space origin": "(-10,20,30)",
}


def as_simpleitk_reads_it(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels [i, j, k] and matrix to RAS mm."""
    image = sitk.ReadImage(str(path))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine


def assert_same(path: Path) -> None:
    scan = read_scan(path)
    voxels, affine = as_simpleitk_reads_it(path)
    assert scan.array.shape == voxels.shape and np.array_equal(scan.array, voxels.astype(scan.array.dtype))
    assert np.abs(scan.affine - affine).max() < 1e-5


def meta(path: Path, content: bytes = VOXELS.tobytes(), without: tuple[str, ...] = (), **changes: str) -> Path:
    """Write a MetaImage: its header, changed, and what follows."""
    fields = {key: value for key, value in (META | changes).items() if key not in without}
    name = fields.pop("ElementDataFile")
    lines = [f"{key} = {value}\n" for key, value in fields.items()] + [f"ElementDataFile = {name}\n"]
    path.write_bytes("".join(lines).encode() + content)
    return path


def nrrd(path: Path, content: bytes = VOXELS.tobytes(), changes: dict[str, str | None] | None = None) -> Path:
    """Write an NRRD file: its header, changed (None leaves a field out), and what follows."""
    fields = {key: value for key, value in (NRRD | (changes or {})).items() if value is not None}
    lines = ["NRRD0004\n", "# a comment\n", *(f"{key}: {value}\n" for key, value in fields.items()), "\n"]
    path.write_bytes("".join(lines).encode() + content)
    return path


def refusal(path: Path) -> PhotonError:
    with pytest.raises(PhotonError) as caught:
        read_scan(path)
    assert caught.value.fact and caught.value.remedy
    return caught.value


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("ending", [".mha", ".mhd", ".nrrd", ".nhdr", ".nii", ".nii.gz"])
def test_written_by_simpleitk(tmp_path: Path, ending: str, is_compressed: bool, dtype: type) -> None:
    random = np.random.RandomState(len(ending))
    image = sitk.GetImageFromArray((random.rand(7, 6, 5) * 120).astype(dtype))
    turn, _ = np.linalg.qr(random.rand(3, 3))
    image.SetDirection(turn.ravel().tolist())
    image.SetSpacing((0.7, 1.3, 2.5))
    image.SetOrigin((-11.25, 20.5, 7.125))
    sitk.WriteImage(image, str(tmp_path / f"a{ending}"), is_compressed)
    assert_same(tmp_path / f"a{ending}")


@pytest.mark.parametrize("order", ["little", "big"])
def test_both_byte_orders(tmp_path: Path, order: str) -> None:
    content = VOXELS.astype("<i2" if order == "little" else ">i2").tobytes()
    assert_same(meta(tmp_path / "a.mha", content, BinaryDataByteOrderMSB=str(order == "big")))
    assert_same(meta(tmp_path / "b.mha", content, ElementByteOrderMSB=str(order == "big")))
    assert_same(nrrd(tmp_path / "a.nrrd", content, {"endian": order}))


def test_directions_offsets_and_what_is_ignored(tmp_path: Path) -> None:
    turn = "0 1 0 0 0 -1 -1 0 0"
    path = meta(tmp_path / "a.mha", TransformMatrix=turn, CenterOfRotation="5 6 7", AnatomicalOrientation="RAI")
    assert_same(path)
    scan = read_scan(path)
    assert scan.orientation == "PIR" and scan.spacing_mm == (0.7, 0.8, 2.5)
    assert scan.notes == ("AnatomicalOrientation RAI contradicts axes towards PIR: the directions of the axes count",)
    assert_same(meta(tmp_path / "b.mha", without=("TransformMatrix", "Offset"), Rotation=turn, Position="1 2 3"))


def test_sizes_of_metaimage_beside_spacings(tmp_path: Path) -> None:
    path = meta(tmp_path / "a.mha", without=("ElementSpacing",), ElementSize="2 3 4")
    assert_same(path)
    assert read_scan(path).notes == ("the header records no ElementSpacing: ElementSize is taken for it",)
    for size, num_notes in (("0.7 0.8 2.5", 0), ("0.7 0.8 2.52", 0), ("0.7 0.8 2.6", 1), ("0.7 nan 2.5", 1)):
        path = meta(tmp_path / "a.mha", ElementSize=size)
        scan = read_scan(path)
        assert scan.spacing_mm == (0.7, 0.8, 2.5) and len(scan.notes) == num_notes
        assert all("ElementSpacing (0.7, 0.8, 2.5), which counts" in note for note in scan.notes)
    assert_same(meta(tmp_path / "a.mha", ElementSize="0.7 0.8 5"))
    for size in ("3", "3 3", "unknown"):
        path = meta(tmp_path / "a.mha", ElementSize=size)
        assert read_scan(path).spacing_mm == (0.7, 0.8, 2.5)
        assert read_scan(path).notes == ("ElementSize is no list of three numbers: ElementSpacing counts",)


def test_letters_of_metaimage_against_its_matrix(tmp_path: Path) -> None:
    def notes(letters: str, turn: str = "1 0 0 0 1 0 0 0 1", without: tuple[str, ...] = ()) -> tuple[str, ...]:
        path = meta(tmp_path / "a.mha", without=without, TransformMatrix=turn, AnatomicalOrientation=letters)
        return read_scan(path).notes

    for letters in ("RAI", "rai", "LPS", "???", "R?I", ""):
        assert notes(letters) == ()
    for letters in ("RAS", "LAI", "ARI", "LPI", "IAR"):
        assert notes(letters) == (
            f"AnatomicalOrientation {letters} contradicts axes towards LPS: the directions of the axes count",
        )
    assert notes("LPI", "-1 0 0 0 -1 0 0 0 1") == () != notes("RAI", "-1 0 0 0 -1 0 0 0 1")
    for letters in ("RRI", "RA", "RAIS", "INVENTED^PATIENT"):
        (note,) = notes(letters)
        assert "contradicts" in note or "no orientation" in note and letters not in note
    assert len(notes("LPI", without=("TransformMatrix",))) == 2  # assumed directions count, too


def test_letters_that_itk_writes_contradict_no_matrix(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    image = sitk.GetImageFromArray(random.randint(-900, 900, (4, 5, 6)).astype(np.int16))
    turns = [np.eye(3)[list(order)] * signs for order in permutations(range(3)) for signs in product((-1, 1), repeat=3)]
    oblique = np.array([[2, -1, 2], [2, 2, -1], [-1, 2, 2]]) / 3  # as far between the axes as can be
    for turn in (*turns, *(np.linalg.qr(random.randn(3, 3))[0] for _ in range(100)), oblique, oblique.T):
        image.SetDirection(turn.ravel().tolist())
        sitk.WriteImage(image, str(tmp_path / "a.mha"))
        assert read_scan(tmp_path / "a.mha").notes == ()


def test_spaces_of_nrrd(tmp_path: Path) -> None:
    for space in ("right-anterior-superior", "RAS", "left-anterior-superior", "LAS", "left-posterior-superior", "LPS"):
        assert_same(nrrd(tmp_path / "a.nrrd", changes={"space": space}))
    names = {"space": None, "space directions": None, "space origin": None, "space dimension": None}
    path = nrrd(tmp_path / "b.nrrd", changes={**names, "spacings": "0.7 0.8 2.5"})
    scan = read_scan(path)
    assert scan.spacing_mm == (0.7, 0.8, 2.5) and scan.orientation == "LPS"
    assert any("LPS is assumed" in note for note in scan.notes) and any("origin" in note for note in scan.notes)
    for unit, directions in (("cm", "(.07,0,0) (0,.08,0) (0,0,.25)"), ("um", "(700,0,0) (0,800,0) (0,0,2500)")):
        units = " ".join([f'"{unit}"'] * 3)
        path = nrrd(tmp_path / "c.nrrd", changes={"space directions": directions, "space units": units})
        assert read_scan(path).spacing_mm == (0.7, 0.8, 2.5)


def test_spacings_of_nrrd_without_directions(tmp_path: Path) -> None:
    assumed = "the header records no directions: axes along those of the space are assumed"
    changes = {"space directions": None, "spacings": "0.7 0.8 2.5"}
    scan = read_scan(nrrd(tmp_path / "a.nrrd", changes=changes))
    assert scan.spacing_mm == (0.7, 0.8, 2.5) and scan.orientation == "LPS" and scan.notes == (assumed,)
    scan = read_scan(nrrd(tmp_path / "a.nrrd", changes=changes | {"spacings": "0.7 -0.8 2.5"}))
    assert scan.orientation == "LAS" and len(scan.notes) == 2 and "turn" in scan.notes[0]
    for unit, spacings in (("cm", ".07 .08 .25"), ("um", "700 800 2500")):
        units = " ".join([f'"{unit}"'] * 3)
        path = nrrd(tmp_path / "b.nrrd", changes=changes | {"spacings": spacings, "units": units})
        scan = read_scan(path)
        assert scan.spacing_mm == (0.7, 0.8, 2.5) and "unit of length" in scan.notes[0]
    scan = read_scan(nrrd(tmp_path / "a.nrrd", changes={"space directions": None}))
    assert scan.spacing_mm == (1, 1, 1) and len(scan.notes) == 2 and assumed in scan.notes
    scan = read_scan(nrrd(tmp_path / "a.nrrd", changes={"space directions": None, "space units": '"cm" "cm" "cm"'}))
    assert scan.spacing_mm == (1, 1, 1) and len(scan.notes) == 3


def test_units_of_axes_beside_directions_say_nothing_of_them(tmp_path: Path) -> None:
    for unit, num_notes in (("mm", 0), ("millimeter", 0), ("", 0), ("HU", 0), ("Doe^John", 0), ("cm", 1)):
        scan = read_scan(nrrd(tmp_path / "a.nrrd", changes={"units": f'"{unit}" "{unit}" "{unit}"'}))
        assert scan.spacing_mm == (0.7, 0.8, 2.5)
        assert len(scan.notes) == num_notes and not any(unit in note for note in scan.notes if unit)
    error = refusal(nrrd(tmp_path / "a.nrrd", changes={"space units": '"Doe^John" "mm" "mm"'}))
    assert error.code == "AFFINE_INVALID" and "doe" not in error.fact.lower()


def test_spacings_beside_directions(tmp_path: Path) -> None:
    for same in ("0.7 0.8 2.5", "nan nan nan"):
        assert read_scan(nrrd(tmp_path / "a.nrrd", changes={"spacings": same})).notes == ()


def test_detached_and_skipped_data(tmp_path: Path) -> None:
    (tmp_path / "my data.raw").write_bytes(b"12 bytes of " + VOXELS.tobytes())
    for skip in ("12", "-1"):
        assert_same(meta(tmp_path / "a.mhd", b"", ElementDataFile="my data.raw", HeaderSize=skip))
        assert_same(nrrd(tmp_path / "a.nhdr", b"", {"data file": "my data.raw", "byte skip": skip}))
    (tmp_path / "lines.raw").write_bytes(b"one\ntwo\n" + VOXELS.tobytes())
    assert_same(nrrd(tmp_path / "b.nhdr", b"", {"datafile": "lines.raw", "line skip": "2"}))
    scan = read_scan(tmp_path / "a.mhd")
    (tmp_path / "my data.raw").write_bytes(b"12 bytes OF " + VOXELS.tobytes())
    assert read_scan(tmp_path / "a.mhd").sha256 != scan.sha256  # both files are in the checksum


def test_compressed_in_other_ways(tmp_path: Path) -> None:
    packed = gzip.compress(VOXELS[:50].tobytes()) + gzip.compress(VOXELS[50:].tobytes())
    path = meta(tmp_path / "a.mha", packed, CompressedData="True")
    assert np.array_equal(read_scan(path).array.ravel("F"), VOXELS)
    path = nrrd(tmp_path / "a.nrrd", packed, {"encoding": "gz"})
    assert np.array_equal(read_scan(path).array.ravel("F"), VOXELS)


def test_slope_and_modality_of_metaimage(tmp_path: Path) -> None:
    path = meta(
        tmp_path / "a.mha",
        ElementToIntensityFunctionSlope="2",
        ElementToIntensityFunctionOffset="-5",
        Modality="MET_MOD_CT",
    )
    scan = read_scan(path)
    assert np.array_equal(scan.array.ravel("F"), VOXELS.astype(np.float32) * 2 - 5) and scan.modality == "ct"
    assert any("slope 2" in note for note in scan.notes)


def test_origins_beyond_any_scanner_are_noted(tmp_path: Path) -> None:
    for path in (
        meta(tmp_path / "a.mha", Offset="0 20000 0"),
        nrrd(tmp_path / "a.nrrd", changes={"space origin": "(0,20000,0)"}),
    ):
        scan = read_scan(path)
        assert scan.affine[1, 3] == -20_000 and scan.notes == (
            "its first voxel lies 20 m from the origin: taken as it is",
        )


META_FAULTS: dict[str, tuple[dict[str, str], str]] = {
    "four axes": ({"NDims": "4", "DimSize": "4 5 6 1", "ElementSpacing": "1 1 1 1"}, "SCAN_NOT_3D"),
    "two axes": ({"NDims": "2", "DimSize": "20 6"}, "SCAN_NOT_3D"),
    "one slice": ({"DimSize": "4 30 1"}, "SCAN_NOT_3D"),
    "negative size": ({"DimSize": "-4 5 6"}, "SCAN_UNREADABLE"),
    "size no number": ({"DimSize": "4 5 x"}, "SCAN_UNREADABLE"),
    "size a fraction": ({"DimSize": "4 5 6.5"}, "SCAN_UNREADABLE"),
    "size infinite": ({"DimSize": "4 5 inf"}, "SCAN_UNREADABLE"),
    "vast number of axes": ({"NDims": "1e9"}, "SCAN_UNREADABLE"),
    "huge": ({"DimSize": "30000 30000 30000"}, "SCAN_TOO_LARGE"),
    "more than the file": ({"DimSize": "4 5 7"}, "SCAN_TRUNCATED"),
    "less than the file": ({"DimSize": "4 5 5"}, "SCAN_TRAILING_DATA"),
    "colours": ({"ElementNumberOfChannels": "3"}, "SCAN_RGB"),
    "text": ({"BinaryData": "False"}, "FORMAT_UNSUPPORTED"),
    "other object": ({"ObjectType": "Tube"}, "FORMAT_UNSUPPORTED"),
    "unknown type": ({"ElementType": "MET_STRING"}, "FORMAT_UNSUPPORTED"),
    "no flag": ({"BinaryData": "perhaps"}, "SCAN_UNREADABLE"),
    "zero spacing": ({"ElementSpacing": "0 1 1"}, "SPACING_INVALID"),
    "negative spacing": ({"ElementSpacing": "-1 1 1"}, "SPACING_INVALID"),
    "NaN spacing": ({"ElementSpacing": "nan 1 1"}, "SPACING_INVALID"),
    "vast spacing": ({"ElementSpacing": "1e30 1 1"}, "SPACING_INVALID"),
    "singular": ({"TransformMatrix": "1 0 0 1 0 0 0 0 1"}, "AFFINE_INVALID"),
    "zero directions": ({"TransformMatrix": "0 0 0 0 0 0 0 0 0"}, "AFFINE_INVALID"),
    "long directions": ({"TransformMatrix": "2 0 0 0 2 0 0 0 2"}, "AFFINE_INVALID"),
    "NaN directions": ({"TransformMatrix": "nan 0 0 0 1 0 0 0 1"}, "AFFINE_INVALID"),
    "other unit": ({"DistanceUnits": "cm"}, "AFFINE_INVALID"),
    "infinite offset": ({"Offset": "inf 0 0"}, "AFFINE_INVALID"),
    "vast offset": ({"Offset": "1e200 0 0"}, "AFFINE_INVALID"),
    "offset of a kilometre": ({"Offset": "0 0 -1000001"}, "AFFINE_INVALID"),
    "vast directions": ({"TransformMatrix": "1e200 0 0 0 1 0 0 0 1"}, "AFFINE_INVALID"),
    "slope zero": ({"ElementToIntensityFunctionSlope": "0"}, "SCALING_INVALID"),
    "slope NaN": ({"ElementToIntensityFunctionSlope": "nan"}, "SCALING_INVALID"),
    "negative skip": ({"HeaderSize": "-7"}, "SCAN_UNREADABLE"),
    "skip behind the end": ({"HeaderSize": "70000"}, "SCAN_TRUNCATED"),
    "not compressed": ({"CompressedData": "True"}, "GZIP_CORRUPT"),
    "many files": ({"ElementDataFile": "a%03d.raw 1 6 1"}, "FORMAT_UNSUPPORTED"),
    "list of files": ({"ElementDataFile": "LIST"}, "FORMAT_UNSUPPORTED"),
    "no such file": ({"ElementDataFile": "none.raw"}, "SCAN_MISSING"),
    "itself": ({"ElementDataFile": "a.mha"}, "SCAN_MISSING"),
    "name that is none": ({"ElementDataFile": "a\0b"}, "FORMAT_UNSUPPORTED"),
}


@pytest.mark.parametrize("fault", META_FAULTS)
def test_header_faults_of_metaimage(tmp_path: Path, fault: str) -> None:
    changes, code = META_FAULTS[fault]
    assert refusal(meta(tmp_path / "a.mha", **changes)).code == code


NRRD_FAULTS: dict[str, tuple[dict[str, str | None], str]] = {
    "four axes": ({"dimension": "4", "sizes": "4 5 6 1", "kinds": None}, "SCAN_NOT_3D"),
    "vectors": ({"kinds": "vector domain domain"}, "SCAN_NOT_3D"),
    "colours": ({"kinds": "RGB-color domain domain"}, "SCAN_RGB"),
    "sizes against dimension": ({"sizes": "4 5 6 7"}, "SCAN_UNREADABLE"),
    "no sizes": ({"sizes": None}, "SCAN_UNREADABLE"),
    "size no number": ({"sizes": "4 5 x"}, "SCAN_UNREADABLE"),
    "negative size": ({"sizes": "4 5 -6"}, "SCAN_UNREADABLE"),
    "huge": ({"sizes": "30000 30000 30000"}, "SCAN_TOO_LARGE"),
    "more than the file": ({"sizes": "4 5 7"}, "SCAN_TRUNCATED"),
    "less than the file": ({"sizes": "4 5 5"}, "SCAN_TRAILING_DATA"),
    "blocks": ({"type": "block"}, "FORMAT_UNSUPPORTED"),
    "no byte order": ({"endian": None}, "SCAN_UNREADABLE"),
    "wrong byte order": ({"endian": "middle"}, "SCAN_UNREADABLE"),
    "text": ({"encoding": "ascii"}, "FORMAT_UNSUPPORTED"),
    "bzip2": ({"encoding": "bzip2"}, "FORMAT_UNSUPPORTED"),
    "not compressed": ({"encoding": "gzip"}, "GZIP_CORRUPT"),
    "with time": ({"space": "left-posterior-superior-time"}, "FORMAT_UNSUPPORTED"),
    "NaN direction": ({"space directions": "(nan,0,0) (0,1,0) (0,0,1)"}, "AFFINE_INVALID"),
    "no direction": ({"space directions": "none (0,1,0) (0,0,1)"}, "AFFINE_INVALID"),
    "two directions": ({"space directions": "(1,0,0) (0,1,0)"}, "AFFINE_INVALID"),
    "singular": ({"space directions": "(1,0,0) (1,0,0) (0,0,1)"}, "AFFINE_INVALID"),
    "vast spacing": ({"space directions": "(1e30,0,0) (0,1,0) (0,0,1)"}, "SPACING_INVALID"),
    "endless direction": ({"space directions": "(1e200,0,0) (0,1,0) (0,0,1)"}, "AFFINE_INVALID"),
    "origin NaN": ({"space origin": "(1,2,nan)"}, "AFFINE_INVALID"),
    "origin of a kilometre": ({"space origin": "(1,2e6,3)"}, "AFFINE_INVALID"),
    "spacing of two": ({"space directions": None, "spacings": "1 2"}, "SCAN_UNREADABLE"),
    "spacing zero": ({"space directions": None, "spacings": "1 0 2"}, "SPACING_INVALID"),
    "spacing NaN": ({"space directions": None, "spacings": "1 nan 2"}, "SPACING_INVALID"),
    "spacing in metres": ({"space directions": None, "spacings": "1 1 2", "units": '"m" "m" "m"'}, "SPACING_INVALID"),
    "two units": (
        {"space directions": None, "spacings": "1 1 2", "space units": '"mm" "mm" "mm"', "units": '"cm" "cm" "cm"'},
        "AFFINE_INVALID",
    ),
    "two spacings without end": ({"spacings": "inf 0.8 2.5"}, "AFFINE_INVALID"),
    "two spacings": ({"spacings": "1 2 3"}, "AFFINE_INVALID"),
    "origin of axes": ({"space origin": None, "axis mins": "10 20 30"}, "AFFINE_INVALID"),
    "origin of two": ({"space origin": "(1,2)"}, "AFFINE_INVALID"),
    "unknown unit": ({"space units": '"foot" "foot" "foot"'}, "AFFINE_INVALID"),
    "negative skip": ({"byte skip": "-2"}, "SCAN_UNREADABLE"),
    "skip behind the end": ({"byte skip": "70000"}, "SCAN_TRUNCATED"),
    "a field twice": ({"SIZES": "4 5 6"}, "SCAN_UNREADABLE"),
    "no field": ({"no separator\nx": "y"}, "SCAN_UNREADABLE"),
    "many files": ({"data file": "a%03d.raw 1 6 1"}, "FORMAT_UNSUPPORTED"),
    "no such file": ({"data file": "none.raw"}, "SCAN_MISSING"),
}


@pytest.mark.parametrize("fault", NRRD_FAULTS)
def test_header_faults_of_nrrd(tmp_path: Path, fault: str) -> None:
    changes, code = NRRD_FAULTS[fault]
    assert refusal(nrrd(tmp_path / "a.nrrd", changes=changes)).code == code


def test_a_header_cannot_name_a_file_outside_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.raw").write_bytes(VOXELS.tobytes())
    (folder / "link.raw").symlink_to(tmp_path / "secret.raw")
    for name in ("../secret.raw", str(tmp_path / "secret.raw"), "link.raw", str(folder / "inside.raw")):
        (folder / "inside.raw").write_bytes(VOXELS.tobytes())
        assert refusal(meta(folder / "a.mhd", b"", ElementDataFile=name)).code == "DATA_FILE_OUTSIDE"
        assert refusal(nrrd(folder / "a.nhdr", b"", {"data file": name})).code == "DATA_FILE_OUTSIDE"


def test_headers_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mha").write_bytes(b"ObjectType = Image\n" + b"x" * 100_000)
    assert refusal(tmp_path / "a.mha").code == "SCAN_UNREADABLE"
    (tmp_path / "a.mha").write_bytes(b"ObjectType = Image\n" + b"".join(b"k%d = 1\n" % n for n in range(2000)))
    assert refusal(tmp_path / "a.mha").code == "SCAN_UNREADABLE"
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004\n" + b"x" * 100_000)
    assert refusal(tmp_path / "a.nrrd").code == "SCAN_UNREADABLE"
    (tmp_path / "a.nrrd").write_bytes(b"NRRD0004\n" + b"# comment\n" * 20_000)
    assert refusal(tmp_path / "a.nrrd").code == "SCAN_UNREADABLE"


def test_the_content_decides_the_format(tmp_path: Path) -> None:
    for path in (meta(tmp_path / "a.nii"), nrrd(tmp_path / "b.mha")):
        scan = read_scan(path)
        assert np.array_equal(scan.array.ravel("F"), VOXELS)
        assert any("other than its name says" in note for note in scan.notes)


def test_zlib_must_end_where_the_file_ends(tmp_path: Path) -> None:
    packed = zlib.compress(VOXELS.tobytes())
    assert read_scan(meta(tmp_path / "a.mha", packed, CompressedData="True")).notes == ()
    assert refusal(meta(tmp_path / "a.mha", packed + b"more", CompressedData="True")).code == "SCAN_TRAILING_DATA"
    assert refusal(meta(tmp_path / "a.mha", packed[:-4], CompressedData="True")).code == "SCAN_TRUNCATED"


@pytest.mark.skipif("PHOTON_REAL_SCANS" not in os.environ, reason="PHOTON_REAL_SCANS names no folder of scans")
def test_real_scans_as_simpleitk_reads_them() -> None:
    num_read = 0
    for path in sorted(Path(os.environ["PHOTON_REAL_SCANS"]).rglob("*")):
        if path.is_file() and scan_ending(path) in FORMAT_OF_ENDING:
            try:
                read_scan(path)
            except PhotonError as error:
                assert error.code == "SCAN_NOT_3D"
                continue
            assert_same(path)
            num_read += 1
    assert num_read > 50
