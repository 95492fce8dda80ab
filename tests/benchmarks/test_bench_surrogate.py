"""The benchmark of the surrogate rules: correlations and signs by hand, and true changes that are true."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from photon.model.packing import IGNORE_INDEX, Branch, pack_batch
from photon.testing import micro_config, micro_model, random_context

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("bench_surrogate", FOLDER / "bench_surrogate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_surrogate"] = module
    spec.loader.exec_module(module)
    return module


def test_correlation_and_signs_by_hand(bench: ModuleType) -> None:
    truth = np.array([0.1, 0.4, 0.2, -0.3])
    assert bench.spearman(truth, np.array([1.0, 9.0, 2.0, -8.0])) == pytest.approx(1.0)
    assert bench.spearman(truth, -truth) == pytest.approx(-1.0)
    assert bench.spearman(truth, np.zeros(4)) is None and bench.spearman(truth[:2], truth[:2]) is None
    assert bench.sign_agreement(truth, np.array([1.0, -1.0, 1.0, -1.0])) == 0.75
    assert bench.sign_agreement(np.array([0.0, 1e-7]), np.ones(2)) is None


def test_top_scores_and_toggled_flags(bench: ModuleType) -> None:
    rho = torch.tensor([0.1, 0.9, 0.5])
    assert bench.top(rho, 2).tolist() == [False, True, True]
    assert bench.top(rho, 0).sum() == 1 and bench.top(rho, 9).sum() == 3
    assert bench.toggled(torch.tensor([True, False]), 1).tolist() == [True, True]


def test_losses_and_wishes_of_a_question(bench: ModuleType) -> None:
    """The loss by forced flags is the model's own, and the rules disagree about the tokens kept."""
    config = micro_config()
    model = micro_model(config)
    context = random_context(config, [(4, 4, 4)], seed=0)
    ids = torch.tensor([3, 5, config.eos_token_id, 7, 8])
    branch = Branch(0, ids, torch.tensor([IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 7, 8]))
    batch = pack_batch([context], [branch], config)
    with torch.no_grad():
        state = model.encode_contexts(batch, config.pruning.layer + 1)
        output = model.run_branches(batch, state, "hard")
        own = bench.answer_losses(model, batch, output)
    keep = output.schedule.keep[0]
    losses = bench.losses_of(model, context, branch, state, torch.stack([keep, ~keep]))
    assert float(losses[0]) == pytest.approx(float(own), abs=1e-5)
    assert abs(float(losses[1] - losses[0])) > 1e-4
    kept, dropped = keep.nonzero().flatten(), (~keep).nonzero().flatten()
    found = {rule: bench.wishes(model, batch, state, rule, 1.0, kept, dropped) for rule in ("paper", "taylor")}
    assert bench.spearman(found["paper"]["kept"], found["taylor"]["kept"]) < 0
    assert model.config == config and all(parameter.grad is None for parameter in model.parameters())
