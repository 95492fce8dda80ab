"""The evaluate stage with answerers whose right and wrong answers, and kept tokens, are known beforehand."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from photon.errors import PhotonError
from pipelines.anatomy import LABELS
from pipelines.answers import ANSWER_SCHEMA, Answer, Answerer, read_answers
from pipelines.baselines import MajorityAnswerer
from pipelines.evaluate import evaluate
from pipelines.manifest import write_manifest
from pipelines.questions import Question, write_questions
from pipelines.results import EvaluateRecord
from pipelines.scans.nifti import write_scan
from pipelines.scans.scan import read_scan
from pipelines.tracking import MemoryTracker
from pipelines.volumes import VOLUME_SPECS, Volume, resample, write_volume

SPEC = VOLUME_SPECS["smoke"]  # 42 x 56 x 56 voxels of 6 mm: 3 x 2 x 2 = 12 tokens
LPS = np.diag([-6.0, -6.0, 6.0, 1.0])  # file axes (X, Y, Z) as the grid's, so that label voxels need no thought
LIVER_TOKENS = {0, 1}


def _question(scan: str, name: str, **fields: Any) -> Question:
    values: dict[str, Any] = {
        "family": "recognition", "subtype": "liver lesion existence", "organ": "liver", "kind": "closed",
        "question": "Is there a liver lesion?", "options": ("yes", "no"), "answer": "yes",
    }  # fmt: skip
    split = "train" if scan.startswith("train") else "test"
    return Question(question_id=f"{scan}-{name}", scan_id=scan, patient_id=f"p-{scan}", split=split, **values | fields)


def _questions_about(scan: str, is_ill: bool) -> list[Question]:
    return [
        _question(scan, "lesion", answer="yes" if is_ill else "no"),
        _question(
            scan, "volume", family="measurement", subtype="organ volume", kind="number", options=(),
            question="Liver volume?", answer="100 mL", value=100.0, unit="mL",
        ),
        _question(
            scan, "heart", family="visual reasoning", subtype="largest organ", organ="heart", kind="text",
            question="Which side is the heart on?", options=(), answer="left side",
        ),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three test scans, of which the middle one is healthy, one training scan and one refused scan."""
    folder = tmp_path_factory.mktemp("data")
    for part in ("raw/images", "raw/labels", "volumes"):
        (folder / part).mkdir(parents=True)
    rows, questions = [], []
    for scan, is_ill in {"test_a": True, "test_b": False, "test_c": True, "train_d": True}.items():
        rows.append(_write_scan(folder, scan))
        questions += _questions_about(scan, is_ill)
    rows.append(
        {
            "scan_id": "test_x", "source": "test_x.nii", "status": "SCAN_TRUNCATED", "message": "cut off",
            "spec_digest": SPEC.digest(),
        }
    )  # fmt: skip
    questions.append(_question("test_x", "lesion"))
    write_manifest(rows, folder / "volumes" / "manifest.parquet")
    write_questions(questions, folder / "questions.jsonl")
    return folder


def _write_scan(folder: Path, scan: str) -> dict[str, Any]:
    image = np.full((56, 56, 42), -1000, dtype=np.int16)
    image[10:46, 10:46, :] = 50
    labels = np.zeros(image.shape, dtype=np.uint8)
    labels[4:40, 4:20, 2:12] = LABELS["liver"]  # X spans both token columns, Y and Z the first token row and slab
    path = folder / "raw" / "images" / f"{scan}.nii"
    write_scan(image, LPS, path)
    write_scan(labels, LPS, folder / "raw" / "labels" / f"{scan}.nii")
    source = read_scan(path)
    digest = write_volume(resample(source, SPEC), folder / "volumes" / f"{scan}.safetensors")
    return {
        "scan_id": scan, "source": path.name, "source_sha256": source.sha256, "status": "ok", "message": "",
        "volume": f"{scan}.safetensors", "volume_sha256": digest, "spec_digest": SPEC.digest(),
        "shape": [56, 56, 42], "spacing_mm": [6.0, 6.0, 6.0], "orientation": "LPS", "modality": "ct",
    }  # fmt: skip


