"""Answers computed from outlines that are known by construction, and what must not be asked of them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from pipelines.mask_questions.ask import Identity, ask
from pipelines.mask_questions.names import Description, Structure, plain_name
from pipelines.mask_questions.rules import REASONS, Rules
from pipelines.mask_questions.segmentation import combine
from pipelines.questions import FAMILIES, Question
from pipelines.scans.scan import make_scan

LPS_2MM = np.diag([-2.0, -2.0, 2.0, 1.0])
SHAPE = (80, 60, 90)  # x to the left, y to the back, z to the head; a voxel is 0.008 cm3
NAMES = {
    "liver": 50,
    "spleen": 60,
    "kidney_left": 160,
    "kidney_right": 120,
    "spine": 300,
    "tumour": 90,
    "left_lung_nodule": 20,
    "gallbladder": 5,
}
EVERYTHING = dataclasses.replace(Rules(), max_per_subtype=1000)

Boxes = list[tuple[str, tuple[slice, slice, slice]]]


def box(x: tuple[int, int], y: tuple[int, int], z: tuple[int, int]) -> tuple[slice, slice, slice]:
    return slice(*x), slice(*y), slice(*z)


SCENE: Boxes = [
    ("liver", box((5, 35), (5, 35), (30, 55))),  # 30 x 30 x 25 voxels
    ("spleen", box((55, 70), (20, 40), (36, 56))),  # 15 x 20 x 20
    ("kidney_left", box((52, 64), (42, 52), (14, 30))),  # 12 x 10 x 16
    ("kidney_right", box((14, 24), (42, 52), (6, 18))),  # 10 x 10 x 12
    ("spine", box((36, 44), (40, 50), (0, 90))),  # from edge to edge
    ("tumour", box((10, 20), (10, 20), (40, 48))),  # in the liver, 10 x 10 x 8
    ("tumour", box((24, 28), (24, 28), (44, 48))),  # in the liver too, 4 x 4 x 4
]


def asked(
    scene: Boxes,
    *,
    affine: np.ndarray = LPS_2MM,
    rules: Rules = EVERYTHING,
    modality: str = "ct",
    unit: str = "HU",
    scan_id: str = "s",
    is_size_told: bool = False,
) -> tuple[dict[str, Question], dict[tuple[str, str], str]]:
    """Questions by id without the scan's, and reasons of what was not asked by subtype and structure."""
    structures = tuple(
        Structure(key=str(value), name=plain_name(name), kind="lesion" if name in LESIONS else "organ")
        for value, name in enumerate(NAMES, start=1)
    )
    description = Description(
        structures=structures, is_label_map=True, image="{scan}", mask="{scan}", modality={}, pet_unit=""
    )
    labels = np.zeros(SHAPE, np.uint8)
    for name, place in scene:
        labels[place] = list(NAMES).index(name) + 1
    values = np.array([-100, *NAMES.values()], np.int16)[labels]
    scans = [make_scan(array, affine, path=Path("scan"), sha256="") for array in (values, labels)]
    segmentation = combine(scans[0], [("", scans[1])], description, is_ct=modality == "ct")
    who = Identity(scan_id=scan_id, patient_id="p", split="test", modality=modality, unit=unit)
    found = ask(segmentation, description, who, rules, is_size_told=is_size_told)
    questions, not_asked = found.questions, found.not_asked
    assert all(question.question in found.wordings[question.question_id] for question in questions)
    assert len({question.question_id for question in questions}) == len(questions)
    assert {question.family for question in questions} <= set(FAMILIES)
    assert {one.reason for one in not_asked} <= set(REASONS)
    for question in questions:
        assert question.kind == "number" or question.answer in question.options
    by_id = {question.question_id.removeprefix(f"{scan_id}."): question for question in questions}
    return by_id, {(one.subtype, one.about): one.reason for one in not_asked}


LESIONS = ("tumour", "left_lung_nodule")

