"""Masks on the voxels of their scan: same grid, another grid, another place, edges."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines.mask_questions.names import Description, Structure
from pipelines.mask_questions.outlines import Outline, share_within
from pipelines.mask_questions.segmentation import Segmentation, combine, label_values, sample_nearest
from pipelines.scans.scan import Scan, make_scan

LPS_2MM = np.diag([-2.0, -2.0, 2.0, 1.0])


def scan_of(array: np.ndarray, affine: np.ndarray = LPS_2MM) -> Scan:
    return make_scan(array, affine, path=Path("scan.nii"), sha256="")


def described(*names: str, is_label_map: bool = True) -> Description:
    return Description(
        structures=tuple(
            Structure(key=str(value) if is_label_map else name, name=name, kind="organ")
            for value, name in enumerate(names, start=1)
        ),
        is_label_map=is_label_map,
        image="{scan}",
        mask="{scan}",
        modality={},
        pet_unit="",
    )


def combined(
    labels: np.ndarray, affine: np.ndarray = LPS_2MM, mask_affine: np.ndarray | None = None, is_ct: bool = False
) -> Segmentation:
    values = np.zeros((20, 20, 20), np.int16)
    mask = scan_of(labels, affine if mask_affine is None else mask_affine)
    return combine(scan_of(values, affine), [("", mask)], described("one", "two"), is_ct=is_ct)


def rotated(degrees: float, spacing_mm: tuple[float, float, float]) -> np.ndarray:
    angle = math.radians(degrees)
    affine = np.eye(4)
    turn = np.array([[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]])
    affine[:3, :3] = turn @ np.diag([-1.0, -1.0, 1.0]) @ np.diag(spacing_mm)
    affine[:3, 3] = (12.0, -7.0, 30.0)
    return affine


def test_same_grid_is_taken_as_it_is() -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[2:6, 3:9, 4:7] = 1
    found = combined(labels)
    one, two = (Outline(region, found) for region in found.regions)
    assert one.num_voxels == 4 * 6 * 3 and one.volume_cm3 == pytest.approx(72 * 0.008)
    assert not one.is_cut and two.num_voxels == 0 and two.volume_cm3 == 0.0
    assert np.array_equal(found.labels, labels)
    assert [(part.start, part.stop) for part in one.box] == [(4, 7), (3, 9), (2, 6)]  # Z, Y, X
    middle = np.array([3.5, 5.5, 5.0])
    assert one.main.centre_mm == pytest.approx(LPS_2MM[:3, :3] @ middle)


def test_values_without_a_name_are_told_and_left_out() -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5, 5, 5], labels[7, 7, 7] = 2, 9
    found = combined(labels)
    assert found.notes == ("values without a name, left out: 9",)
    assert found.labels.max() == 2


@pytest.mark.parametrize("axes", ["flipped", "permuted", "finer", "cropped", "oblique"])
def test_mask_on_another_grid_falls_on_the_same_place(axes: str) -> None:
    affine = rotated(17.0, (2.0, 2.0, 2.0)) if axes == "oblique" else LPS_2MM
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[4:12, 6:9, 5:16] = 1
    labels[14:17, 14:17, 5:9] = 2
    other, matrix = labels, np.eye(4)  # index in the mask to index in the scan
    if axes == "flipped" or axes == "oblique":
        other, matrix = labels[:, ::-1], np.diag([1.0, -1.0, 1.0, 1.0])
        matrix[1, 3] = 19
    elif axes == "permuted":
        other, matrix = labels.transpose(2, 0, 1), np.eye(4)[[1, 2, 0, 3]]
    elif axes == "finer":
        other = labels.repeat(2, 0).repeat(2, 1).repeat(2, 2)
        matrix = np.diag([0.5, 0.5, 0.5, 1.0])
        matrix[:3, 3] = -0.25
    elif axes == "cropped":
        other, matrix = labels[2:18, 4:19, 3:18], np.eye(4)
        matrix[:3, 3] = (2, 4, 3)
    found = combined(np.ascontiguousarray(other), affine, affine @ matrix)
    assert np.array_equal(found.labels, labels)
    assert [region.is_cut for region in found.regions] == [False, False]


def test_nearest_voxel_is_taken_when_grids_are_turned_against_each_other() -> None:
    fine, coarse = rotated(0.0, (1.0, 1.0, 1.0)), rotated(30.0, (2.0, 2.5, 3.0))
    index = np.stack(np.meshgrid(*[np.arange(60)] * 3, indexing="ij"), axis=-1)
    centre = fine @ [30, 30, 30, 1]
    ball = (((index @ fine[:3, :3].T + fine[:3, 3]) - centre[:3]) ** 2).sum(axis=-1) <= 15.0**2
    start = coarse.copy()
    start[:3, 3] = centre[:3] - coarse[:3, :3] @ [12, 12, 12]
    scan = scan_of(np.zeros((25, 25, 25), np.int16), start)
    found = combine(scan, [("", scan_of(ball.astype(np.uint8), fine))], described("ball"), is_ct=False)
    outline = Outline(found.regions[0], found)
    assert outline.volume_cm3 == pytest.approx(4 / 3 * math.pi * 15.0**3 / 1000, rel=0.02)
    assert outline.main.centre_mm == pytest.approx(centre[:3], abs=0.3)
    assert 30.0 - 1.0 <= outline.main.diameter_mm <= 30.0 + math.hypot(2.0, 2.5, 3.0)


def test_sheared_voxels_have_the_volume_of_their_determinant() -> None:
    affine = LPS_2MM.copy()
    affine[1, 2] = 0.8  # gantry tilt
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:10, 5:10, 5:10] = 1
    found = combined(labels, affine)
    assert Outline(found.regions[0], found).volume_cm3 == pytest.approx(125 * 0.008)


def test_sampling_outside_is_nothing() -> None:
    labels = np.ones((3, 3, 3), np.uint8)
    moved = np.eye(4)
    moved[0, 3] = -2.0
    out = sample_nearest(labels, moved, (6, 3, 3))
    assert out[:, 1, 1].tolist() == [0, 0, 1, 1, 1, 0]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("is_last", [False, True])
def test_structure_at_an_edge_of_the_scan_is_cut(axis: int, is_last: bool) -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    place = [slice(8, 12)] * 3
    place[axis] = slice(17, 20) if is_last else slice(0, 3)
    labels[tuple(place)] = 1
    labels[2:4, 2:4, 2:4] = 2 * (labels[2:4, 2:4, 2:4] == 0)
    assert [region.is_cut for region in combined(labels).regions] == [True, False]


def test_structure_at_the_edge_of_a_smaller_mask_is_cut() -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[4:12, 6:9, 5:16] = 1
    labels[14:17, 14:17, 5:9] = 2
    matrix = np.eye(4)
    matrix[:3, 3] = (4, 4, 3)
    found = combined(np.ascontiguousarray(labels[4:18, 4:19, 3:18]), LPS_2MM, LPS_2MM @ matrix)
    assert [region.is_cut for region in found.regions] == [True, False]


def test_structure_that_goes_on_outside_the_scan_is_cut() -> None:
    labels = np.zeros((40, 20, 20), np.uint8)
    labels[4:8, 5:8, 5:8] = labels[30:34, 5:8, 5:8] = 1  # the second piece lies outside the scan
    labels[10:14, 10:14, 10:14] = 2
    assert [region.is_cut for region in combined(labels).regions] == [True, False]


def test_structure_beside_filling_is_cut_in_ct() -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:10, 5:10, 5:10] = 1
    labels[13:16, 13:16, 13:16] = 2
    values = np.zeros((20, 20, 20), np.int16)
    values[:5] = -3024
    mask = [("", scan_of(labels))]
    cut = [r.is_cut for r in combine(scan_of(values), mask, described("one", "two"), is_ct=True).regions]
    assert cut == [True, False]
    cut = [r.is_cut for r in combine(scan_of(values), mask, described("one", "two"), is_ct=False).regions]
    assert cut == [False, False]


def test_mask_elsewhere_is_refused() -> None:
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[5:10, 5:10, 5:10] = 1
    far = LPS_2MM.copy()
    far[0, 3] = 500.0
    with pytest.raises(PhotonError) as caught:
        combined(labels, LPS_2MM, far)
    assert caught.value.code == "MASK_OUTSIDE_SCAN" and "100 %" in caught.value.fact


def test_mask_of_fractions_is_refused() -> None:
    labels = np.zeros((20, 20, 20), np.float32)
    labels[5, 5, 5] = 0.5
    with pytest.raises(PhotonError) as caught:
        combined(labels)
    assert caught.value.code == "LABELS_INVALID"


def test_masks_of_their_own_may_overlap() -> None:
    whole, part = np.zeros((20, 20, 20), np.uint8), np.zeros((20, 20, 20), np.uint8)
    whole[3:13, 3:13, 3:13] = 255
    part[5:8, 5:8, 5:8] = 1
    description = described("liver", "cyst", "spleen", is_label_map=False)
    masks = [("liver", scan_of(whole)), ("cyst", scan_of(part))]
    found = combine(scan_of(np.zeros((20, 20, 20), np.int16)), masks, description, is_ct=False)
    liver, cyst = (Outline(region, found) for region in found.regions)
    assert [liver.name, cyst.name] == ["liver", "cyst"]  # nobody looked for a spleen
    assert (liver.num_voxels, cyst.num_voxels) == (1000, 27)
    assert share_within(cyst.main.points, liver) == 1.0
    assert share_within(liver.main.points, cyst) == pytest.approx(0.027)
    assert label_values(description) == {"liver": 1, "cyst": 2, "spleen": 3}
    assert np.bincount(found.labels.ravel()).tolist() == [8000 - 1000, 1000 - 27, 27]
