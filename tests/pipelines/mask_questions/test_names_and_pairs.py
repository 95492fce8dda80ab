"""The names file, and which masks it gives to which image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from photon.errors import PhotonError
from pipelines.mask_questions.names import Description, plain_name, read_description
from pipelines.mask_questions.pairs import find_pairs

WriteNames = Callable[[Any], Path]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("kidney_left", "left kidney"),
        ("lung_upper_lobe_right", "right lung upper lobe"),
        ("rib_left_5", "left rib 5"),
        ("vertebrae_L5", "vertebra L5"),
        ("vertebrae", "vertebrae"),
        ("Kidney-Cyst_LEFT", "left Kidney Cyst"),
        ("liver", "liver"),
    ],
)
def test_names_are_words_with_the_side_first(label: str, words: str) -> None:
    assert plain_name(label) == words


def test_names_alone_are_a_label_map(write_names: WriteNames) -> None:
    found = read_description(write_names({"1": "liver", "02": "liver_tumor", "3": {"name": "x", "kind": "lesion"}}))
    assert found.is_label_map and (found.image, found.mask) == ("{scan}", "{scan}")
    assert [(s.key, s.name, s.kind) for s in found.structures] == [
        ("1", "liver", "organ"),
        ("2", "liver tumor", "lesion"),
        ("3", "x", "lesion"),
    ]


def test_names_may_be_the_keys_as_in_our_own_data(write_names: WriteNames) -> None:
    found = read_description(write_names({"left lung": 1, "left kidney cyst": 13}))
    assert [(s.key, s.name, s.side, s.of_other_side) for s in found.structures] == [
        ("1", "left lung", "left", "right lung"),
        ("13", "left kidney cyst", "left", "right kidney cyst"),
    ]


def test_file_names_are_one_mask_a_structure(write_names: WriteNames) -> None:
    found = read_description(write_names({"liver": "liver", "kidney_left": "kidney_left"}))
    assert not found.is_label_map and found.mask == "{scan}/{structure}"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1], "not a JSON object"),
        ({}, "at least one"),
        ({"1": "liver", "spleen": "spleen"}, "all be label values, or all names of files"),
        ({"0": "background"}, "1 to 255"),
        ({"256": "liver"}, "1 to 255"),
        ({"1": "liver", "2": "liver"}, "'liver' comes twice"),
        ({"1": "kidney_left", "2": "left kidney"}, "'left kidney' comes twice"),
        ({"1": ""}, "no name"),
        ({"1": {"name": "liver", "kind": "bone"}}, "kind is not organ or lesion"),
        ({"1": ["liver"]}, "no name and no object"),
        ({"structures": {"1": "liver"}, "colour": "red"}, "unknown keys colour"),
        ({"structures": {"1": "liver"}, "image": "scan"}, "'scan' must hold"),
        ({"structures": {"1": "liver"}, "image": "{scan}/{scan}"}, "each once"),
        ({"structures": {"1": "liver"}, "image": "{visit}"}, "must hold some of"),
        ({"structures": {"1": "liver"}, "mask": "{scan}/{structure}"}, "if and only if"),
        ({"structures": {"liver": "liver"}, "mask": "{scan}"}, "if and only if"),
        ({"structures": {"1": "liver"}, "mask": "{patient}"}, "the pattern of images lacks"),
        ({"structures": {"1": "liver"}, "modality": "us"}, "one of ct, mr, pt"),
        ({"structures": {"1": "liver"}, "pet_unit": "Bq/mL"}, "only SUV"),
        ({"structures": {"1": "liver"}, "image": 3}, "not a text"),
    ],
)
def test_bad_names_are_refused(write_names: WriteNames, content: Any, told: str) -> None:
    with pytest.raises(PhotonError) as caught:
        read_description(write_names(content))
    assert caught.value.code == "NAMES_INVALID" and told in caught.value.fact


def test_damaged_or_missing_names_file(tmp_path: Path) -> None:
    (tmp_path / "names.json").write_text("{")
    for path in (tmp_path / "names.json", tmp_path / "nothing.json"):
        with pytest.raises(PhotonError) as caught:
            read_description(path)
        assert caught.value.code == "NAMES_INVALID"


def described(write_names: WriteNames, **fields: Any) -> Description:
    return read_description(write_names({"structures": {"1": "tumour"}} | fields))


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_images_and_masks_of_the_same_path(tmp_path: Path, write_names: WriteNames) -> None:
    touch(tmp_path / "images", "b/one.nii.gz", "two.nii", "three.nii", "readme.txt")
    touch(tmp_path / "masks", "b/one.nii", "two.nii.gz", "four.nii")
    pairs = find_pairs(tmp_path / "images", tmp_path / "masks", described(write_names))
    assert [(p.scan_id, p.patient_id, [m.relative for m in p.masks.values()]) for p in pairs] == [
        ("b_one", "b_one", ["b/one.nii"]),
        ("three", "three", []),
        ("two", "two", ["two.nii.gz"]),
    ]


def test_one_folder_for_both_with_patients_and_modalities(tmp_path: Path, write_names: WriteNames) -> None:
    touch(tmp_path, "A/CT_image.nii.gz", "A/CT_mask.nii.gz", "A/MR_T1_image.nii.gz", "A/MR_T1_mask.nii.gz")
    description = described(write_names, image="{patient}/{modality}_image", mask="{patient}/{modality}_mask")
    pairs = find_pairs(tmp_path, tmp_path, description)
    assert [(p.scan_id, p.patient_id, p.modality, p.masks[""].relative) for p in pairs] == [
        ("A_CT", "A", "CT", "A/CT_mask.nii.gz"),
        ("A_MR_T1", "A", "MR_T1", "A/MR_T1_mask.nii.gz"),
    ]


def test_a_file_for_each_structure(tmp_path: Path, write_names: WriteNames) -> None:
    touch(tmp_path / "i", "s1/ct.nii.gz", "s2/ct.nii.gz")
    touch(tmp_path / "m", "s1/seg/liver.nii.gz", "s1/seg/colon.nii.gz", "s2/seg/spleen.nii.gz")
    names = write_names(
        {
            "structures": {"liver": "liver", "spleen": "spleen"},
            "image": "{scan}/ct",
            "mask": "{scan}/seg/{structure}",
        }
    )
    pairs = find_pairs(tmp_path / "i", tmp_path / "m", read_description(names))
    assert [(p.scan_id, sorted(p.masks)) for p in pairs] == [("s1", ["liver"]), ("s2", ["spleen"])]


@pytest.mark.parametrize(
    ("images", "masks", "told"),
    [
        (("a.nii", "a.nii.gz"), ("a.nii",), "would both be the scan a"),
        (("x/a.nii", "x_a.nii"), ("x_a.nii",), "would both be the scan x_a"),
        (("a.nii",), ("b.nii",), "belongs to any of the 1 images"),
    ],
)
def test_what_cannot_be_paired(
    tmp_path: Path, write_names: WriteNames, images: tuple[str, ...], masks: tuple[str, ...], told: str
) -> None:
    touch(tmp_path / "i", *images)
    touch(tmp_path / "m", *masks)
    with pytest.raises(PhotonError) as caught:
        find_pairs(tmp_path / "i", tmp_path / "m", described(write_names))
    assert caught.value.code == "PAIRS_MISSING" and told in caught.value.fact


def test_no_image_fits_its_pattern(tmp_path: Path, write_names: WriteNames) -> None:
    touch(tmp_path, "a.nii")
    with pytest.raises(PhotonError) as caught:
        find_pairs(tmp_path, tmp_path, described(write_names, image="{patient}/ct", mask="{patient}/seg"))
    assert caught.value.code == "PAIRS_MISSING" and "{patient}/ct" in caught.value.fact
