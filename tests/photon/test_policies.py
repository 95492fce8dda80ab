"""Who decides which visual tokens a question gets: the policies beside the threshold, and keep flags from outside."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from photon.config import POLICIES, PhotonConfig, PruningConfig
from photon.errors import PhotonError
from photon.generate import EncodedScan, ask, decode, encode_scan
from photon.model.network import Output, Photon
from photon.model.packing import Branch, pack_batch
from photon.ops.saliency.op import differentiable_saliency
from photon.ops.saliency.reference import own_scores, question_vector, scores
from photon.ops.schedule.reference import LARGEST_SCORE, highest, normalise
from photon.scheduling import ThresholdPredictor, kept_counts, ranked
from photon.testing import (
    micro_config,
    micro_model,
    ragged_branches,
    ragged_contexts,
    random_branch,
    training_batch,
)
from photon.training.stages import Stage
from photon.training.step import StepResult, compute_loss

RANKED = ("fixed", "fixed-blind")
RATIO = 0.3


def config_of(policy: str, **pruning: Any) -> PhotonConfig:
    return micro_config(pruning={"policy": policy, "keep_ratio": RATIO, **pruning})


def kept(output: Output, branch: int) -> list[int]:
    return [] if output.schedule is None else output.schedule.kept_tokens(branch).tolist()


def step(model: Photon, config: PhotonConfig, stage: Stage, **marks: list[int]) -> StepResult:
    return compute_loss(model, training_batch(ragged_contexts(config), ragged_branches(config), config, **marks), stage)


def decided(u: list[float], **pruning: Any) -> list[bool]:
    config = PruningConfig(layer=0, policy="fixed", **pruning)
    row = torch.tensor([u])
    return ranked(row, torch.tensor([len(u)]), torch.tensor([0]), config).keep[0].tolist()


@pytest.mark.parametrize("policy", RANKED)
@pytest.mark.parametrize("stage", ["warm-up", "soft", "hard"])
def test_a_batch_gives_what_each_branch_gives_alone(policy: str, stage: Stage) -> None:
    config = config_of(policy)
    model = micro_model(config)
    contexts, branches = ragged_contexts(config), ragged_branches(config)
    whole = training_batch(contexts, branches, config)
    output = model(whole.batch, "full" if stage == "warm-up" else "hard")
    loss = compute_loss(model, whole, stage).loss
    losses = []
    for number, branch in enumerate(branches):
        single = training_batch([contexts[branch.context]], [Branch(0, branch.input_ids, branch.labels)], config)
        alone = model(single.batch, "full" if stage == "warm-up" else "hard")
        assert kept(output, number) == kept(alone, 0)
        losses.append(compute_loss(model, single, stage).loss)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", RANKED)
@pytest.mark.parametrize(("ratio", "minimum"), [(0.3, 1), (0.3, 7), (1.0, 1), (0.001, 1), (0.5, 3)])
def test_every_volume_keeps_its_exact_share(policy: str, ratio: float, minimum: int) -> None:
    config = config_of(policy, keep_ratio=ratio, min_tokens=minimum)
    output = micro_model(config)(pack_batch(ragged_contexts(config), ragged_branches(config), config), "hard")
    assert output.schedule is not None
    sizes = output.schedule.valid.sum(1).tolist()
    assert sizes == [24, 8, 6, 24, 8, 6]
    assert output.schedule.keep.sum(1).tolist() == [min(max(math.ceil(ratio * n), minimum), n) for n in sizes]


def test_shares_are_rounded_up_but_not_by_rounding_errors() -> None:
    lengths = torch.tensor([100, 20, 3, 1, 0])
    for ratio, expected in ((0.07, [7, 2, 1, 1, 0]), (0.35, [35, 7, 2, 1, 0]), (1.0, [100, 20, 3, 1, 0])):
        assert kept_counts(lengths, PruningConfig(layer=0, policy="fixed", keep_ratio=ratio)).tolist() == expected
    for policy in ("all", "slices", "pooled"):
        config = PruningConfig(layer=0, policy=policy, keep_ratio=0.1)
        assert torch.equal(kept_counts(lengths, config), lengths)


def test_fixed_keeps_the_highest_scores_of_the_photon_policy() -> None:
    batches = []
    for policy in ("photon", "fixed"):
        config = config_of(policy)
        batches.append(
            micro_model(config)(pack_batch(ragged_contexts(config), ragged_branches(config), config), "hard")
        )
    photon, fixed = (output.schedule for output in batches)
    assert photon is not None and fixed is not None
    assert torch.equal(photon.u, fixed.u) and torch.equal(photon.rho, fixed.rho)
    for row in range(len(fixed.u)):
        keep, u = fixed.keep[row], fixed.u[row]
        dropped = fixed.valid[row] & ~keep
        # The last question is a single token, to which no other answers: all its scores are 0.
        assert u[keep].min() > u[dropped].max() or (row > 3 and keep.nonzero().max() < dropped.nonzero().min())
        assert float(fixed.theta[row]) == float(fixed.rho[row][keep].min())
    assert torch.equal(fixed.p, fixed.keep.float())


def test_ties_take_the_first_and_scores_that_are_none_come_last() -> None:
    assert decided([1.0, 2.0, 2.0, 2.0, 0.0], keep_ratio=0.4) == [False, True, True, False, False]
    assert decided([3.0] * 4, keep_ratio=0.5) == [True, True, False, False]
    bad = [math.nan, -5.0, math.inf, -6.0, LARGEST_SCORE, -math.inf]
    assert decided(bad, keep_ratio=0.3) == [False, True, False, True, False, False]
    assert decided(bad, keep_ratio=0.5) == [True, True, False, True, False, False]
    assert decided([math.nan] * 3, keep_ratio=0.1, min_tokens=2) == [True, True, False]


def test_counts_of_their_own_for_every_row() -> None:
    values = torch.tensor([[5.0, 1.0, 5.0, 3.0]] * 3)
    found = highest(values, torch.tensor([1, 3, 9]))
    assert found.tolist() == [[True, False, False, False], [True, False, True, True], [True] * 4]
    for count in (1, 2, 3, 4, 7):
        assert torch.equal(highest(values, torch.full((3,), count)), highest(values, count))


def test_the_scan_asks_itself_by_the_question_s_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the question's own arithmetic with the visual tokens as the question; in blocks of any size."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(23, 4, 8, generator=generator), torch.randn(23, 2, 8, generator=generator)
    expected = scores(question_vector(q[None], k[None]), k)[0]
    assert expected.std() > 0.01
    for size in (1, 5, 23, 256):
        monkeypatch.setattr("photon.ops.saliency.reference.OWN_BLOCK_ROWS", size)
        torch.testing.assert_close(own_scores(q, k), expected, rtol=1e-4, atol=1e-5)


def test_a_token_that_is_no_number_asks_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(9, 4, 8, generator=generator), torch.randn(9, 2, 8, generator=generator)
    clean = own_scores(q[1:], k[1:])
    q[0, 0, 0], k[0, 1, 1] = math.inf, math.nan
    found = own_scores(q, k)
    assert not bool(found[0].isfinite())
    torch.testing.assert_close(found[1:], clean, rtol=1e-4, atol=1e-6)


def test_blind_means_blind_to_the_question() -> None:
    """The same tokens for every question; "fixed" takes others for others."""
    sets = {}
    for policy in RANKED:
        config = config_of(policy)
        scan = encode_scan(micro_model(config), ragged_contexts(config)[0])
        asked = [random_branch(config, 0, num_question=n, seed=n).input_ids for n in (1, 3, 6, 9)]
        schedule = ask(micro_model(config), scan, asked).output.schedule
        assert schedule is not None
        sets[policy] = {tuple(schedule.kept_tokens(n).tolist()) for n in range(4)}
    assert len(sets["fixed-blind"]) == 1 and len(sets["fixed"]) > 1


def test_the_blind_scores_are_made_once_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("fixed-blind")
    model, calls = micro_model(config), []

    def counting(q: Tensor, k: Tensor) -> Tensor:
        calls.append(q.shape[0])
        return own_scores(q, k)

    monkeypatch.setattr("photon.model.pruning.own_scores", counting)
    model(pack_batch(ragged_contexts(config), ragged_branches(config), config), "hard")
    assert calls == [24, 8, 6]
    model(pack_batch(ragged_contexts(config), [], config), "full")
    assert calls == [24, 8, 6] * 2


@pytest.mark.parametrize("policy", RANKED)
def test_soft_is_hard_and_no_threshold_learns(policy: str) -> None:
    config = config_of(policy)
    model = micro_model(config)
    soft, hard = step(model, config, "soft"), step(model, config, "hard")
    assert torch.equal(soft.loss, hard.loss) and soft.band_loss == hard.band_loss == 0.0
    counts = [8, 3, 2, 8, 3, 2]
    assert soft.kept_fraction == hard.kept_fraction == pytest.approx(sum(counts) / (24 + 8 + 6 + 24 + 8 + 6))
    hard.loss.backward()
    assert all(p.grad is None for name, p in model.named_parameters() if ".atp." in name)
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


@pytest.mark.parametrize("policy", RANKED)
def test_a_flipped_branch_gets_the_complement(policy: str) -> None:
    config = config_of(policy)
    model = micro_model(config)
    batch = pack_batch(ragged_contexts(config), ragged_branches(config), config)
    flip = torch.tensor([True, False, False, False, True])
    plain, flipped = model(batch, "hard"), model(batch, "hard", flip=flip)
    assert plain.selection is not None and flipped.selection is not None
    own = [n - b for n, b in zip(plain.selection.host_lengths, flipped.selection.host_lengths, strict=True)]
    assert own == [8 - 16, 0, 0, 0, 5 - 9]
    assert not torch.equal(step(model, config, "hard", flipped=[0]).loss, step(model, config, "hard").loss)


@pytest.mark.parametrize("stage", ["alignment", "warm-up", "soft", "hard"])
def test_all_never_prunes(stage: Stage) -> None:
    """Every stage is the photon policy's warm-up, also for branches that were to be flipped."""
    config, photon = config_of("all"), config_of("photon")
    expected = step(micro_model(photon), photon, "warm-up")
    for marks in ({}, {"flipped": [0, 3]}):
        found = step(micro_model(config), config, stage, **marks)
        assert torch.equal(found.loss, expected.loss)
        assert (found.kept_fraction, found.band_loss, found.answer_loss) == (1.0, 0.0, expected.answer_loss)
    output = micro_model(config)(pack_batch(ragged_contexts(config), ragged_branches(config), config), "hard")
    assert output.selection is None
    assert [len(kept(output, n)) for n in range(5)] == [24, 14, 24, 0, 14]


