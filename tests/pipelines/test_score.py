"""The score stage: one row a scan and question, whatever happens to a scan or to the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from photon.errors import PhotonError
from pipelines.answers import Answer
from pipelines.files import lock_output
from pipelines.questions import EVERY_SCAN, Question, write_questions
from pipelines.results import ScoreRecord
from pipelines.scans.nifti import write_scan
from pipelines.score import score
from pipelines.score_store import SCORE_SCHEMA, join_parts, read_part, score_frame, write_part
from pipelines.volumes import Volume, VolumeSpec, read_volume

SPEC = VolumeSpec(spacing_mm=4.0, shape=(14, 28, 28), window_hu=(-200, 300))


class FakeModel:
    """Answers with the volume's mean and keeps as many tokens as the question is long."""

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.volume_spec = SPEC
        self.config_digest = "config"
        self.data_version = "data.dir"
        self.delay_s = delay_s
        self.num_calls = 0
        self.change: dict[str, object] = {}
        self.error: BaseException | None = None

    def answer(self, volume: Volume | None, questions: Sequence[Question]) -> list[Answer]:
        assert volume is not None
        self.num_calls += 1
        time.sleep(self.delay_s)
        if self.error:
            raise self.error
        return [
            Answer(
                **{
                    "question_id": question.question_id,
                    "text": f"{volume.voxels.mean():.3f}",
                    "confidence": 0.75,
                    "num_tokens": 200,
                    "kept": tuple(range(len(question.question))),
                    "seconds": time.perf_counter() % 1,
                    **self.change,
                }
            )
            for question in questions
        ]


def make_question(question_id: str, scan_id: str, text: str = "How bright is it?") -> Question:
    return Question(
        question_id=question_id,
        scan_id=scan_id,
        patient_id="",
        split="test",
        family="recognition",
        subtype="brightness",
        organ="",
        kind="text",
        question=text,
    )


def make_site(folder: Path, num_scans: int = 3) -> dict[str, Path]:
    """An archive of scans s0, s1 ... with two questions asked of every scan and one of s0 alone."""
    archive = folder / "archive"
    archive.mkdir(parents=True)
    for number in range(num_scans):
        array = np.random.RandomState(number).randint(-1000, 400, (16, 16, 12)).astype(np.int16)
        ending = ".nii" if number % 2 else ".nii.gz"
        write_scan(array, np.diag([4.0, 4.0, 4.0, 1.0]), archive / f"s{number}{ending}")
    asked = [
        make_question("q2", EVERY_SCAN),
        make_question("q1", EVERY_SCAN),
        make_question("q0", "s0", "Where?"),
    ]
    write_questions(asked, folder / "questions.jsonl")
    (folder / "model").mkdir()
    (folder / "model" / "model.onnx").write_bytes(b"weights")
    return {
        "archive": archive,
        "questions": folder / "questions.jsonl",
        "model": folder / "model",
        "output": folder / "out",
    }


def run_score(site: dict[str, Path], model: FakeModel, **options: object) -> ScoreRecord:
    return score(**site, **{"answerer": model, "model_version": "7"} | options)


def rows_of(record: ScoreRecord) -> pl.DataFrame:
    return pl.read_parquet(record.table, glob=False)


@pytest.fixture
def site(tmp_path: Path) -> dict[str, Path]:
    return make_site(tmp_path)


def test_one_row_a_scan_and_question(site: dict[str, Path]) -> None:
    seen: list[tuple[int, int, str]] = []
    record = run_score(site, FakeModel(), on_progress=lambda *step: seen.append(step))
    table = rows_of(record)
    assert table.schema == SCORE_SCHEMA
    assert table.select("scan_id", "question_id").rows() == [
        ("s0", "q0"), ("s0", "q1"), ("s0", "q2"), ("s1", "q1"), ("s1", "q2"), ("s2", "q1"), ("s2", "q2"),
    ]  # fmt: skip
    assert (record.num_scans, record.rows, record.failed_rows, record.refused_scans) == (3, 7, 0, 0)
    assert seen == [(1, 3, "s0"), (2, 3, "s1"), (3, 3, "s2")]
    first = table.row(0, named=True)
    assert first["source"] == "s0.nii.gz" and first["num_kept"] == len("Where?")
    assert first["kept"] == list(range(len("Where?"))) and first["error"] is None
    assert (first["model_version"], first["data_version"]) == ("7", "data.dir")
    volume = read_volume(site["output"] / "volumes" / "s0.safetensors", SPEC)
    assert first["answer"] == f"{volume.voxels.mean():.3f}"
    assert ScoreRecord.read(site["output"] / "score.json") == record


