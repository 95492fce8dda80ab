"""The flows on a Prefect server, the deployments, and the settings they start from."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from flows import settings
from photon.errors import PhotonError
from pipelines.results import ScoreRecord

PROJECT = Path(__file__).resolve().parents[2]
DEPLOYMENTS = yaml.safe_load((PROJECT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: deployment["name"])
def test_every_deployment_can_be_run_and_is_scheduled(deployment: dict) -> None:
    import inspect

    from prefect import Flow

    path, name = deployment["entrypoint"].split(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    flow = getattr(module, name)
    assert isinstance(flow, Flow)
    inspect.signature(flow.fn).bind(**deployment["parameters"])
    assert deployment["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}
    assert deployment["schedules"]
    for schedule in deployment["schedules"]:
        assert len(schedule["cron"].split()) == 5
        assert schedule["active"] is True


def test_prefect_yaml_names_the_installed_prefect() -> None:
    import prefect

    content = yaml.safe_load((PROJECT / "prefect.yaml").read_text(encoding="utf-8"))
    assert content["prefect-version"] == prefect.__version__


def test_settings_do_not_override_the_user(tmp_path: Path) -> None:
    code = (
        "from flows import settings; print(settings.apply()); import os\n"
        "print(os.environ['PREFECT_HOME'], os.environ['MLFLOW_TRACKING_URI'], os.environ['ORT_DISABLE_TELEMETRY'])\n"
        "import prefect.settings as s; print(s.get_current_settings().home)"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT", "MLFLOW"))}
    environment.update(PHOTON_STATE=str(tmp_path / "state"), MLFLOW_TRACKING_URI="http://tracking:5000")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    folder, variables, home = done.stdout.splitlines()
    assert folder == str(tmp_path / "state")
    assert variables.split() == [f"{folder}/prefect", "http://tracking:5000", "1"]
    assert home == f"{folder}/prefect"


def test_importing_settings_starts_none_of_the_big_libraries() -> None:
    code = (
        "import sys; from flows import settings; settings.apply()\n"
        "print([m for m in ('prefect', 'mlflow', 'onnxruntime', 'dvc', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_process_of_a_killed_owner_is_stopped() -> None:
    code = (
        "import os, subprocess, sys; from flows import settings\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], stdout=-3, stderr=-3)\n"
        "context = settings.noted_process(child.pid); context.__enter__()\n"
        "print(child.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    orphan = int(done.stdout)
    with settings.noted_process(os.getpid()):  # one whose owner lives is left alone
        settings.stop_abandoned_processes()
    for _ in range(100):
        state = Path(f"/proc/{orphan}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the orphan still runs")


def score_record(table: Path, rows: int, failed_rows: int) -> ScoreRecord:
    import dataclasses

    values = {"table": str(table), "rows": rows, "failed_rows": failed_rows, "num_scans": 4, "refused_scans": 1}
    values |= {"resumed_rows": 0, "seconds": 1.5, "model_version": "m/1", "data_version": "d.dir"}
    names = {field.name for field in dataclasses.fields(ScoreRecord)}
    return ScoreRecord(**{name: values.get(name, 0) for name in names})


@pytest.fixture
def champion(tmp_path: Path) -> str:
    from pipelines.registry import register_model
    from pipelines.tracking import open_store, tracked_run

    export = tmp_path / "export"
    export.mkdir()
    (export / "scan.onnx").write_bytes(b"onnx")
    store = open_store(experiment="models")
    name = f"model-{tmp_path.name}"
    with tracked_run(store, "export") as tracker:
        register_model(store, tracker, export, name=name, accuracy=0.5, data_version="d.dir")
    return name


def test_nightly_scoring_uses_the_champion_and_survives_refused_scans(
    prefect_server: str, champion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.nightly import score_archive_flow
    from pipelines import score
    from pipelines.tracking import open_store

    seen = {}

    def fake_score(archive, questions, model, output, *, model_version, **_):
        seen.update(model=model, model_version=model_version)
        return score_record(output / "scores.parquet", rows=40, failed_rows=10)

    monkeypatch.setattr(score, "score", fake_score)
    state = score_archive_flow(
        tmp_path, tmp_path / "q.jsonl", tmp_path / "out", model=f"models:/{champion}@champion", return_state=True
    )
    assert state.is_completed()
    assert seen["model_version"] == f"{champion}/1"
    assert (seen["model"] / "scan.onnx").read_bytes() == b"onnx"
    store = open_store(experiment="photon-archive")
    run = store.client.search_runs([store.experiment_id], order_by=["attributes.start_time DESC"])[0]
    assert run.info.status == "FINISHED"
    assert (run.data.metrics["rows"], run.data.metrics["failed_rows"], run.data.metrics["refused_scans"]) == (40, 10, 1)


def test_nightly_scoring_fails_when_nothing_was_scored(
    prefect_server: str, champion: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.nightly import score_archive_flow
    from pipelines import score

    monkeypatch.setattr(score, "score", lambda *_, **__: score_record(tmp_path / "t", rows=5, failed_rows=5))
    state = score_archive_flow(tmp_path, tmp_path, tmp_path, model=f"models:/{champion}@champion", return_state=True)
    assert state.is_failed()
    with pytest.raises(PhotonError, match="NOTHING_SCORED"):
        state.result()


def test_stages_run_as_sub_flows_and_errors_come_through_unchanged(prefect_server: str) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client

    from flows.retrain import call_as_flow

    class Unserialisable:
        def __reduce__(self) -> str:
            raise TypeError("must not be stored")

    def train_toy(argument: object) -> object:
        return argument

    def broken_toy() -> None:
        raise PhotonError("TOY", "toy", "it is broken.", "Mend it.")

    given = Unserialisable()

    @flow(name="toy-parent")
    def parent() -> bool:
        return call_as_flow(train_toy, given) is given

    assert parent()
    with get_client(sync_client=True) as client:
        names = {client.read_flow(run.flow_id).name for run in client.read_flow_runs()}
    assert {"toy-parent", "train-toy"} <= names
    with settings.quiet_flow_errors(), pytest.raises(PhotonError, match="TOY"):
        call_as_flow(broken_toy)


def test_the_embedded_server_is_one_for_the_whole_block_and_then_gone(prefect_server: str) -> None:
    with settings.embedded_server() as url:  # inside a configured server nothing is started
        assert url == prefect_server
    assert not list((settings.state_folder() / "processes").glob("*.json"))
    assert json.dumps(url)
