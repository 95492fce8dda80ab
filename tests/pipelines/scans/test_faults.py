"""The fault matrix of scan files: damaged, lying and unusual ones, by the names that the faults have there (D1 to D7,
D10; DICOM, D8, and archives, D9, have files of their own)."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines.resample import VolumeSpec
from pipelines.scans import streams
from pipelines.scans.find import find_scans, read_source
from pipelines.scans.nifti import write_scan
from pipelines.scans.scan import read_scan
from pipelines.volumes import resample

AFFINE = np.diag([3.0, 3.0, 4.0, 1.0])
ARRAY = np.random.RandomState(0).randint(-900, 900, (9, 10, 11)).astype(np.int16)
VOXELS = ARRAY.ravel("F").astype("<i2").tobytes()
META = (
    "ObjectType = Image\nNDims = 3\nDimSize = 9 10 11\nElementSpacing = 3 3 4\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n"
    "ElementType = MET_SHORT\nCompressedData = {}\nElementDataFile = {}\n"
)
NRRD = (
    "NRRD0004\ntype: short\ndimension: 3\nspace: RAS\nsizes: 9 10 11\nspace directions: (3,0,0) (0,3,0) (0,0,4)\n"
    "endian: little\nspace origin: (0,0,0)\nencoding: {}\n"
)
DAMAGE = ("GZIP_CORRUPT", "SCAN_TRUNCATED")


def nifti_bytes() -> bytes:
    image = nibabel.Nifti1Image(ARRAY, AFFINE)
    image.set_sform(AFFINE, code="scanner")
    image.set_qform(AFFINE, code="scanner")
    return image.to_bytes()


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


FILES: dict[str, tuple[bytes, bytes]] = {
    "a.nii": (b"", nifti_bytes()),
    "a.nii.gz": (b"", packed(nifti_bytes())),
    "a.mha": (META.format("True", "LOCAL").encode(), zlib.compress(VOXELS)),
    "plain.mha": (META.format("False", "LOCAL").encode(), VOXELS),
    "a.mhd": (META.format("True", "a.zraw").encode(), zlib.compress(VOXELS)),
    "plain.mhd": (META.format("False", "plain.raw").encode(), VOXELS),
    "a.nrrd": (NRRD.format("gzip\n").encode(), packed(VOXELS)),
    "plain.nrrd": (NRRD.format("raw\n").encode(), VOXELS),
    "a.nhdr": (NRRD.format("gzip\ndata file: a.raw.gz").encode(), packed(VOXELS)),
}
"""Text before the data, and the data: in one file or, where the text names it, in another."""

DETACHED = {"a.mhd": "a.zraw", "plain.mhd": "plain.raw", "a.nhdr": "a.raw.gz"}
COMPRESSED = [name for name, (_, data) in FILES.items() if data not in (VOXELS, nifti_bytes())]


def put(folder: Path, name: str, data: bytes) -> Path:
    """Write a file of `FILES` with other data."""
    text = FILES[name][0]
    if name in DETACHED:
        (folder / name).write_bytes(text)
        (folder / DETACHED[name]).write_bytes(data)
    else:
        (folder / name).write_bytes(text + data)
    return folder / name


def patched(path: Path, offset: int, fmt: str, *values: float) -> Path:
    """Overwrite header fields of an uncompressed NIfTI file."""
    content = bytearray(nifti_bytes())
    struct.pack_into("<" + fmt, content, offset, *values)
    path.write_bytes(content)
    return path


def refusal(path: Path, **options: object) -> PhotonError:
    with pytest.raises(PhotonError) as caught:
        read_scan(path, **options)  # type: ignore[arg-type]
    assert str(path.parent) in caught.value.subject and caught.value.fact and caught.value.remedy
    return caught.value


def peak_bytes(work: Callable[[], object]) -> int:
    """Most memory that Python and numpy held beyond what they held before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_read(tmp_path: Path, name: str) -> None:
    scan = read_scan(put(tmp_path, name, FILES[name][1]))
    assert np.array_equal(scan.array, ARRAY) and scan.notes == () and scan.spacing_mm == (3.0, 3.0, 4.0)


