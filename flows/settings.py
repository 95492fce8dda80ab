"""Environment defaults for a job on one machine, and the one Prefect server it runs against.

Prefect, MLflow, onnxruntime and DVC read their environment when they are imported, so the command line and
every flow module call :func:`apply` before they import any of them. What the user has set already wins.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipelines.files import write_json
from pipelines.provenance import is_process_alive, process_identity

STATE_VARIABLE = "PHOTON_STATE"
START_TIMEOUT_S = 300  # the first start creates Prefect's database; slow machines need minutes, not its 20 s
DRAIN_S = 2.0  # the server records task runs in batches; stopping at once would lose the last ones


def project_folder() -> Path:
    """The checkout this package runs from, or the working folder when it is installed elsewhere."""
    checkout = Path(__file__).resolve().parents[1]
    return checkout if (checkout / "prefect.yaml").is_file() else Path.cwd()


def state_folder() -> Path:
    """Where databases live: ``PHOTON_STATE``, or ``.state`` in the project folder. Absolute."""
    return Path(os.environ.get(STATE_VARIABLE) or project_folder() / ".state").resolve()


def apply(state: Path | None = None) -> Path:
    """Set the environment defaults of a local, offline, quiet job and return the (created) state folder.

    Args:
        state: the folder of all databases; without it see :func:`state_folder`.
    """
    folder = (state or state_folder()).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ[STATE_VARIABLE] = str(folder)
    for name, value in _defaults(folder).items():
        os.environ.setdefault(name, value)
    return folder


def _defaults(folder: Path) -> dict[str, str]:
    return {
        "DO_NOT_TRACK": "true",  # the word: MLflow accepts no other spelling
        "DVC_NO_ANALYTICS": "true",
        "GIT_PYTHON_REFRESH": "quiet",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}",
        "NO_PROXY": "127.0.0.1,localhost",  # behind a proxy the embedded server would seem to time out
        "ORT_DISABLE_TELEMETRY": "1",
        "PREFECT_CLI_PROMPT": "false",
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(START_TIMEOUT_S),
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "50",
        # Whole seconds: the recorder drops the fraction, and an interval of 0 keeps a core busy for nothing.
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
        "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "50",
    }


@contextmanager
def embedded_server() -> Iterator[str]:
    """One Prefect server for everything inside the block; yields its API URL.

    A configured ``PREFECT_API_URL`` is used as it is. Otherwise a server is started on a free port of
    127.0.0.1 and stopped at the end. A server left behind by a killed job is stopped first.

    Raises:
        RuntimeError: the server did not answer within ``START_TIMEOUT_S``.
    """
    apply()
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if configured := PREFECT_API_URL.value():
        yield configured
        return

    from prefect.server.api.server import SubprocessASGIServer

    stop_abandoned_processes()
    server = SubprocessASGIServer()
    server.start(timeout=START_TIMEOUT_S)
    assert server.server_process is not None
    try:
        with noted_process(server.server_process.pid), temporary_settings({PREFECT_API_URL: server.api_url}):
            yield server.api_url
            time.sleep(DRAIN_S)
    finally:
        server.stop()


@contextmanager
def noted_process(pid: int) -> Iterator[None]:
    """Remember a process this one started, so that it can be stopped later if this one is killed."""
    notes = state_folder() / "processes"
    notes.mkdir(parents=True, exist_ok=True)
    note = notes / f"{pid}.json"
    write_json(note, {"process": process_identity(pid), "owner": process_identity(os.getpid())})
    try:
        yield
    finally:
        note.unlink(missing_ok=True)


def stop_abandoned_processes() -> None:
    """Stop servers and workers whose owner was killed before it could stop them."""
    for note in (state_folder() / "processes").glob("*.json"):
        with suppress(OSError, ValueError, KeyError):
            content = json.loads(note.read_text(encoding="utf-8"))
            if is_process_alive(content["owner"]):
                continue
            if is_process_alive(content["process"]):
                os.kill(int(note.stem), signal.SIGTERM)
            note.unlink(missing_ok=True)


@contextmanager
def quiet_flow_errors() -> Iterator[None]:
    """Keep Prefect from printing a traceback for each flow an error passes; the caller tells it once."""
    loggers = [logging.getLogger(name) for name in ("prefect.flow_runs", "prefect.task_runs")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