@dataclasses.dataclass
class FakeAnswerer:
    """Right about lesions when it sees the scan, 10 % off in volumes, never right about the heart.

    Questions about the liver keep its two tokens and one more, others keep the last six.
    """

    policy: str

    def answer(self, volume: Volume | None, questions: Sequence[Question]) -> list[Answer]:
        assert (volume is None) == (self.policy == "blind")
        return [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Answer:
        kept: tuple[int, ...] = tuple(range(12)) if self.policy == "all_tokens" else (0, 1, 5)
        if self.policy == "photon" and question.organ != "liver":
            kept = tuple(range(6, 12))
        texts = {"closed": question.answer.title(), "number": "110 mL", "text": "Left."}
        if self.policy == "blind":
            kept, texts = (), {"closed": "yes", "number": "unsure", "text": "left side"}
        return Answer(
            question_id=question.question_id,
            text=texts[question.kind],
            confidence=0.9,
            num_tokens=0 if self.policy == "blind" else 12,
            kept=kept,
            seconds=0.01,
        )


def _open(checkpoint: Path, policy: str) -> Answerer:
    assert checkpoint.name == ("blind" if policy == "blind" else "model")
    return FakeAnswerer(policy)


@pytest.fixture(scope="module")
def evaluated(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[EvaluateRecord, MemoryTracker, Path]:
    output, tracker = tmp_path_factory.mktemp("out") / "evaluate", MemoryTracker()
    record = evaluate(
        Path("model"), data, output, blind_checkpoint=Path("blind"), data_version="md5", tracker=tracker,
        open_answerer=_open,
    )  # fmt: skip
    return record, tracker, output


def test_accuracy_of_every_policy(evaluated: tuple[EvaluateRecord, MemoryTracker, Path]) -> None:
    accuracy = evaluated[0].accuracy
    assert accuracy["photon"]["value"] == pytest.approx((3 * 1 + 3 * 0.8 + 0) / 9)
    assert accuracy["all_tokens"]["value"] == pytest.approx(accuracy["photon"]["value"])
    assert accuracy["blind"]["value"] == pytest.approx((2 + 0 + 3) / 9)
    assert accuracy["majority"]["value"] == pytest.approx((2 + 3 + 3) / 9)
    for score in accuracy.values():
        assert score["low"] <= score["value"] <= score["high"]
        assert (score["num_questions"], score["num_patients"]) == (9, 3)


def test_paired_differences(evaluated: tuple[EvaluateRecord, MemoryTracker, Path]) -> None:
    differences = evaluated[0].differences
    assert differences["photon - all_tokens"]["value"] == 0
    assert differences["photon - blind"]["value"] == pytest.approx((5.4 - 5) / 9)


def test_findings_count_a_blind_yes(evaluated: tuple[EvaluateRecord, MemoryTracker, Path]) -> None:
    rows = {row["policy"]: row for row in evaluated[0].findings}
    assert {row["subtype"] for row in rows.values()} == {"liver lesion existence"}
    assert rows["photon"]["balanced_accuracy"]["value"] == 1.0
    assert (rows["blind"]["tp"], rows["blind"]["fp"], rows["blind"]["tn"]) == (2, 1, 0)
    assert rows["blind"]["sensitivity"]["value"] == 1.0
    assert rows["blind"]["specificity"]["value"] == 0.0
    assert rows["blind"]["balanced_accuracy"]["value"] == 0.5


def test_tokens_and_regions(evaluated: tuple[EvaluateRecord, MemoryTracker, Path]) -> None:
    tokens = evaluated[0].tokens
    assert tokens["before"] == 12
    assert tokens["kept_mean"] == 4
    assert (tokens["kept_by_question_min"], tokens["kept_by_question_max"]) == (3, 6)
    assert tokens["kept_fraction"] == pytest.approx(1 / 3)
    assert tokens["by_subtype"]["largest organ"]["kept_fraction"] == 0.5
    rows = {row["organ"]: row for row in evaluated[0].regions}
    assert set(rows) == {"all organs", "liver"}  # no label map shows a heart
    assert rows["liver"]["organ_share"]["value"] == 1.0
    assert rows["liver"]["overall_share"]["value"] == 0.25
    assert rows["liver"]["unasked_share"]["value"] == 0.0
    assert rows["liver"]["above_unasked"]["value"] == 1.0


def test_breakdown_and_diagnostics(evaluated: tuple[EvaluateRecord, MemoryTracker, Path]) -> None:
    record = evaluated[0]
    rows = {(row["group"], row["name"], row["policy"]): row["value"] for row in record.breakdown}
    assert rows["family", "measurement", "photon"] == pytest.approx(0.8)
    assert rows["kind", "text", "blind"] == 1.0
    assert rows["subtype", "largest organ", "photon"] == 0.0
    photon = record.diagnostics["photon"]
    assert photon["mra_linear_v2"] == pytest.approx(0.9)
    assert photon["rouge1"] == pytest.approx(2 / 3)
    assert photon["mean_over_subtypes"] == pytest.approx((1 + 0.8 + 0) / 3)
    assert record.diagnostics["blind"]["parse_failure_rate"] == pytest.approx(1 / 3)
    assert record.num_questions_skipped == 1


def test_files_and_tracker(evaluated: tuple[EvaluateRecord, MemoryTracker, Path]) -> None:
    record, tracker, output = evaluated
    assert EvaluateRecord.read(output / "evaluation.json") == record
    table = read_answers(Path(record.answers))
    assert len(table) == 4 * 9
    lesion = table.filter(policy="photon", question_id="test_a-lesion").to_dicts()[0]
    assert lesion["kept"] == [0, 1, 5]
    assert (lesion["organ_tokens"], lesion["organ_tokens_kept"]) == (len(LIVER_TOKENS), 2)
    assert table.filter(policy="blind")["organ_tokens"].null_count() == 9
    assert tracker.summary["accuracy/photon/low"] == record.accuracy["photon"]["low"]
    assert tracker.summary["kept_fraction"] == pytest.approx(1 / 3)
    assert tracker.summary["family/visual_reasoning/blind"] == 1.0
    logged = "".join(path.read_text() for path, _ in tracker.artifacts)
    assert "p-test_a" not in logged + json.dumps(tracker.summary)


def test_progress_and_order_do_not_change_the_result(data: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    record = evaluate(
        Path("model"), data, tmp_path, blind_checkpoint=Path("blind"), split="train", data_version="md5",
        on_progress=lambda *step: seen.append(step), open_answerer=_open,
    )  # fmt: skip
    assert seen == [(1, 1, "train_d")]
    assert record.accuracy["majority"]["value"] == 1.0
    assert record.accuracy["photon"]["low"] < record.accuracy["photon"]["value"]  # one patient proves little


def test_where_and_how_questions_are_answered_is_handed_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, ...]] = []

    def open_answerer(
        checkpoint: Path, policy: str, *, closed_by: str, device: str, precision: str, backend: str
    ) -> Answerer:
        opened.append((policy, closed_by, device, precision, backend))
        return _open(checkpoint, policy)

    monkeypatch.setattr("pipelines.predict.TorchAnswerer", open_answerer)
    other = {"closed_by": "likelihood", "device": "auto", "precision": "bfloat16", "backend": "reference"}
    for number, wanted in enumerate(({}, {"closed_by": "generation"}, other)):
        opened.clear()
        output = tmp_path / str(number)
        record = evaluate(Path("model"), data, output, blind_checkpoint=Path("blind"), data_version="md5", **wanted)
        expected, device = wanted.get("closed_by", "generation"), wanted.get("device", "cpu")
        how = (expected, device, wanted.get("precision", "float32"), wanted.get("backend", "auto"))
        assert opened == [(policy, *how) for policy in ("photon", "all_tokens", "blind")]
        assert record.closed_by == EvaluateRecord.read(output / "evaluation.json").closed_by == expected


def test_a_split_without_scans_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(PhotonError) as caught:
        evaluate(
            Path("model"), data, tmp_path, blind_checkpoint=Path("blind"), split="val", data_version="md5",
            open_answerer=_open,
        )  # fmt: skip
    assert caught.value.code == "SPLIT_EMPTY"
    assert "test, train" in caught.value.fact
    assert not list(tmp_path.iterdir())


def test_answers_to_other_questions_are_not_scored(data: Path, tmp_path: Path) -> None:
    class Confused(FakeAnswerer):
        def answer(self, volume: Volume | None, questions: Sequence[Question]) -> list[Answer]:
            return super().answer(volume, questions)[::-1]

    with pytest.raises(ValueError, match="in their order"):
        evaluate(
            Path("model"), data, tmp_path, blind_checkpoint=Path("blind"), data_version="md5",
            open_answerer=lambda checkpoint, policy: Confused(policy),
        )  # fmt: skip


def test_majority_prefers_the_same_text_then_the_subtype_then_the_kind() -> None:
    training = [
        _question("train_1", "a", answer="no"),
        _question("train_1", "b", answer="yes"),
        _question("train_2", "c", answer="yes"),
        _question("train_2", "d", question="Any lesion?", answer="no"),
        _question("train_3", "e", question="Any lesion?", answer="no"),
        _question("train_3", "f", subtype="spleen size", question="Big?", answer="no"),
    ]
    asked = [
        _question("test", "1", question="is there  a LIVER lesion?"),
        _question("test", "2", question="Does the liver show something?"),
        _question("test", "3", subtype="unheard of", question="?"),
        _question("test", "4", kind="text", question="?"),
    ]
    answers = MajorityAnswerer(training).answer(None, asked)
    assert [answer.text for answer in answers] == ["yes", "no", "no", ""]
    assert answers[0].confidence == pytest.approx(2 / 3)


def test_majority_number_maximises_relative_accuracy_not_frequency() -> None:
    values = ["10 mL", "10 mL", "100 mL", "104 mL", "108 mL", "112 mL", "about that"]
    training = [
        _question("train", str(index), kind="number", options=(), answer=value) for index, value in enumerate(values)
    ]
    answer = MajorityAnswerer(training).answer(None, [_question("test", "n", kind="number", options=())])[0]
    assert answer.text in {"104 mL", "108 mL"}
    assert answer.confidence == pytest.approx((0 + 0 + 1 + 0.9 + 1 + 0.9) / 7, abs=0.06)


def test_a_table_of_other_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.parquet"
    for content, fact in ((None, "does not exist"), (b"no parquet", "not a Parquet")):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(PhotonError, match=fact):
            read_answers(path)
    pl.DataFrame(schema=ANSWER_SCHEMA).drop("kept").write_parquet(path)
    with pytest.raises(PhotonError, match="kept"):
        read_answers(path)