def test_model_version_defaults_to_the_digest_of_its_files(site: dict[str, Path]) -> None:
    before = run_score(site, FakeModel(), model_version=None).model_version
    (site["model"] / "model.onnx").write_bytes(b"other weights")
    after = run_score(site, FakeModel(), model_version=None).model_version
    assert before.startswith("sha256:") and after.startswith("sha256:") and before != after


def test_refused_scans_cost_their_own_rows_alone(site: dict[str, Path]) -> None:
    clean = rows_of(run_score(site | {"output": site["output"].with_name("clean")}, FakeModel()))
    content = bytearray((site["archive"] / "s0.nii.gz").read_bytes())
    content[-6] ^= 0x10  # in the checksum: the voxels themselves are whole
    (site["archive"] / "s0.nii.gz").write_bytes(content)
    (site["archive"] / "s3.nii").write_bytes((site["archive"] / "s1.nii").read_bytes()[:-100])
    write_scan(np.zeros((4, 4, 4, 3), np.int16), np.eye(4), site["archive"] / "s4.nii")
    record = run_score(site, FakeModel())
    table = rows_of(record)
    codes = {scan: table.filter(scan_id=scan)["error"].unique().to_list() for scan in ("s0", "s3", "s4")}
    assert codes == {"s0": ["GZIP_CORRUPT"], "s3": ["SCAN_TRUNCATED"], "s4": ["SCAN_NOT_3D"]}
    assert all(table.filter(pl.col("error").is_not_null())["message"].str.len_chars() > 10)
    assert (record.failed_rows, record.refused_scans, record.rows) == (7, 3, 11)
    healthy = pl.col("scan_id").is_in(["s1", "s2"])
    assert table.filter(healthy).drop("seconds").equals(clean.filter(healthy).drop("seconds"))
    assert not (site["output"] / "volumes" / "s0.safetensors").exists()


def test_question_about_an_absent_scan_gets_a_coded_row(site: dict[str, Path]) -> None:
    write_questions([make_question("a", "s1"), make_question("b", "../gone")], site["questions"])
    record = run_score(site, FakeModel())
    assert rows_of(record).select("scan_id", "error").rows() == [("../gone", "SCAN_MISSING"), ("s1", None)]
    assert (record.num_scans, record.failed_rows, record.refused_scans) == (1, 1, 0)


def test_chosen_questions_alone(site: dict[str, Path]) -> None:
    record = run_score(site, FakeModel(), question_ids=["q0", "q0"])
    assert rows_of(record).select("scan_id", "question_id").rows() == [("s0", "q0")]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"confidence": float("nan")}, "nan"),
        ({"confidence": None}, "TypeError"),
        ({"kept": (5, 900)}, "200"),
        ({"question_id": "other"}, "other"),
        ({"text": None}, "incomplete"),
    ],
)
def test_nonsense_from_the_model_becomes_coded_rows(
    site: dict[str, Path], change: dict[str, object], word: str
) -> None:
    model = FakeModel()
    model.change = change
    table = rows_of(run_score(site, model))
    assert table["error"].unique().to_list() == ["SCORING_FAILED"]
    assert word.lower() in table["message"][0].lower() and table["answer"].null_count() == table.height
    model.change = {}
    assert rows_of(run_score(site, model))["error"].null_count() == 7, "a failed scan is tried again"


def test_too_few_answers_and_exceptions_become_coded_rows(site: dict[str, Path]) -> None:
    model = FakeModel()
    model.error = RuntimeError("shape mismatch at node 7")
    table = rows_of(run_score(site, model))
    assert table["message"].unique().to_list() == ["RuntimeError: shape mismatch at node 7"]
    model.error = PhotonError("QUESTION_TOO_LONG", "q1", "it has 900 tokens.", "Shorten it.")
    assert rows_of(run_score(site, model))["error"].unique().to_list() == ["QUESTION_TOO_LONG"]
    model.error = None
    model.answer = lambda volume, questions: []  # type: ignore[method-assign]
    site = site | {"output": site["output"].with_name("few")}
    assert rows_of(run_score(site, model))["error"].unique().to_list() == ["SCORING_FAILED"]


