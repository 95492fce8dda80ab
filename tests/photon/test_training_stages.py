"""Stages as fractions, a warm-up that ends on evidence, and the learning rate of the shorter run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from photon.errors import PhotonError
from photon.testing import micro_config, micro_model, random_branch, random_context, training_batch
from photon.training.loop import StepReport, Trainer
from photon.training.optimiser import OptimiserConfig
from photon.training.stages import Curriculum, Stage, StageSchedule, WarmUpSwitch, learning_rate_factor
from photon.training.state import PROGRESS
from photon.training.step import TrainingBatch

PLAN = StageSchedule(alignment=2, warm_up=8, soft=3, hard=4, flip_after=1)
SWITCH = WarmUpSwitch(margin=0.1, patience=2, baseline=0.5)
CONFIG = micro_config()


def test_stages_as_fractions_of_the_run() -> None:
    schedule = StageSchedule.from_fractions(2000, alignment=0.05, warm_up=0.5, soft=0.2, flip_after=0.125)
    assert schedule == StageSchedule(alignment=100, warm_up=1000, soft=400, hard=500, flip_after=250)
    for num_steps in range(1, 40):
        short = StageSchedule.from_fractions(num_steps, alignment=0.1, warm_up=1 / 3, soft=1 / 3)
        assert short.num_steps == num_steps
        assert abs(short.alignment + short.warm_up - num_steps * (0.1 + 1 / 3)) <= 0.5
    whole = StageSchedule.from_fractions(10, alignment=0.6, warm_up=0.3, soft=0.1)
    assert whole.hard == 0 and whole.num_steps == 10


@pytest.mark.parametrize("bad", [{"warm_up": -0.1}, {"warm_up": 0.9}, {"warm_up": math.nan}, {"flip_after": math.inf}])
def test_fractions_that_are_none_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(PhotonError) as caught:
        StageSchedule.from_fractions(100, **{"alignment": 0.1, "warm_up": 0.5, "soft": 0.1} | bad)
    assert caught.value.code == "TRAINING_INVALID"


@pytest.mark.parametrize("bad", [{"soft": -1}, {"alignment": 0, "warm_up": 0, "soft": 0, "hard": 0}])
def test_a_schedule_without_a_step_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(PhotonError) as caught:
        dataclasses.replace(PLAN, **bad)
    assert caught.value.code == "TRAINING_INVALID"


@pytest.mark.parametrize("bad", [{"margin": math.nan}, {"patience": 0}])
def test_a_switch_that_decides_nothing_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(PhotonError) as caught:
        WarmUpSwitch(**bad)  # type: ignore[arg-type]
    assert caught.value.code == "TRAINING_INVALID"


def follow(accuracies: dict[int, float], switch: WarmUpSwitch | None = SWITCH) -> tuple[Curriculum, dict[int, bool]]:
    """The curriculum after validations (steps done -> accuracy), and what each decided."""
    curriculum, verdicts = Curriculum(plan=PLAN, switch=switch), {}
    for num_done, accuracy in accuracies.items():
        curriculum, verdict = curriculum.validated(num_done, accuracy)
        if verdict is not None:
            verdicts[num_done] = verdict
    return curriculum, verdicts


def test_evidence_ends_the_warm_up_and_later_stages_keep_their_lengths() -> None:
    curriculum, verdicts = follow({3: 0.61, 4: 0.7, 5: 0.2})
    assert verdicts == {4: True} and curriculum.accuracy == 0.7
    assert curriculum.schedule == StageSchedule(alignment=2, warm_up=2, soft=3, hard=4, flip_after=1)
    told = curriculum.told(4)
    assert (told["evidence"], told["switched_at"], told["num_steps"]) == (True, 4, 11)
    assert told["planned"]["warm_up"] == 8 and told["schedule"]["warm_up"] == 2


def test_what_is_no_evidence() -> None:
    assert follow({2: 0.9, 3: 0.9})[1] == {}, "the alignment does not count"
    assert follow({3: 0.9, 4: 0.6, 5: 0.9})[1] == {}, "0.6 is not above 0.5 + 0.1, and patience starts again"
    assert follow({3: 0.9, 4: 0.9}, None)[1] == {}
    curriculum, verdicts = follow({3: 0.55, 10: 0.9, 11: 0.9, 12: 0.9})
    assert verdicts == {10: False} and curriculum.schedule == PLAN
    assert (curriculum.told(10)["evidence"], curriculum.told(9)["evidence"]) == (False, None)
    assert follow({}, None)[0].told(17)["evidence"] is None


def test_evidence_at_the_last_chance_changes_no_step() -> None:
    curriculum, verdicts = follow({9: 0.9, 10: 0.9})
    assert verdicts == {10: True} and curriculum.schedule == PLAN
    assert [curriculum.clock(step) for step in range(PLAN.num_steps)] == list(range(PLAN.num_steps))


def test_the_learning_rate_of_the_shorter_run_neither_jumps_nor_misses_its_end() -> None:
    plan = StageSchedule(alignment=10, warm_up=500, soft=30, hard=80, flip_after=20)
    options = {"warm_up_steps": 31, "floor": 0.05}

    def factors(curriculum: Curriculum) -> list[float]:
        steps = range(curriculum.schedule.num_steps)
        return [learning_rate_factor(curriculum.clock(s), plan.num_steps, **options) for s in steps]

    planned = factors(Curriculum(plan=plan))
    shorter = factors(Curriculum(plan=plan, switched_at=200))
    assert len(planned) == 620 and len(shorter) == 310
    assert shorter[:201] == planned[:201], "up to the switch nothing is different"
    assert shorter[-1] == pytest.approx(0.05)
    falls = [a - b for a, b in zip(shorter[31:], shorter[32:], strict=False)]
    assert min(falls) >= 0 and max(falls) < 0.02
    assert factors(Curriculum(plan=plan, switched_at=509))[-1] == pytest.approx(0.05)


def batch_at(step: int, with_flips: bool) -> TrainingBatch:
    context = random_context(CONFIG, [(1, 4, 4)], seed=step)
    branches = [random_branch(CONFIG, 0, num_question=2, num_answer=1, seed=step + n) for n in range(2)]
    return training_batch([context], branches, CONFIG, flipped=[1] if with_flips else [])


class Stop(Exception):
    """Stands for a kill."""


def train(folder: Path, stop: int = 99) -> tuple[Trainer, list[tuple[int, Stage, float, float]]]:
    """A run whose validations after 3 and 4 steps are evidence enough."""
    rates = OptimiserConfig(learning_rate=2e-3, vision_learning_rate=1e-3, alignment_learning_rate=5e-3)
    trainer = Trainer(micro_model(CONFIG), PLAN, rates, run_digest="run", switch=SWITCH)
    trainer.restore(folder)
    rows = []

    def on_step(report: StepReport) -> None:
        if report.step == stop:
            raise Stop
        trainer.validated({2: 0.9, 3: 0.7, 4: 0.8}.get(report.step, 0.3))
        rows.append((report.step, report.stage, report.learning_rate, float(report.result.loss)))

    trainer.run(batch_at, on_step=on_step, save_to=folder, save_every=1)
    return trainer, rows


@pytest.mark.parametrize("stop", [3, 4, 5, 9])
def test_a_resumed_run_goes_on_with_the_same_curriculum(tmp_path: Path, stop: int) -> None:
    """Killed before, between and after the two validations that end the warm-up."""
    whole, expected = train(tmp_path / "whole")
    assert [stage for _, stage, _, _ in expected] == ["alignment"] * 2 + ["warm-up"] * 2 + ["soft"] * 3 + ["hard"] * 4
    with pytest.raises(Stop):
        train(tmp_path / "state", stop)
    resumed, rows = train(tmp_path / "state")
    assert rows == expected[-len(rows) :] and len(rows) == 11 - stop
    assert resumed.curriculum == whole.curriculum
    told = json.loads((tmp_path / "state" / PROGRESS).read_text())["curriculum"]
    assert (told["switched_at"], told["accuracy"], told["evidence"]) == (4, 0.7, True)


def test_a_state_from_before_there_was_a_curriculum_is_read(tmp_path: Path) -> None:
    train(tmp_path)
    path = tmp_path / PROGRESS
    content = json.loads(path.read_text())
    path.write_text(json.dumps({name: content[name] for name in ("num_steps_done", "run_digest")}))
    trainer = Trainer(
        micro_model(CONFIG),
        PLAN,
        OptimiserConfig(learning_rate=2e-3, vision_learning_rate=1e-3, alignment_learning_rate=5e-3),
        run_digest="run",
    )
    assert trainer.restore(tmp_path) and trainer.schedule == PLAN
