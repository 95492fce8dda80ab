"""A small archive and a model trained on it, made once for all tests that need a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.export import export
from pipelines.phantoms import PhantomSpec, generate
from pipelines.preprocess import preprocess
from pipelines.train import train
from pipelines.train_spec import TrainSpec
from pipelines.volumes import VOLUME_SPECS

DATA_VERSION = "0123456789abcdef.dir"


@pytest.fixture(scope="session")
def smoke_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preprocessed data folder: 8 training, 3 validation and 4 test patients. Read it only."""
    data = tmp_path_factory.mktemp("smoke") / "data"
    generate(PhantomSpec(num_train=8, num_val=3, num_test=4), data)
    record = preprocess(data / "raw" / "images", data / "volumes", VOLUME_SPECS["smoke"], num_workers=1)
    assert record.num_refused == 0
    return data


@pytest.fixture(scope="session")
def trained(smoke_data: Path) -> Path:
    """The folder of a finished smoke training run. Read it only."""
    folder = smoke_data.parent / "train"
    train(TrainSpec.preset("smoke"), smoke_data, folder, data_version=DATA_VERSION)
    return folder


@pytest.fixture(scope="session")
def exported(smoke_data: Path, trained: Path) -> Path:
    """The folder of an accepted export of that run; its making is most of these tests' time. Read it only."""
    folder = smoke_data.parent / "export"
    export(trained / "checkpoint", smoke_data, folder, data_version=DATA_VERSION)
    return folder
