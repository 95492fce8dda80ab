"""Everything a schedule needs on one machine: a server, the registered deployments and a worker.

``make serve`` runs it until Ctrl-C. Schedules never fire on the embedded server of a single job; they need this one.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows import settings
from photon.errors import PhotonError

POOL = "photon-local"
STOP_TIMEOUT_S = 20


@contextmanager
def running_server(port: int = 4200) -> Iterator[str]:
    """A Prefect server with scheduler for the length of the block; yields its API URL.

    A configured ``PREFECT_API_URL`` is used as it is.

    Raises:
        PhotonError: ``PORT_TAKEN``; ``SERVER_FAILED`` when it does not answer in time.
    """
    if configured := os.environ.get("PREFECT_API_URL"):
        yield configured
        return
    settings.stop_abandoned_processes()
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            remedy = (
                "Stop that program, set PREFECT_API_URL to the server, or choose another port: make serve PORT=4300."
            )
            raise PhotonError("PORT_TAKEN", f"127.0.0.1:{port}", "another program listens there.", remedy) from error
    url = f"http://127.0.0.1:{port}/api"
    with _running(["server", "start", "--host", "127.0.0.1", "--port", str(port)], url) as server:
        _wait_until_healthy(url, server)
        yield url


def register_deployments(project: Path, url: str) -> None:
    """Create the work pool and register every deployment of ``project/prefect.yaml``.

    Raises:
        PhotonError: ``DEPLOY_FAILED`` with what Prefect said.
    """
    _create_pool(url)
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = {**os.environ, "PREFECT_API_URL": url, "PWD": str(project)}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        said = " ".join((done.stdout + done.stderr).split())[-400:]
        raise PhotonError("DEPLOY_FAILED", project / "prefect.yaml", said, "Mend the file and start again.")


@contextmanager
def running_worker(project: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that runs, in processes on this machine, what the schedules create."""
    with _running(["worker", "start", "--pool", POOL, "--type", "process"], url, project) as worker:
        yield worker


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until interrupted; exit code 0 after Ctrl-C, 1 when the worker or a start failed."""
    parser = argparse.ArgumentParser(description="Run the schedules of prefect.yaml on this machine.")
    parser.add_argument("--port", type=int, default=4200, help="port of the Prefect server (4200)")
    port = parser.parse_args(arguments).port
    settings.apply()
    project = settings.project_folder()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running_server(port) as url:
            register_deployments(project, url)
            with running_worker(project, url) as worker:
                _say(f"Schedules of prefect.yaml are served; see {url.removesuffix('/api')}. Ctrl-C ends.")
                return worker.wait()
    except KeyboardInterrupt:
        _say("Stopped.")
        return 0
    except PhotonError as error:
        _say(str(error))
        return 1


@contextmanager
def _running(command: Sequence[str], url: str, folder: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A `prefect` command in a process group of its own, so that Ctrl-C reaches it in our order, not at once."""
    environment = {**os.environ, "PREFECT_API_URL": url}
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "--no-prompt", *command],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    with settings.noted_process(process.pid):
        try:
            yield process
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            break
        os.killpg(process.pid, number)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue


def _wait_until_healthy(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + settings.START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    remedy = "Its own messages are above; PREFECT_LOGGING_SERVER_LEVEL=INFO shows more."
    raise PhotonError("SERVER_FAILED", url, "the Prefect server did not start.", remedy)


def _create_pool(url: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.workers.process import ProcessWorker

    async def create() -> None:
        async with get_client() as client:
            template = ProcessWorker.get_default_base_job_template()
            pool = WorkPoolCreate(name=POOL, type="process", base_job_template=template)
            await client.create_work_pool(pool, overwrite=True)

    with temporary_settings({PREFECT_API_URL: url}):
        asyncio.run(create())


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