EXPECTED = {
    "existence-liver": "yes",
    "existence-gallbladder": "no",
    "existence-tumour": "yes",
    "existence-left-lung-nodule": "no",
    "volume-liver": "173 cm3",  # 22500 voxels less the 864 of the tumours: 173.088
    "volume-spleen": "48 cm3",
    "volume-left-kidney": "15.4 cm3",
    "volume-right-kidney": "9.6 cm3",
    "volume-tumour": "6.91 cm3",  # 800 + 64 voxels
    "largest-diameter-left-kidney": f"{2 * math.hypot(16, 11, 9):.3g} mm",
    "largest-diameter-tumour": f"{2 * math.hypot(10, 9, 7):.3g} mm",
    "mean-HU-liver": "50 HU",
    "mean-HU-spine": "300 HU",  # cut, but what the scan shows of it has a mean
    "mean-HU-tumour": "90 HU",
    "count-tumour": "2",
    "third-liver": "middle third",  # centre at 42.5 of 90 slices
    "third-right-kidney": "lower third",  # at 12
    "largest-slice-tumour": "46",  # 45 to 48 show both
    "larger-side-left-kidney,-right-kidney": "left kidney",
    "higher-side-left-kidney,-right-kidney": "left kidney",
    "larger-left-kidney,-spleen": None,
    "denser-liver,-spleen": "spleen",
    "denser-left-kidney,-right-kidney": "left kidney",
    "containing-structure-tumour": "liver",
    "side-tumour": "right",
}


def test_answers_are_those_of_the_scene() -> None:
    questions, reasons = asked(SCENE)
    for name, answer in EXPECTED.items():
        assert (questions[name].answer if name in questions else None) == answer, name
    assert reasons["largest slice", "liver"] == "too close to call"  # a box is as large in all of its slices
    for subtype in ("volume", "largest diameter", "third", "largest slice"):
        assert reasons[subtype, "spine"] == "cut by the field of view"
    assert {question.split for question in questions.values()} == {"test"}


def test_answers_do_not_depend_on_how_the_scan_lies_in_its_file() -> None:
    turned, _ = asked(SCENE)
    angle = math.radians(7.0)
    for name, affine in (
        ("moved", np.array([[-2.0, 0, 0, 50], [0, -2, 0, -90], [0, 0, 2, 700], [0, 0, 0, 1]])),
        ("tilted", np.array(LPS_2MM)),
    ):
        if name == "tilted":
            turn = np.array([[1, 0, 0], [0, math.cos(angle), -math.sin(angle)], [0, math.sin(angle), math.cos(angle)]])
            affine[:3, :3] = turn @ affine[:3, :3]
        again, _ = asked(SCENE, affine=affine)
        assert {key: q.answer for key, q in again.items()} == {key: q.answer for key, q in turned.items()}, name


def test_mirrored_scan_has_mirrored_sides() -> None:
    mirrored = np.diag([2.0, -2.0, 2.0, 1.0])
    questions, _ = asked(SCENE, affine=mirrored)
    assert questions["side-tumour"].answer == "left"


def test_upside_down_scan_has_other_thirds() -> None:
    questions, _ = asked(SCENE, affine=np.diag([-2.0, 2.0, -2.0, 1.0]))
    assert questions["third-right-kidney"].answer == "upper third"
    assert questions["higher-side-left-kidney,-right-kidney"].answer == "right kidney"


def test_anisotropic_spacing_is_in_every_number() -> None:
    questions, _ = asked(SCENE, affine=np.diag([-1.0, -2.0, 5.0, 1.0]))
    assert questions["volume-spleen"].answer == "60 cm3"
    assert questions["largest-diameter-left-kidney"].value == pytest.approx(
        math.hypot(11 * 1.0, 9 * 2.0, 16 * 5.0), rel=0.005
    )


@pytest.mark.parametrize(
    ("modality", "unit", "reason"), [("mr", "", "values have no unit"), ("ct", "", "values are no HU")]
)
def test_no_densities_without_a_unit(modality: str, unit: str, reason: str) -> None:
    questions, reasons = asked(SCENE, modality=modality, unit=unit)
    assert not [question for question in questions.values() if question.unit in ("HU", "SUV")]
    assert not [name for name in questions if name.startswith("denser")]
    assert reasons["mean value", "liver"] == reason
    assert "volume-liver" in questions


