"""Every test works on databases of its own: nothing touches the state of the checkout or of the user."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

STATE = Path(tempfile.mkdtemp(prefix="photon-tests-"))
atexit.register(shutil.rmtree, STATE, ignore_errors=True)
for name in ("PREFECT_API_URL", "PREFECT_HOME", "PREFECT_PROFILE", "MLFLOW_TRACKING_URI"):
    os.environ.pop(name, None)
# Without a GPU the Triton kernels run in its interpreter, which has to be known before they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from flows import settings  # noqa: E402

settings.apply(STATE)

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The models here are too small to share; threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """One Prefect server with a fresh database for all flow tests; its start takes most of their time."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=settings.START_TIMEOUT_S):
        yield str(PREFECT_API_URL.value())