def test_all_answers_with_everything() -> None:
    config, photon = config_of("all"), config_of("photon")
    asked = [random_branch(config, 0, num_question=n, seed=n).input_ids for n in (2, 4)]
    found = ask(micro_model(config), encode_scan(micro_model(config), ragged_contexts(config)[0]), asked)
    scan = encode_scan(micro_model(photon), ragged_contexts(photon)[0])
    assert torch.equal(found.logits, ask(micro_model(photon), scan, asked, keep_all=True).logits)
    assert not torch.equal(found.logits, ask(micro_model(photon), scan, asked).logits)
    assert found.output.schedule is not None and bool(found.output.schedule.keep.all())


def test_the_band_has_a_weight() -> None:
    losses = []
    for weight in (0.0, 1.0, 3.0):
        config = config_of("photon", band_weight=weight, keep_band=(0.9, 1.0))
        result = step(micro_model(config), config, "hard")
        losses.append((float(result.loss.detach()), result.band_loss))
    (none, band), (one, same), (three, _) = losses
    assert band == same > 0.1
    assert one == pytest.approx(none + band, rel=1e-6) and three == pytest.approx(none + 3 * band, rel=1e-6)


# Keep flags from outside


def asked_scan(policy: str, context: int = 1) -> tuple[Photon, EncodedScan, list[Tensor]]:
    config = config_of(policy)
    model = micro_model(config)
    asked = [random_branch(config, 0, num_question=n, seed=n).input_ids for n in (2, 4, 7)]
    return model, encode_scan(model, ragged_contexts(config)[context]), asked


