from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from photon.errors import PhotonError
from pipelines import provenance, tracking
from pipelines.registry import register_model, resolve_model
from pipelines.tracking import MemoryTracker, NullTracker, Store, open_store, tracked_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(f"sqlite:///{tmp_path_factory.mktemp('state')}/mlflow.db", "trials")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("scan.onnx", "question.onnx", "decode.onnx"):
        (folder / name).write_bytes(name.encode() * 100)
    (folder / "model.json").write_text("{}")
    return folder


def register(store: Store, export: Path, name: str, accuracy: float, data_version: str = "d1.dir", measure=None):
    with tracked_run(store, "export") as tracker:
        return register_model(
            store, tracker, export, name=name, accuracy=accuracy, data_version=data_version, measure=measure
        )


def test_opening_a_store_sets_write_ahead_log_and_absolute_artifacts(store: Store) -> None:
    path = Path(store.uri.removeprefix("sqlite:///"))
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    place = store.client.get_experiment(store.experiment_id).artifact_location
    assert place == (path.parent / "mlartifacts" / "trials").as_uri()


def test_processes_that_open_a_fresh_database_together_all_succeed(tmp_path: Path) -> None:
    code = "import sys; from pipelines.tracking import open_store; print(open_store(sys.argv[1]).experiment_id)"
    uri = f"sqlite:///{tmp_path}/fresh.db"
    runs = [
        subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    outputs = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1


def test_a_run_holds_what_was_logged(store: Store, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("hello")
    with tracked_run(store, "train", tags={"data_version": "abc.dir"}) as tracker:
        tracker.log_hyperparameters({"optimizer": {"lr": 0.1}, "name": "x" * 9000})
        for step in range(450):
            tracker.log({"loss": 1.0 / (step + 1), "kept": 0.5}, step)
        tracker.log({"loss": float("nan")}, 450)
        tracker.log_summary({"accuracy": 0.75})
        tracker.log_artifact(tmp_path / "note.txt", "notes")
    run = store.client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.1"
    assert len(run.data.params["name"]) == tracking.MAX_PARAMETER_CHARACTERS
    history = store.client.get_metric_history(tracker.run_id, "loss")
    assert [entry.step for entry in history] == list(range(450))
    assert run.data.metrics["accuracy"] == 0.75
    assert run.data.tags["data_version"] == "abc.dir"
    assert run.data.tags["code_version"] == provenance.code_version()
    assert run.data.tags["environment.python"].startswith("3.")
    assert [file.path for file in store.client.list_artifacts(tracker.run_id, "notes")] == ["notes/note.txt"]


def test_worker_threads_log_to_the_run_they_are_given(store: Store) -> None:
    with (
        tracked_run(store, "parent") as parent,
        tracked_run(store, "child", parent_run_id=parent.run_id) as child,
    ):
        threads = [threading.Thread(target=child.log, args=({"x": float(i)}, i)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(store.client.get_metric_history(child.run_id, "x")) == 4
    nested = store.client.search_runs([store.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert [run.info.run_id for run in nested] == [child.run_id]
    assert not store.client.search_runs([store.experiment_id], "attributes.status = 'RUNNING'")


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_breaks_says_so(store: Store, error: type[BaseException], status: str) -> None:
    with pytest.raises(error), tracked_run(store, "broken") as tracker:
        tracker.log({"loss": 3.0}, 0)
        raise error
    run = store.client.get_run(tracker.run_id)
    assert run.info.status == status
    assert run.data.metrics["loss"] == 3.0  # the buffer is not lost


def test_a_killed_process_leaves_a_run_that_is_ended_later(store: Store) -> None:
    code = (
        "import os, sys; from pipelines.tracking import open_store, tracked_run\n"
        "with tracked_run(open_store(sys.argv[1], 'trials'), 'doomed') as run:\n"
        "    print(run.run_id, flush=True); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code, store.uri], capture_output=True, text=True, timeout=120)
    doomed = done.stdout.split()[-1]
    with tracked_run(store, "alive") as alive:
        assert tracking.run_status(store, doomed) == "RUNNING"
        assert tracking.terminate_abandoned_runs(store) == [doomed]
        assert tracking.run_status(store, alive.run_id) == "RUNNING"
    assert tracking.run_status(store, doomed) == "KILLED"
    with tracked_run(store, "doomed", resume_run_id=doomed) as resumed:
        resumed.log_hyperparameters({"lr": 1})
        resumed.log_hyperparameters({"lr": 2})  # MLflow forbids changing a parameter
    run = store.client.get_run(doomed)
    assert (run.info.status, run.data.params["lr"], run.data.tags["changed.lr"]) == ("FINISHED", "1", "2")


def test_nothing_in_the_tags_names_the_machine_or_its_user(store: Store) -> None:
    with tracked_run(store, "anonymous") as tracker:
        tags = store.client.get_run(tracker.run_id).data.tags
    text = " ".join(tags.values())
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text


def test_an_unusable_store_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(PhotonError, match="TRACKING_UNAVAILABLE"):
        open_store()
    (tmp_path / "file").write_text("")
    with pytest.raises(PhotonError, match="TRACKING_UNAVAILABLE"):
        open_store(f"sqlite:///{tmp_path}/file/mlflow.db")
    (tmp_path / "broken.db").write_bytes(b"not a database" * 100)
    with pytest.raises(PhotonError, match="TRACKING_UNAVAILABLE"):
        open_store(f"sqlite:///{tmp_path}/broken.db")


def test_champion_and_challenger(store: Store, export: Path, tmp_path: Path) -> None:
    first = register(store, export, "rivals", 0.60)
    assert (first.version, first.alias) == ("1", "champion")
    worse = register(store, export, "rivals", 0.55)
    assert (worse.version, worse.alias) == ("2", "challenger")
    elsewhere = register(store, export, "rivals", 0.99, data_version="d2.dir")
    assert (elsewhere.alias, "other test data" in elsewhere.decision) == ("challenger", True)
    assert resolve_model("models:/rivals@challenger", tmp_path / "a", store)[1] == "rivals/3"
    assert resolve_model("models:/rivals@champion", tmp_path / "a", store)[1] == "rivals/1"
    (export / "scan.onnx").write_bytes(b"newer")
    equal = register(store, export, "rivals", 0.60)
    assert (equal.version, equal.alias) == ("4", "champion")
    folder, version = resolve_model("models:/rivals@champion", tmp_path / "a", store)
    assert version == "rivals/4"
    assert (folder / "scan.onnx").read_bytes() == b"newer"
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in export.iterdir())
    assert resolve_model("models:/rivals@previous", tmp_path / "a", store)[1] == "rivals/1"
    assert resolve_model("models:/rivals/2", tmp_path / "a", store)[1] == "rivals/2"
    tags = store.client.get_model_version("rivals", "4").tags
    assert (tags["data_version"], tags["decision"]) == ("d1.dir", equal.decision)


@pytest.mark.parametrize(("rival", "alias"), [(0.7, "champion"), (0.9, "challenger"), (None, "challenger")])
def test_a_champion_of_other_data_is_measured_on_the_present(
    store: Store, export: Path, rival: float | None, alias: str
) -> None:
    name = f"measured-{rival}"
    register(store, export, name, 0.95)
    champion = (export / "scan.onnx").read_bytes()
    (export / "scan.onnx").write_bytes(b"newer")

    def measure(folder: Path) -> float:
        assert (folder / "scan.onnx").read_bytes() == champion
        if rival is None:
            raise PhotonError("MODEL_MISMATCH", folder, "it wants another grid.", "None.")
        return rival

    made = register(store, export, name, 0.8, data_version="d2.dir", measure=measure)
    assert made.alias == alias
    assert ("another grid" if rival is None else f"{rival:.4f}") in made.decision


def test_mlflow_itself_downloads_the_champion(store: Store, export: Path, tmp_path: Path) -> None:
    import mlflow

    register(store, export, "plain", 0.5)
    mlflow.set_tracking_uri(store.uri)
    try:
        folder = mlflow.artifacts.download_artifacts("models:/plain@champion", dst_path=str(tmp_path / "got"))
    finally:
        mlflow.set_tracking_uri(None)
    assert (Path(folder) / "scan.onnx").read_bytes() == (export / "scan.onnx").read_bytes()


@pytest.mark.parametrize(
    "reference", ["models:/nobody@champion", "models:/nobody/3", "models:/x", "out/x", "models:/@"]
)
def test_an_unknown_model_is_one_clear_error(store: Store, tmp_path: Path, reference: str) -> None:
    with pytest.raises(PhotonError, match="MODEL_UNKNOWN"):
        resolve_model(reference, tmp_path, store)


def test_a_folder_without_onnx_is_not_registered(store: Store, tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="MODEL_MISSING"):
        register(store, tmp_path, "nothing", 0.5)


def test_the_other_trackers_take_the_same_calls(tmp_path: Path) -> None:
    memory = MemoryTracker()
    for tracker in (memory, NullTracker()):
        tracker.log_hyperparameters({"lr": 0.1})
        tracker.log({"loss": 1.0}, 3)
        tracker.log_summary({"accuracy": 0.5})
        tracker.log_artifact(tmp_path)
        tracker.log_tags({"a": "b"})
        tracker.finish()
    assert memory.steps == [(3, {"loss": 1.0})]
    assert (memory.summary, memory.tags, memory.status) == ({"accuracy": 0.5}, {"a": "b"}, "FINISHED")


def test_a_process_identity_outlives_neither_its_process_nor_a_reboot() -> None:
    mine = provenance.process_identity(os.getpid())
    assert provenance.is_process_alive(mine)
    host, boot, pid, started = mine.split(":")
    assert not provenance.is_process_alive(f"{host}:{boot}:{pid}:1{started}")
    assert not provenance.is_process_alive(f"{host}:00000000:{pid}:{started}")
    assert provenance.is_process_alive(f"elsewhere:{boot}:{pid}:{started}")
    child = subprocess.Popen([sys.executable, "-c", ""])
    identity = provenance.process_identity(child.pid)
    child.wait()
    assert not provenance.is_process_alive(identity)
    assert not provenance.is_process_alive("nonsense")
