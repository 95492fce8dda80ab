"""Two real processes train what one trains: whole models (DDP) and sharded ones (FSDP2), on the CPU by gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from photon.checkpoint import load_tensors
from photon.errors import PhotonError
from photon.testing import micro_model
from photon.training.launch import join, num_processes
from photon.training.loop import Trainer
from photon.training.parallel import ALONE
from photon.training.working import read_note, take_notes, told, write_note

WORKER = Path(__file__).with_name("parallel_worker.py")
TRAINED = ("ddp accumulated", "fsdp one has nothing", "fsdp text", "ddp resumed", "fsdp resumed")
LEFT = "fsdp left"
"""Stopped in its sixth step, and left for a process of its own."""
FAILED = ("ddp fails cannot read", "fsdp fails diverges", "fsdp fails cannot compute")
"""The last is noticed by the other rank only when the process that failed has ended."""
ATOL = 1e-6
"""Largest difference of a weight after nine steps that moved weights by up to 8e-3; measured: 2.4e-7."""


def worker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parallel_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launch(folder: Path, names: Sequence[str]) -> list[int]:
    """Run scenarios on two ranks; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = min(free.getsockname()[1], 65000)
    ranks = []
    for rank in range(2):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
        environment |= {name: str(value) for name, value in variables.items()}
        command = [sys.executable, "-W", "error::UserWarning:photon", str(WORKER), str(folder), *names]
        ranks.append(subprocess.Popen(command, env=environment))
    try:
        return [process.wait(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert launch(folder, [*TRAINED, LEFT]) == [0, 0]
    assert not list(folder.glob("*.error"))
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[list[float], dict[str, Tensor]]]:
    """Losses and weights of one process."""
    module, found = worker(), {}
    for dealt in ("even", "text"):
        trainer, losses = module.run(ALONE, dealt=dealt)
        found[dealt] = losses, {name: p.detach() for name, p in trainer.model.named_parameters()}
    return found


@pytest.mark.parametrize("name", TRAINED)
def test_losses_and_weights_are_those_of_one_process(
    trained: Path, alone: dict[str, tuple[list[float], dict[str, Tensor]]], name: str
) -> None:
    expected_losses, expected = alone["text" if name.endswith("text") else "even"]
    losses = json.loads((trained / f"{name}.0.json").read_text())
    assert losses == json.loads((trained / f"{name}.1.json").read_text()), "every rank knows the loss of all"
    assert len(losses) == (5 if name.endswith("resumed") else len(expected_losses))
    assert losses == pytest.approx(expected_losses[-len(losses) :], rel=2e-6)
    found = load_tensors(trained / f"{name}.safetensors")
    assert found.keys() == expected.keys()
    for label, weight in expected.items():
        torch.testing.assert_close(found[label], weight, rtol=0, atol=ATOL, msg=label)


def test_the_test_could_tell(alone: dict[str, tuple[list[float], dict[str, Tensor]]]) -> None:
    """Gradients are clipped in this run, weights move far more than the tolerance, and the threshold network learns."""
    module = worker()
    start = dict(micro_model(module.CONFIG).named_parameters())
    moved = {name: float((weight - start[name].detach()).abs().max()) for name, weight in alone["even"][1].items()}
    assert max(moved.values()) > 1000 * ATOL
    assert min(value for name, value in moved.items() if "predictor" in name) > 100 * ATOL
    trainer = Trainer(micro_model(module.CONFIG), module.SCHEDULE, module.RATES, run_digest="run")
    assert trainer._gradient([module.pack(0, range(4))], 1).grad_norm > module.RATES.max_grad_norm


def test_one_process_goes_on_where_two_stopped(
    trained: Path, alone: dict[str, tuple[list[float], dict[str, Tensor]]]
) -> None:
    trainer, losses = worker().run(ALONE, trained / LEFT)
    expected_losses, expected = alone["even"]
    assert len(losses) == 5 and losses == pytest.approx(expected_losses[-5:], rel=2e-6)
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(weight.detach(), expected[name], rtol=0, atol=ATOL, msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_state_of_ranks_is_one_of_a_process(trained: Path, kind: str) -> None:
    """Rank 0 alone writes, whole tensors, and a process of its own goes on from them."""
    module = worker()
    folder = trained / f"{kind} resumed"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "model.safetensors",
        "optimiser.safetensors",
        "progress.json",
    ]
    trainer, losses = module.run(ALONE, folder)
    assert losses == [] and trainer.num_steps_done == module.SCHEDULE.num_steps
    found = load_tensors(trained / f"{kind} resumed.safetensors")
    assert all(torch.equal(found[name], p.detach()) for name, p in trainer.model.named_parameters())
    moments = {name: len(state) for name, state in trainer.optimiser.state.items()}
    assert len(moments) == sum(1 for _ in trainer.model.parameters()) - 1, "all but the unused position projection"


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failed")
    assert launch(folder, FAILED) == [0, 0], "no rank hangs"
    return folder


@pytest.mark.parametrize(
    "name, code, words",
    [
        ("ddp fails cannot read", "VOLUME_CORRUPT", "scan-3"),
        ("fsdp fails diverges", "TRAINING_DIVERGED", "step 2 (scans scan-0, scan-2, scan-1, scan-3)"),
        ("fsdp fails cannot compute", "TRAINING_FAILED", "step 2 (scans scan-1, scan-3)"),
    ],
)
def test_an_error_of_one_rank_ends_both_with_its_message(failed: Path, name: str, code: str, words: str) -> None:
    told_by = [json.loads((failed / f"{name}.{rank}.error").read_text()) for rank in range(2)]
    assert told_by[0] == told_by[1]
    assert told_by[0]["code"] == code and words in told_by[0]["subject"]
    assert not (failed / name / "working").exists(), "who tells the scans leaves no note of them"


def test_a_killed_rank_is_told_with_its_scans(tmp_path: Path) -> None:
    assert launch(tmp_path, ["ddp fails is killed"]) == [0, -9]
    error = json.loads((tmp_path / "ddp fails is killed.0.error").read_text())
    assert error["code"] == "TRAINING_FAILED"
    assert error["fact"] == "rank 1 ended without a message in step 2, working on scans scan-1, scan-3."
    notes = tmp_path / "ddp fails is killed" / "working"
    assert take_notes(notes) == ["rank 1 ended without a message in step 2, working on scans scan-1, scan-3"]
    assert take_notes(notes) == []


def test_notes(tmp_path: Path) -> None:
    folder = tmp_path / "working"
    assert read_note(folder, 0) is None and take_notes(folder) == []
    write_note(folder, 0, 7, ["a", "b"])
    write_note(folder, 0, 8, ["c"])
    assert told(read_note(folder, 0)) == "in step 8, working on scans c"
    (folder / "rank-1.json").write_text("{")
    assert take_notes(folder)[1] == "rank 1 ended without a message before its first step"


def test_without_torchrun_there_are_no_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PhotonError, match="torchrun") as caught, join("ddp", torch.device("cpu"), tmp_path):
        pass
    assert caught.value.code == "TRAINING_INVALID"
    assert num_processes({}) == 1
    started: dict[str, Any] = {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    assert num_processes(started | {"WORLD_SIZE": "4"}) == 4