def flags(output: Output, num_tokens: int) -> Tensor:
    assert output.schedule is not None
    keep = torch.zeros(3, num_tokens, dtype=torch.bool)
    for number in range(3):
        keep[number, output.schedule.kept_tokens(number)] = True
    return keep


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("context", [0, 1])
def test_its_own_decision_forced_upon_it_changes_nothing(policy: str, context: int) -> None:
    """Also with two volumes in the prompt, whose tokens are counted through."""
    model, scan, asked = asked_scan(policy, context)
    num_tokens = int((scan.context.input_ids == model.config.video_token_id).sum())
    free = ask(model, scan, asked)
    keep = flags(free.output, num_tokens)
    again = ask(model, scan, asked, keep=keep)
    if model.config.pruning.prunes:
        assert 0 < int(keep.sum()) < keep.numel()
        assert torch.equal(again.logits, free.logits) and torch.equal(again.cache.k, free.cache.k)
    torch.testing.assert_close(again.logits, free.logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(flags(again.output, num_tokens), keep)
    told = [answer.ids for answer in decode(model, again, max_new_tokens=4)]
    assert told == [answer.ids for answer in decode(model, free, max_new_tokens=4)]


def test_what_is_forced_is_what_is_seen() -> None:
    """Voxels of a token that no question gets change nothing but through the layers before; rows tell who is there."""
    model, scan, asked = asked_scan("photon")
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(3, 14, generator=generator) < 0.5
    keep[1] = False
    prompted = ask(model, scan, asked, keep=keep)
    assert torch.equal(flags(prompted.output, 14), keep)
    selection = prompted.output.selection
    assert selection is not None
    rows = selection.rows.split(selection.host_lengths)
    visual = (scan.context.input_ids == model.config.video_token_id).nonzero().flatten()
    for number in range(3):
        assert torch.equal(torch.isin(visual, rows[number]), keep[number])
    alone = [ask(model, scan, [ids], keep=keep[n : n + 1]).logits[0] for n, ids in enumerate(asked)]
    torch.testing.assert_close(prompted.logits, torch.stack(alone), rtol=1e-5, atol=1e-5)


def test_removed_is_the_complement_that_flipping_gives() -> None:
    model, scan, asked = asked_scan("photon", 0)
    batch = pack_batch([scan.context], [Branch(0, ids) for ids in asked], model.config)
    with torch.no_grad():
        flipped = model.run_branches(batch, scan.state, "hard", flip=torch.ones(3, dtype=torch.bool))
        free = model.run_branches(batch, scan.state, "hard")
        removed = model.run_branches(batch, scan.state, "hard", keep=~flags(free, 24))
    assert torch.equal(removed.hidden, flipped.hidden)
    assert not torch.equal(removed.hidden[: len(free.hidden)], free.hidden[: len(removed.hidden)])


def test_a_mixed_batch_takes_flags_as_wide_as_its_largest_prompt() -> None:
    config = config_of("photon")
    model = micro_model(config)
    batch = pack_batch(ragged_contexts(config), ragged_branches(config), config)
    keep = torch.rand(5, 24, generator=torch.Generator().manual_seed(1)) < 0.5
    output = model(batch, "hard", keep=keep)
    counts = [24, 14, 24, 0, 14]
    assert [kept(output, n) for n in range(5)] == [
        keep[n, :c].nonzero().flatten().tolist() for n, c in enumerate(counts)
    ]


def test_flags_that_do_not_fit_are_refused() -> None:
    model, scan, asked = asked_scan("photon")
    good = torch.ones(3, 14, dtype=torch.bool)
    for bad in (good[:2], good[:, :13], good.float(), good[0], torch.ones(3, 15, dtype=torch.bool)):
        with pytest.raises(PhotonError, match="keep flags") as caught:
            ask(model, scan, asked, keep=bad)
        assert caught.value.code == "PROMPT_INVALID"
    with pytest.raises(PhotonError, match="keep flags") as caught:
        ask(model, scan, asked, keep=good, keep_all=True)
    assert caught.value.code == "GENERATION_INVALID"
    blind = encode_scan(model, ragged_contexts(model.config)[2])
    with pytest.raises(PhotonError, match="keep flags"):
        ask(model, blind, asked, keep=good)
    nothing = ask(model, blind, asked, keep=good[:, :0])
    assert torch.equal(nothing.logits, ask(model, blind, asked).logits)


# Configuration


def test_new_settings_are_written_only_where_they_differ() -> None:
    plain = micro_config()
    changes: list[dict[str, Any]] = [
        {"policy": "fixed"},
        {"keep_ratio": 0.5},
        {"band_weight": 0.0},
        {"saliency_gradient": True},
        {"distillation_weight": 0.5},
        {"warm_up_distillation_weight": 0.5},
    ]
    assert not {name for change in changes for name in change} & set(plain.to_hf()["photon"])
    for change in changes:
        config = micro_config(pruning=change)
        assert {k: v for k, v in config.to_hf()["photon"].items() if k in change} == change
        assert PhotonConfig.from_hf(config.to_hf()) == config and config.digest() != plain.digest()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"policy": "best"}, "policy"),
        ({"policy": None}, "policy"),
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"keep_ratio": 1.01}, "keep_ratio"),
        ({"keep_ratio": math.nan}, "keep_ratio"),
        ({"band_weight": -1.0}, "band_weight"),
        ({"saliency_gradient": 1}, "saliency_gradient"),
        ({"saliency_gradient": True, "policy": "fixed"}, "saliency_gradient"),
        ({"distillation_weight": -0.1}, "distillation_weight"),
        ({"warm_up_distillation_weight": -0.1}, "warm_up_distillation_weight"),
        ({"distillation_weight": 0.1, "policy": "all"}, "distilled"),
        ({"warm_up_distillation_weight": 0.1, "policy": "fixed"}, "distilled"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change: dict[str, Any], named: str) -> None:
    with pytest.raises(PhotonError, match=named) as caught:
        micro_config(pruning=change)
    assert caught.value.code == "CONFIG_INVALID"