def test_pet_in_suv_has_mean_and_maximum() -> None:
    questions, _ = asked(SCENE, modality="pt", unit="SUV")
    assert questions["mean-SUV-liver"].answer == "50 SUV" and questions["maximum-SUV-liver"].answer == "50 SUV"


def test_density_that_no_tissue_has_is_no_hu() -> None:
    _, reasons = asked(SCENE, rules=dataclasses.replace(EVERYTHING, max_hu=100.0))
    assert reasons["mean HU", "spine"] == "values are no HU"


def test_specks_are_not_asked_about() -> None:
    scene = [*SCENE, ("gallbladder", box((40, 42), (10, 12), (30, 34)))]  # 16 voxels
    questions, reasons = asked(scene)
    assert reasons["existence", "gallbladder"] == "too small"
    assert not [name for name in questions if "gallbladder" in name and not name.startswith("slice")]


def test_sliver_at_the_edge_is_neither_there_nor_not() -> None:
    scene = [*SCENE, ("gallbladder", box((40, 50), (0, 10), (0, 1)))]  # 100 voxels, 0.8 cm3
    questions, reasons = asked(scene)
    assert reasons["existence", "gallbladder"] == "cut by the field of view"
    assert "existence-gallbladder" not in questions


def test_lesion_with_a_speck_beside_it_is_not_counted() -> None:
    questions, reasons = asked([*SCENE, ("tumour", box((30, 31), (30, 31), (50, 51)))])
    assert reasons["count", "tumour"] == "in fragments" and "count-tumour" not in questions
    assert questions["largest-diameter-tumour"].answer == EXPECTED["largest-diameter-tumour"]


def test_largest_of_two_equal_lesions_is_not_asked_about() -> None:
    questions, reasons = asked([*SCENE[:6], ("tumour", box((22, 32), (20, 30), (40, 48)))])
    assert questions["count-tumour"].answer == "2"
    for subtype in ("largest diameter", "third", "location"):
        assert reasons[subtype, "tumour"] == "several of similar size"


def test_organ_in_pieces_has_no_diameter() -> None:
    questions, reasons = asked([*SCENE, ("spleen", box((72, 78), (20, 30), (60, 70)))])
    assert reasons["largest diameter", "spleen"] == "in fragments" and "volume-spleen" in questions


@pytest.mark.parametrize(
    ("height", "answer"), [((70, 80), "upper third"), ((55, 65), None), ((25, 35), None), ((40, 50), "middle third")]
)
def test_thirds_have_margins(height: tuple[int, int], answer: str | None) -> None:
    questions, reasons = asked([("gallbladder", box((40, 50), (10, 20), height))])
    found = questions.get("third-gallbladder")
    assert (found.answer if found else None) == answer
    assert answer or reasons["third", "gallbladder"] == "too close to call"


def test_slices_are_counted_from_the_feet() -> None:
    layers: Boxes = [
        ("gallbladder", box((40 - n, 40 + n), (20 - n, 20 + n), (z, z + 1))) for n, z in ((5, 40), (9, 41), (4, 42))
    ]
    questions, _ = asked(layers)
    assert questions["largest-slice-gallbladder"].answer == "42"
    assert "90 axial slices" in questions["largest-slice-gallbladder"].question
    upside_down, _ = asked(layers, affine=np.diag([-2.0, 2.0, -2.0, 1.0]))
    assert upside_down["largest-slice-gallbladder"].answer == "49"


def test_slices_of_a_tilted_scan_are_not_axial() -> None:
    affine = np.array(LPS_2MM)
    angle = math.radians(20.0)
    affine[1:3, 1:3] = (
        np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ (affine[1:3, 1:3])
    )
    questions, reasons = asked(SCENE, affine=affine)
    assert reasons["third", "liver"] == "slices are tilted"
    assert not [name for name in questions if name.startswith(("slice", "third", "largest-slice"))]
    assert questions["volume-spleen"].answer == "48 cm3"