@pytest.mark.parametrize("name", COMPRESSED)
def test_d1_every_flipped_bit_is_refused(tmp_path: Path, name: str) -> None:
    """Only the fields of a gzip header that say nothing of the content (time, system, name) may change unseen."""
    data = FILES[name][1]
    random = np.random.RandomState(1)
    for _ in range(200):
        position = random.randint(len(data))
        broken = bytearray(data)
        broken[position] ^= 1 << random.randint(8)
        path = put(tmp_path, name, bytes(broken))
        if data.startswith(b"\x1f\x8b") and 3 <= position < 10 and not broken[3] & 0xE0:
            try:
                assert np.array_equal(read_scan(path).array, ARRAY)
            except PhotonError as error:
                assert error.code in DAMAGE
        else:
            assert refusal(path).code in (*DAMAGE, "SCAN_UNREADABLE")


@pytest.mark.parametrize("name", [name for name in COMPRESSED if FILES[name][1].startswith(b"\x1f\x8b")])
def test_d1_flags_that_gzip_reserves_are_refused(tmp_path: Path, name: str) -> None:
    for bit in range(5, 8):
        broken = bytearray(FILES[name][1])
        broken[3] |= 1 << bit
        error = refusal(put(tmp_path, name, bytes(broken)))
        assert error.code == "GZIP_CORRUPT" and "reserved" in error.fact


