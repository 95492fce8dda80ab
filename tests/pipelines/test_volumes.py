"""Reading scans, putting them on a grid, and volumes on disk."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines.resample import frame_of
from pipelines.volumes import (
    VOLUME_SPECS,
    Scan,
    VolumeSpec,
    normalise,
    read_scan,
    read_volume,
    resample,
    resample_labels,
    sample_scans,
    write_scan,
    write_volume,
)

SPEC = VolumeSpec(spacing_mm=3.0, shape=(28, 56, 56), window_hu=(-1000, 1000))
TO_RAS = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}


def axes_affine(orientation: str, spacing: tuple[float, ...], origin: tuple[float, ...]) -> np.ndarray:
    """Matrix of a scan whose array axes point to the letters of ``orientation``."""
    affine = np.eye(4)
    for column, letter in enumerate(orientation):
        world, sign = TO_RAS[letter]
        affine[:3, column] = 0
        affine[world, column] = sign * spacing[column]
    affine[:3, 3] = origin
    return affine


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


def refusal(path: Path, **options: int) -> PhotonError:
    with pytest.raises(PhotonError) as caught:
        read_scan(path, **options)
    assert caught.value.fact and caught.value.remedy
    return caught.value


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "LAS", "SRP", "ASL"])
def test_a_known_point_keeps_its_millimetres(tmp_path: Path, orientation: str) -> None:
    shape, spacing = (23, 25, 27), (3.0, 3.0, 3.0)
    array = np.full(shape, -1000, np.int16)
    array[5, 9, 20] = 900
    affine = axes_affine(orientation, spacing, (17.0, -40.0, 8.0))
    point_mm = affine @ [5, 9, 20, 1]
    centre_mm = affine @ [*((n - 1) / 2 for n in shape), 1]
    write_scan(array, affine, tmp_path / "a.nii")

    volume = resample(read_scan(tmp_path / "a.nii"), SPEC)

    z, y, x = np.unravel_index(int(volume.voxels.argmax()), volume.voxels.shape)
    assert np.abs(volume.affine @ [x, y, z, 1] - point_mm).max() <= 1.5 + 1e-6
    # Z towards the head, Y towards the back, X towards the left, half a voxel of rounding at most.
    right, front, up = (point_mm - centre_mm)[:3]
    assert abs((z - 13.5) * 3 - up) <= 1.5
    assert abs((y - 27.5) * 3 + front) <= 1.5
    assert abs((x - 27.5) * 3 + right) <= 1.5


def test_a_ramp_keeps_its_values() -> None:
    # 200 voxels of 1.7 mm, value = 10 x millimetres from the centre towards the left.
    position_mm = (np.arange(200) - 99.5) * 1.7
    array = np.broadcast_to((10 * position_mm).astype(np.float32)[:, None, None], (200, 60, 30)).copy()
    affine = axes_affine("LPS", (1.7, 3.0, 3.0), (0, 0, 0))
    scan = Scan(
        array=array,
        affine=affine,
        path=Path("ramp"),
        sha256="",
        spacing_mm=(1.7, 3.0, 3.0),
        orientation="LPS",
        notes=(),
    )
    row = resample(scan, SPEC, "ct").voxels[14, 28]
    expected = (np.arange(56) - 27.5) * 3 * 10
    assert np.abs(row - expected.clip(-1000, 1000)).max() <= 0.5


def test_a_tilted_scan_lies_along_the_patient(tmp_path: Path) -> None:
    angle = np.deg2rad(20)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = turn * 3
    array = np.full((31, 31, 31), -1000, np.int16)
    array[24:27, 14:17, 14:17] = 800  # 30 mm from the centre along the tilted first axis
    write_scan(array, affine, tmp_path / "a.nii")
    volume = resample(read_scan(tmp_path / "a.nii"), SPEC)
    weight = np.clip(volume.voxels.astype(float) + 900, 0, None)
    z, y, x = (np.indices(SPEC.shape) * weight).sum(axis=(1, 2, 3)) / weight.sum()
    assert abs((x - 27.5) * 3 + 30 * np.cos(angle)) < 1
    assert abs((y - 27.5) * 3 + 30 * np.sin(angle)) < 1
    assert abs(z - 13.5) < 0.3
    assert any("tilted 20.0 degrees" in note for note in volume.metadata["notes"])
    labels = np.where(array > 0, 7, 0).astype(np.uint8)
    write_scan(labels, affine, tmp_path / "labels.nii")
    assert (resample_labels(tmp_path / "labels.nii", SPEC) == 7)[13:15, 23:25, 17:19].any()


def test_axis_order_does_not_change_the_volume(tmp_path: Path) -> None:
    array = np.random.RandomState(1).randint(-900, 900, (20, 30, 14)).astype(np.int16)
    voxels = []
    for orientation, moved in (
        ("LPS", array),
        ("RAS", array[::-1, ::-1]),
        ("SPL", array.transpose(2, 1, 0)),
        ("PIR", array.transpose(1, 2, 0)[:, ::-1, ::-1]),
    ):
        spacing = {"L": 3.5, "R": 3.5, "P": 4.0, "A": 4.0, "S": 5.0, "I": 5.0}
        affine = axes_affine(orientation, tuple(spacing[letter] for letter in orientation), (0, 0, 0))
        write_scan(np.ascontiguousarray(moved), affine, tmp_path / "a.nii")
        voxels.append(resample(read_scan(tmp_path / "a.nii"), SPEC, "ct").voxels)
    assert all(np.array_equal(voxels[0], other) for other in voxels[1:])


def test_outside_is_padded_and_the_window_clips(tmp_path: Path) -> None:
    write_scan(
        np.full((8, 8, 8), 2000, np.int16) - np.eye(8, dtype=np.int16), np.diag([3, 3, 3, 1]), tmp_path / "a.nii"
    )
    volume = resample(read_scan(tmp_path / "a.nii"), VOLUME_SPECS["demo"], "ct")
    assert volume.voxels[0, 0, 0] == -200  # air, clipped to the window
    assert volume.voxels[42, 56, 56] == 300
    inside = (volume.voxels == 300).nonzero()
    assert [int(np.ptp(axis)) + 1 for axis in inside] == [8, 8, 8]
    values = normalise(volume.voxels, (-200, 300))
    assert values.dtype == np.float32 and values.min() == 0 and values.max() == 1


def test_a_stretched_grid_holds_the_whole_field_of_view(tmp_path: Path) -> None:
    spec = VolumeSpec(spacing_mm=None, shape=(28, 56, 56), window_hu=(-1000, 1000))
    write_small(tmp_path / "a.nii")
    volume = resample(read_scan(tmp_path / "a.nii"), spec, "ct")
    assert volume.voxels.min() > -1000  # nothing padded
    assert np.allclose(np.abs(np.diag(volume.affine))[:3], [9 * 3 / 56, 10 * 3 / 56, 11 * 4 / 28])


def test_mr_is_mapped_by_percentiles_and_ct_is_recognised(tmp_path: Path) -> None:
    array = np.random.RandomState(0).randint(0, 4000, (20, 20, 20)).astype(np.int16)
    write_scan(array, np.diag([3, 3, 3, 1]), tmp_path / "mr.nii")
    scan = read_scan(tmp_path / "mr.nii")
    volume = resample(scan, SPEC)
    assert (volume.metadata["modality"], volume.metadata["modality_source"]) == ("mr", "inferred")
    middle = volume.voxels[10:18, 20:36, 20:36]
    assert middle.min() < -800 and middle.max() > 800 and abs(float(middle.mean())) < 60
    assert resample(scan, SPEC, "ct").metadata["modality_source"] == "declared"
    write_small(tmp_path / "ct.nii")
    assert resample(read_scan(tmp_path / "ct.nii"), SPEC).metadata["modality"] == "ct"
    with pytest.raises(PhotonError, match="MODALITY_UNKNOWN"):
        resample(scan, SPEC, "pet")


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


def test_every_flipped_bit_in_a_gzip_is_refused_or_harmless(tmp_path: Path) -> None:
    array = write_small(tmp_path / "a.nii")
    packed = gzip.compress((tmp_path / "a.nii").read_bytes(), mtime=0)
    random = np.random.RandomState(0)
    num_refused = 0
    for _ in range(200):
        broken = bytearray(packed)
        broken[random.randint(len(packed))] ^= 1 << random.randint(8)
        (tmp_path / "b.nii.gz").write_bytes(broken)
        try:
            # Only gzip's own time and name fields may change unseen.
            assert np.array_equal(read_scan(tmp_path / "b.nii.gz").array, array)
        except PhotonError as error:
            assert error.code in ("GZIP_CORRUPT", "SCAN_TRUNCATED")
            num_refused += 1
    assert num_refused > 190


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_small(tmp_path / "a.nii")
    plain = (tmp_path / "a.nii").read_bytes()
    packed = gzip.compress(plain, mtime=0)
    for percent in range(0, 100, 3):
        for name, content in (("b.nii", plain), ("b.nii.gz", packed)):
            (tmp_path / name).write_bytes(content[: len(content) * percent // 100])
            assert refusal(tmp_path / name).code == "SCAN_TRUNCATED"
    (tmp_path / "b.nii.gz").write_bytes(packed[:-8])  # only the checksum is missing
    assert refusal(tmp_path / "b.nii.gz").code == "SCAN_TRUNCATED"


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
    "spacing against matrix": ((80, "f", 3.1), "AFFINE_INVALID"),
    "NaN matrix": ((280, "f", float("nan")), "AFFINE_INVALID"),
    "zero matrix": ((280, "12f", *[0.0] * 12), "AFFINE_INVALID"),
    "flat matrix": ((280, "12f", 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0), "AFFINE_INVALID"),
    "voxels in the header": ((108, "f", 0.0), "SCAN_UNREADABLE"),
    "voxels far away": ((108, "f", 1e9), "SCAN_UNREADABLE"),
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
    assert refusal(tmp_path).code == "FORMAT_UNSUPPORTED"


def test_volume_round_trip_is_exact_and_deterministic(tmp_path: Path) -> None:
    write_small(tmp_path / "a.nii")
    volume = resample(read_scan(tmp_path / "a.nii"), SPEC)
    for name in ("1", "2"):
        write_volume(volume, tmp_path / name)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    back = read_volume(tmp_path / "1", SPEC)
    assert np.array_equal(back.voxels, volume.voxels) and np.array_equal(back.affine, volume.affine)
    assert back.metadata == volume.metadata and back.spec == SPEC


def test_damaged_volumes_are_refused(tmp_path: Path) -> None:
    write_small(tmp_path / "a.nii")
    path = tmp_path / "a.safetensors"
    write_volume(resample(read_scan(tmp_path / "a.nii"), SPEC), path)
    with pytest.raises(PhotonError, match="VOLUME_SPEC_MISMATCH"):
        read_volume(path, VOLUME_SPECS["demo"])
    content = bytearray(path.read_bytes())
    for damaged in (content[:-1], content[:3], b"", content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]):
        path.write_bytes(damaged)
        with pytest.raises(PhotonError, match="VOLUME_CORRUPT"):
            read_volume(path)
    with pytest.raises(PhotonError, match="VOLUME_MISSING"):
        read_volume(tmp_path / "none.safetensors")


def test_spec_digest_names_the_content() -> None:
    for spec in VOLUME_SPECS.values():
        assert VolumeSpec.from_dict(spec.as_dict()) == spec
        assert len(spec.digest()) == 12
    assert len({spec.digest() for spec in VOLUME_SPECS.values()}) == len(VOLUME_SPECS)
    with pytest.raises(PhotonError, match="SPEC_INVALID"):
        VolumeSpec(spacing_mm=1.0, shape=(14, 28, 30), window_hu=(0, 1))
    with pytest.raises(PhotonError, match="SPEC_INVALID"):
        VolumeSpec(spacing_mm=0.0, shape=(14, 28, 28), window_hu=(0, 1))


def test_labels_are_read_on_the_grid_of_the_scan(tmp_path: Path) -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[12, 5, 7] = 200
    write_scan(labels, axes_affine("RAS", (3, 3, 3), (0, 0, 0)), tmp_path / "a.nii")
    found = resample_labels(tmp_path / "a.nii", SPEC)
    assert found.dtype == np.uint8 and sorted(np.unique(found)) == [0, 200]
    frame = frame_of(labels.shape, axes_affine("RAS", (3, 3, 3), (0, 0, 0)))
    assert np.argwhere(found == 200).tolist() == [
        [index + offset for index, offset in zip(np.argwhere(frame.canonical(labels))[0], (4, 18, 18), strict=True)]
    ]
    write_scan(labels.astype(np.int16) - 1, np.diag([3, 3, 3, 1]), tmp_path / "b.nii")
    with pytest.raises(PhotonError, match="LABELS_INVALID"):
        resample_labels(tmp_path / "b.nii", SPEC)


def test_real_scans_of_the_nibabel_package() -> None:
    found = {path.name: path for path in sample_scans()}
    volume = resample(read_scan(found["anatomical.nii"]), VOLUME_SPECS["demo"])
    assert volume.metadata["orientation"] == "LAS" and volume.metadata["modality"] == "mr"
    assert np.ptp(volume.voxels) > 400
    assert refusal(found["example4d.nii.gz"]).code == "SCAN_NOT_3D"


@pytest.mark.skipif("PHOTON_REAL_SCANS" not in os.environ, reason="PHOTON_REAL_SCANS names no folder of scans")
def test_real_scans_of_the_user() -> None:
    paths = [path for path in Path(os.environ["PHOTON_REAL_SCANS"]).rglob("*.nii*") if path.is_file()]
    num_read = 0
    for path in paths:
        try:
            scan = read_scan(path)
        except PhotonError:
            continue
        num_read += 1
        volume = resample(scan, VOLUME_SPECS["demo"])
        middle = volume.voxels[32:52, 46:66, 46:66]
        assert -200 <= volume.voxels.min() < volume.voxels.max() <= 300, path
        assert middle.size and volume.metadata["modality"] in ("ct", "mr")
    assert num_read > len(paths) / 2
