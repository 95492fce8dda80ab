"""A schedule really starts a run: server, registration and worker as `make serve` starts them."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import serve, settings
from photon.errors import PhotonError

PROJECT = Path(__file__).resolve().parents[2]
FLOW = """
from pathlib import Path
from prefect import flow

@flow(name="tiny", persist_result=False)
def tiny_flow(mark: str) -> None:
    Path(mark).write_text(str(Path.cwd()))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, path: str, body: Any) -> Any:
    request = urllib.request.Request(
        f"{url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def test_a_scheduled_run_starts_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PREFECT_WORKER_QUERY_SECONDS", "2")
    project = tmp_path / "project"
    project.mkdir()
    content = yaml.safe_load((PROJECT / "prefect.yaml").read_text(encoding="utf-8"))
    deployment = content["deployments"][0]  # the shipped one, with a flow and a schedule of seconds
    mark = tmp_path / "mark"
    deployment |= {"entrypoint": "tiny.py:tiny_flow", "parameters": {"mark": str(mark)}, "schedules": [{"interval": 5}]}
    (project / "prefect.yaml").write_text(yaml.safe_dump({**content, "deployments": [deployment]}))
    (project / "tiny.py").write_text(FLOW)
    with serve.running_server(free_port()) as url:
        serve.register_deployments(project, url)
        with serve.running_worker(project, url) as worker:
            completed = wait_for_completed_run(url, deadline_s=90)
            assert worker.poll() is None
    assert completed["auto_scheduled"] is True
    assert completed["created_by"]["type"] == "SCHEDULE"
    assert mark.read_text() == str(project)
    assert worker.poll() is not None
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url}/health", timeout=2)


def wait_for_completed_run(url: str, deadline_s: float) -> dict[str, Any]:
    deadline = time.monotonic() + deadline_s
    states: list[str] = []
    while time.monotonic() < deadline:
        runs = ask(url, "flow_runs/filter", {"sort": "START_TIME_ASC"})
        states = [run["state"]["type"] for run in runs]
        for run in runs:
            if run["state"]["type"] == "COMPLETED":
                return dict(run)
        time.sleep(0.5)
    pytest.fail(f"no scheduled run completed within {deadline_s} s; states: {states}")


def test_a_taken_port_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(PhotonError, match="PORT_TAKEN"), serve.running_server(taken.getsockname()[1]):
            pass


def test_a_configured_server_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere:4200/api")
    with serve.running_server() as url:
        assert url == os.environ["PREFECT_API_URL"]
    assert not list((settings.state_folder() / "processes").glob("*.json"))