def test_policies_do_not_differ_in_parameters() -> None:
    names = {p: [n for n, _ in Photon(config_of(p)).named_parameters()] for p in POLICIES}
    assert len({tuple(each) for each in names.values()}) == 1
    assert dataclasses.replace(config_of("all").pruning, policy="photon") == config_of("photon").pruning


# A gradient into the scores


def gradients(
    model: Photon, config: PhotonConfig, stage: Stage, **marks: list[int]
) -> tuple[StepResult, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    result = step(model, config, stage, **marks)
    result.loss.backward()
    return result, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def twins(**pruning: Any) -> list[tuple[Photon, PhotonConfig]]:
    """The same weights without and with the gradient. The threshold does not read the scores."""
    found = []
    for is_on in (False, True):
        config = config_of("photon", saliency_gradient=is_on, keep_band=(0.0, 0.1), **pruning)
        model = micro_model(config)
        torch.nn.init.zeros_(model.model.predictor.weights.last_weight)
        found.append((model, config))
    return found


def test_p_is_the_derivative_of_the_scores() -> None:
    """By finite differences at fixed thresholds, one direction each in q, the question's k and the scan's k."""
    config = config_of("photon", saliency_gradient=True)
    model = micro_model(config)
    batch = pack_batch(ragged_contexts(config), ragged_branches(config), config)
    output = model(batch, "hard")
    theta = output.schedule.theta.detach() if output.schedule is not None else torch.zeros(0)
    own = output.pruning_layer[1]
    inputs = [x.detach() for x in (own.q, own.k, output.context.layers[1].k)]
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(6, 24, generator=generator)

    def value(q: Tensor, k: Tensor, keys: Tensor) -> Tensor:
        u = differentiable_saliency(q, k, keys, batch.layout)
        decision = model.model.predictor(u, batch.layout.pair_lengths, batch.layout.pair_branch)
        decision = dataclasses.replace(decision, theta=theta, p=torch.zeros_like(u))
        moved = decision.with_saliency_gradient(u, config.pruning)
        rho = normalise(u, decision.valid)
        exact = torch.where(decision.valid, torch.sigmoid((rho - theta[:, None]) / config.pruning.temperature), 0.0)
        return ((moved.p if u.requires_grad else exact) * weights).double().sum()

    for place in range(3):
        direction = torch.randn(inputs[place].shape, generator=generator)
        leaves = [x.clone().requires_grad_(n == place) for n, x in enumerate(inputs)]
        (gradient,) = torch.autograd.grad(value(*leaves), leaves[place])
        ends = []
        for sign in (1, -1):
            moved = [x + sign * 3e-3 * direction if n == place else x for n, x in enumerate(inputs)]
            ends.append(float(value(*moved)))
        expected = (ends[0] - ends[1]) / 6e-3
        assert abs(expected) > 1e-2
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=2e-2)


