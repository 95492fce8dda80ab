"""Masks that do not say what they seem to: of a part of the scan, beside their images, behind links."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines.files import lock_output
from pipelines.mask_questions.names import read_description
from pipelines.mask_questions.stage import make_questions
from pipelines.questions import Question, read_questions, write_questions
from pipelines.scans.nifti import write_scan
from pipelines.scans.scan import read_scan

LPS_2MM = np.diag([-2.0, -2.0, 2.0, 1.0])
SHAPE = (40, 40, 60)
NAMES = {"1": "liver", "2": "spleen", "3": "liver tumor", "4": "vertebrae_T8"}

WritePair = Callable[..., None]
WriteNames = Callable[[Any], Path]


@pytest.fixture
def values() -> np.ndarray:
    """CT values: a body in air."""
    array = np.full(SHAPE, -1000, np.int16)
    array[5:35, 5:35] = 40
    return array


@pytest.fixture
def labels() -> np.ndarray:
    """A liver with a tumour in the lower third of the scan, and a vertebra; no spleen."""
    array = np.zeros(SHAPE, np.uint8)
    array[8:18, 8:18, 5:15] = 1
    array[11:15, 11:15, 8:12] = 3
    array[18:22, 26:32, 3:18] = 4
    return array


def asked(tmp_path: Path, names: Path) -> dict[tuple[str, str], Question]:
    """Questions by subtype and structure."""
    make_questions(tmp_path / "images", tmp_path / "masks", names, tmp_path / "data")
    return {(q.subtype, q.organ): q for q in read_questions(tmp_path / "data" / "questions.jsonl")}


def test_a_mask_of_a_part_of_the_scan_says_no_to_nothing(
    tmp_path: Path, write_pair: WritePair, write_names: WriteNames, values: np.ndarray, labels: np.ndarray
) -> None:
    names = write_names(NAMES)
    write_pair("s", values, labels)
    whole = asked(tmp_path, names)
    assert whole["existence", "spleen"].answer == "no" and whole["count", "liver tumor"].value == 1
    write_pair("s", values, labels[:, :, :20])
    part = asked(tmp_path, names)
    assert ("existence", "spleen") not in part
    assert {key for key in whole if key[1] == "liver"} == {key for key in part if key[1] == "liver"}
    assert part["volume", "liver"] == whole["volume", "liver"]
    assert {subtype for subtype, organ in part if organ == "liver tumor"} == {"existence"}
    assert "leaves out a part of the scan" in (tmp_path / "data" / "raw" / "scans.csv").read_text()


def test_a_mask_that_is_larger_or_a_voxel_short_is_of_the_whole_scan(
    tmp_path: Path, write_pair: WritePair, write_names: WriteNames, values: np.ndarray, labels: np.ndarray
) -> None:
    for mask, z in ((np.pad(labels, ((0, 0), (0, 0), (3, 3))), -6.0), (labels[:, :, 1:-1], 2.0)):
        moved = LPS_2MM.copy()
        moved[2, 3] = z
        write_pair("s", values, mask, mask_affine=moved)
        assert asked(tmp_path, write_names(NAMES))["existence", "spleen"].answer == "no"


def test_a_side_in_a_name_is_no_side_of_the_body_where_halves_cross_the_middle(
    tmp_path: Path, write_pair: WritePair, write_names: WriteNames, values: np.ndarray, labels: np.ndarray
) -> None:
    labels[labels == 1] = 0
    labels[24:34, 8:18, 5:15] = 1  # array x runs to the left: left of the vertebra
    labels[11:15, 11:15, 8:12] = 0
    labels[27:31, 11:15, 8:12] = 3
    write_pair("s", values, labels)
    found = asked(tmp_path, write_names(NAMES | {"1": "heart_ventricle_right", "3": "lesion"}))
    assert found["containing structure", "lesion"].answer == "right heart ventricle"
    assert found["side", "lesion"].answer == "left"


def test_links_to_scans_are_followed(
    tmp_path: Path, write_pair: WritePair, write_names: WriteNames, values: np.ndarray, labels: np.ndarray
) -> None:
    write_pair("s", values, labels)
    (tmp_path / "store").mkdir()
    (tmp_path / "images" / "s.nii").rename(tmp_path / "store" / "x.nii")
    (tmp_path / "images" / "s.nii").symlink_to("../store/x.nii")
    asked(tmp_path, write_names(NAMES))
    assert np.array_equal(read_scan(tmp_path / "data" / "raw" / "images" / "s.nii").array, values)


def test_masks_beside_their_images_are_no_images(
    tmp_path: Path, write_names: WriteNames, values: np.ndarray, labels: np.ndarray
) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    write_scan(values, LPS_2MM, folder / "s.nii")
    write_scan(labels, LPS_2MM, folder / "s_seg.nii")
    names = write_names({"structures": NAMES, "image": "{scan}", "mask": "{scan}_seg"})
    record = make_questions(folder, folder, names, tmp_path / "data")
    assert (record.num_scans, record.num_refused) == (1, 0)


def test_questions_about_other_scans_are_not_written_over(
    tmp_path: Path, write_pair: WritePair, write_names: WriteNames, values: np.ndarray, labels: np.ndarray
) -> None:
    names = write_names(NAMES)
    write_pair("s", values, labels)
    first = asked(tmp_path, names)
    assert asked(tmp_path, names) == first
    path = tmp_path / "data" / "questions.jsonl"
    other = Question.from_dict(next(iter(first.values())).as_dict() | {"question_id": "other", "scan_id": "imported"})
    write_questions([other], path)
    with pytest.raises(PhotonError, match="imported") as caught:
        asked(tmp_path, names)
    assert caught.value.code == "DATA_FOREIGN" and read_questions(path) == [other]


def test_two_runs_do_not_fill_one_folder(
    tmp_path: Path, write_pair: WritePair, write_names: WriteNames, values: np.ndarray, labels: np.ndarray
) -> None:
    write_pair("s", values, labels)
    (tmp_path / "data").mkdir()
    with lock_output(tmp_path / "data"), pytest.raises(PhotonError) as caught:
        asked(tmp_path, write_names(NAMES))
    assert caught.value.code == "OUTPUT_BUSY"


@pytest.mark.parametrize(
    "content", [{"1": "Liver", "2": "liver"}, {"structures": {"1": "liver"}, "modality": {"a": ["ct"]}}]
)
def test_names_that_cannot_be_told_apart_or_used_are_refused(tmp_path: Path, content: Any) -> None:
    (tmp_path / "names.json").write_text(json.dumps(content))
    with pytest.raises(PhotonError) as caught:
        read_description(tmp_path / "names.json")
    assert caught.value.code == "NAMES_INVALID"
