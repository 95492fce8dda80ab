"""M3D, whose images are no scans, and AbdomenAtlas, whose questions are computed from its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.datasets.base import ImportOptions, Refusal, ScanFile, assemble
from pipelines.datasets.catalogue import DATASETS
from pipelines.datasets.leaks import find_leaks
from pipelines.datasets.placing import place_scans
from pipelines.datasets.splits import SplitRule
from pipelines.mask_questions.names import read_description
from pipelines.mask_questions.pairs import find_pairs
from pipelines.scans.nifti import write_scan
from pipelines.scans.scan import read_scan

M3D_HEADER = [
    "Image Path",
    "Text",
    "Question Type",
    "Question",
    "Choice A",
    "Choice B",
    "Choice C",
    "Choice D",
    "Answer",
    "Answer Choice",
]
IMAGE = "M3D_Cap/ct_case/000012/Axial_bone_window.npy"
SCAN = "ct_case_000012_Axial_bone_window"
PLANE = [IMAGE, "", 1, "Which plane?", "axial", "coronal", "sagittal", "oblique", "axial", "A"]


def test_m3d_questions(tmp_path: Path, made: Any, read: Any) -> None:
    made.write_csv(
        tmp_path / "M3D_VQA_train.csv",
        M3D_HEADER,
        [PLANE, [*PLANE[:2], 9, *PLANE[3:]], [*PLANE[:9], "B"], ["x.npy", *PLANE[1:]]],
    )
    made.write_csv(tmp_path / "M3D_VQA_val.csv", M3D_HEADER, [PLANE])
    made.write_csv(tmp_path / "M3D_VQA_test.csv", M3D_HEADER, [PLANE])
    made.write_csv(tmp_path / "M3D_VQA_test5k.csv", M3D_HEADER, [PLANE])
    yes_no = [IMAGE, "", 4, "Is there a fracture?", "", "", "", "", "yes", ""]
    made.write_csv(tmp_path / "M3D_VQA_yn_train.csv", M3D_HEADER, [yes_no])
    drafts, refusals = read("m3d", tmp_path)
    assert [draft.split for draft in drafts] == ["test", "train", "val", "train"]
    assert {draft.scan_id for draft in drafts} == {SCAN} and {draft.patient_id for draft in drafts} == {
        "ct_case/000012"
    }
    assert drafts[1].options == ("axial", "coronal", "sagittal", "oblique") and drafts[1].answer == "axial"
    assert drafts[3].options == ("yes", "no") and drafts[3].subtype == "abnormality"
    assert [refusal.place.row for refusal in refusals] == [3, 4, 5]


def test_m3d_images_are_scans_only_on_demand(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((1, 5, 6, 7)).astype(np.float32)
    for case in ("000012", "000013"):
        (tmp_path / IMAGE.replace("000012", case)).parent.mkdir(parents=True)
    np.save(tmp_path / IMAGE, array)
    np.save(tmp_path / IMAGE.replace("000012", "000013"), array[0, 0])
    wanted = frozenset({SCAN, SCAN.replace("12", "13")})
    refused = list(DATASETS["m3d"].scan_files(tmp_path, wanted, ImportOptions()))
    assert len(refused) == 2 and all(isinstance(scan, Refusal) for scan in refused)
    found = list(DATASETS["m3d"].scan_files(tmp_path, wanted, ImportOptions(nominal_geometry=True)))
    scans = [scan for scan in found if isinstance(scan, ScanFile)]
    rows = place_scans(scans, tmp_path / "images", tmp_path / "scans.parquet", "link", num_workers=1).to_dicts()
    assert [row["status"] for row in rows] == ["ok", "SCAN_UNREADABLE"]
    assert "assumed" in rows[0]["notes"][-1]
    scan = read_scan(tmp_path / "images" / rows[0]["image"])
    assert scan.orientation == "LPS" and scan.spacing_mm == (1.0, 1.0, 1.0)
    assert np.array_equal(scan.array, array[0].transpose(2, 1, 0))


ATLAS_HEADER = [
    "BDMAP ID",
    "spacing",
    "shape",
    "sex",
    "age",
    "liver volume (cm^3)",
    "total liver lesion volume (cm^3)",
    "number of liver lesion instances",
    "largest liver lesion diameter (cm)",
    "largest liver lesion location (1-8)",
    "largest liver lesion attenuation (hyperattenuating, isoattenuating, hypoattenuating)",
    "left kidney volume (cm^3)",
    "pancreas volume (cm^3)",
    "number of pancreatic lesion instances",
    "largest pancreatic PDAC location (head, body, tail)",
    "pancreatic tumor staging (T1-T4)",
    "number of colon lesion instances",
    "largest kidney lesion location (left, right)",
    "structured report",
]
FULL = ["1520.4", "12.5", "2", "3.1", "4", "hypoattenuating", "140.0", "80", "", "head,body", "T2", "", "left"]


def atlas_row(number: int, values: list[str]) -> list[str]:
    return [f"BDMAP_{number:08d}", "[1 1 1]", "(9, 9, 9)", "M", "70", *values, 'two\nlines, "quoted"']


def atlas(folder: Path, made: Any, rows: list[list[str]]) -> None:
    made.write_csv(folder / "AbdomenAtlas3.0MiniWithMeta.csv", ATLAS_HEADER, rows)


def test_atlas_questions_from_measured_columns(tmp_path: Path, made: Any, read: Any) -> None:
    atlas(tmp_path, made, [atlas_row(1, FULL), atlas_row(2, ["900"] + [""] * 12)])
    drafts, refusals = read("abdomenatlas", tmp_path)
    assert not refusals and not {"M", "70"} & {draft.answer for draft in drafts}
    said = {(draft.subtype, draft.organ): draft for draft in drafts if draft.scan_id == "BDMAP_00000001"}
    assert {key: draft.answer for key, draft in said.items()} == {
        ("organ volume measurement", "liver"): "1520.4 cm^3",
        ("lesion volume measurement", "liver"): "12.5 cm^3",
        ("liver lesion existence", "liver"): "yes",
        ("lesion counting", "liver"): "2",
        ("largest lesion diameter", "liver"): "3.1 cm",
        ("largest lesion location", "liver"): "4",
        ("largest lesion attenuation", "liver"): "hypoattenuating",
        ("organ volume measurement", "left kidney"): "140 cm^3",
        ("organ volume measurement", "pancreas"): "80 cm^3",
        ("largest lesion location", "pancreas"): "body, head",
        ("pancreatic tumor staging", "pancreas"): "T2",
        ("largest lesion location", "kidney"): "left",
    }
    assert said["largest lesion location", "liver"].options == tuple("12345678")
    assert said["largest lesion location", "pancreas"].kind == "text"
    assert [draft.answer for draft in drafts if draft.scan_id == "BDMAP_00000002"] == ["900 cm^3"]
    assert len(assemble("abdomenatlas", drafts, SplitRule()).questions) == len(drafts)


def test_empty_counts_are_none_only_when_told_and_measured(tmp_path: Path, made: Any, read: Any) -> None:
    atlas(tmp_path, made, [atlas_row(1, ["900", "", "", *[""] * 10])])
    drafts, _ = read("abdomenatlas", tmp_path, empty_counts="zero")
    assert {(draft.subtype, draft.answer) for draft in drafts} == {
        ("organ volume measurement", "900 cm^3"),
        ("liver lesion existence", "no"),  # the pancreas was not measured, so its lesions stay unknown
        ("lesion counting", "0"),
    }


@pytest.mark.parametrize(
    ("column", "value"), [(0, "-3"), (0, "large"), (2, "1.5"), (4, "9"), (5, "bright"), (10, "T7"), (3, "nan cm")]
)
def test_impossible_atlas_values_cost_their_question(
    tmp_path: Path, made: Any, read: Any, column: int, value: str
) -> None:
    values = [*FULL[:column], value, *FULL[column + 1 :]]
    atlas(tmp_path, made, [atlas_row(1, values), atlas_row(2, FULL)])
    drafts, refusals = read("abdomenatlas", tmp_path)
    assert len(refusals) == 1 and refusals[0].place.row == 2
    by_scan = [sum(draft.scan_id.endswith(end) for draft in drafts) for end in "12"]
    assert by_scan[1] == 12 and by_scan[0] in (10, 11)


def test_a_report_that_never_closes_costs_its_row(tmp_path: Path, made: Any, read: Any) -> None:
    atlas(tmp_path, made, [atlas_row(number, FULL) for number in (1, 2, 3)])
    path = tmp_path / "AbdomenAtlas3.0MiniWithMeta.csv"
    text = path.read_text().replace('"two\nlines, ""quoted"""', '"two\nlines, quoted', 1)
    path.write_text(text)
    drafts, refusals = read("abdomenatlas", tmp_path)
    assert sorted({draft.scan_id for draft in drafts}) == ["BDMAP_00000002", "BDMAP_00000003"]
    assert refusals[0].place.row == 2