def test_soft_gradients_are_those_of_the_loss() -> None:
    """The whole loss, band included, along directions in the pruning layer's projections; off, they are not."""
    (off, off_config), (on, config) = twins()
    found = [gradients(model, c, "soft") for model, c in ((off, off_config), (on, config))]
    assert torch.equal(found[0][0].loss, found[1][0].loss)
    generator = torch.Generator().manual_seed(5)
    for name in ("q_proj.weight", "k_proj.weight"):
        parameter = on.get_parameter(f"model.layers.1.self_attn.{name}")
        # Along the gradient itself, so that little is lost to rounding; a little of another direction beside it.
        gradient = found[1][1][f"model.layers.1.self_attn.{name}"]
        noise = torch.randn(parameter.shape, generator=generator)
        direction = gradient / gradient.norm() + 0.3 * noise / noise.norm()
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 4e-3 * direction)
                ends.append(float(step(on, config, "soft").loss))
                parameter.sub_(sign * 4e-3 * direction)
        expected = (ends[0] - ends[1]) / 8e-3
        of_off, of_on = (float((g[f"model.layers.1.self_attn.{name}"] * direction).sum()) for _, g in found)
        assert of_on == pytest.approx(expected, rel=2e-3)
        assert of_off != pytest.approx(expected, rel=2e-2)


