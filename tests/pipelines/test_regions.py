"""Tokens and organs: order, edges and counts on maps small enough to check by hand."""

from __future__ import annotations

import numpy as np
import pytest

from photon.config import VisionConfig
from photon.errors import PhotonError
from photon.grid import token_boxes
from pipelines import regions

SHAPE = (28, 84, 56)  # 2 x 3 x 2 tokens
VISION = VisionConfig(depth=1, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=8)


def test_a_voxel_marks_the_token_whose_box_holds_it() -> None:
    for voxel, token in {
        (0, 0, 0): 0,
        (13, 27, 28): 1,
        (0, 28, 0): 2,
        (14, 0, 0): 6,
        (27, 83, 55): 11,
    }.items():
        organ = np.zeros(SHAPE, dtype=bool)
        organ[voxel] = True
        assert np.flatnonzero(regions.organ_tokens(organ)).tolist() == [token]


def test_the_order_is_that_of_the_token_boxes() -> None:
    boxes = token_boxes((2, 6, 4), VISION).numpy()
    for token, ((z0, z1), (y0, y1), (x0, x1)) in enumerate(boxes):
        organ = np.zeros(SHAPE, dtype=bool)
        organ[z0:z1, y0:y1, x0:x1] = True
        found = regions.organ_tokens(organ, min_voxels=14 * 28 * 28)
        assert np.flatnonzero(found).tolist() == [token]
        assert np.array_equal(regions.voxel_mask(found, SHAPE), organ)


def test_few_voxels_can_be_ignored() -> None:
    organ = np.zeros(SHAPE, dtype=bool)
    organ[0, 0, :5] = True
    organ[20, 40, 40] = True
    assert regions.organ_tokens(organ).sum() == 2
    assert regions.organ_tokens(organ, min_voxels=5).sum() == 1
    assert regions.organ_tokens(np.zeros(SHAPE, dtype=bool)).sum() == 0


@pytest.mark.parametrize("shape", [(15, 28, 28), (14, 28), (14, 0, 28), (14, 14, 28)])
def test_a_map_that_is_no_whole_number_of_boxes_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PhotonError) as caught:
        regions.organ_tokens(np.zeros(shape, dtype=bool))
    assert caught.value.code == "GRID_INVALID"


def test_retention_shares() -> None:
    in_organ = np.zeros(12, dtype=bool)
    in_organ[[1, 2, 3, 4]] = True
    counts = regions.retention((1, 2, 3, 10), 12, in_organ)
    assert counts == regions.Retention(num_tokens=12, num_kept=4, organ_tokens=4, organ_tokens_kept=3)
    assert counts.organ_share == 0.75
    assert counts.overall_share == pytest.approx(1 / 3)


def test_retention_without_organ_tokens_or_volume_has_no_share() -> None:
    counts = regions.retention((0,), 12, None)
    assert counts.organ_share is None
    assert counts.overall_share == pytest.approx(1 / 12)
    assert regions.retention((), 0, None).overall_share is None


def test_indices_and_masks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        regions.retention((12,), 12, None)
    with pytest.raises(ValueError, match="do not fit"):
        regions.kept_mask((-1,), 12)
    with pytest.raises(ValueError, match="organ mask"):
        regions.retention((0,), 12, np.zeros(4, dtype=bool))
