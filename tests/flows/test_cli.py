"""The `photon` command: its help, its messages, its exit codes, and that it never loses what is there."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import flows.preprocess  # noqa: F401 - Prefect logs to the stream it finds when it is imported first
from flows import cli
from flows.cli import COMMANDS
from flows.progress import show_progress
from photon.checkpoint import CONFIG, WEIGHTS, read_pretrained
from photon.errors import PhotonError
from photon.model.network import PATCH_EMBEDDING
from photon.testing import micro_config, micro_model
from pipelines.answers import Answer
from pipelines.files import file_digest
from pipelines.questions import EVERY_SCAN, Question, write_questions
from pipelines.scans.nifti import write_scan
from pipelines.train_spec import TrainSpec
from pipelines.versioning import folder_version, read_version, version_folder
from pipelines.volumes import VOLUME_SPECS

NAMES = [command.__name__ for command in COMMANDS]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder with databases of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHOTON_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("PHOTON_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def photon(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command line; returns exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def make_archive(folder: Path, *, with_bad_scan: bool = False) -> Path:
    archive = folder / "archive"
    archive.mkdir()
    for number in range(2):
        array = np.random.RandomState(number).randint(-1000, 400, (12, 12, 8)).astype(np.int16)
        write_scan(array, np.diag([6.0, 6.0, 6.0, 1.0]), archive / f"s{number}.nii.gz")
    if with_bad_scan:
        (archive / "bad.nii").write_bytes((archive / "s0.nii.gz").read_bytes())
    return archive


def make_questions(folder: Path, scan_id: str = EVERY_SCAN) -> Path:
    question = Question(
        question_id="q1",
        scan_id=scan_id,
        patient_id="",
        split="test",
        family="recognition",
        subtype="",
        organ="",
        kind="text",
        question="What is it?",
    )
    write_questions([question], folder / "questions.jsonl")
    return folder / "questions.jsonl"


class FakeModel:
    def __init__(self, _folder: Path) -> None:
        self.volume_spec = VOLUME_SPECS["smoke"]
        self.config_digest, self.data_version = "config", "data.dir"

    def answer(self, _volume: object, questions: list[Question]) -> list[Answer]:
        return [
            Answer(question_id=q.question_id, text="yes", confidence=0.5, num_tokens=9, kept=(1, 2), seconds=0.1)
            for q in questions
        ]


def test_every_command_has_help_with_an_example(photon: Callable[..., tuple[int, str, str]]) -> None:
    code, text, _ = photon("--help")
    assert code == 0 and all(name in text for name in NAMES)
    for name in NAMES:
        code, text, _ = photon(name, "--help")
        assert code == 0 and f"Example: photon {name} " in text
    assert photon("--version")[1].startswith("photon ")


def test_stages_of_the_mission_are_all_there() -> None:
    assert {"preprocess", "train", "evaluate", "export", "score", "retrain", "report"} <= set(NAMES)


def test_examples_use_options_that_exist(photon: Callable[..., tuple[int, str, str]]) -> None:
    for command in COMMANDS:
        example = (command.__doc__ or "").split("Example: `photon ")[1].split("`")[0].split()
        text = " ".join(photon(command.__name__, "--help")[1].split())
        assert all(f"{word} " in text for word in example if word.startswith("--")), command.__name__


def test_help_is_quick_and_imports_no_stage() -> None:
    heavy = ("torch", "mlflow", "prefect", "onnxruntime", "polars", "nibabel", "numpy", "dvc")
    program = f"import sys, flows.cli; flows.cli.run(['--help']); sys.exit(any(m in sys.modules for m in {heavy}))"
    started = time.perf_counter()
    assert subprocess.run([sys.executable, "-c", program], capture_output=True).returncode == 0
    assert time.perf_counter() - started < 5, "0.3 s on an idle machine"


def test_help_writes_nothing(place: Path, photon: Callable[..., tuple[int, str, str]]) -> None:
    for name in NAMES:
        photon(name, "--help")
    assert not list(place.iterdir())


def test_console_command_is_installed() -> None:
    program = Path(sys.executable).with_name("photon")
    done = subprocess.run([program, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("photon ")


def test_preprocess_tells_what_it_refused(place: Path, photon: Callable[..., tuple[int, str, str]]) -> None:
    archive = make_archive(place)
    arguments = ("preprocess", "--input", archive, "--output", place / "out", "--preset", "smoke")
    code, text, _ = photon(*arguments)
    assert code == 0 and "manifest.parquet" in text
    (archive / "bad.nii").write_bytes(b"no scan")
    code, text, error = photon(*arguments)
    assert code == 3 and "SCAN_UNREADABLE" in text and "preprocess: 3/3" in error
    assert pl.read_parquet(place / "out" / "manifest.parquet").height == 3


def test_runners_of_preprocessing_are_told_and_options_fit_them(
    place: Path, photon: Callable[..., tuple[int, str, str]]
) -> None:
    text = " ".join(photon("preprocess", "--help")[1].replace("│", " ").split())
    assert "processes or threads of this machine, dask or ray" in text
    arguments = ("preprocess", "--input", make_archive(place), "--output", place / "out", "--preset", "smoke")
    for more in (("--address", "tcp://x:1"), ("--runner", "threads", "--address", "tcp://x:1")):
        code, text, error = photon(*arguments, *more)
        assert code == 1 and error.startswith("photon: [OPTION_UNUSED] --address: ") and not text
    code, _, error = photon(*arguments, "--scans-per-task", 4)
    assert code == 1 and "[OPTION_UNUSED] --scans-per-task" in error
    assert not (place / "out").exists()


def test_a_contact_sheet_tells_which_volumes_cannot_be_read(
    place: Path, photon: Callable[..., tuple[int, str, str]]
) -> None:
    archive = make_archive(place)
    (archive / "bad.nii").write_bytes(b"no scan")
    photon("preprocess", "--input", archive, "--output", place / "out", "--preset", "smoke")
    arguments = ("contact-sheet", "--volumes", place / "out", "--output", place / "scans.html")
    code, text, _ = photon(*arguments)
    assert code == 0 and re.search(r"^unread +0$", text, re.MULTILINE), "a refused scan has been told before"
    (place / "out" / "s0.safetensors").unlink()
    code, text, _ = photon(*arguments)
    assert code == 3 and "[VOLUME_MISSING] s0.safetensors: the file does not exist. Run" in text
    assert re.search(r"^shown +1$", text, re.MULTILINE) and re.search(r"^unread +1$", text, re.MULTILINE)
    assert "VOLUME_MISSING" in (place / "scans.html").read_text(encoding="utf-8")


def test_versions_of_the_data_are_told_compared_and_restored(
    place: Path, photon: Callable[..., tuple[int, str, str]]
) -> None:
    data = place / "project" / "data"
    shutil.copytree(make_archive(place), data / "raw")
    arguments = ("preprocess", "--input", data / "raw", "--output", data / "volumes", "--preset", "smoke")
    assert photon(*arguments)[0] == 0 and not data.with_name("data.dvc").exists()
    code, text, _ = photon(*arguments, "--record")
    assert code == 0 and re.search(r"^added +2$", text, re.MULTILINE)
    first = read_version(data.with_name("data.dvc"))
    (data / "raw" / "bad.nii").write_bytes(b"no scan")
    code, text, _ = photon(*arguments)  # recorded, as the folder has a version
    assert code == 3 and re.search(r"^refused +1$", text, re.MULTILINE)
    second = read_version(data.with_name("data.dvc"))
    _, text, _ = photon("versions", "--data", data)
    assert first != second and text.index(second) < text.index(first)
    _, text, _ = photon("diff", first[:8], second[:8], "--data", data)
    assert "bad" in text and re.search(r"^added +0$", text, re.MULTILINE)
    assert photon("restore", first[:8], "--data", data)[0] == 0
    assert folder_version(data) == first and not (data / "raw" / "bad.nii").exists()
    code, text, _ = photon("contact-sheet", "--volumes", data / "volumes", "--output", place / "scans.html")
    assert code == 0 and (place / "scans.html").is_file()


def test_versions_of_other_data_folders_are_kept_apart(
    place: Path, photon: Callable[..., tuple[int, str, str]]
) -> None:
    first, second = place / "first", place / "second"
    found = []
    for number, data in enumerate((first, second)):
        data.mkdir()
        (data / "a.txt").write_text(str(number))
        photon("record", "--data", data, "--no-track")
        found.append(read_version(data.with_name(f"{data.name}.dvc")))
    _, text, _ = photon("versions", "--data", first)
    assert found[0] in text and found[1] not in text and "1 more of other data folders" in text
    _, text, _ = photon("versions", "--data", first, "--all")
    assert found[1] in text and "unknown" not in text
    code, _, error = photon("restore", found[1][:8], "--data", first)
    assert code == 1 and "[VERSION_FOREIGN]" in error and "of the data folder second" in error
    assert (first / "a.txt").read_text() == "0"
    assert photon("diff", found[0][:8], found[1][:8], "--data", first)[0] == 0
    assert photon("restore", found[1][:8], "--data", first, "--from-other")[0] == 0
    assert (first / "a.txt").read_text() == "1"


def test_versions_of_which_nobody_noted_the_folder_are_told(
    place: Path, photon: Callable[..., tuple[int, str, str]]
) -> None:
    data = place / "data"
    data.mkdir()
    for number in range(2):
        (data / "a.txt").write_text(str(number))
        version_folder(data)
    _, text, _ = photon("versions", "--data", data)
    assert "unknown: nobody noted the folder" in text and text.count(".dir") == 2


def test_score_tells_its_rows_and_exits_with_3_when_some_failed(
    place: Path, photon: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.score._open_model", FakeModel)
    archive, questions = make_archive(place), make_questions(place)
    arguments = ("score", "--archive", archive, "--questions", questions, "--model", place / "model")
    code, text, _ = photon(*arguments, "--output", place / "out")
    assert code == 0 and "scores.parquet" in text
    (archive / "bad.nii").write_bytes(b"no scan")
    code, text, _ = photon(*arguments, "--output", place / "out")
    assert code == 3 and "SCAN_UNREADABLE" in text and "2 of them from an earlier start" in text
    table = pl.read_parquet(place / "out" / "scores.parquet")
    assert table.select("scan_id", "error").rows() == [("bad", "SCAN_UNREADABLE"), ("s0", None), ("s1", None)]
    before = file_digest(place / "out" / "scores.parquet")
    code, _, error = photon(*arguments, "--output", place / "out", "--question-id", "q9")
    assert code == 1 and "[UNKNOWN_QUESTION] q9" in error
    assert file_digest(place / "out" / "scores.parquet") == before


def bad_calls(place: Path) -> dict[str, tuple[object, ...]]:
    """Command lines that cannot work, by what is wrong with them and the code they must end with."""
    archive, questions = make_archive(place), make_questions(place)
    empty, blocked = place / "empty", place / "file"
    empty.mkdir()
    blocked.write_text("in the way")
    score = ("score", "--questions", questions, "--model", place / "none", "--output", place / "out", "--archive")
    return {
        "missing input INPUT_MISSING": ("preprocess", "--input", place / "none", "--output", place / "out"),
        "empty input ARCHIVE_EMPTY": ("preprocess", "--input", empty, "--output", place / "out"),
        "unwritable OUTPUT_UNWRITABLE": ("preprocess", "--input", archive, "--output", blocked / "out"),
        "unknown grid PRESET_UNKNOWN": ("preprocess", "--input", archive, "--output", "out", "--preset", "x"),
        "unknown modality MODALITY_UNKNOWN": (
            "preprocess", "--input", archive, "--output", place / "out", "--modality", "pet",
        ),
        "missing archive INPUT_MISSING": (*score, place / "none"),
        "empty archive ARCHIVE_EMPTY": (*score, empty),
        "unwritable scores OUTPUT_UNWRITABLE": (*score, archive, "--output", blocked),
        "no questions QUESTIONS_UNREADABLE": (*score, archive, "--questions", place / "none.jsonl"),
        "unknown question UNKNOWN_QUESTION": (*score, archive, "--question-id", "q9"),
        "unknown size PRESET_UNKNOWN": ("generate", "--preset", "x"),
        "unwritable data OUTPUT_UNWRITABLE": ("generate", "--preset", "smoke", "--output", blocked / "data"),
        "missing data DATA_MISSING": ("train", "--data", place / "none", "--no-track"),
        "unwritable run OUTPUT_UNWRITABLE": ("retrain", "--preset", "smoke", "--no-prefect", "--output", blocked),
        "no model MODEL_UNKNOWN": (*score, archive, "--model", "models:/nobody@champion"),
        "bad preset PRESET_UNKNOWN": ("retrain", "--preset", "x"),
    }  # fmt: skip


def test_bad_input_is_one_clear_line_and_exit_code_1(place: Path, photon: Callable[..., tuple[int, str, str]]) -> None:
    for name, arguments in bad_calls(place).items():
        code, text, error = photon(*arguments)
        lines = [line for line in error.splitlines() if not line.startswith(("preprocess:", "score:"))]
        assert code == 1, name
        assert len(lines) == 1 and lines[0].startswith(f"photon: [{name.split()[-1]}] "), (name, error)
        assert not text, name
    assert (place / "file").read_text() == "in the way"


def test_missing_checkpoint_is_one_clear_line(place: Path, photon: Callable[..., tuple[int, str, str]]) -> None:
    make_questions(place, "s0")
    photon("preprocess", "--input", make_archive(place), "--output", place / "volumes", "--preset", "smoke")
    arguments = ("--data", place, "--checkpoint", place / "none", "--output", place / "out")
    for command in (("evaluate", *arguments, "--no-track"), ("export", *arguments)):
        code, _, error = photon(*command)
        assert code == 1 and error.count("\n") == 1, error
        assert error.startswith("photon: [CHECKPOINT_MISSING] "), error


def test_evaluate_hands_on_how_closed_questions_are_answered(
    place: Path, photon: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[str] = []

    def evaluate(*_: object, closed_by: str, **__: object) -> None:
        handed.append(closed_by)
        raise PhotonError("SPLIT_EMPTY", "x", "nothing.", "Stop here.")

    make_questions(place, "s0")
    monkeypatch.setattr("pipelines.evaluate.evaluate", evaluate)
    arguments = ("evaluate", "--data", place, "--output", place / "out", "--no-track")
    for more in ((), ("--closed-by", "likelihood"), ("--closed-by", "generation")):
        assert photon(*arguments, *more)[0] == 1
    assert handed == ["generation", "likelihood", "generation"]
    assert photon(*arguments, "--closed-by", "dice")[0] == 2 and len(handed) == 3


def test_train_and_evaluate_hand_on_precision_and_memory(
    place: Path, photon: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    handed: list[tuple[object, ...]] = []

    def stop() -> None:
        raise PhotonError("SPLIT_EMPTY", "x", "nothing.", "Stop here.")

    def train(spec: TrainSpec, *_: object, checkpoint_activations: bool, **__: object) -> None:
        sizes = {(draw.scans_per_step, draw.questions_per_scan) for draw in (spec.draw, spec.pruned_draw)}
        handed.append((spec.optimiser.precision, checkpoint_activations, sizes))
        stop()

    def evaluate(*_: object, precision: str, **__: object) -> None:
        handed.append((precision,))
        stop()

    make_questions(place, "s0")
    monkeypatch.setattr("pipelines.train.train", train)
    monkeypatch.setattr("pipelines.evaluate.evaluate", evaluate)
    arguments = ("--data", place, "--output", place / "out", "--no-track")
    sizes = ("--scans-per-step", 1, "--questions-per-scan", 2)
    assert photon("train", *arguments)[0] == 1
    assert photon("train", *arguments, *sizes, "--precision", "bfloat16", "--recompute")[0] == 1
    assert photon("evaluate", *arguments)[0] == 1
    assert photon("evaluate", *arguments, "--precision", "bfloat16")[0] == 1
    assert handed == [
        ("float32", False, {(8, 24), (8, 12)}),
        ("bfloat16", True, {(1, 2)}),
        ("float32",),
        ("bfloat16",),
    ]
    for wrong in (("--precision", "float16"), ("--scans-per-step", 0)):
        assert photon("train", *arguments, *wrong)[0] == 2
    assert len(handed) == 4


def test_train_prints_what_the_checkpoint_lacked_and_what_of_it_is_ignored(
    place: Path, photon: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = micro_model(micro_config())
    held = {name: value.detach().clone() for name, value in model.named_parameters() if name != PATCH_EMBEDDING}
    held["visual.patch_embed.proj.weight"] = torch.ones(model.config.vision.hidden_size, 3, 2, 14, 14)
    folder = place / "qwen"
    folder.mkdir()
    save_file(held, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(model.config.to_hf()))

    def train(*_: object, start_from: Path, **__: object) -> None:
        for _twin in range(2):
            read_pretrained(start_from, seed=3)
        raise PhotonError("SPLIT_EMPTY", "x", "nothing.", "Stop here.")

    make_questions(place, "s0")
    monkeypatch.setattr("pipelines.train.train", train)
    _, _, error = photon("train", "--data", place, "--start-from", folder, "--no-track")
    lines = error.splitlines()
    assert lines[:2] == [
        f"Initialised from seed 3: {PATCH_EMBEDDING}.",
        "Ignored in the checkpoint: visual.patch_embed.proj.weight.",
    ]
    assert len(lines) == 3 and lines[2].startswith("photon: [SPLIT_EMPTY]")
    assert not logging.getLogger("photon").handlers, "the command leaves the logger as it was"


def test_unwritable_state_folder_is_told(
    place: Path, photon: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "file").write_text("in the way")
    monkeypatch.setenv("PHOTON_STATE", str(place / "file" / "state"))
    code, _, error = photon("generate", "--preset", "smoke")
    assert code == 1 and error.startswith("photon: [OUTPUT_UNWRITABLE] ")


def test_wrong_usage_exits_with_2(photon: Callable[..., tuple[int, str, str]]) -> None:
    for arguments in (("nonsense",), ("score",), ("train", "--nonsense"), ("train", "--seed", "x")):
        code, _, error = photon(*arguments)
        assert code == 2 and "Usage: photon" in error and "Traceback" not in error


def test_unexpected_faults_are_short_unless_asked_for(
    photon: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by\nnothing")

    monkeypatch.setattr("pipelines.phantoms.generate", fail)
    code, _, error = photon("generate")
    assert code == 2 and error.splitlines()[-1].startswith("photon: unexpected ZeroDivisionError: by nothing (")
    assert "Traceback" not in error and "--debug" in error
    code, _, error = photon("--debug", "generate")
    assert code == 2 and "Traceback" in error
    monkeypatch.setenv("PHOTON_DEBUG", "1")
    assert "Traceback" in photon("generate")[2]


def test_debug_shows_where_a_coded_error_came_from(place: Path, photon: Callable[..., tuple[int, str, str]]) -> None:
    code, _, error = photon("--debug", "preprocess", "--input", place / "none", "--output", place / "out")
    assert code == 1 and "Traceback" in error and error.splitlines()[-1].startswith("photon: [INPUT_MISSING]")


def test_an_interrupt_exits_with_130(
    photon: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.phantoms.generate", interrupt)
    code, _, error = photon("generate")
    assert code == 130 and "Traceback" not in error


def test_progress_off_a_terminal_is_a_line_every_tenth() -> None:
    stream = io.StringIO()
    with show_progress("score", Console(file=stream)) as on_progress:
        for done in range(1, 201):
            on_progress(done, 200, f"[scan] {done}")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11 and lines[0] == "score: 1/200 [scan] 1" and lines[-1] == "score: 200/200 [scan] 200"


def test_progress_on_a_terminal_is_a_bar() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with show_progress("score", console) as on_progress:
        on_progress(3, 4)
        on_progress(4, 4, "last scan")
    assert "4/4" in stream.getvalue() and "last scan" in stream.getvalue()


def test_progress_does_not_hide_an_error() -> None:
    with pytest.raises(PhotonError), show_progress("score", Console(file=io.StringIO())):
        raise PhotonError("CODE", "subject", "fact.", "remedy.")
