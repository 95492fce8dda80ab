"""The sequence, its records and its resumption, with stand-ins for the stages that take minutes."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from photon.errors import PhotonError
from pipelines import stages
from pipelines.results import EvaluateRecord, ExportRecord, ScoreRecord, TrainRecord
from pipelines.retrain_spec import RetrainSpec
from pipelines.retraining import retrain
from pipelines.tracking import Store, open_store, run_status


@dataclass(frozen=True)
class FakeTrainSpec:
    steps: int = 3
    seed: int = 0

    @classmethod
    def preset(cls, _name: str, *, seed: int = 0) -> FakeTrainSpec:
        return cls(seed=seed)


@dataclass
class Calls:
    """How often each stand-in worked, and what one of them should do once."""

    done: list[str] = field(default_factory=list)
    break_in: str = ""
    error: type[BaseException] = KeyboardInterrupt

    def note(self, name: str) -> None:
        if self.break_in == name:
            self.break_in = ""
            raise self.error
        self.done.append(name)


def score_of(value: float) -> dict[str, float]:
    return {"value": value, "low": value, "high": value, "num_questions": 10, "num_patients": 2}


def filled(record_type: type[Any], **values: Any) -> Any:
    """A record of which only some fields matter here."""
    rest = {item.name: 0 for item in dataclasses.fields(record_type) if item.name not in values}
    return record_type(**values, **rest)


def put(folder: Path, name: str, content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)
    return folder / name


def fake_stages(calls: Calls, accuracy: Callable[[], float]) -> dict[str, dict[str, Any]]:
    def train(spec, data, output, *, data_version, tracker, on_progress):
        put(output, "half.json", "{}")
        tracker.log({"loss": 2.0}, 0)
        calls.note("train")
        on_progress(1, 1, "step")
        tracker.log({"loss": 1.0}, 1)
        checkpoint = put(output / "checkpoint", "model.safetensors", f"{spec}{data_version}").parent
        blind = put(output / "blind", "model.safetensors", "blind").parent
        return filled(
            TrainRecord,
            checkpoint=str(checkpoint), blind_checkpoint=str(blind), history="h", num_steps=3, elapsed_s=0.1,
            final_loss=1.0, kept_fraction=0.4, config_digest="c", data_version=data_version,
        )  # fmt: skip

    def evaluate(checkpoint, data, output, *, blind_checkpoint, data_version, tracker, on_progress):
        calls.note("evaluate")
        put(output, "answers.parquet", "answers")
        scores = {name: score_of(accuracy()) for name in ("photon", "all_tokens", "blind", "majority")}
        tokens = {
            "before": 24,
            "kept_mean": 9.5,
            "kept_by_question_min": 3,
            "kept_by_question_max": 20,
            "x": [],
        }
        return filled(
            EvaluateRecord,
            accuracy=scores, differences={}, tokens=tokens, breakdown=[], findings=[], regions=[],
            diagnostics={}, answers="a", split="test", data_version=data_version,
        )  # fmt: skip

    def export(checkpoint, data, output, *, data_version, on_progress):
        calls.note("export")
        for name in ("scan.onnx", "question.onnx", "decode.onnx", "model.json"):
            put(output, name, name)
        return filled(
            ExportRecord,
            folder=str(output), files={}, max_abs_logit_diff=1e-6, kept_sets_equal=True, answers_equal=True,
            token_counts_checked=[3, 9], config_digest="c", data_version=data_version,
        )  # fmt: skip

    def make_archive(data, output, *, more_scans):
        return put(output, "questions.jsonl", "{}").parent

    def score(archive, questions, model, output, *, model_version, on_progress):
        calls.note("score")
        table = put(output, "scores.parquet", model_version)
        return filled(
            ScoreRecord,
            table=str(table), num_scans=2, rows=20, failed_rows=3, refused_scans=1,
            resumed_rows=0, seconds=0.5,
            model_version=model_version, data_version="d",
        )  # fmt: skip

    def build_report(run, data, provenance):
        calls.note("report")
        assert json.loads((run / "summary.json").read_text())["scoring"]["rows"] == 20
        return put(run, "report.html", "<html>")

    return {
        "train": {"train": train, "TrainSpec": FakeTrainSpec},
        "evaluate": {"evaluate": evaluate},
        "export": {"export": export},
        "archive": {"make_archive": make_archive},
        "score": {"score": score},
        "report": {"build_report": build_report},
    }


@dataclass
class Bench:
    spec: RetrainSpec
    store: Store
    calls: Calls

    def parents(self) -> list[Any]:
        runs = self.store.client.search_runs([self.store.experiment_id], order_by=["attributes.start_time ASC"])
        return [run for run in runs if "mlflow.parentRunId" not in run.data.tags]

    def children(self, parent: str) -> dict[str, Any]:
        query = f"tags.`mlflow.parentRunId` = '{parent}'"
        runs = self.store.client.search_runs([self.store.experiment_id], query)
        return {run.info.run_name: run for run in runs}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    from pipelines import phantoms

    tiny = phantoms.PhantomSpec(num_train=1, num_val=1, num_test=1, second_visit_fraction=0.0)
    monkeypatch.setitem(phantoms.PHANTOM_SPECS, "smoke", tiny)
    calls = Calls()
    for module, content in fake_stages(calls, lambda: 0.75).items():
        fake = ModuleType(f"pipelines.{module}")
        fake.__dict__.update(content)
        monkeypatch.setitem(sys.modules, f"pipelines.{module}", fake)
    spec = RetrainSpec.preset("smoke", output=tmp_path / "run")
    spec = dataclasses.replace(spec, experiment=tmp_path.name, model_name=f"photon-{tmp_path.name}")
    return Bench(spec, open_store(None, spec.experiment), calls)


EVERY = ["train", "evaluate", "export", "score", "report"]


def test_a_whole_run_ends_with_its_summary(bench: Bench) -> None:
    summary = json.loads(retrain(bench.spec).read_text())
    assert bench.calls.done == EVERY
    pointer = bench.spec.data.with_name("data.dvc").read_text()
    assert summary["data_version"] in pointer
    assert summary["accuracy"]["photon"] == score_of(0.75)
    assert summary["tokens"] == {
        "before": 24, "kept_mean": 9.5, "kept_by_question_min": 3, "kept_by_question_max": 20,
    }  # fmt: skip
    assert summary["onnx"] == {
        "max_abs_logit_diff": 1e-6, "kept_sets_equal": True, "answers_equal": True,
        "token_counts_checked": [3, 9],
    }  # fmt: skip
    assert (summary["scoring"]["rows"], summary["scoring"]["failed_rows"]) == (20, 3)
    model = summary["registered_model"]
    assert (model["name"], model["version"], model["alias"]) == (bench.spec.model_name, "1", "champion")
    assert (bench.spec.output / "score" / "scores.parquet").read_text() == f"{bench.spec.model_name}/1"


def test_every_stage_has_its_run_under_the_parent(bench: Bench) -> None:
    summary = json.loads(retrain(bench.spec).read_text())
    (parent,) = bench.parents()
    assert summary["mlflow"]["parent_run_id"] == parent.info.run_id
    children = bench.children(parent.info.run_id)
    names = {"data", "preprocess", "version", "train", "evaluate", "export", "register", "score", "report"}
    assert set(children) == set(summary["mlflow"]["runs"]) == names
    for name, run in children.items():
        assert run.info.run_id == summary["mlflow"]["runs"][name]
        assert (run.info.status, run.data.tags["data_version"]) == ("FINISHED", summary["data_version"]), name
    assert parent.data.metrics["accuracy.photon"] == 0.75
    assert parent.data.params["training"] == "smoke"
    assert parent.inputs.dataset_inputs[0].dataset.digest == summary["data_version"]
    artifacts = {file.path for file in bench.store.client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"report.html", "summary.json"}


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, "KILLED"), (RuntimeError, "FAILED")])
def test_an_interrupted_run_goes_on_where_it_stopped(bench: Bench, error: Any, status: str) -> None:
    bench.calls.break_in, bench.calls.error = "evaluate", error
    with pytest.raises(error):
        retrain(bench.spec)
    (parent,) = bench.parents()
    assert parent.info.status == status
    evaluate_run = bench.children(parent.info.run_id)["evaluate"].info.run_id
    summary = json.loads(retrain(bench.spec).read_text())
    assert bench.calls.done == EVERY  # training was not repeated
    assert summary["mlflow"]["parent_run_id"] == parent.info.run_id
    assert summary["mlflow"]["runs"]["evaluate"] == evaluate_run
    assert run_status(bench.store, parent.info.run_id) == "FINISHED"


def test_an_interrupted_stage_finds_what_it_had(bench: Bench) -> None:
    bench.calls.break_in = "train"
    with pytest.raises(KeyboardInterrupt):
        retrain(bench.spec)
    left = bench.spec.output / "train" / "half.json"
    left.write_text("step 1")
    seen = []
    original = sys.modules["pipelines.train"].train

    def resuming(*arguments: Any, **options: Any) -> TrainRecord:
        seen.append(left.read_text())
        return original(*arguments, **options)

    sys.modules["pipelines.train"].train = resuming  # type: ignore[attr-defined]
    summary = json.loads(retrain(bench.spec).read_text())
    assert seen == ["step 1"]
    history = bench.store.client.get_metric_history(summary["mlflow"]["runs"]["train"], "loss")
    assert [entry.step for entry in history] == [0, 0, 1]  # both halves in one run


def test_a_finished_run_is_reused_under_a_new_parent(bench: Bench) -> None:
    first = json.loads(retrain(bench.spec).read_text())
    second = json.loads(retrain(bench.spec).read_text())
    assert bench.calls.done == [*EVERY, "report"]
    assert second["mlflow"]["parent_run_id"] != first["mlflow"]["parent_run_id"]
    assert second["data_version_status"] == "matches"
    assert second["registered_model"]["version"] == "1"
    train_run = bench.children(second["mlflow"]["parent_run_id"])["train"]
    assert train_run.data.tags["reused_run_id"] == first["mlflow"]["runs"]["train"]
    assert train_run.data.metrics["kept_fraction"] == 0.4


def test_fresh_repeats_everything_and_registers_the_next_version(bench: Bench) -> None:
    retrain(bench.spec)
    summary = json.loads(retrain(bench.spec, is_fresh=True).read_text())
    assert bench.calls.done == [*EVERY, *EVERY]
    assert (summary["registered_model"]["version"], summary["registered_model"]["alias"]) == ("2", "champion")


@pytest.mark.parametrize("victim", ["train/checkpoint/model.safetensors", "export/scan.onnx", "score/scores.parquet"])
def test_a_damaged_result_is_made_again(bench: Bench, victim: str) -> None:
    retrain(bench.spec)
    target = bench.spec.output / victim
    content = target.read_text()
    target.write_text("damaged")
    retrain(bench.spec)
    assert target.read_text() == content
    stage = victim.split("/")[0]
    assert bench.calls.done == [*EVERY, stage, "report"]


def test_changed_code_repeats_every_stage(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    retrain(bench.spec)
    monkeypatch.setattr(stages, "source_digest", lambda *_: "another")
    retrain(bench.spec)
    assert bench.calls.done == [*EVERY, *EVERY]


def test_two_jobs_do_not_share_an_output_folder(bench: Bench) -> None:
    errors = []

    def intrude(stage: Callable[..., Any], *arguments: Any) -> Any:
        if not errors:
            with pytest.raises(PhotonError, match="OUTPUT_BUSY") as caught:
                retrain(bench.spec)
            errors.append(caught)
        return stage(*arguments)

    retrain(bench.spec, call=intrude)
    assert len(errors) == 1
    assert len(bench.parents()) == 1


def test_scans_of_somebody_else_are_left_alone(bench: Bench) -> None:
    foreign = put(bench.spec.data / "raw" / "images", "patient.nii", "voxels")
    with pytest.raises(PhotonError, match="DATA_FOREIGN"):
        retrain(bench.spec)
    assert foreign.read_text() == "voxels"
    assert bench.parents()[0].info.status == "FAILED"


def test_a_preset_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="PRESET_UNKNOWN.*demo, smoke"):
        RetrainSpec.preset("huge", output=tmp_path)
