"""The import stage: what it writes, leaks, several datasets in one folder, and training on what was imported."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flows.cli import run
from photon.errors import PhotonError
from photon.training.pretrain import NamingConfig
from photon.training.stages import StageSchedule
from pipelines.datasets.base import ImportOptions
from pipelines.datasets.importing import import_dataset
from pipelines.datasets.leaks import find_leaks, without_leaks
from pipelines.datasets.splits import SplitRule
from pipelines.preprocess import preprocess
from pipelines.questions import Question, read_questions
from pipelines.results import ImportRecord
from pipelines.scans.nifti import write_scan
from pipelines.train import train
from pipelines.train_spec import TrainSpec
from pipelines.volumes import VOLUME_SPECS

SHAPE = (40, 44, 30)
PATIENTS = [f"train_{number}" for number in range(1, 7)] + ["test_1", "test_2"]


@pytest.fixture
def rad(tmp_path: Path, made: Any) -> tuple[Path, Path]:
    """3D-RAD's tables about eight patients, and CT-RATE's original scans of seven of them."""
    questions, scans = tmp_path / "3DRAD", tmp_path / "CT-RATE"
    metadata = []
    for seed, patient in enumerate(PATIENTS):
        split, name = patient.split("_")[0], patient.replace("test", "valid")
        rows = [
            made.rad_yes_no(1, f"{patient}_a_1.nii.gz", "Is there a nodule?", ("Yes", "No")[seed % 2]),
            made.rad_yes_no(1, f"{patient}_a_1.nii.gz", "Is the heart large?", ("No", "Yes")[seed % 2]),
        ]
        table = questions / split / f"Task4_Existence_Detection/Finding {patient}.csv"
        made.write_csv(table, made.RAD_HEADER, rows)
        metadata.append(made.metadata_row(f"{name}_a_1.nii.gz", SHAPE))
        if patient == "test_1":  # of the corrected copy, and so a link
            fixed = scans / f"dataset/valid_fixed/{name}_a_1.nii.gz"
            fixed.parent.mkdir()
            write_scan(made.chest(seed), np.diag([-7.0, -7.5, 10.0, 1.0]), fixed)
        elif patient != "test_2":
            made.write_blank_nifti(made.chest(seed) + 1024, scans / f"dataset/{name}_a_1.nii.gz")
    made.write_csv(scans / "metadata.csv", made.METADATA_HEADER, metadata)
    return questions, scans


def imported(rad: tuple[Path, Path], output: Path, **changed: Any) -> ImportRecord:
    arguments = {"options": ImportOptions(images=rad[1]), "rule": SplitRule(val_percent=40), "num_workers": 1}
    return import_dataset("3d-rad", rad[0], output, **arguments | changed)


def test_import_preprocess_and_train(rad: tuple[Path, Path], tmp_path: Path) -> None:
    data = tmp_path / "data"
    record = imported(rad, data)
    assert record.num_questions == 16 and set(record.num_questions_by_split) == {"train", "val", "test"}
    assert (record.num_scans_ok, record.num_scans_missing, record.num_rows_refused) == (7, 1, 0)
    assert ImportRecord.read(data / "import/3d-rad/record.json") == record
    preprocessed = preprocess(data / "raw/images", data / "volumes", VOLUME_SPECS["smoke"], num_workers=1)
    assert (preprocessed.num_ok, preprocessed.num_refused) == (7, 0)
    assert [path.name for path in (data / "raw/images").iterdir() if path.is_symlink()] == ["valid_1_a_1.nii.gz"]
    smoke = TrainSpec.preset("smoke")
    spec = dataclasses.replace(
        smoke,
        schedule=StageSchedule(alignment=0, warm_up=1, soft=0, hard=1, flip_after=1),
        draw=dataclasses.replace(smoke.draw, scans_per_step=2, questions_per_scan=2),
        pruned_draw=dataclasses.replace(smoke.pruned_draw, scans_per_step=1, questions_per_scan=2),
        blind_steps=1,
        naming=NamingConfig(num_steps=0),
        validate_every=2,
    )
    trained = train(spec, data, tmp_path / "train", data_version="v")
    assert trained.num_steps == 2 and np.isfinite(trained.final_loss)


def test_the_same_rows_in_another_order_give_the_same_questions(rad: tuple[Path, Path], tmp_path: Path) -> None:
    imported(rad, tmp_path / "one", scans="none")
    for path in rad[0].rglob("*.csv"):
        header, *rows = path.read_text().splitlines()
        random.Random(3).shuffle(rows)
        path.write_text("\n".join([header, "broken row", *rows]) + "\n")
    record = imported(rad, tmp_path / "two", scans="none")
    assert (tmp_path / "one/questions.jsonl").read_bytes() == (tmp_path / "two/questions.jsonl").read_bytes()
    assert record.num_rows_refused == len(PATIENTS) and not (tmp_path / "two/raw").exists()
    refused = pl.read_parquet(tmp_path / "two/import/3d-rad/refused.parquet")
    assert refused["row"].to_list() == [2] * len(PATIENTS)
    assert "  the row cannot be read" in (tmp_path / "two/import/3d-rad/report.txt").read_text().replace(
        "8 the", "  the"
    )


def test_importing_again_replaces_its_own_questions_alone(rad: tuple[Path, Path], tmp_path: Path, made: Any) -> None:
    data = tmp_path / "data"
    imported(rad, data)
    videos = [{"role": "user", "content": "<video> Where?"}, {"role": "assistant", "content": "left"}]
    made.write_jsonl(tmp_path / "chat/train.jsonl", [{"messages": videos, "videos": ["/x/valid_1_a_1.nii.gz"]}])
    record = import_dataset("chat", tmp_path / "chat", data, scans="none")
    assert record.num_questions == 1 and record.num_leaks == 1  # 3D-RAD tests this patient
    assert len(read_questions(data / "questions.jsonl")) == 17
    record = import_dataset("chat", tmp_path / "chat", data, scans="none", drop_leaks=True)
    assert (record.num_questions, record.num_dropped) == (0, 1)
    table = next(rad[0].rglob("Finding train_1.csv"))
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:2]))
    imported(rad, data)
    questions = read_questions(data / "questions.jsonl")
    assert len(questions) == 15 and all(question.question_id.startswith("3d-rad.") for question in questions)


def test_the_same_image_under_two_ids_is_found_and_left_out(tmp_path: Path, made: Any) -> None:
    hu, affine = made.chest(1), np.diag([-7.0, -7.5, 10.0, 1.0])
    rows = []
    for number, array in ((1, hu), (2, made.chest(2)), (3, hu)):
        path = tmp_path / f"in/image_only/BDMAP_{number:08d}/ct.nii.gz"
        path.parent.mkdir(parents=True)
        write_scan(array, affine + np.eye(4) * (number == 3) * 0.001, path)
        rows.append([f"BDMAP_{number:08d}", "1500"])
    made.write_csv(tmp_path / "in/meta.csv", ["BDMAP ID", "liver volume (cm^3)"], rows)
    made.write_csv(tmp_path / "in/IID_train.csv", ["id"], [["BDMAP_00000001"], ["BDMAP_00000002"]])
    made.write_csv(tmp_path / "in/IID_test.csv", ["id"], [["BDMAP_00000003"]])
    arguments: dict[str, Any] = {"rule": SplitRule(val_percent=0), "num_workers": 1}
    record = import_dataset("abdomenatlas", tmp_path / "in", tmp_path / "data", **arguments)
    leaks = {
        row["check"]: row for row in pl.read_parquet(tmp_path / "data/import/abdomenatlas/leaks.parquet").to_dicts()
    }
    assert set(leaks) == {"image in two splits", "question in two splits"} and record.num_leaks == 2
    assert leaks["image in two splits"]["detail"] == "BDMAP_00000001, BDMAP_00000003"
    assert "BDMAP_00000001, BDMAP_00000003" in Path(record.report).read_text()
    record = import_dataset("abdomenatlas", tmp_path / "in", tmp_path / "data", drop_leaks=True, **arguments)
    kept = {(q.scan_id[-1], q.split) for q in read_questions(tmp_path / "data/questions.jsonl")}
    assert kept == {("2", "train"), ("3", "test")} and record.num_dropped == 1


def question(number: int, split: str, **changed: Any) -> Question:
    fields: dict[str, Any] = {
        "question_id": f"q{number}",
        "scan_id": f"s{number}",
        "patient_id": f"p{number}",
        "split": split,
        "family": "recognition",
        "subtype": "nodule existence",
        "kind": "closed",
        "organ": "",
        "question": f"Is there a nodule of number {number}?",
        "options": ("yes", "no"),
        "answer": ("yes", "no")[number % 2],
    }
    return Question(**fields | changed)


def checks(questions: list[Question], voxels: dict[str, str] | None = None) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in find_leaks(questions, voxels or {}).to_dicts():
        found.setdefault(row["check"], []).append(row)
    return found


def test_no_leak_is_found_where_none_is() -> None:
    questions = [question(number, ("train", "val", "test")[number % 3]) for number in range(90)]
    assert checks(questions, {f"s{number}": f"{number:064}" for number in range(90)}) == {}
    assert without_leaks(questions, {}) == questions


def test_patients_and_scans_in_two_splits() -> None:
    questions = [question(1, "train"), question(2, "test", patient_id="p1"), question(3, "val"), question(4, "val")]
    found = checks(questions)
    assert [row["subject"] for row in found["patient in two splits"]] == ["p1"]
    assert found["patient in two splits"][0]["splits"] == ["train", "test"]
    assert [q.question_id for q in without_leaks(questions, {})] == ["q2", "q3", "q4"]
    questions = [question(1, "train"), question(2, "test", scan_id="s1", question=question(1, "train").question)]
    found = checks(questions)
    assert set(found) == {"scan of two patients", "question in two splits"}
    assert [q.question_id for q in without_leaks(questions, {})] == ["q2"]


def test_leaks_are_followed_over_several_patients() -> None:
    """1 and 2 share an image, 2 and 3 a patient: none of 1 may be learnt when 3 is tested."""
    questions = [
        question(1, "train"),
        question(2, "train"),
        question(3, "test", patient_id="p2"),
        question(4, "train"),
    ]
    kept = without_leaks(questions, {"s1": "x", "s2": "x"})
    assert [q.question_id for q in kept] == ["q3", "q4"]


def test_answers_told_by_the_words() -> None:
    told = [
        question(
            n, ("train", "test")[n % 2], question=f"Is there number {n // 2 % 2}?", answer=("yes", "no")[n // 2 % 2]
        )
        for n in range(200)
    ]
    assert checks(told)["told by the question"][0]["value"] == 1.0
    same = [question(number, "test", answer="no") for number in range(100)]
    assert checks(same)["always the same answer"][0]["detail"] == "the answer is 'no'"
    echo = [question(1, "test", kind="text", options=(), question="Is it left or right?", answer="Left.")]
    assert checks(echo)["answer in the question"][0]["value"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"dataset": "imagenet"}, "DATASET_UNKNOWN"),
        ({"scans": "move"}, "OPTION_UNKNOWN"),
        ({"input": Path("nowhere")}, "INPUT_MISSING"),
    ],
)
def test_wrong_arguments(rad: tuple[Path, Path], tmp_path: Path, arguments: dict[str, Any], code: str) -> None:
    defaults: dict[str, Any] = {"dataset": "3d-rad", "input": rad[0], "output": tmp_path / "data"}
    with pytest.raises(PhotonError, match=code):
        import_dataset(**defaults | arguments)
    assert not (tmp_path / "data").exists()


def test_folders_inside_each_other(rad: tuple[Path, Path], tmp_path: Path, made: Any) -> None:
    for input, output in ((rad[0], rad[0] / "data"), (rad[0], rad[0]), (rad[0], rad[1] / "data")):
        with pytest.raises(PhotonError, match="OUTPUT_MISPLACED"):
            import_dataset("3d-rad", input, output, options=ImportOptions(images=rad[1]))
    own = tmp_path / "mine/raw/images/BDMAP_00000001.nii.gz"
    own.parent.mkdir(parents=True)
    write_scan(made.chest(1), np.eye(4), own)
    before = own.read_bytes()
    made.write_csv(own.parent / "meta.csv", ["BDMAP ID", "liver volume (cm^3)"], [["BDMAP_00000001", "1500"]])
    with pytest.raises(PhotonError, match="OUTPUT_MISPLACED"):
        import_dataset("abdomenatlas", own.parent, tmp_path / "mine")
    assert own.read_bytes() == before and not own.is_symlink()


def test_options_that_do_not_exist() -> None:
    with pytest.raises(PhotonError, match="--rescale"):
        ImportOptions(rescale="twice")


def test_a_folder_whose_rows_are_all_bad(tmp_path: Path, made: Any) -> None:
    made.write_csv(tmp_path / "in/x.csv", made.RAD_HEADER, [made.rad_open(1, 1, "mine.nii.gz", "What?", "x")])
    with pytest.raises(PhotonError, match="DATASET_EMPTY.*volume name"):
        import_dataset("3d-rad", tmp_path / "in", tmp_path / "data")


def test_the_command(rad: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["import", "--dataset", "3d-rad", "--input", str(rad[0]), "--images", str(rad[1])]
    assert run([*arguments, "--output", str(tmp_path / "data"), "--val-percent", "40"]) == 0
    assert "16 (" in capsys.readouterr().out
    assert json.loads((tmp_path / "data/import/3d-rad/record.json").read_text())["num_scans_ok"] == 7
    next(rad[0].rglob("*.csv")).open("a").write("broken\n")
    assert run([*arguments, "--output", str(tmp_path / "data")]) == 3
    assert run([*arguments, "--output", str(tmp_path / "data"), "--rescale", "thrice"]) == 1
    assert run(["import", "--help"]) == 0
    assert "--rescale" in capsys.readouterr().out