def test_d7_compressed_voxels_may_begin_anywhere(tmp_path: Path) -> None:
    """Also where the buffer of the file ends between the two bytes by which gzip is known."""
    text = META.format("True", "LOCAL")
    for missing in (0, 1, 2, 3):
        fill = (1 << 16) - len(text) - missing
        lines = [f"k{n:02d} = ".ljust(1023, "x") + "\n" for n in range(fill // 1024)]
        last = "last = ".ljust(fill - 1024 * len(lines) - 1, "x") + "\n"
        header = "".join(lines) + last
        (tmp_path / "a.mha").write_bytes(
            text.replace("CompressedData", header + "CompressedData").encode() + packed(VOXELS)
        )
        assert np.array_equal(read_scan(tmp_path / "a.mha").array, ARRAY)


@pytest.mark.parametrize("name", FILES)
def test_d2_every_truncation_is_refused(tmp_path: Path, name: str) -> None:
    data = FILES[name][1]
    for length in [len(data) * percent // 100 for percent in range(100)] + [len(data) - 8, len(data) - 1]:
        assert refusal(put(tmp_path, name, data[:length])).code == "SCAN_TRUNCATED"


@pytest.mark.parametrize("name", [name for name in FILES if "." in name])
def test_d2_truncated_headers_are_refused(tmp_path: Path, name: str) -> None:
    text = FILES[name][0]
    for length in range(0, len(text) - 2, 3):
        path = tmp_path / name
        path.write_bytes(text[:length])
        assert refusal(path).code in ("SCAN_TRUNCATED", "SCAN_UNREADABLE", "FORMAT_UNSUPPORTED", "SCAN_MISSING")


@pytest.mark.parametrize("name", FILES)
def test_d3_bytes_behind_the_end_are_refused(tmp_path: Path, name: str) -> None:
    for more in (b"x", bytes(range(1, 40)), FILES[name][1]):
        assert refusal(put(tmp_path, name, FILES[name][1] + more)).code in ("SCAN_TRAILING_DATA", *DAMAGE)


@pytest.mark.parametrize("name", COMPRESSED)
def test_d3_other_bytes_behind_a_compressed_stream(tmp_path: Path, name: str) -> None:
    data = FILES[name][1]
    for more in (b"x", b"junk", b"x" * 9, b"x" * 10, b"y" * 10_000):
        error = refusal(put(tmp_path, name, data + more))
        assert error.code == "SCAN_TRAILING_DATA" and "goes on behind" in error.fact
        damaged = bytearray(data)
        damaged[-1] ^= 1  # the length (gzip) or the checksum (zlib)
        assert refusal(put(tmp_path, name, bytes(damaged) + more)).code == "GZIP_CORRUPT"


@pytest.mark.parametrize("name", [name for name in COMPRESSED if FILES[name][1].startswith(b"\x1f\x8b")])
def test_d3_zeros_may_fill_up_a_gzip_file(tmp_path: Path, name: str) -> None:
    data = FILES[name][1]
    for more in (b"\0", bytes(512), bytes(4095), bytes(100_000), bytes(20) + packed(b"") + bytes(20)):
        assert np.array_equal(read_scan(put(tmp_path, name, data + more)).array, ARRAY)
    for more in (bytes(20) + b"x", bytes(4096 * 3) + b"xy", packed(b"") + bytes(7) + b"xyz"):
        assert refusal(put(tmp_path, name, data + more)).code == "SCAN_TRAILING_DATA"
    for more in (packed(b"")[:1], packed(b"")[:2], packed(b"")[:-1], bytes(20) + packed(b"")[:12]):
        assert refusal(put(tmp_path, name, data + more)).code == "SCAN_TRUNCATED"
    for num_zeros in (4096 - len(data) % 4096, 10_000):  # blocks of nothing else
        cut, spoilt = packed(b"")[:-3], packed(b"")[:-5] + b"wrong"
        assert refusal(put(tmp_path, name, data + bytes(num_zeros) + cut)).code == "SCAN_TRUNCATED"
        assert refusal(put(tmp_path, name, data + bytes(num_zeros) + spoilt)).code == "GZIP_CORRUPT"


def test_d3_headers_that_declare_more_or_less_than_there_is(tmp_path: Path) -> None:
    for size, code in ((12, "SCAN_TRUNCATED"), (10, "SCAN_TRAILING_DATA")):
        path = patched(tmp_path / "a.nii", 40, "8h", 3, 9, 10, size, 1, 1, 1, 1)
        assert refusal(path).code == code
        (tmp_path / "a.nii.gz").write_bytes(packed(path.read_bytes()))
        assert refusal(tmp_path / "a.nii.gz").code == code


def test_d4_declared_bombs_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    header = bytearray(nifti_bytes()[:352])
    (tmp_path / "a.nii.gz").touch()
    for shape, code in (((2000, 2000, 400), "SCAN_TOO_LARGE"), ((2000, 2000, 120), "SCAN_TRUNCATED")):
        struct.pack_into("<8h", header, 40, 3, *shape, 1, 1, 1, 1)
        (tmp_path / "a.nii.gz").write_bytes(packed(bytes(header) + bytes(100_000)))
        assert peak_bytes(lambda: refusal(tmp_path / "a.nii.gz")) < 10 << 20
        assert refusal(tmp_path / "a.nii.gz").code == code


def test_d4_content_that_is_packed_too_well_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_UNPROVEN_BYTES", 1 << 20)
    header = bytearray(nifti_bytes()[:352])
    struct.pack_into("<8h", header, 40, 3, 200, 200, 200, 1, 1, 1, 1)
    (tmp_path / "a.nii.gz").write_bytes(packed(bytes(header) + bytes(16_000_000)))
    assert peak_bytes(lambda: refusal(tmp_path / "a.nii.gz")) < 10 << 20
    assert "no real scan" in refusal(tmp_path / "a.nii.gz").fact
    (tmp_path / "a.mha").write_bytes(
        META.format("True", "LOCAL").replace("9 10 11", "200 200 200").encode() + zlib.compress(bytes(16_000_000))
    )
    assert refusal(tmp_path / "a.mha").code == "SCAN_TOO_LARGE"


def test_d4_trailing_bombs_take_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(packed(nifti_bytes()) + packed(bytes(100 << 20)))
    assert peak_bytes(lambda: refusal(tmp_path / "a.nii.gz")) < 12 << 20
    assert refusal(tmp_path / "a.nii.gz").code == "SCAN_TRAILING_DATA"


@pytest.mark.parametrize(
    ("dtype", "slope", "size"),
    [("<i2", 1, 2), (">i2", 1, 2), ("<i2", 2, 4), ("<u1", 1, 2), ("<f4", 1, 4), (">f4", 3, 4)],
)
def test_d4_reading_takes_less_than_one_and_a_half_of_what_is_read(
    tmp_path: Path, dtype: str, slope: float, size: int
) -> None:
    array = np.random.RandomState(0).randint(0, 100, (160, 160, 160)).astype(dtype)
    header = nibabel.Nifti1Header(endianness=dtype[0])
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_sform(AFFINE, code=1)
    header["pixdim"][1:4], header["scl_slope"], header["vox_offset"], header["magic"] = (3, 3, 4), slope, 352, b"n+1"
    content = header.binaryblock + bytes(4) + array.tobytes(order="F")
    for name, data in (("a.nii", content), ("a.nii.gz", gzip.compress(content, 1))):
        (tmp_path / name).write_bytes(data)
        output = array.size * size
        assert peak_bytes(lambda name=name: read_scan(tmp_path / name)) < 1.5 * output + (8 << 20)
    assert np.array_equal(read_scan(tmp_path / "a.nii").array, array.astype(np.float32) * slope)


def test_d5_spacing_that_cannot_be_is_refused(tmp_path: Path) -> None:
    for value in (0.0, -3.0, float("nan"), float("inf"), 1e30, 0.001):
        path = patched(tmp_path / "a.nii", 80, "f", value)
        for trust in (None, "pixdim"):
            assert refusal(path, trust=trust).code == "SPACING_INVALID"
        scan = read_scan(path, trust="sform")
        assert scan.spacing_mm == (3.0, 3.0, 4.0) and any("sform is trusted" in note for note in scan.notes)


def test_d5_matrices_that_cannot_be_are_refused(tmp_path: Path) -> None:
    nan = float("nan")
    for matrix in (
        [0.0] * 12,
        [nan] * 12,
        [3, 0, 0, nan, 0, 3, 0, 0, 0, 0, 4, 0],
        [3, 3, 0, 0, 3, 3, 0, 0, 0, 0, 4, 0],
    ):
        path = patched(tmp_path / "a.nii", 280, "12f", *matrix)
        for trust in (None, "sform", "pixdim"):
            assert refusal(path, trust=trust).code == "AFFINE_INVALID"


def test_d5_spacing_against_matrix_is_refused_or_decided_by_the_user(tmp_path: Path) -> None:
    path = patched(tmp_path / "a.nii", 280, "12f", 5, 0, 0, -7, 0, 5, 0, -8, 0, 0, 5, -9)
    error = refusal(path)
    assert error.code == "SPACING_CONFLICT" and "--trust" in error.remedy
    assert read_scan(path, trust="sform").spacing_mm == (5.0, 5.0, 5.0)
    scan = read_scan(path, trust="pixdim")
    assert scan.spacing_mm == (3.0, 3.0, 4.0) and scan.affine[:3, 3].tolist() == [-7, -8, -9]
    assert any("pixdim is trusted" in note for note in scan.notes)
    read_scan(patched(path, 280, "f", 3.02), trust=None)  # 0.7 %: rounding of a header
    assert read_scan(put(tmp_path, "a.nii.gz", FILES["a.nii.gz"][1]), trust="pixdim").notes == ()


def test_d5_a_matrix_of_absurd_size_can_still_say_where_axes_point(tmp_path: Path) -> None:
    path = patched(tmp_path / "a.nii", 280, "12f", -1e30, 0, 0, 1, 0, 1e30, 0, 2, 0, 0, 1e30, 3)
    assert refusal(path).code == refusal(path, trust="sform").code == "SPACING_INVALID"
    assert np.allclose(np.diag(read_scan(path, trust="pixdim").affine), [-3, 3, 4, 1])


def test_d6_slopes(tmp_path: Path) -> None:
    for slope, intercept in ((np.nan, 0), (np.inf, 0), (1e30, 0), (1e-30, 0), (1, np.nan), (1, np.inf), (1e5, 0)):
        assert refusal(patched(tmp_path / "a.nii", 112, "2f", slope, intercept)).code == "SCALING_INVALID"
    scan = read_scan(patched(tmp_path / "a.nii", 112, "2f", 0, 5))
    assert np.array_equal(scan.array, ARRAY) and any("slope is 0" in note for note in scan.notes)
    assert np.array_equal(read_scan(patched(tmp_path / "a.nii", 112, "2f", -1, 0)).array, -ARRAY.astype(np.float32))
    scan = read_scan(patched(tmp_path / "a.nii", 112, "2f", 1, -1000))
    assert np.array_equal(scan.array, ARRAY - 1000) and scan.array.dtype == np.int16


def test_d6_values_that_are_none(tmp_path: Path) -> None:
    for bad in (np.nan, np.inf, -np.inf):
        array = ARRAY.astype(np.float32)
        array[8, 9, 10] = bad
        write_scan(array, AFFINE, tmp_path / "a.nii")
        error = refusal(tmp_path / "a.nii")
        assert error.code == "VOXELS_NOT_FINITE" and "1 of 990" in error.fact


def test_d6_constant_scans_are_refused_and_constant_labels_are_not(tmp_path: Path) -> None:
    write_scan(np.zeros((9, 10, 11), np.uint8), AFFINE, tmp_path / "a.nii")
    assert refusal(tmp_path / "a.nii").code == "SCAN_CONSTANT"
    scan = read_scan(tmp_path / "a.nii", is_labels=True)
    assert scan.notes == () and not scan.array.any()


def test_d6_hounsfield_units_that_no_tissue_has_are_noted_and_clipped(tmp_path: Path) -> None:
    spec = VolumeSpec(spacing_mm=3.0, shape=(14, 28, 28), window_hu=(-1000, 1000))
    array = ARRAY.astype(np.float32)
    array[0], array[1, 0, 0] = -3024, 40_000
    write_scan(array, AFFINE, tmp_path / "a.nii")
    volume = resample(read_scan(tmp_path / "a.nii"), spec, "ct")
    assert any("-3024 to 40000" in note for note in volume.metadata["notes"])
    assert -1000 <= volume.voxels.min() < volume.voxels.max() <= 1000
    assert not any("HU" in note for note in resample(read_scan(tmp_path / "a.nii"), spec, "mr").metadata["notes"])
    array[1, 0, 0] = 2e7
    write_scan(array, AFFINE, tmp_path / "a.nii")
    assert refusal(tmp_path / "a.nii").code == "SCALING_INVALID"


D7_SHAPES = {
    "4-D": ((9, 10, 11, 2), "SCAN_NOT_3D"),
    "2-D": ((90, 11), "SCAN_NOT_3D"),
    "one slice": ((90, 11, 1), "SCAN_NOT_3D"),
    "one row": ((1, 90, 11), "SCAN_NOT_3D"),
    "5-D of one frame": ((9, 10, 11, 1, 1), None),
}


@pytest.mark.parametrize("kind", D7_SHAPES)
def test_d7_shapes(tmp_path: Path, kind: str) -> None:
    shape, code = D7_SHAPES[kind]
    array = np.resize(ARRAY, shape)
    for image in (nibabel.Nifti1Image(array, AFFINE), nibabel.Nifti2Image(array, AFFINE)):
        (tmp_path / "a.nii").write_bytes(image.to_bytes())
        if code:
            assert refusal(tmp_path / "a.nii").code == code
        else:
            assert read_scan(tmp_path / "a.nii").array.shape == (9, 10, 11)


def test_d7_colours(tmp_path: Path) -> None:
    pixel = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    (tmp_path / "a.nii").write_bytes(nibabel.Nifti1Image(np.zeros((4, 5, 6), pixel), AFFINE).to_bytes())
    assert refusal(tmp_path / "a.nii").code == "SCAN_RGB"


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_d7_both_versions_both_byte_orders_and_all_types(tmp_path: Path, kind: type, order: str, dtype: str) -> None:
    array = (ARRAY % 100).astype(dtype)
    image = kind(array, AFFINE, kind.header_class(endianness=order))  # type: ignore[attr-defined]
    image.set_data_dtype(array.dtype)
    for name, pack in (("a.nii", bytes), ("a.nii.gz", packed)):
        (tmp_path / name).write_bytes(pack(image.to_bytes()))
        scan = read_scan(tmp_path / name)
        expected = nibabel.load(tmp_path / name)
        assert np.array_equal(scan.array, np.asanyarray(expected.dataobj)) and scan.array.dtype.isnative
        assert np.array_equal(scan.affine, expected.affine)


def test_d7_many_members(tmp_path: Path) -> None:
    content = nifti_bytes()
    for cuts in ([100], [352, 353, 1000], list(range(0, len(content), 50))):
        pieces = [content[start:end] for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True)]
        (tmp_path / "a.nii.gz").write_bytes(b"".join(packed(piece) for piece in pieces))
        assert np.array_equal(read_scan(tmp_path / "a.nii.gz").array, ARRAY)
    last = bytearray(b"".join(packed(piece) for piece in pieces))
    last[-5] ^= 1  # the last member's checksum
    (tmp_path / "a.nii.gz").write_bytes(last)
    assert refusal(tmp_path / "a.nii.gz").code == "GZIP_CORRUPT"


def test_d7_names_that_lie_about_compression(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(nifti_bytes())
    (tmp_path / "b.nii").write_bytes(packed(nifti_bytes()))
    for name in ("a.nii.gz", "b.nii"):
        scan = read_scan(tmp_path / name)
        assert np.array_equal(scan.array, ARRAY) and any("other than its name says" in note for note in scan.notes)


def test_d10_one_bad_scan_of_a_thousand_costs_one(tmp_path: Path) -> None:
    content = nifti_bytes()
    for number in range(1000):
        (tmp_path / f"{number:04d}.nii").write_bytes(content[:-1] if number == 500 else content)
    codes = []
    for source in find_scans(tmp_path):
        try:
            read_source(source)
            codes.append("")
        except PhotonError as error:
            codes.append(error.code)
    assert len(codes) == 1000 and codes[500] == "SCAN_TRUNCATED" and set(codes) == {"", "SCAN_TRUNCATED"}
    assert codes.count("") == 999
