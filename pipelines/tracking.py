"""Experiment tracking: the seam every stage logs through, and its MLflow form. The only importer of MLflow.

MLflow's fluent interface keeps the active run in the thread, so a run started by a flow is invisible in its
worker threads and their metrics would land in new runs that never end. Everything here therefore goes through
``MlflowClient`` with an explicit run id, and nesting is the ``mlflow.parentRunId`` tag.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from photon.errors import PhotonError
from pipelines.provenance import code_version, environment_tags, is_process_alive, process_identity

PARENT_TAG = "mlflow.parentRunId"
PROCESS_TAG = "photon.process"
TABLES_TAG = "mlflow.loggedArtifacts"
FLUSH_AT = 200  # buffered metrics; one batch of them costs as much as about ten single calls
MAX_PARAMETER_CHARACTERS = 6000


class Tracker(Protocol):
    """What a stage may tell about its run."""

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        """Settings of the run; nested mappings become dotted names."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Values of one step of a curve; cheap enough for every step."""

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        """Final values, by which runs are compared."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, or a folder with what it holds, copied under ``folder`` of the run's artifacts."""

    def log_table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """A table of equally long columns, shown as one by the store's pages."""

    def log_dataset(self, name: str, version: str, source: str) -> None:
        """The data the run used: a name, its DVC version (at most 36 characters) and its pointer file."""

    def log_tags(self, tags: Mapping[str, str]) -> None:
        """Short strings to search runs by."""

    def finish(self, status: str = "FINISHED") -> None:
        """End the run with FINISHED, FAILED or KILLED; nothing may be logged afterwards."""