def test_atlas_splits(tmp_path: Path, made: Any, read: Any) -> None:
    atlas(tmp_path, made, [atlas_row(number, FULL) for number in (1, 2, 3)])
    for scheme, split, number in (("IID", "train", 1), ("IID", "test", 2), ("OOD", "train", 2), ("OOD", "test", 3)):
        made.write_csv(tmp_path / f"TrainTestIDS/{scheme}_{split}.csv", ["id"], [[f"BDMAP_{number:08d}"]])
    drafts, refusals = read("abdomenatlas", tmp_path)
    assert {(draft.scan_id[-1], draft.split) for draft in drafts} == {("1", "train"), ("2", "test")}
    assert [refusal.detail for refusal in refusals] == ["BDMAP_00000003"]


def test_questions_that_are_always_answered_yes_are_told(tmp_path: Path, made: Any, read: Any) -> None:
    atlas(tmp_path, made, [atlas_row(number, FULL) for number in range(1, 200)])
    questions = assemble("abdomenatlas", read("abdomenatlas", tmp_path)[0], SplitRule()).questions
    leaks = find_leaks(questions, {})
    told = leaks.filter(check="always the same answer")["subject"].to_list()
    assert "liver lesion existence" in told


def test_atlas_masks_are_found_as_the_notes_say(tmp_path: Path) -> None:
    names = {"structures": {"liver": "liver"}, "image": "{scan}/ct", "mask": "{scan}/segmentations/{structure}"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    for path in ("image_only/BDMAP_00000001/ct.nii.gz", "mask_only/BDMAP_00000001/segmentations/liver.nii.gz"):
        (tmp_path / path).parent.mkdir(parents=True)
        write_scan(np.arange(8, dtype=np.int16).reshape(2, 2, 2), np.eye(4), tmp_path / path)
    description = read_description(tmp_path / "names.json")
    (pair,) = find_pairs(tmp_path / "image_only", tmp_path / "mask_only", description)
    assert pair.scan_id == "BDMAP_00000001" and list(pair.masks) == ["liver"]
    assert all(name in " ".join(DATASETS["abdomenatlas"].notes) for name in ("{scan}/ct", names["mask"]))


def test_atlas_scans(tmp_path: Path) -> None:
    for name in ("image_only/BDMAP_00000001/ct.nii.gz", "other/BDMAP_00000002.nii.gz", "image_only/x/ct.nii.gz"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    wanted = frozenset({"BDMAP_00000001", "BDMAP_00000002", "BDMAP_00000003"})
    for name in ("abdomenatlas", "deeptumorvqa-v2"):
        found = list(DATASETS[name].scan_files(tmp_path, wanted, ImportOptions()))
        assert [scan.scan_id for scan in found if isinstance(scan, ScanFile)] == sorted(wanted)[:2]
