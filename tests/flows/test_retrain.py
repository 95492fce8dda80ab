"""The whole job at its smallest size, with every real stage: killed once in the middle, then finished as a flow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from flows.retrain import run_retrain
from pipelines.champion import accuracy_of
from pipelines.registry import resolve_model
from pipelines.tracking import open_store
from pipelines.versioning import folder_version, read_version


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("retrain") / "run"


@pytest.fixture(scope="module")
def killed(output: Path) -> dict[str, Any]:
    """The stages' notes of a job killed with -9 while it evaluates."""
    command = [sys.executable, "-m", "flows.cli", "retrain", "--preset", "smoke", "--no-prefect"]
    with (output.parent / "log").open("w") as log:
        process = subprocess.Popen([*command, "--output", str(output)], stdout=log, stderr=log)
        notes = output / "records" / "stages.json"
        deadline = time.monotonic() + 240
        while not (notes.exists() and "evaluate" in json.loads(notes.read_text())):
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"the job did not reach its evaluation: {(output.parent / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    return dict(json.loads(notes.read_text()))


@pytest.fixture(scope="module")
def summary(prefect_server: str, killed: dict[str, Any], output: Path) -> dict[str, Any]:
    return dict(json.loads(run_retrain(preset="smoke", output=output).read_text()))


def test_the_killed_job_was_continued_not_repeated(killed: dict[str, Any], summary: dict[str, Any]) -> None:
    runs = summary["mlflow"]["runs"]
    for stage in ("data", "preprocess", "train", "evaluate"):
        assert runs[stage] == killed[stage]["run_id"]
        assert summary["mlflow"]["parent_run_id"] == killed[stage]["parent"]
    store = open_store(summary["mlflow"]["tracking_uri"], summary["mlflow"]["experiment"])
    losses = store.client.get_metric_history(runs["train"], "loss")
    steps = [entry.step for entry in losses]
    assert len(steps) == len(set(steps)) >= 5
    for run_id in (*runs.values(), summary["mlflow"]["parent_run_id"]):
        run = store.client.get_run(run_id)
        assert run.info.status == "FINISHED"
        assert run.data.tags["data_version"] == summary["data_version"]


def test_the_summary_tells_what_is_on_disk(summary: dict[str, Any], output: Path) -> None:
    assert summary["data_version"] == folder_version(output / "data") == read_version(output / "data.dvc")
    for policy in ("photon", "all_tokens", "blind", "majority"):
        score = summary["accuracy"][policy]
        assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
    tokens = summary["tokens"]
    assert (
        0 < tokens["kept_by_question_min"] <= tokens["kept_mean"] <= tokens["kept_by_question_max"] <= tokens["before"]
    )
    onnx = summary["onnx"]
    assert onnx["max_abs_logit_diff"] <= 1e-4
    assert onnx["kept_sets_equal"] is onnx["answers_equal"] is True
    assert len(set(onnx["token_counts_checked"])) >= 2
    scores = pl.read_parquet(output / "score" / "scores.parquet")
    assert summary["scoring"]["rows"] == len(scores)
    assert summary["scoring"]["failed_rows"] == scores["error"].is_not_null().sum() > 0  # the damaged scans
    assert set(scores["model_version"]) == {"photon-smoke/" + summary["registered_model"]["version"]}


def test_the_report_is_there_and_in_mlflow(summary: dict[str, Any], output: Path) -> None:
    report = (output / "report.html").read_text()
    assert summary["mlflow"]["parent_run_id"] in report
    assert summary["data_version"][:12] in report
    store = open_store(summary["mlflow"]["tracking_uri"], summary["mlflow"]["experiment"])
    artifacts = {file.path for file in store.client.list_artifacts(summary["mlflow"]["parent_run_id"])}
    assert {"report.html", "summary.json"} <= artifacts


def test_the_registered_model_is_the_export(summary: dict[str, Any], output: Path, tmp_path: Path) -> None:
    model = summary["registered_model"]
    folder, version = resolve_model(f"models:/{model['name']}@{model['alias']}", tmp_path)
    assert version == f"{model['name']}/{model['version']}"
    assert folder_version(folder) == folder_version(output / "export" / "model")


def test_the_export_measured_anew_is_as_accurate_as_the_checkpoint(summary: dict[str, Any], output: Path) -> None:
    measured = accuracy_of(output / "export" / "model", output / "data")
    assert measured == pytest.approx(summary["accuracy"]["photon"]["value"], abs=1e-9)


def test_no_process_is_left_behind(summary: dict[str, Any]) -> None:
    from flows import settings

    assert summary
    assert not list((settings.state_folder() / "processes").glob("*.json"))
    assert os.environ["PHOTON_STATE"] == str(settings.state_folder())
