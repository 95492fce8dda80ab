"""The schedule, the perturbations, and a trainer that continues as if it had never stopped."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from photon.checkpoint import read_model
from photon.config import POLICIES
from photon.device import sums_in_order
from photon.errors import PhotonError
from photon.testing import micro_config, micro_model, random_branch, random_context, training_batch
from photon.training.loop import StepReport, Trainer
from photon.training.optimiser import OptimiserConfig
from photon.training.perturb import KINDS, ODDS, draw_kind, perturb
from photon.training.stages import StageSchedule, learning_rate_factor
from photon.training.state import OPTIMISER, PROGRESS
from photon.training.step import TrainingBatch, compute_loss

SCHEDULE = StageSchedule(alignment=2, warm_up=2, soft=2, hard=3, flip_after=1)
CONFIG = micro_config(pruning={"min_tokens": 2})
OPTIMISER_CONFIG = OptimiserConfig(learning_rate=2e-3, vision_learning_rate=1e-3, alignment_learning_rate=5e-3)


def batch_at(step: int, with_flips: bool) -> TrainingBatch:
    """Two scans with two questions each; some perturbed, some flipped, from the step alone."""
    contexts = [
        random_context(CONFIG, [(1 + step % 2, 4, 4)], seed=10 * step),
        random_context(CONFIG, [(1, 2, 6)], seed=step),
    ]
    branches = [
        random_branch(CONFIG, n // 2, num_question=2 + n, num_answer=1 + n % 2, seed=step + n) for n in range(4)
    ]
    return training_batch(
        contexts, branches, CONFIG, perturbed=[0] if step % 3 == 2 else [], flipped=[3] if with_flips else []
    )


def new_trainer(digest: str = "run", schedule: StageSchedule = SCHEDULE) -> Trainer:
    return Trainer(micro_model(CONFIG), schedule, OPTIMISER_CONFIG, run_digest=digest)


class Stop(Exception):
    """Stands for a kill."""


def stop_after(count: int, losses: list[float]) -> Callable[[StepReport], None]:
    def on_step(report: StepReport) -> None:
        if report.step >= count:
            raise Stop
        losses.append(float(report.result.loss.detach()))

    return on_step


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def run_whole() -> tuple[list[float], dict[str, Tensor]]:
    losses: list[float] = []
    trainer = new_trainer()
    trainer.run(batch_at, on_step=stop_after(99, losses))
    return losses, weights(trainer)


def test_stages_and_their_edges() -> None:
    stages = [SCHEDULE.stage_at(step) for step in range(SCHEDULE.num_steps)]
    assert stages == ["alignment"] * 2 + ["warm-up"] * 2 + ["soft"] * 2 + ["hard"] * 3
    assert [SCHEDULE.flips_at(step) for step in range(9)] == [False] * 7 + [True] * 2
    only_hard = StageSchedule(alignment=0, warm_up=0, soft=0, hard=2, flip_after=0)
    assert [only_hard.stage_at(step) for step in range(2)] == ["hard", "hard"] and only_hard.flips_at(0)
    none_hard = StageSchedule(alignment=0, warm_up=1, soft=1, hard=0, flip_after=0)
    assert [none_hard.stage_at(step) for step in range(2)] == ["warm-up", "soft"]
    assert not none_hard.flips_at(1)


def test_learning_rate() -> None:
    factors = [learning_rate_factor(step, 20, warm_up_steps=4, floor=0.1) for step in range(20)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(factors[4:], factors[5:], strict=False))
    assert learning_rate_factor(0, 1, warm_up_steps=1, floor=0.1) == 1.0
    assert math.isfinite(learning_rate_factor(1, 2, warm_up_steps=1, floor=0.1))


@pytest.mark.parametrize("kind", KINDS)
def test_perturbations(kind: str) -> None:
    patches = torch.rand(500, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    original = patches.clone()
    spoilt = perturb(patches, kind, torch.Generator().manual_seed(1))
    assert torch.equal(patches, original), "the scan itself is left alone"
    assert torch.equal(spoilt, perturb(patches, kind, torch.Generator().manual_seed(1)))
    assert spoilt.shape == patches.shape and not torch.equal(spoilt, patches)
    is_zero = spoilt == 0
    is_same = spoilt == patches
    if kind.startswith("shuffle"):
        assert torch.equal(spoilt.sum(1).sort().values, patches.sum(1).sort().values)
    elif kind == "drop_patches":
        assert bool((is_zero.all(1) | is_same.all(1)).all())
        assert 0.7 < float(is_zero.float().mean()) < 0.9
    elif kind == "drop_voxels":
        assert bool((is_zero | is_same).all()) and not bool(is_zero.all(1).all())
        assert 0.87 < float(is_zero.float().mean()) < 0.93
    elif kind == "noise":
        assert float(spoilt.min()) >= 0.0 and float(spoilt.max()) < 1.0
        assert float(spoilt.mean()) == pytest.approx(0.5, abs=0.05)
    else:
        assert bool(is_zero.all())


def test_kinds_are_drawn_with_their_odds() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_kind(generator) for _ in range(4000)]
    assert sum(ODDS) == pytest.approx(1.0)
    for kind, odds in zip(KINDS, ODDS, strict=True):
        assert drawn.count(kind) / 4000 == pytest.approx(odds, abs=0.03)


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 7, 8])
def test_resuming_equals_never_stopping(tmp_path: Path, stop: int) -> None:
    """Killed inside alignment, warm-up, soft and hard: equal losses and weights to the last bit."""
    expected_losses, expected = run_whole()
    losses: list[float] = []
    with pytest.raises(Stop):
        new_trainer().run(batch_at, on_step=stop_after(stop, losses), save_to=tmp_path / "state", save_every=1)
    again = new_trainer()
    assert again.restore(tmp_path / "state")
    assert again.num_steps_done == stop
    again.run(batch_at, on_step=stop_after(99, losses), save_to=tmp_path / "state", save_every=1)
    assert losses == expected_losses
    found = weights(again)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    finished = new_trainer()
    assert finished.restore(tmp_path / "state") and finished.num_steps_done == SCHEDULE.num_steps
    finished.run(batch_at, on_step=lambda report: pytest.fail("there is nothing left to do"))


def test_steps_since_the_last_save_are_done_again(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        new_trainer().run(batch_at, on_step=stop_after(5, []), save_to=tmp_path / "state", save_every=3)
    again = new_trainer()
    again.restore(tmp_path / "state")
    assert again.num_steps_done == 3
    again.run(batch_at, on_step=lambda report: None)
    expected = run_whole()[1]
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())


def test_nothing_to_restore(tmp_path: Path) -> None:
    trainer = new_trainer()
    assert not trainer.restore(tmp_path / "state") and trainer.num_steps_done == 0


def test_another_runs_state_is_refused(tmp_path: Path) -> None:
    trainer = new_trainer()
    trainer.save(tmp_path)
    other = new_trainer(digest="another")
    before = weights(other)
    with pytest.raises(PhotonError) as caught:
        other.restore(tmp_path)
    assert caught.value.code == "CHECKPOINT_MISMATCH"
    assert all(torch.equal(before[name], value) for name, value in weights(other).items())
    wider = Trainer(micro_model(micro_config(intermediate_size=50)), SCHEDULE, OPTIMISER_CONFIG, run_digest="run")
    with pytest.raises(PhotonError) as caught:
        wider.restore(tmp_path)
    assert caught.value.code == "CHECKPOINT_MISMATCH"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run_digest": "run"}'])
def test_damaged_progress_is_refused(tmp_path: Path, content: str) -> None:
    new_trainer().save(tmp_path)
    (tmp_path / PROGRESS).write_text(content)
    with pytest.raises(PhotonError) as caught:
        new_trainer().restore(tmp_path)
    assert caught.value.code == "CHECKPOINT_CORRUPT"


def test_damaged_optimiser_state_is_refused(tmp_path: Path) -> None:
    new_trainer().save(tmp_path)
    (tmp_path / OPTIMISER).write_bytes(b"half")
    with pytest.raises(PhotonError) as caught:
        new_trainer().restore(tmp_path)
    assert caught.value.code == "CHECKPOINT_CORRUPT"


def test_divergence_leaves_the_last_state_usable(tmp_path: Path) -> None:
    def poisoned(step: int, with_flips: bool) -> TrainingBatch:
        item = batch_at(step, with_flips)
        if step == 3:
            item.batch.patches.fill_(torch.nan)
        return item

    with pytest.raises(PhotonError, match="step 3.*nan.*warm-up") as caught:
        new_trainer().run(poisoned, on_step=lambda report: None, save_to=tmp_path / "state", save_every=1)
    assert caught.value.code == "TRAINING_DIVERGED"
    again = new_trainer()
    assert again.restore(tmp_path / "state")
    assert again.num_steps_done == 2, "nobody has seen the weights after step 2 give a finite loss"
    again.run(batch_at, on_step=lambda report: None)
    expected = run_whole()[1]
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())


def test_a_gradient_that_overflows_is_divergence_too(tmp_path: Path) -> None:
    """The loss is still finite, the weights after the step would not be: they must not be saved."""
    trainer = new_trainer(schedule=dataclasses.replace(SCHEDULE, alignment=0))
    trainer.model.model.norm.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    with pytest.raises(PhotonError, match="gradient") as caught:
        trainer.run(batch_at, on_step=lambda report: None, save_to=tmp_path / "state", save_every=1)
    assert caught.value.code == "TRAINING_DIVERGED"
    assert not (tmp_path / "state").exists()
    assert all(bool(torch.isfinite(value).all()) for value in weights(trainer).values())


def test_alignment_trains_the_patch_embedding_alone() -> None:
    trainer = new_trainer()
    before = weights(trainer)
    with pytest.raises(Stop):
        trainer.run(batch_at, on_step=stop_after(1, []))
    after = weights(trainer)
    assert [n for n in after if not torch.equal(before[n], after[n])] == ["visual.vision_patch_embed.proj.weight"]


def test_after_alignment_everything_learns_and_pruning_comes_last() -> None:
    trainer = new_trainer()
    changed: dict[int, set[str]] = {}
    previous = weights(trainer)

    def on_step(report: StepReport) -> None:
        nonlocal previous
        now = weights(trainer)
        changed[report.step] = {name for name in now if not torch.equal(now[name], previous[name])}
        previous = now

    trainer.run(batch_at, on_step=on_step)
    names = set(previous)
    unused = {"model.layers.1.atp.pos_proj.weight"}
    predictor = {name for name in names if ".atp.predictor." in name}
    assert changed[3] == names - predictor - unused
    assert changed[5] == changed[8] == names - unused


def test_learning_rates_of_the_groups() -> None:
    trainer = new_trainer()
    trainer._set_learning_rates(0, "alignment")
    assert {group["lr"] for group in trainer.optimiser.param_groups} == {5e-3}
    trainer._set_learning_rates(1, "warm-up")
    rates = {id(p): group["lr"] for group in trainer.optimiser.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in trainer.optimiser.param_groups for p in group["params"]}
    factor = learning_rate_factor(1, 9, warm_up_steps=1, floor=0.05)
    for name, parameter in trainer.model.named_parameters():
        if name.endswith("pos_proj.weight"):
            assert id(parameter) not in rates
            continue
        expected = 1e-3 if name.startswith("visual.") else 2e-3
        assert rates[id(parameter)] == pytest.approx(expected * factor), name
        assert decays[id(parameter)] == (0.01 if parameter.ndim > 1 else 0.0), name


def test_report_numbers() -> None:
    model = micro_model(CONFIG)
    item = batch_at(2, True)  # branch 0 perturbed, branch 3 flipped
    result = compute_loss(model, item, "hard")
    with torch.no_grad():
        decision = model(item.batch, "hard").schedule
    assert result.kept_fraction == pytest.approx(float(decision.keep[decision.valid].float().mean()))
    assert 0.0 <= result.correct <= 1.0 and result.answer_loss > 0.0
    counts = item.batch.layout.pair_lengths
    output = model(item.batch, "hard", flip=item.is_flipped)
    expected = item.batch.layout.context_lengths - counts + item.batch.layout.own_lengths
    visual = torch.bincount(output.selection.slots[output.selection.slots >= 0] // decision.keep.shape[1], minlength=4)
    assert result.tokens_per_branch == pytest.approx(float((expected + visual).float().mean()))
    full = compute_loss(model, item, "warm-up")
    assert full.kept_fraction == 1.0 and full.band_loss == 0.0
    assert compute_loss(model, item, "soft").kept_fraction == pytest.approx(float(decision.p[decision.valid].mean()))


def test_keep_band_is_part_of_the_loss_of_plain_branches_only() -> None:
    config = micro_config(pruning={"threshold_bias_init": 20.0, "threshold_scale": 1.5})  # p far below the band
    model = micro_model(config)
    context = random_context(config, [(1, 4, 4)], seed=0)
    branches = [random_branch(config, 0, num_question=3, num_answer=1, seed=n) for n in range(2)]
    with torch.no_grad():
        p = model(training_batch([context], branches, config).batch, "hard").schedule.p
    outside = (0.3 - p.mean(1)).tolist()
    assert min(outside) > 0
    for perturbed, expected in (([], sum(outside) / 2), ([0], outside[1] / 2), ([0, 1], 0.0)):
        item = training_batch([context], branches, config, perturbed=perturbed)
        assert compute_loss(model, item, "hard").band_loss == pytest.approx(expected, abs=1e-6)
        assert compute_loss(model, item, "warm-up").band_loss == 0.0


def test_state_folder_is_a_checkpoint(tmp_path: Path) -> None:
    trainer = new_trainer()
    trainer.save(tmp_path)
    read = dict(read_model(tmp_path).named_parameters())
    assert all(torch.equal(read[name], value) for name, value in weights(trainer).items())
    progress = json.loads((tmp_path / PROGRESS).read_text())
    assert (progress["num_steps_done"], progress["run_digest"]) == (0, "run")
    assert progress["curriculum"]["schedule"] == dataclasses.asdict(SCHEDULE)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_trains_through_every_stage_and_resumes(tmp_path: Path, policy: str) -> None:
    """Alignment, warm-up, soft, hard and flips; stopped in the soft stage, equal to the last bit."""
    config = micro_config(pruning={"min_tokens": 2, "policy": policy})

    def reduced_batch(step: int, with_flips: bool) -> TrainingBatch:
        contexts = [random_context(config, [(3, 4, 4)], seed=step)]
        branches = [random_branch(config, 0, num_question=2 + n, num_answer=1, seed=step + n) for n in range(3)]
        return training_batch(contexts, branches, config, perturbed=[0], flipped=[2] if with_flips else [])

    def trainer() -> Trainer:
        return Trainer(micro_model(config), SCHEDULE, OPTIMISER_CONFIG, run_digest="run")

    whole, losses = trainer(), []
    whole.run(reduced_batch, on_step=lambda report: losses.append(float(report.result.loss.detach())))
    again: list[float] = []
    with pytest.raises(Stop):
        trainer().run(reduced_batch, on_step=stop_after(5, again), save_to=tmp_path / "state", save_every=1)
    rest = trainer()
    assert rest.restore(tmp_path / "state") and rest.num_steps_done == 5
    rest.run(reduced_batch, on_step=stop_after(99, again))
    assert again == losses and len(losses) == 9
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(rest).items())


def test_rows_are_added_up_in_a_fixed_order_on_the_cpu() -> None:
    """With several threads the order of additions is anybody's otherwise, and no seed gives the same weights twice."""
    trainer, seen = new_trainer(), []
    for parameter in trainer.model.parameters():
        parameter.register_hook(lambda gradient: seen.append(torch.are_deterministic_algorithms_enabled()))
    with pytest.raises(Stop):
        trainer.run(batch_at, on_step=stop_after(2, []))
    assert seen and all(seen)
    assert not torch.are_deterministic_algorithms_enabled()


def test_gradients_of_repeated_rows_are_the_same_every_time() -> None:
    index = torch.randint(0, 50, (20_000,), generator=torch.Generator().manual_seed(0))
    factor = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = []
        for _ in range(6):
            rows = torch.ones(50, 64, requires_grad=True)
            with sums_in_order(torch.device("cpu")):
                (rows[index] * factor).sum().backward()
            found.append(rows.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(gradient, found[0]) for gradient in found)
