"""Micro-batches: the gradient, loss and log of a step are those of one batch with all of its branches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from photon.errors import PhotonError
from photon.model.packing import Branch, Context
from photon.testing import micro_config, micro_model, random_branch, random_context, training_batch
from photon.training.loop import StepReport, Trainer
from photon.training.optimiser import OptimiserConfig
from photon.training.stages import Stage, StageSchedule
from photon.training.step import StepResult, TrainingBatch, compute_loss

CONFIG = micro_config(pruning={"min_tokens": 2})
NUM_QUESTIONS = (4, 1, 2, 3)
"""About each of four scans; every branch is to count the same nevertheless."""
RATES = OptimiserConfig(learning_rate=2e-3, vision_learning_rate=1e-3, alignment_learning_rate=5e-3)


def scans(step: int) -> list[tuple[Context, list[Branch]]]:
    """Four scans of different sizes with questions and answers of different lengths."""
    drawn = []
    for place, count in enumerate(NUM_QUESTIONS):
        context = random_context(CONFIG, [(1 + place % 2, 4, 4)], seed=10 * step + place)
        asked = [
            random_branch(
                CONFIG, 0, num_question=2 + n, num_answer=1 + (n + place) % 3, seed=100 * step + 10 * place + n
            )
            for n in range(count)
        ]
        drawn.append((context, asked))
    return drawn


def pack(step: int, places: Sequence[int]) -> TrainingBatch:
    """Some of a step's scans. The second is spoilt; of the last, the first question's mask is inverted."""
    drawn = scans(step)
    contexts = [drawn[place][0] for place in places]
    branches = [
        Branch(number, branch.input_ids, branch.labels)
        for number, place in enumerate(places)
        for branch in drawn[place][1]
    ]
    owners = [(place, n) for place in places for n in range(NUM_QUESTIONS[place])]
    perturbed = [number for number, (place, _) in enumerate(owners) if place == 1]
    flipped = [number for number, owner in enumerate(owners) if owner == (3, 0)]
    return training_batch(contexts, branches, CONFIG, perturbed=perturbed, flipped=flipped)


DEALT = {"whole": [[0, 1, 2, 3]], "two": [[0, 2], [1, 3]], "four": [[0], [1], [2], [3]], "uneven": [[1], [0, 2, 3]]}


def gradients(parts: Sequence[Sequence[int]], stage: Stage) -> tuple[dict[str, torch.Tensor], StepResult]:
    edges = {"alignment": 0, "warm_up": 0, "soft": 0, "hard": 0, "flip_after": 0} | {stage.replace("-", "_"): 1}
    trainer = Trainer(micro_model(CONFIG), StageSchedule(**edges), RATES, run_digest="run")
    report = trainer._gradient([pack(0, places) for places in parts], 0)
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return found, report.result


@pytest.mark.parametrize("stage", ["alignment", "warm-up", "soft", "hard"])
@pytest.mark.parametrize("dealt", ["two", "four", "uneven"])
def test_gradient_and_log_are_those_of_one_batch(dealt: str, stage: Stage) -> None:
    expected, whole = gradients(DEALT["whole"], stage)
    found, result = gradients(DEALT[dealt], stage)
    assert found.keys() == expected.keys()
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-6 * scale, msg=name)
    for field in ("loss", "answer_loss", "band_loss", "kept_fraction", "tokens_per_branch", "correct"):
        assert float(getattr(result, field)) == pytest.approx(float(getattr(whole, field)), rel=1e-5, abs=1e-7), field
    counts = ("num_branches", "num_answers", "num_visual")
    assert [getattr(result, name) for name in counts] == [getattr(whole, name) for name in counts]


def test_every_branch_counts_the_same() -> None:
    """The loss of a dealt step is the mean over branches asked by themselves, spoilt and flipped ones too."""
    drawn, losses = scans(0), []
    for place, count in enumerate(NUM_QUESTIONS):
        for n in range(count):
            item = training_batch(
                [drawn[place][0]],
                [drawn[place][1][n]],
                CONFIG,
                perturbed=[0] if place == 1 else [],
                flipped=[0] if (place, n) == (3, 0) else [],
            )
            losses.append(float(compute_loss(micro_model(CONFIG), item, "hard").loss.detach()))
    for parts in DEALT.values():
        assert float(gradients(parts, "hard")[1].loss) == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    mean_of_means = sum(float(gradients([places], "hard")[1].loss) for places in DEALT["four"]) / 4
    assert abs(mean_of_means - sum(losses) / len(losses)) > 1e-3, "the test could not tell a mean of means"


@pytest.mark.parametrize("dealt", ["two", "four", "uneven"])
def test_a_run_ends_with_the_weights_of_one_batch_a_step(dealt: str) -> None:
    def run(parts: Sequence[Sequence[int]]) -> tuple[dict[str, torch.Tensor], list[float]]:
        schedule = StageSchedule(alignment=1, warm_up=2, soft=2, hard=3, flip_after=1)
        trainer = Trainer(micro_model(CONFIG), schedule, RATES, run_digest="run")
        for group in trainer.optimiser.param_groups:
            group["eps"] = 1e-3  # else AdamW turns the rounding of gradients that are truly 0 into whole steps
        losses: list[float] = []

        def on_step(report: StepReport) -> None:
            losses.append(float(report.result.loss))

        trainer.run(lambda step, _: [pack(step, places) for places in parts], on_step=on_step)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}, losses

    expected, expected_losses = run(DEALT["whole"])
    found, losses = run(DEALT[dealt])
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    start = dict(micro_model(CONFIG).named_parameters())
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=2e-6, msg=name)
    assert max(float((expected[name] - start[name].detach()).abs().max()) for name in start) > 5e-3


def test_a_micro_batch_without_a_question_adds_nothing() -> None:
    empty = training_batch([random_context(CONFIG, [(1, 4, 4)], seed=0)], [], CONFIG)
    schedule = StageSchedule(alignment=0, warm_up=1, soft=0, hard=0, flip_after=0)
    results = []
    for items in ([pack(0, [0, 1])], [empty, pack(0, [0, 1]), empty]):
        trainer = Trainer(micro_model(CONFIG), schedule, RATES, run_digest="run")
        results.append((float(trainer._gradient(items, 0).result.loss), trainer.model.model.norm.weight.grad))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
    with pytest.raises(PhotonError) as caught:
        Trainer(micro_model(CONFIG), schedule, RATES, run_digest="run")._gradient([empty], 0)
    assert caught.value.code == "TRAINING_FAILED"


def test_sums_of_results_add_up() -> None:
    one, other = (gradients([places], "hard")[1] for places in ([0], [1, 3]))
    both = StepResult.of_sums(one.sums() + other.sums())
    assert both.num_branches == one.num_branches + other.num_branches
    assert other.num_answers > 0 and math.isfinite(both.answer_loss)
    spoilt = gradients([[1]], "hard")[1]
    assert (spoilt.num_answers, spoilt.answer_loss) == (0, 0.0)
    again = StepResult.of_sums(one.sums() + spoilt.sums())
    assert again.answer_loss == pytest.approx(one.answer_loss) and again.correct == pytest.approx(one.correct)
