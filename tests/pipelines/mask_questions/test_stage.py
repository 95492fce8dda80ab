"""From folders of images and masks to a data folder that the other stages read."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.cli import run
from photon.errors import PhotonError
from pipelines.datasets.splits import SplitRule
from pipelines.mask_questions.stage import Options, make_questions
from pipelines.preprocess import preprocess
from pipelines.questions import read_questions
from pipelines.regions import read_organ_masks
from pipelines.scans.nifti import write_scan
from pipelines.scans.scan import read_scan
from pipelines.train import train
from pipelines.train_spec import TrainSpec
from pipelines.volumes import VOLUME_SPECS

WritePair = Callable[..., None]
WriteNames = Callable[[Any], Path]

NAMES = {"1": "liver", "2": {"name": "tumour", "kind": "lesion"}}

SAME = ["count-tumour", "existence-liver", "largest-diameter-liver", "mean-HU-liver", "mean-HU-tumour"]
SAME += ["third-liver", "third-tumour"]


def scene(size: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """CT values and labels [x, y, z] of 2 mm voxels: a liver of 20 x 20 x 20 voxels with a tumour of ``size``³."""
    labels = np.zeros((60, 60, 60), np.uint8)
    labels[10:30, 10:30, 20:40] = 1
    labels[15 : 15 + size, 15 : 15 + size, 25 : 25 + size] = 2
    values = np.array([-1000, 50, 90], np.int16)[labels]
    values[5:55, 5:55] = np.maximum(values[5:55, 5:55], -100)
    return values, labels


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def make(tmp_path: Path, names: Path, options: Options | None = None, **more: Any) -> Any:
    return make_questions(tmp_path / "images", tmp_path / "masks", names, tmp_path / "data", options, **more)


def test_data_folder_is_complete(tmp_path: Path, write_pair: WritePair, write_names: WriteNames) -> None:
    for number, size in enumerate((0, 5, 10)):
        write_pair(f"s{number}", *scene(size))
    done: list[tuple[int, int, str]] = []
    record = make(tmp_path, write_names(NAMES), on_progress=lambda *step: done.append(step))
    data = tmp_path / "data"
    assert done == [(1, 3, "s0"), (2, 3, "s1"), (3, 3, "s2")]
    questions = {question.question_id: question for question in read_questions(data / "questions.jsonl")}
    assert questions["s0.existence-tumour"].answer == "no" and "s0.volume-tumour" not in questions
    assert questions["s1.volume-tumour"].answer == "1 cm3" and questions["s2.volume-tumour"].answer == "8 cm3"
    assert questions["s2.mean-HU-tumour"].answer == "90 HU"  # CT, as the values tell: there is air
    assert record.num_questions == len(questions) == sum(record.num_questions_by_split.values())
    assert record.num_questions_by_subtype["existence"] == 6
    assert record.same_everywhere == SAME
    assert json.loads((data / "raw" / "labels.json").read_text()) == {"liver": 1, "tumour": 2}
    rows = table(data / "raw" / "scans.csv")
    assert [(row["scan_id"], row["modality"], row["unit"], row["status"]) for row in rows] == [
        (f"s{n}", "ct", "HU", "ok") for n in range(3)
    ]
    assert record.not_asked == {"no midline": 2, "too close to call": 5}
    assert len(table(data / "raw" / "not_asked.csv")) == 7
    for number, size in enumerate((0, 5, 10)):
        assert np.array_equal(read_scan(data / "raw" / "labels" / f"s{number}.nii").array, scene(size)[1])
        linked, source = data / "raw" / "images" / f"s{number}.nii", tmp_path / "images" / f"s{number}.nii"
        assert linked.read_bytes() == source.read_bytes()


def test_questions_with_one_answer_may_be_left_out(
    tmp_path: Path, write_pair: WritePair, write_names: WriteNames
) -> None:
    for number, size in enumerate((0, 5, 10)):
        write_pair(f"s{number}", *scene(size))
    record = make(tmp_path, write_names(NAMES), Options(drops_same=True))
    names = {q.question_id.split(".")[1] for q in read_questions(tmp_path / "data" / "questions.jsonl")}
    assert "existence-tumour" in names and "volume-tumour" in names
    assert not names & set(record.same_everywhere)
    assert record.same_everywhere == SAME
    assert record.not_asked["same answer everywhere"] == 18


def test_same_input_gives_the_same_bytes_with_any_number_of_workers(
    tmp_path: Path, write_pair: WritePair, write_names: WriteNames
) -> None:
    for number in range(3):
        write_pair(f"s{number}", *scene(4 + number))
    names = write_names(NAMES)
    make(tmp_path, names)
    first = {path.name: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    make(tmp_path, names, num_workers=2)
    again = {path.name: path.read_bytes() for path in (tmp_path / "data").rglob("*") if path.is_file()}
    assert first == again


def test_bad_scans_cost_themselves_alone(tmp_path: Path, write_pair: WritePair, write_names: WriteNames) -> None:
    write_pair("good", *scene(5))
    write_pair("lonely", *scene(5))
    (tmp_path / "masks" / "lonely.nii").unlink()
    write_pair("damaged", *scene(5))
    (tmp_path / "images" / "damaged.nii").write_bytes(b"no scan")
    far = np.diag([-2.0, -2.0, 2.0, 1.0])
    far[2, 3] = 4000.0
    write_pair("elsewhere", *scene(5), mask_affine=far)
    record = make(tmp_path, write_names(NAMES))
    status = {row["scan_id"]: row["status"] for row in table(tmp_path / "data" / "raw" / "scans.csv")}
    assert status["good"] == "ok" and status["lonely"] == "MASK_MISSING" and status["elsewhere"] == "MASK_OUTSIDE_SCAN"
    assert status["damaged"].startswith("SCAN_")
    assert (record.num_scans, record.num_refused) == (1, 3)
    assert {question.scan_id for question in read_questions(tmp_path / "data" / "questions.jsonl")} == {"good"}
    assert sorted(path.name for path in (tmp_path / "data" / "raw" / "images").iterdir()) == ["good.nii"]


def test_what_an_earlier_run_left_is_no_part_of_this_one(
    tmp_path: Path, write_pair: WritePair, write_names: WriteNames
) -> None:
    write_pair("a", *scene(5))
    write_pair("b", *scene(5))
    names = write_names(NAMES)
    make(tmp_path, names)
    (tmp_path / "masks" / "b.nii").write_bytes(b"damaged")
    make(tmp_path, names)
    (row,) = (row for row in table(tmp_path / "data" / "raw" / "scans.csv") if row["scan_id"] == "b")
    assert row["status"] == "FORMAT_UNSUPPORTED" or row["status"].startswith("SCAN_")
    assert row["message"].startswith("the mask b.nii: ")
    for part in ("images", "labels"):
        assert [path.name for path in (tmp_path / "data" / "raw" / part).iterdir()] == ["a.nii"]
    (tmp_path / "images" / "a.nii").rename(tmp_path / "images" / "c.nii")
    (tmp_path / "masks" / "a.nii").rename(tmp_path / "masks" / "c.nii")
    with pytest.raises(PhotonError) as caught:
        make(tmp_path, names)
    assert caught.value.code == "DATA_FOREIGN" and "a.nii" in caught.value.fact


def test_a_mask_of_its_own_that_is_empty_says_no(tmp_path: Path, write_names: WriteNames) -> None:
    values, labels = scene(5)
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    for scan, tumour in (("a", labels == 2), ("b", np.zeros_like(labels))):
        (tmp_path / "masks" / scan).mkdir(parents=True)
        (tmp_path / "images").mkdir(exist_ok=True)
        write_scan(values, affine, tmp_path / "images" / f"{scan}.nii.gz")
        write_scan((labels > 0).astype(np.uint8), affine, tmp_path / "masks" / scan / "liver.nii.gz")
        write_scan(tumour.astype(np.uint8), affine, tmp_path / "masks" / scan / "tumour.nii.gz")
    make(tmp_path, write_names({"liver": "liver", "tumour": "tumour", "spleen": "spleen"}))
    questions = {q.question_id: q for q in read_questions(tmp_path / "data" / "questions.jsonl")}
    assert (questions["a.existence-tumour"].answer, questions["b.existence-tumour"].answer) == ("yes", "no")
    assert questions["a.volume-liver"].answer == "64 cm3"  # with the tumour in it
    assert "a.existence-spleen" not in questions
    missing = [row for row in table(tmp_path / "data" / "raw" / "not_asked.csv") if row["about"] == "spleen"]
    assert [row["reason"] for row in missing] == ["not outlined", "not outlined"]


def test_modality_comes_from_the_names_file(tmp_path: Path, write_names: WriteNames) -> None:
    values, labels = scene(8)
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])
    for patient in ("A", "B"):
        folder = tmp_path / "all" / patient
        folder.mkdir(parents=True)
        for kind in ("CT", "MR_T1", "PET"):
            write_scan(values, affine, folder / f"{kind}_image.nii")
            write_scan(labels, affine, folder / f"{kind}_mask.nii")
    names = write_names(
        {
            "structures": NAMES,
            "image": "{patient}/{modality}_image",
            "mask": "{patient}/{modality}_mask",
            "modality": {"CT": "ct", "MR_T1": "mr", "PET": "pt"},
            "pet_unit": "SUV",
        }
    )
    record = make_questions(tmp_path / "all", tmp_path / "all", names, tmp_path / "data")
    units = {row["scan_id"]: (row["modality"], row["unit"]) for row in table(tmp_path / "data" / "raw" / "scans.csv")}
    assert units["A_CT"] == ("ct", "HU") and units["A_MR_T1"] == ("mr", "") and units["B_PET"] == ("pt", "SUV")
    questions = read_questions(tmp_path / "data" / "questions.jsonl")
    assert {q.unit for q in questions if q.scan_id == "A_MR_T1"} == {"", "cm3", "mm"}
    assert record.num_patients == 2
    assert all(len({q.split for q in questions if q.patient_id == patient}) == 1 for patient in ("A", "B"))


def test_values_like_no_ct_are_of_unknown_modality(
    tmp_path: Path, write_pair: WritePair, write_names: WriteNames
) -> None:
    values, labels = scene(5)
    write_pair("mr", (values + 1100).astype(np.int16), labels)
    make(tmp_path, write_names(NAMES))
    (row,) = table(tmp_path / "data" / "raw" / "scans.csv")
    assert (row["modality"], row["unit"]) == ("", "")
    names = write_names({"structures": NAMES, "modality": "ct"})
    make(tmp_path, names)
    (row,) = table(tmp_path / "data" / "raw" / "scans.csv")
    assert (row["modality"], row["unit"]) == ("ct", "")  # its rescaling was lost
    reasons = {row["reason"] for row in table(tmp_path / "data" / "raw" / "not_asked.csv")}
    assert "values are no HU" in reasons


def test_scans_are_never_written_over(tmp_path: Path, write_pair: WritePair, write_names: WriteNames) -> None:
    write_pair("a", *scene(5))
    names = write_names(NAMES)
    (tmp_path / "mine" / "raw").mkdir(parents=True)
    (tmp_path / "images").rename(tmp_path / "mine" / "raw" / "images")
    images = tmp_path / "mine" / "raw" / "images"
    for output in (tmp_path / "mine", images, images / "data", tmp_path / "masks" / "data"):
        with pytest.raises(PhotonError) as caught:
            make_questions(images, tmp_path / "masks", names, output)
        assert caught.value.code == "OUTPUT_MISPLACED"
    assert (images / "a.nii").is_file()


def test_nothing_to_pair_is_one_error(tmp_path: Path, write_pair: WritePair, write_names: WriteNames) -> None:
    write_pair("a", *scene(5))
    with pytest.raises(PhotonError) as caught:
        make(tmp_path, write_names({"structures": NAMES, "image": "{patient}/x", "mask": "{patient}/y"}))
    assert caught.value.code == "PAIRS_MISSING"
    assert not (tmp_path / "data" / "questions.jsonl").exists()


def test_command(
    tmp_path: Path, write_pair: WritePair, write_names: WriteNames, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair("a", *scene(5))
    names = write_names(NAMES)
    words = ["questions", "--images", tmp_path / "images", "--masks", tmp_path / "masks", "--names", names]
    assert run([*map(str, words), "--output", str(tmp_path / "data")]) == 0
    assert "1 patients" in capsys.readouterr().out
    write_pair("b", *scene(5))
    (tmp_path / "masks" / "b.nii").unlink()
    assert run([*map(str, words), "--output", str(tmp_path / "data")]) == 3
    assert "MASK_MISSING" in capsys.readouterr().out


def test_questions_train_a_model(tmp_path: Path, write_pair: WritePair, write_names: WriteNames) -> None:
    for number in range(6):
        write_pair(f"s{number}", *scene(number + 4))
    record = make(tmp_path, write_names(NAMES), Options(split=SplitRule(val_percent=30, test_percent=30)))
    assert all(record.num_questions_by_split.values())
    data = tmp_path / "data"
    assert preprocess(data / "raw" / "images", data / "volumes", VOLUME_SPECS["smoke"]).num_refused == 0
    masks = read_organ_masks(data, "s5", VOLUME_SPECS["smoke"], ["liver", "tumour", "spleen"])
    assert sorted(masks) == ["liver", "tumour"]
    assert masks["liver"].sum() > masks["tumour"].sum() > 0
    trained = train(TrainSpec.preset("smoke", naming_steps=1), data, tmp_path / "train", data_version="v")
    assert trained.num_steps > 0
