"""A loss that explodes stops the run, and what is on disk is a model from before."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from photon.checkpoint import read_model
from photon.errors import PhotonError
from photon.testing import micro_config, micro_model, random_branch, random_context, training_batch
from photon.training.divergence import FACTOR, WINDOW, LossWatch
from photon.training.loop import StepReport, Trainer
from photon.training.optimiser import OptimiserConfig
from photon.training.stages import StageSchedule
from photon.training.state import OPTIMISER, PROGRESS
from photon.training.step import TrainingBatch, compute_loss

CONFIG = micro_config()
RATES = OptimiserConfig(learning_rate=1e-2, vision_learning_rate=1e-3, alignment_learning_rate=5e-3)
SCHEDULE = StageSchedule(alignment=0, warm_up=40, soft=0, hard=0, flip_after=0)
GUESS = math.log(40)


def stopped_at(losses: Iterable[float], vocab_size: int = 40) -> int | None:
    """Step at which the watch stops a run with these losses."""
    watch = LossWatch(vocab_size)
    for step, loss in enumerate(losses):
        try:
            watch.see(loss, step, "warm-up")
        except PhotonError as error:
            assert error.code == "TRAINING_DIVERGED" and f"{WINDOW} steps" in error.fact and str(step) in error.subject
            return step
    return None


def test_what_is_an_explosion() -> None:
    learning = [GUESS * 0.98**step for step in range(100)]
    assert stopped_at([*learning, *[5 * GUESS] * 20]) == 100 + WINDOW - 1
    assert stopped_at([1.0, *[FACTOR * GUESS] * 20]) == WINDOW, "the first loss is a low one too"
    drifting = [*learning, *[0.5 * 1.05**step for step in range(200)]]
    stop = stopped_at(drifting)
    assert stop is not None and drifting[stop - WINDOW] <= GUESS < drifting[stop - WINDOW + 1]


def test_what_is_none() -> None:
    chance = random.Random(0)
    learning = [GUESS * 0.98**step * chance.uniform(0.5, 2.0) for step in range(300)]
    assert stopped_at(learning) is None
    assert stopped_at([3 * GUESS] * 50) is None, "it never was better"
    assert stopped_at([*[0.2] * 20, *[GUESS - 0.01] * 50]) is None, "pruning costs much, but it still beats a guess"
    spikes = [loss if step % WINDOW else 1e6 for step, loss in enumerate(learning)]
    assert stopped_at(spikes[1:]) is None
    almost = [*[0.2] * 20, *([9.0] * (WINDOW - 1) + [0.2]) * 5]
    assert stopped_at(almost) is None
    assert stopped_at([*[2.0] * 20, *[5.9] * 50]) is None, "not three times the lowest"


def test_a_watch_goes_on_where_it_was() -> None:
    losses = [*[0.5] * 15, *[4.0] * (WINDOW - 1)]
    whole, first = LossWatch(40), LossWatch(40)
    for step, loss in enumerate(losses):
        whole.see(loss, step, "soft")
        if step < 18:
            first.see(loss, step, "soft")
    again = LossWatch(40)
    again.resume(json.loads(json.dumps(first.as_dict())))
    for step, loss in enumerate(losses[18:], 18):
        again.see(loss, step, "soft")
    assert again == whole
    with pytest.raises(PhotonError):
        again.see(4.0, 99, "soft")
    fresh = LossWatch(40)
    fresh.resume(json.loads(json.dumps(LossWatch(40).as_dict())))
    assert fresh == LossWatch(40)


def batch_at(step: int, with_flips: bool) -> TrainingBatch:
    contexts = [random_context(CONFIG, [(1, 4, 4)], seed=step % 3)]
    branches = [random_branch(CONFIG, 0, num_question=2, num_answer=1, seed=step % 3 + n) for n in range(3)]
    return training_batch(contexts, branches, CONFIG)


@pytest.mark.parametrize("rate, words", [(10.0, "answer loss was above"), (math.inf, "not finite|nan|inf")])
def test_an_explosion_leaves_a_usable_state(tmp_path: Path, rate: float, words: str) -> None:
    """The learning rate gets out of hand in step 15; every state is written, and no bad one stays."""
    trainer = Trainer(micro_model(CONFIG), SCHEDULE, RATES, run_digest="run")
    losses: list[float] = []

    def on_step(report: StepReport) -> None:
        losses.append(report.result.answer_loss)
        if report.step == 14:
            for group in trainer.optimiser.param_groups:
                group["base_lr"] = rate

    with pytest.raises(PhotonError, match=words) as caught:
        trainer.run(batch_at, on_step=on_step, save_to=tmp_path, save_every=1)
    assert caught.value.code == "TRAINING_DIVERGED" and "learning rate" in caught.value.remedy
    progress = json.loads((tmp_path / PROGRESS).read_text())
    assert 14 <= progress["num_steps_done"] <= 15, "the weights after step 15 are bad, and step 16 found out"
    model = read_model(tmp_path)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    with torch.no_grad():
        loss = compute_loss(model, batch_at(progress["num_steps_done"], False), "warm-up").answer_loss
    assert loss < GUESS and loss == pytest.approx(losses[progress["num_steps_done"]], rel=1e-6)
    again = Trainer(micro_model(CONFIG), SCHEDULE, RATES, run_digest="run")
    assert again.restore(tmp_path) and (tmp_path / OPTIMISER).is_file()
    again.run(batch_at, on_step=lambda report: None)


def test_bad_weights_after_the_last_step_are_not_written(tmp_path: Path) -> None:
    trainer = Trainer(
        micro_model(CONFIG),
        StageSchedule(alignment=0, warm_up=3, soft=0, hard=0, flip_after=0),
        RATES,
        run_digest="run",
    )

    def on_step(report: StepReport) -> None:
        if report.step == 2:
            trainer.model.model.norm.weight.data[0] = math.nan

    with pytest.raises(PhotonError, match="model.norm.weight is not finite") as caught:
        trainer.run(batch_at, on_step=on_step, save_to=tmp_path, save_every=1)
    assert caught.value.code == "TRAINING_DIVERGED"
    assert json.loads((tmp_path / PROGRESS).read_text())["num_steps_done"] == 2


def test_a_loss_that_is_too_high_is_not_saved_until_it_is_well_again(tmp_path: Path) -> None:
    """In a spike the state stays as it was; once the loss has recovered it is written with the right progress."""
    trainer = Trainer(micro_model(CONFIG), SCHEDULE, RATES, run_digest="run")
    seen: list[int] = []
    high: list[int] = []

    def on_step(report: StepReport) -> None:
        path = tmp_path / PROGRESS
        seen.append(json.loads(path.read_text())["num_steps_done"] if path.is_file() else 0)
        high.append(trainer.watch.num_high)

    see = trainer.watch.see
    trainer.watch.see = lambda loss, step, stage: see(99.0 if 20 <= step < 25 else loss, step, stage)  # type: ignore
    trainer.run(batch_at, on_step=on_step, save_to=tmp_path, save_every=1)
    assert high[20:25] == [1, 2, 3, 4, 5] and high[25] == 0
    assert seen[19:27] == [19, 19, 19, 19, 19, 19, 25, 26]


def test_bfloat16_steps_keep_float32_masters(tmp_path: Path) -> None:
    """Updates far below what bfloat16 weights could hold add up, in weights and moments that are float32."""
    rates = OptimiserConfig(
        learning_rate=1e-6,
        vision_learning_rate=1e-6,
        alignment_learning_rate=1e-6,
        weight_decay=0.0,
        warm_up_fraction=0.01,
        floor=1.0,
        precision="bfloat16",
    )
    trainer = Trainer(micro_model(CONFIG), SCHEDULE, rates, run_digest="run")
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.run(batch_at, on_step=lambda report: None, save_to=tmp_path)
    tensors = [*trainer.model.parameters(), *(p.grad for p in trainer.model.parameters() if p.grad is not None)]
    tensors += [value for state in trainer.optimiser.state.values() for value in state.values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}
    name = "model.layers.0.mlp.gate_proj.weight"
    moved = (dict(trainer.model.named_parameters())[name] - start[name]).detach().abs()
    assert 20e-6 < float(moved.max()) <= 41e-6, "forty steps of at most 1e-6 each"
    large = start[name].abs() > 0.02
    assert bool(large.any()) and bool((moved[large] > 0).float().mean() > 0.9)
    one_step = (start[name].bfloat16() + 1e-6).float()
    assert torch.equal(one_step[large], start[name].bfloat16().float()[large]), "bfloat16 weights would not move at all"
    assert {p.dtype for p in read_model(tmp_path).parameters()} == {torch.float32}