def test_slice_contents_name_what_is_there_and_nothing_that_is_near() -> None:
    scene: Boxes = [
        ("liver", box((5, 25), (5, 25), (40, 50))),
        ("spleen", box((30, 40), (5, 25), (5, 15))),
        ("kidney_left", box((45, 55), (5, 25), (5, 15))),
        ("kidney_right", box((60, 70), (5, 25), (70, 80))),
        ("gallbladder", box((60, 70), (30, 50), (50, 60))),  # 10 mm above the slice in the middle: no option
    ]
    questions, _ = asked(scene)
    found = questions["slice-contents-half-of-the-height"]
    assert found.answer == "liver"
    assert found.options == ("left kidney", "liver", "right kidney", "spleen")
    assert "left kidney, liver, right kidney or spleen" in found.question


def test_equal_kidneys_are_not_compared() -> None:
    scene = [*SCENE[:3], ("kidney_right", box((14, 26), (42, 52), (15, 31)))]
    _, reasons = asked(scene)
    for subtype in ("larger side", "higher side"):
        assert reasons[subtype, "left kidney, right kidney"] == "too close to call"


def test_lesion_in_no_organ_has_a_nearest_one_and_a_side_by_the_spine() -> None:
    scene = [*SCENE[:5], ("tumour", box((66, 72), (44, 50), (20, 26)))]
    questions, _ = asked(scene)
    assert questions["nearest-structure-tumour"].answer == "left kidney"
    assert questions["side-tumour"].answer == "left"
    _, reasons = asked([*SCENE[:2], SCENE[2], ("tumour", box((66, 72), (44, 50), (20, 26)))])
    assert reasons["side", "tumour"] == "no midline"


def test_lesion_between_two_organs_has_no_nearest() -> None:
    scene: Boxes = [
        ("liver", box((10, 20), (10, 30), (30, 50))),
        ("spleen", box((40, 50), (10, 30), (30, 50))),
        ("tumour", box((27, 33), (17, 23), (37, 43))),
    ]
    _, reasons = asked(scene)
    assert reasons["nearest structure", "tumour"] == "too close to call"


def test_side_that_a_name_tells_is_not_asked() -> None:
    questions, reasons = asked([*SCENE[:5], ("left_lung_nodule", box((60, 66), (10, 16), (70, 76)))])
    assert "side-left-lung-nodule" not in questions and ("side", "left lung nodule") not in reasons


def test_too_many_questions_of_a_kind_are_thinned_by_their_ids() -> None:
    rules = dataclasses.replace(EVERYTHING, max_per_subtype=3)
    first, reasons = asked(SCENE, rules=rules)
    for prefix in ("existence-", "volume-", "mean-HU-"):
        assert len([name for name in first if name.startswith(prefix)]) == 3
    assert list(reasons.values()).count("over the limit") > 5
    chosen = {
        scan_id: frozenset(name for name in asked(SCENE, rules=rules, scan_id=scan_id)[0] if name.startswith("exist"))
        for scan_id in ("a", "b", "c", "d")
    }
    assert len(set(chosen.values())) > 1


def test_wordings_differ_from_scan_to_scan_and_never_by_the_answer() -> None:
    other = [*SCENE, ("gallbladder", box((40, 50), (10, 20), (70, 80)))]
    texts = {asked(SCENE, scan_id=f"s{n}")[0]["existence-gallbladder"].question for n in range(20)}
    assert len(texts) == 3
    for n in range(5):
        absent = asked(SCENE, scan_id=f"s{n}")[0]["existence-gallbladder"]
        present = asked(other, scan_id=f"s{n}")[0]["existence-gallbladder"]
        assert absent.question == present.question and (absent.answer, present.answer) == ("no", "yes")
        assert absent.question_id == present.question_id


def test_size_of_the_scan_is_told_where_millimetres_are_asked_for() -> None:
    questions, _ = asked(SCENE, is_size_told=True)
    told = "The scan is 160 mm wide, 120 mm deep and 180 mm high. "
    assert questions["volume-liver"].question.startswith(told)
    assert questions["largest-diameter-spleen"].question.startswith(told)
    assert not questions["mean-HU-liver"].question.startswith(told)
