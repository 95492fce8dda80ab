"""The public model's widths, heads and volume at a few layers, on a GPU: its fused attention is as exact as blocks.

The same comparison runs on the CPU with the micro model, where both sides are blocks.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from photon.config import PhotonConfig, qwen2_5_vl_3b
from photon.generate import generate
from photon.grid import Grid
from photon.model.network import Photon
from photon.model.pruning import Mode
from photon.testing import micro_config, random_branch, random_context, training_batch
from photon.training.stages import Stage
from photon.training.step import TrainingBatch, compute_loss


def few_layers() -> PhotonConfig:
    """The public preset with 4 of 36 and 4 of 32 layers and a small vocabulary."""
    whole = qwen2_5_vl_3b()
    return dataclasses.replace(
        whole,
        num_hidden_layers=4,
        vocab_size=1024,
        vision_start_token_id=1000,
        vision_end_token_id=1001,
        video_token_id=1002,
        eos_token_id=1003,
        vision=dataclasses.replace(whole.vision, depth=4, fullatt_block_indexes=(1, 3)),
        pruning=dataclasses.replace(whole.pruning, layer=1),
    )


SIZES = [
    pytest.param(micro_config(), [[(2, 4, 4)], [(1, 4, 6), (2, 2, 2)]], "cpu", id="micro"),
    pytest.param(
        few_layers(),
        # The second scan's windows are cut off at its edges.
        [[(10, 20, 20)], [(3, 18, 14), (1, 2, 2)]],
        "cuda",
        id="full",
        marks=(pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ),
]


def item_of(config: PhotonConfig, grids: list[list[Grid]], num_answer: int = 3) -> TrainingBatch:
    contexts = [random_context(config, each, seed=n) for n, each in enumerate([*grids, []])]
    places = [(0, 60), (0, 7), (1, 30), (2, 12)]
    branches = [random_branch(config, c, num_question=n, num_answer=num_answer, seed=n) for c, n in places]
    return training_batch(contexts, branches, config)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@torch.no_grad()
def logits(model: Photon, item: TrainingBatch, mode: Mode) -> Tensor:
    output = model(item.batch, mode)
    return model.logits(output.hidden[output.branch_rows])


def gradient(model: Photon, item: TrainingBatch, stage: Stage) -> Tensor:
    compute_loss(model, item, stage).loss.backward()
    found = torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("config", "grids", "device"), SIZES)
def test_half_precision(
    config: PhotonConfig, grids: list[list[Grid]], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice as far from float32 as the blocks are in the same precision."""
    exact = Photon(config).initialise(0).to(device)
    half = copy.deepcopy(exact).bfloat16()
    item = item_of(config, grids).to(device)
    fused = logits(half, item, "full"), gradient(half, item, "warm-up")
    half.checkpoint_activations = True
    assert relative(gradient(half, item, "warm-up"), fused[1]) < 1e-2, "atomic sums aside, the same"
    half.checkpoint_activations = False
    pruned = logits(half, item, "hard"), gradient(half, item, "hard")
    assert all(bool(torch.isfinite(values).all()) for values in pruned)
    monkeypatch.setattr("photon.model.attention.FUSED_DTYPES", ())
    blocks = logits(half, item, "full"), gradient(half, item, "warm-up")
    expected = logits(exact, item, "full"), gradient(exact, item, "warm-up")
    for ours, plain, right in zip(fused, blocks, expected, strict=True):
        assert 0 < relative(plain, right) < 0.2
        assert relative(ours, right) <= 2 * relative(plain, right)


@pytest.mark.parametrize(("config", "grids", "device"), SIZES)
def test_a_batch_keeps_what_each_question_keeps_alone(
    config: PhotonConfig, grids: list[list[Grid]], device: str
) -> None:
    """In float32; and generation in bfloat16 goes through."""
    model = Photon(config).initialise(0).to(device)
    contexts = [random_context(config, each, seed=n) for n, each in enumerate(grids)]
    branches = [random_branch(config, c, num_question=n, seed=n) for c, n in ((0, 60), (0, 7), (1, 30))]
    together = training_batch(contexts, branches, config).batch
    with torch.no_grad():
        found = model(together.to(device), "hard").schedule
        for number, branch in enumerate(branches):
            alone = training_batch([contexts[branch.context]], [dataclasses.replace(branch, context=0)], config).batch
            expected = model(alone.to(device), "hard").schedule
            sure = ((expected.rho - expected.theta[:, None]).abs() > 1e-4)[expected.valid]
            rows = found.branch == number
            kept, kept_alone = found.keep[rows][found.valid[rows]], expected.keep[expected.valid]
            assert torch.equal(kept & sure, kept_alone & sure)
    for keep_all in (False, True):
        answers, _ = generate(model.bfloat16(), together, keep_all=keep_all, max_new_tokens=4)
        assert all(0 < answer.confidence <= 1 for answer in answers)