def test_a_question_the_model_refuses_costs_its_own_row_alone(site: dict[str, Path]) -> None:
    clean = rows_of(run_score(site | {"output": site["output"].with_name("clean")}, FakeModel()))
    model = FakeModel()
    real = model.answer

    def answer(volume: Volume | None, questions: Sequence[Question]) -> list[Answer]:
        if any(question.question_id == "q0" for question in questions):
            raise PhotonError("QUESTION_NOT_UNDERSTOOD", "q0", "unknown word.", "Ask otherwise.")
        return real(volume, questions)

    model.answer = answer  # type: ignore[method-assign]
    record = run_score(site, model)
    table = rows_of(record)
    assert table.filter(question_id="q0")["error"].to_list() == ["QUESTION_NOT_UNDERSTOOD"]
    assert (record.failed_rows, record.refused_scans) == (1, 0)
    others = pl.col("question_id") != "q0"
    assert table.filter(others).drop("seconds").equals(clean.filter(others).drop("seconds"))


def test_an_interrupt_ends_the_run_and_keeps_finished_parts(site: dict[str, Path]) -> None:
    model = FakeModel()
    real = model.answer

    def answer(volume: Volume | None, questions: Sequence[Question]) -> list[Answer]:
        if model.num_calls == 2:
            raise KeyboardInterrupt
        return real(volume, questions)

    model.answer = answer  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_score(site, model)
    assert not (site["output"] / "scores.parquet").exists()
    record = run_score(site, FakeModel())
    assert (record.resumed_rows, record.rows) == (5, 7)


def test_second_run_repeats_nothing_not_even_refusals(site: dict[str, Path]) -> None:
    (site["archive"] / "bad.nii").write_bytes(b"no header")
    model = FakeModel()
    first = run_score(site, model)
    second = run_score(site, model)
    assert model.num_calls == 3 and second.resumed_rows == second.rows == first.rows
    assert rows_of(first).equals(rows_of(second))


def test_changed_scan_alone_is_asked_again(site: dict[str, Path]) -> None:
    run_score(site, FakeModel())
    array = np.random.RandomState(9).randint(-1000, 400, (16, 16, 12)).astype(np.int16)
    write_scan(array, np.diag([4.0, 4.0, 4.0, 1.0]), site["archive"] / "s1.nii")
    model = FakeModel()
    record = run_score(site, model)
    assert (model.num_calls, record.resumed_rows, record.rows) == (1, 5, 7)


def test_lost_or_foreign_volume_is_made_again(site: dict[str, Path]) -> None:
    run_score(site, FakeModel())
    volumes = site["output"] / "volumes"
    (volumes / "s1.safetensors").unlink()
    (volumes / "s2.safetensors").write_bytes((volumes / "s0.safetensors").read_bytes())
    model = FakeModel()
    run_score(site, model)
    assert model.num_calls == 2
    assert not np.array_equal(
        read_volume(volumes / "s2.safetensors").voxels, read_volume(volumes / "s0.safetensors").voxels
    )


def test_parts_of_another_model_or_other_questions_are_never_mixed_in(site: dict[str, Path]) -> None:
    run_score(site, FakeModel())
    (site["model"] / "model.onnx").write_bytes(b"other weights")
    other = run_score(site, FakeModel(), model_version="8")
    assert other.resumed_rows == 0 and rows_of(other)["model_version"].unique().to_list() == ["8"]
    fewer = run_score(site, FakeModel(), model_version="8", question_ids=["q1"])
    assert (fewer.resumed_rows, fewer.rows) == (0, 3)
    again = run_score(site, FakeModel(), model_version="8")
    assert (again.resumed_rows, again.rows) == (7, 7)


def test_damaged_part_is_scored_again(site: dict[str, Path]) -> None:
    run_score(site, FakeModel())
    part = min((site["output"] / "parts").iterdir())
    part.write_bytes(part.read_bytes()[:-20])
    (site["output"] / "parts" / ".left.parquet.x.tmp").write_bytes(b"half")
    model = FakeModel()
    assert run_score(site, model).rows == 7 and model.num_calls == 1
    assert not list((site["output"] / "parts").glob(".*.tmp"))


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_score
folder = Path(sys.argv[2])
site = {name: folder / place for name, place in
        {"archive": "archive", "questions": "questions.jsonl", "model": "model", "output": "out"}.items()}
