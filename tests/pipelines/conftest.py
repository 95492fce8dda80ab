"""A small archive and a model trained on it, made once for all tests that need a real one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipelines.export import export
from pipelines.phantoms import PhantomSpec, generate
from pipelines.preprocess import preprocess
from pipelines.results import ExportRecord, TrainRecord
from pipelines.train import TrainSpec, train
from pipelines.volumes import VOLUME_SPECS

DATA_VERSION = "0123456789abcdef.dir"


@dataclass(frozen=True)
class SmokeRun:
    """A trained and exported model, and the data folder it learned from."""

    data: Path
    folder: Path
    trained: TrainRecord
    exported: ExportRecord


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The models here are too small to share; threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smoke_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preprocessed data folder: 8 training, 3 validation and 4 test patients. Read it only."""
    data = tmp_path_factory.mktemp("smoke") / "data"
    generate(PhantomSpec(num_train=8, num_val=3, num_test=4), data)
    record = preprocess(data / "raw" / "images", data / "volumes", VOLUME_SPECS["smoke"], num_workers=1)
    assert record.num_refused == 0
    return data


@pytest.fixture(scope="session")
def smoke_run(smoke_data: Path) -> SmokeRun:
    """The smoke preset trained and exported. Read it only."""
    folder = smoke_data.parent
    trained = train(TrainSpec.preset("smoke"), smoke_data, folder / "train", data_version=DATA_VERSION)
    exported = export(folder / "train" / "checkpoint", smoke_data, folder / "export", data_version=DATA_VERSION)
    return SmokeRun(smoke_data, folder, trained, exported)
