"""Reading scans, putting them on a grid, and volumes on disk."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines.resample import frame_of
from pipelines.scans.nifti import sample_scans, write_scan
from pipelines.scans.scan import Scan, read_scan
from pipelines.volumes import VOLUME_SPECS, VolumeSpec, normalise, read_volume, resample, resample_labels, write_volume

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


def test_a_blank_image_is_refused_in_words_that_help(tmp_path: Path) -> None:
    array = np.zeros((20, 20, 20), np.int16)
    write_scan(array, np.diag([3, 3, 3, 1]), tmp_path / "empty.nii")
    array[9, 9, 5:15] = 2  # as in the label map of a small lesion
    write_scan(array, np.diag([3, 3, 3, 1]), tmp_path / "specks.nii")
    with pytest.raises(PhotonError, match="SCAN_CONSTANT") as empty:
        read_scan(tmp_path / "empty.nii")
    with pytest.raises(PhotonError, match="SCAN_CONSTANT") as specks:
        resample(read_scan(tmp_path / "specks.nii"), SPEC)
    assert empty.value.fact == "all its voxels have the value 0: the image is blank."
    assert specks.value.fact == "99 % or more of its voxels have the value 0: the image is all but blank."
    for error in (empty.value, specks.value):
        assert "export it again" in error.remedy and "`photon questions --masks`" in error.remedy


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
    with pytest.raises(PhotonError, match="SCAN_NOT_3D"):
        read_scan(found["example4d.nii.gz"])


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