class NullTracker:
    """Forgets everything."""

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None: ...

    def log(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_summary(self, metrics: Mapping[str, float]) -> None: ...

    def log_artifact(self, path: Path, folder: str | None = None) -> None: ...

    def log_table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None: ...

    def log_dataset(self, name: str, version: str, source: str) -> None: ...

    def log_tags(self, tags: Mapping[str, str]) -> None: ...

    def finish(self, status: str = "FINISHED") -> None: ...


@dataclass(kw_only=True)
class MemoryTracker:
    """Keeps everything in lists and dictionaries, for tests."""

    hyperparameters: dict[str, Any] = field(default_factory=dict)
    steps: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    artifacts: list[tuple[Path, str | None]] = field(default_factory=list)
    tables: dict[str, dict[str, Sequence[Any]]] = field(default_factory=dict)
    datasets: list[tuple[str, str, str]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    status: str = "RUNNING"

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        self.hyperparameters.update(values)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.steps.append((step, dict(metrics)))

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        self.summary.update(metrics)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        self.artifacts.append((path, folder))

    def log_table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        self.tables[name] = dict(columns)

    def log_dataset(self, name: str, version: str, source: str) -> None:
        self.datasets.append((name, version, source))

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self.tags.update(tags)

    def finish(self, status: str = "FINISHED") -> None:
        self.status = status


class MlflowTracker:
    """One MLflow run, named by its id. Step metrics are buffered, other calls reach the store at once."""

    def __init__(self, client: Any, run_id: str) -> None:
        self.client = client
        self.run_id = run_id
        self._buffer: list[Any] = []

    def log_hyperparameters(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        flat = {name: str(value)[:MAX_PARAMETER_CHARACTERS] for name, value in flatten(values).items()}
        known = self.client.get_run(self.run_id).data.params  # a resumed run has some already
        fresh = [Param(name, value) for name, value in flat.items() if name not in known]
        changed = {name: value for name, value in flat.items() if known.get(name, value) != value}
        self.client.log_batch(self.run_id, params=fresh)
        self.log_tags({f"changed.{name}": value[:500] for name, value in changed.items()})

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._buffer.extend(_metrics(metrics, step))
        if len(self._buffer) >= FLUSH_AT:
            self.flush()

    def log_summary(self, metrics: Mapping[str, float]) -> None:
        self.flush()
        self.client.log_batch(self.run_id, metrics=_metrics(metrics, step=0))

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        if path.is_dir():
            self.client.log_artifacts(self.run_id, str(path), folder)
        else:
            self.client.log_artifact(self.run_id, str(path), folder)

    def log_table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        # As MLflow's own log_table writes it, which would load the rows into pandas and append to an earlier table.
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        self.client.log_dict(self.run_id, {"columns": list(columns), "data": rows}, f"{name}.json")
        listed = json.loads(self.client.get_run(self.run_id).data.tags.get(TABLES_TAG, "[]"))
        entry = {"path": f"{name}.json", "type": "table"}
        if entry not in listed:
            self.client.set_tag(self.run_id, TABLES_TAG, json.dumps([*listed, entry]))

    def log_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        if tags:
            self.client.log_batch(self.run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def log_dataset(self, name: str, version: str, source: str) -> None:
        from mlflow.entities import Dataset, DatasetInput

        described = json.dumps({"pointer": source})
        dataset = Dataset(name=name, digest=version[:36], source_type="dvc", source=described)
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [])])

    def flush(self) -> None:
        """Send the buffered step metrics."""
        pending, self._buffer = self._buffer, []
        for start in range(0, len(pending), 1000):  # MLflow's limit for one batch
            self.client.log_batch(self.run_id, metrics=pending[start : start + 1000])

    def finish(self, status: str = "FINISHED") -> None:
        self.flush()
        self.client.set_terminated(self.run_id, status)


@dataclass(frozen=True, kw_only=True)
class Store:
    """An initialised MLflow store and the experiment runs go to; `created_ms` tells it from a later one."""

    uri: str
    experiment: str
    experiment_id: str
    created_ms: int
    client: Any


def open_store(uri: str | None = None, experiment: str = "photon") -> Store:
    """Open a tracking store; creates a SQLite database and the experiment when they are missing.

    Fresh databases are migrated under a file lock: several processes at once would break each other.
    Artifacts lie beside the database, at an absolute place, and do not move with the working folder.

    Args:
        uri: tracking URI; default the environment's ``MLFLOW_TRACKING_URI``.
        experiment: experiment name.

    Raises:
        PhotonError: ``TRACKING_UNAVAILABLE`` when no URI is set or the store cannot be opened.
    """
    address = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
    remedy = "Set MLFLOW_TRACKING_URI to a server, or to sqlite:////absolute/path/mlflow.db in a writable folder."
    if not address:
        raise PhotonError("TRACKING_UNAVAILABLE", "MLFLOW_TRACKING_URI", "no tracking store is configured.", remedy)
    for noisy in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    database = _database_path(address)
    try:
        with _locked(database):
            if database:
                _set_write_ahead_log(database)
            client = MlflowClient(tracking_uri=address, registry_uri=address)
            found = client.get_experiment_by_name(experiment)
            if found is None:
                place = (database.parent / "mlartifacts" / experiment).as_uri() if database else None
                found = client.get_experiment(client.create_experiment(experiment, artifact_location=place))
    except (MlflowException, OSError, sqlite3.Error) as error:
        fact = f"the tracking store cannot be opened ({str(error).splitlines()[0][:200]})."
        raise PhotonError("TRACKING_UNAVAILABLE", address, fact, remedy) from error
    return Store(
        uri=address,
        experiment=experiment,
        experiment_id=str(found.experiment_id),
        created_ms=int(found.creation_time or 0),
        client=client,
    )


@contextmanager
def tracked_run(
    store: Store,
    name: str,
    *,
    parent_run_id: str | None = None,
    resume_run_id: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> Iterator[MlflowTracker]:
    """A run for the length of the block: FINISHED at its end, FAILED on an error, KILLED on an interrupt.

    Args:
        store: from :func:`open_store`.
        name: run name.
        parent_run_id: the run to nest it under.
        resume_run_id: continue this run instead of making one.
        tags: further tags; code version, environment and process are always set.
    """
    own = {**environment_tags(), "code_version": code_version(), PROCESS_TAG: process_identity(os.getpid())}
    own.update(tags or {})
    if parent_run_id:
        own[PARENT_TAG] = parent_run_id
    if resume_run_id:
        store.client.update_run(resume_run_id, status="RUNNING")
        tracker = MlflowTracker(store.client, resume_run_id)
        tracker.log_tags(own)
    else:
        run = store.client.create_run(store.experiment_id, run_name=name, tags=own)
        tracker = MlflowTracker(store.client, run.info.run_id)
    try:
        yield tracker
    except Exception:
        tracker.finish("FAILED")
        raise
    except BaseException:
        tracker.finish("KILLED")
        raise
    tracker.finish("FINISHED")


def terminate_abandoned_runs(store: Store) -> list[str]:
    """End, as KILLED, the runs that still say RUNNING although their process on this machine is gone."""
    ended = []
    running = store.client.search_runs([store.experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
    for run in running:
        process = run.data.tags.get(PROCESS_TAG)
        if process and not is_process_alive(process):
            store.client.set_terminated(run.info.run_id, "KILLED")
            ended.append(run.info.run_id)
    return ended


def run_status(store: Store, run_id: str) -> str | None:
    """The run's status, or None when the store does not know it."""
    run = found_or_none(store.client.get_run, run_id)
    return str(run.info.status) if run is not None else None


def found_or_none(call: Callable[..., Any], *arguments: str) -> Any | None:
    """What a client's ``get_`` method finds, or None where it raises that there is nothing.

    Local and remote stores share only the base of their error classes.
    """
    from mlflow.exceptions import MlflowException

    try:
        return call(*arguments)
    except MlflowException:
        return None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _metrics(values: Mapping[str, float], step: int) -> list[Any]:
    """Finite values as MLflow metrics; a NaN has no column to be compared in."""
    from mlflow.entities import Metric

    now_ms = int(time.time() * 1000)
    return [Metric(name, float(value), now_ms, step) for name, value in values.items() if math.isfinite(float(value))]


def _database_path(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


@contextmanager
def _locked(database: Path | None) -> Iterator[None]:
    """Hold the lock file beside the database; a server's store has its own locks."""
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_suffix(".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _set_write_ahead_log(database: Path) -> None:
    """Three times cheaper commits, and readers that do not block the writer; the database remembers it."""
    connection = sqlite3.connect(database, timeout=30)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()