def test_hard_gradients_never_reach_the_scores() -> None:
    """The surrogate is a direction for the threshold; a soft step moves the scores, a hard one does not."""
    (off, off_config), (on, config) = twins()
    before, after = (gradients(model, c, "hard") for model, c in ((off, off_config), (on, config)))
    assert torch.equal(before[0].loss, after[0].loss) and before[0].kept_fraction == after[0].kept_fraction
    assert all(torch.equal(after[1][name], before[1][name]) for name in after[1])
    soft = gradients(on, config, "soft")[1], gradients(off, off_config, "soft")[1]
    assert not torch.equal(*(found["model.layers.1.self_attn.q_proj.weight"] for found in soft))


def test_disturbed_branches_do_not_move_the_scores() -> None:
    marks = {"perturbed": [0, 1], "flipped": [2, 3, 4]}
    (off, off_config), (on, config) = twins()
    before, after = (gradients(model, c, "hard", **marks)[1] for model, c in ((off, off_config), (on, config)))
    assert all(torch.equal(after[name], before[name]) for name in after)


def test_scores_that_are_none_get_no_gradient() -> None:
    config = PruningConfig(layer=0, saliency_gradient=True)
    u = torch.tensor([[1.0, math.nan, 3.0, 2.0], [math.inf, math.nan, 0.0, 0.0]]).requires_grad_()
    lengths = torch.tensor([4, 2])
    plain = ThresholdPredictor(64, config)(u, lengths, torch.tensor([0, 1]))
    found = plain.with_saliency_gradient(u, config)
    assert torch.equal(found.p, plain.p)
    found.p.sum().backward()
    assert u.grad is not None and bool(u.grad.isfinite().all())
    assert u.grad[0, 3] != 0 and u.grad[0, 1] == 0 and not bool(u.grad[1].any())


@pytest.mark.parametrize("asked", [{"saliency_gradient": True}, {"distillation_weight": 0.5}])
def test_kernels_refuse_a_gradient_that_they_do_not_have(asked: dict[str, Any]) -> None:
    (name,) = asked
    config = config_of("photon", **asked)
    model = micro_model(config)
    model.backend = "triton"
    with pytest.raises(PhotonError, match=name) as caught:
        step(model, config, "soft")
    assert caught.value.code == "BACKEND_UNAVAILABLE"
