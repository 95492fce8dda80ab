"""Which implementation of the pruning operators runs, and that the model does not care."""

from __future__ import annotations

import contextlib
import copy
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from photon.errors import PhotonError
from photon.generate import answer, encode_scan, generate
from photon.model.network import Photon
from photon.model.pruning import Mode
from photon.ops import backend as backends
from photon.ops.backend import resolve
from photon.testing import micro_config, micro_model, random_branch, random_context, training_batch
from photon.training.stages import Stage
from photon.training.step import TrainingBatch, compute_loss

CONFIG = micro_config(pruning={"min_tokens": 2})
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")


def mixed_item(*, num_answer: int = 2) -> TrainingBatch:
    """Two volumes, one volume and no volume; several questions a scan, not in the order of the scans."""
    contexts = [
        random_context(CONFIG, grids, seed=n) for n, grids in enumerate(([(1, 4, 4), (2, 2, 4)], [(2, 4, 6)], []))
    ]
    branches = [
        random_branch(CONFIG, context, num_question=length, num_answer=num_answer, seed=length)
        for context, length in ((1, 2), (0, 5), (2, 3), (1, 7))
    ]
    return training_batch(contexts, branches, CONFIG, perturbed=[0], flipped=[3]).to(DEVICE)


def models() -> tuple[Photon, Photon]:
    """The same weights with plain operators and with kernels."""
    plain = micro_model(CONFIG).to(DEVICE)
    fused = copy.deepcopy(plain)
    plain.backend, fused.backend = "reference", "triton"
    return plain, fused


@pytest.mark.parametrize("mode", ["full", "soft", "hard"])
def test_forward_is_the_same(mode: Mode) -> None:
    batch = mixed_item().batch
    with torch.no_grad():
        expected, found = (model(batch, mode, with_layers=True) for model in models())
    assert torch.equal(found.schedule.keep, expected.schedule.keep)
    assert 0 < int(found.schedule.keep.sum()) < int(found.schedule.valid.sum())
    torch.testing.assert_close(found.schedule.u, expected.schedule.u)
    torch.testing.assert_close(found.schedule.p, expected.schedule.p)
    torch.testing.assert_close(found.hidden, expected.hidden)
    assert found.layer_lengths == expected.layer_lengths
    for ours, theirs in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(ours.k, theirs.k)
        torch.testing.assert_close(ours.v, theirs.v)


@pytest.mark.parametrize("stage", ["warm-up", "soft", "hard"])
def test_a_training_step_is_the_same(stage: Stage) -> None:
    item = mixed_item()
    plain, fused = models()
    expected, found = (compute_loss(model, item, stage) for model in (plain, fused))
    torch.testing.assert_close(found.loss, expected.loss)
    assert found.kept_fraction == pytest.approx(expected.kept_fraction)
    expected.loss.backward()
    found.loss.backward()
    for (name, ours), theirs in zip(fused.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None:
            size = float(theirs.grad.abs().max())
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * size, msg=name)


def test_every_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch goes to the current GPU, which need not be theirs."""
    interface = pytest.importorskip("triton.runtime.jit").KernelInterface
    chosen: list[torch.device] = []
    launched: set[str] = set()
    launch = interface.__getitem__

    @contextlib.contextmanager
    def device_of(x: torch.Tensor) -> Iterator[None]:
        chosen.append(x.device)
        yield
        chosen.pop()

    def launch_noted(kernel: Any, grid: Any) -> Any:
        assert chosen and chosen[-1].type == DEVICE.type, kernel.__name__
        launched.add(kernel.__name__)
        return launch(kernel, grid)

    monkeypatch.setattr(interface, "__getitem__", launch_noted)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    compute_loss(models()[1], mixed_item(), "hard").loss.backward()
    kernels = ("centrality", "question", "score", "schedule", "select", "compact", "rows", "probability")
    assert launched == {f"{name}_kernel" for name in kernels}


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_finding_the_backend_is_not_traced(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Looking for a compiler on the disk is nothing for a graph."""
    monkeypatch.setattr(backends, "_is_installed", lambda: bool(shutil.which("sh")))

    def chosen(x: torch.Tensor) -> torch.Tensor:
        return x + len(resolve(backend, x.device))

    found = torch.compile(chosen, fullgraph=True, backend="eager")(torch.zeros(1, device=DEVICE))
    assert found.item() == len(resolve(backend, DEVICE))


def test_answers_are_the_same() -> None:
    item, context = mixed_item(num_answer=0), random_context(CONFIG, [(2, 4, 4)], seed=0)
    questions = [random_branch(CONFIG, 0, num_question=n, seed=n).input_ids for n in (2, 6)]
    expected, found = (
        [
            *generate(model, item.batch, keep_all=False, max_new_tokens=4)[0],
            *answer(model, encode_scan(model, context), questions, max_new_tokens=4),
        ]
        for model in models()
    )
    assert [said.ids for said in found] == [said.ids for said in expected]
    assert [said.confidence for said in found] == pytest.approx([said.confidence for said in expected])


def test_the_choice_without_a_gpu() -> None:
    assert resolve("auto", CPU) == "reference", "even where the interpreter could run the kernels"
    assert resolve("reference", CPU) == "reference"
    with pytest.raises(PhotonError) as caught:
        resolve("cuda", CPU)
    assert caught.value.code == "BACKEND_UNKNOWN"


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda patch: patch.setattr(backends, "_is_installed", lambda: False), "not installed"),
        (lambda patch: patch.delenv("TRITON_INTERPRET", raising=False), "interpreter"),
    ],
)
def test_a_request_by_name_never_falls_back(
    monkeypatch: pytest.MonkeyPatch, spoil: Callable[[pytest.MonkeyPatch], None], fact: str
) -> None:
    spoil(monkeypatch)
    with pytest.raises(PhotonError) as caught:
        resolve("triton", CPU)
    assert caught.value.code == "BACKEND_UNAVAILABLE" and fact in str(caught.value)
    model, item = micro_model(CONFIG), mixed_item().to("cpu")
    model.backend = "triton"
    with pytest.raises(PhotonError, match="BACKEND_UNAVAILABLE"):
        compute_loss(model, item, "hard")


@pytest.mark.parametrize(
    ("has_gpu", "capability", "has_compiler", "fact"),
    [(False, (9, 0), True, "no GPU"), (True, (7, 5), True, "capability"), (True, (9, 0), False, "compiler")],
)
def test_what_a_gpu_lacks(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, capability: tuple[int, int], has_compiler: bool, fact: str
) -> None:
    """Told when the kernels are asked for by name; "auto" then takes plain PyTorch."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(backends, "_has_compiler", lambda: has_compiler)
    monkeypatch.setattr(backends, "_is_installed", lambda: True)
    gpu = torch.device("cuda")
    assert resolve("auto", gpu) == "reference"
    with pytest.raises(PhotonError, match=fact):
        resolve("triton", gpu)


def test_a_gpu_that_has_it_all_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_has_compiler", lambda: True)
    monkeypatch.setattr(backends, "_is_installed", lambda: True)
    assert resolve("auto", torch.device("cuda")) == resolve("triton", torch.device("cuda")) == "triton"