test_score.run_score(site, test_score.FakeModel(delay_s=0.15))
"""


@contextmanager
def slow_run(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that scores the archive in ``folder`` slowly; killed without warning at the end of the block."""
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        yield process
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_parts(folder: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while len(list((folder / "out" / "parts").glob("*.parquet"))) < count:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_run_goes_on_with_each_row_exactly_once(tmp_path: Path) -> None:
    site = make_site(tmp_path, num_scans=10)
    whole = rows_of(run_score(site | {"output": tmp_path / "whole"}, FakeModel()))
    for num_parts in (2, 5):
        with slow_run(tmp_path) as process:
            wait_for_parts(tmp_path, num_parts, process)
        assert not (site["output"] / "scores.parquet").exists()
    model = FakeModel()
    record = run_score(site, model)
    table = rows_of(record)
    assert record.resumed_rows >= 2 * 5 and model.num_calls <= 5
    assert table.drop("seconds").equals(whole.drop("seconds"))


def test_second_process_is_refused_and_a_dead_ones_lock_is_free(tmp_path: Path) -> None:
    site = make_site(tmp_path, num_scans=10)
    with slow_run(tmp_path) as process:
        wait_for_parts(tmp_path, 1, process)
        with pytest.raises(PhotonError) as caught:
            run_score(site, FakeModel())
        assert caught.value.code == "OUTPUT_BUSY" and str(process.pid) in caught.value.fact
    assert run_score(site, FakeModel()).rows == 21


def test_bad_input(site: dict[str, Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    strangers = tmp_path / "strangers.jsonl"
    write_questions([make_question("q", "nobody")], strangers)
    cases: dict[str, tuple[dict[str, Path], dict[str, object]]] = {
        "INPUT_MISSING": (site | {"archive": tmp_path / "none"}, {}),
        "ARCHIVE_EMPTY": (site | {"archive": empty}, {}),
        "OUTPUT_UNWRITABLE": (site | {"output": site["questions"]}, {}),
        "QUESTIONS_UNREADABLE": (site | {"questions": tmp_path / "none.jsonl"}, {}),
        "QUESTIONS_MISMATCH": (site | {"questions": strangers}, {}),
        "UNKNOWN_QUESTION": (site, {"question_ids": ["q1", "q99"]}),
        "MODALITY_UNKNOWN": (site, {"modality": "pet"}),
    }
    for code, (places, options) in cases.items():
        with pytest.raises(PhotonError) as caught:
            run_score(places, FakeModel(), **options)
        assert caught.value.code == code


def test_a_failed_start_leaves_an_earlier_table_alone(site: dict[str, Path]) -> None:
    table = Path(run_score(site, FakeModel()).table)
    before = table.read_bytes()
    with pytest.raises(PhotonError):
        run_score(site, FakeModel(), question_ids=["q99"])
    assert table.read_bytes() == before


ROW = {
    "scan_id": "a", "source": "a.nii", "question_id": "q", "question": "?", "answer": "yes",
    "confidence": 0.5, "num_tokens": 9, "num_kept": 2, "kept": [1, 5], "seconds": 0.1,
    "model_version": "1", "data_version": "d",
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"scan_id": None},
        {"answer": None},
        {"kept": None},
        {"confidence": float("nan")},
        {"confidence": 1.5},
        {"num_kept": 3},
        {"num_tokens": 1},
        {"error": "CODE", "message": "text"},
        {"message": "text"},
    ],
)
def test_rows_that_break_the_schema_are_not_written(tmp_path: Path, change: dict[str, object]) -> None:
    frame = pl.DataFrame([ROW | change], schema=SCORE_SCHEMA)
    with pytest.raises(ValueError, match="scan"):
        write_part(tmp_path / "p.parquet", frame)
    assert not list(tmp_path.iterdir())


def test_rows_are_checked_for_repeats_and_columns() -> None:
    with pytest.raises(ValueError, match="twice"):
        score_frame([ROW, ROW])
    with pytest.raises(ValueError, match="columns"):
        write_part(Path("never"), score_frame([ROW]).drop("kept"))


def test_parts_in_a_folder_with_wildcards_in_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "run[1]*"
    folder.mkdir()
    parts = [folder / "b.parquet", folder / "a.parquet"]
    for part in parts:
        write_part(part, score_frame([ROW | {"scan_id": part.stem}]))
    join_parts(parts, folder / "scores.parquet")
    joined = read_part(folder / "scores.parquet")
    assert joined is not None and joined["scan_id"].to_list() == ["b", "a"]


def test_lock_is_free_again_after_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with lock_output(tmp_path), pytest.raises(PhotonError, match=str(os.getpid())), lock_output(tmp_path):
            pass
