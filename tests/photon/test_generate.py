"""Decoding from the cache against running the whole prompt again for every token, for mixed scans in one batch."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from photon.config import PhotonConfig
from photon.decoding import decode_step
from photon.errors import PhotonError
from photon.generate import ask_batch, decode, generate
from photon.likelihood import option_log_likelihoods
from photon.model.attention import BlockAttention
from photon.model.network import Photon
from photon.model.packing import IGNORE_INDEX, Branch, Context, PackedBatch, pack_batch
from photon.objectives import answer_targets
from photon.sampling import Generated, Sampling
from photon.testing import micro_config, micro_model, random_branch, random_context

CONFIG = micro_config()
MAX_NEW = 6


@torch.no_grad()
def whole_logits(model: Photon, context: Context, ids: Tensor, said: Tensor, *, keep_all: bool) -> Tensor:
    """No cache and nothing removed: the whole prompt and all that was said runs at once, and masks hide dropped
    tokens - from every row after the pruning layer, and from what was said everywhere.

    Returns:
        logits [1 + said, vocabulary] of the first answer token and of the one after each token said.
    """
    keep = model(pack_batch([context], [Branch(0, ids)], model.config), "hard").schedule
    whole = Branch(0, torch.cat([ids, said]))
    batch = pack_batch([context], [whole], model.config)
    size, prompt = context.input_ids.numel() + whole.input_ids.numel(), context.input_ids.numel() + ids.numel()
    is_dropped = torch.zeros(size, dtype=torch.bool)
    if keep is not None and not keep_all:
        is_dropped[batch.visual_rows] = ~keep.keep[0]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    is_said = torch.arange(size) >= prompt
    early = causal & ~(is_said[:, None] & is_dropped)
    late = causal & (~is_dropped | torch.eye(size, dtype=torch.bool))
    x = model.model.embed_tokens(torch.cat([context.input_ids, whole.input_ids]))
    if batch.visual_rows.numel():
        x = x.index_copy(0, batch.visual_rows, model.visual(context.patches, context.grids))
    table = model.model.rotary(torch.cat([batch.context_positions, batch.branch_positions], dim=1))
    for index, layer in enumerate(model.model.layers):
        mask = early if index <= model.config.pruning.layer else late
        x, _ = layer(x, table, BlockAttention(mask[None]))
    return model.logits(x[prompt - 1 :])


def naive(model: Photon, context: Context, ids: Tensor, *, keep_all: bool) -> Generated:
    """Greedy decoding that runs everything again for every token."""
    said: list[int] = []
    confidence = 1.0
    for _ in range(MAX_NEW):
        p = whole_logits(model, context, ids, torch.tensor(said, dtype=torch.long), keep_all=keep_all)[-1]
        p = p.double().softmax(-1)
        confidence *= float(p.max())
        token = int(p.argmax())
        if token == model.config.eos_token_id:
            break
        said.append(token)
    return Generated(tuple(said), confidence)


def prompts(config: PhotonConfig = CONFIG) -> tuple[list[Context], list[Branch]]:
    contexts = [random_context(config, grids, seed=n) for n, grids in enumerate(([(2, 4, 6)], [], [(1, 2, 4)]))]
    places = [(0, 5), (2, 2), (0, 1), (1, 4), (0, 8)]
    return contexts, [random_branch(config, c, num_question=n, seed=7 * n + c) for c, n in places]


@pytest.mark.parametrize("keep_all", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_batch_of_unequal_prompts_equals_running_everything_again(keep_all: bool, seed: int) -> None:
    model = micro_model(seed=seed)
    contexts, branches = prompts()
    answers, output = generate(model, pack_batch(contexts, branches, CONFIG), keep_all=keep_all, max_new_tokens=MAX_NEW)
    if not keep_all:
        decision = output.schedule
        assert decision is not None and 0 < int(decision.keep.sum()) < int(decision.valid.sum())
    for answer, branch in zip(answers, branches, strict=True):
        expected = naive(model, contexts[branch.context], branch.input_ids, keep_all=keep_all)
        assert answer.ids == expected.ids
        assert answer.confidence == pytest.approx(expected.confidence, rel=1e-3)
    assert max(len(answer.ids) for answer in answers) > 2
    assert len({answer.ids for answer in answers}) > 1


def test_pruning_changes_what_is_seen() -> None:
    model = micro_model()
    contexts, branches = prompts()
    batch = pack_batch(contexts, branches, CONFIG)
    pruned, full = (generate(model, batch, keep_all=k, max_new_tokens=MAX_NEW)[0] for k in (False, True))
    assert [a.confidence for a in pruned] != [a.confidence for a in full]
    assert pruned[3].ids == full[3].ids, "a question without a scan has nothing to prune"


def test_answers_stop_at_the_limit() -> None:
    model = micro_model()
    contexts, branches = prompts()
    batch = pack_batch(contexts, branches, CONFIG)
    long, _ = generate(model, batch, keep_all=True, max_new_tokens=MAX_NEW)
    for limit in (1, 3):
        answers, _ = generate(model, batch, keep_all=True, max_new_tokens=limit)
        assert [answer.ids for answer in answers] == [answer.ids[:limit] for answer in long]
    with pytest.raises(PhotonError) as caught:
        generate(model, batch, keep_all=True, max_new_tokens=0)
    assert caught.value.code == "GENERATION_INVALID"


def test_drawn_answers_depend_on_their_seed_and_prompt_alone() -> None:
    """Together, in another order, and each alone; the same seed for different questions, and different ones."""
    model = micro_model()
    contexts, branches = prompts()
    sampling = Sampling(temperature=8.0, top_k=20, top_p=0.95)
    seeds = [3, 4, 3, 5, 6]

    def drawn(places: list[int]) -> list[Generated]:
        scans = sorted({branches[place].context for place in places})
        asked = [dataclasses.replace(branches[p], context=scans.index(branches[p].context)) for p in places]
        batch = pack_batch([contexts[scan] for scan in scans], asked, CONFIG)
        chosen = [seeds[place] for place in places]
        return generate(model, batch, keep_all=False, max_new_tokens=8, sampling=sampling, seeds=chosen)[0]

    together = drawn([0, 1, 2, 3, 4])
    assert len({answer.ids for answer in together}) == 5
    for places in ([4, 2, 0, 3, 1], [2, 2], *([place] for place in range(5))):
        for place, answer in zip(places, drawn(places), strict=True):
            assert answer.ids == together[place].ids
            assert answer.confidence == pytest.approx(together[place].confidence, rel=1e-3)
    before, seeds = together[0].ids, [9] * 5
    assert drawn([0])[0].ids != before


def test_confidence_of_a_drawn_answer_is_the_models() -> None:
    model = micro_model()
    contexts, branches = prompts()
    batch = pack_batch(contexts, branches, CONFIG)
    sampling = Sampling(temperature=8.0, top_k=5, seed=1)
    answers, _ = generate(model, batch, keep_all=False, max_new_tokens=4, sampling=sampling)
    for answer, branch in zip(answers, branches, strict=True):
        said = torch.tensor([*answer.ids, CONFIG.eos_token_id][:4])
        logits = whole_logits(model, contexts[branch.context], branch.input_ids, said[:-1], keep_all=False)
        log_p = logits.double().log_softmax(-1).gather(-1, said[:, None]).sum()
        assert answer.confidence == pytest.approx(float(log_p.exp()), rel=1e-3)


def test_tokens_are_told_as_soon_as_they_are_chosen() -> None:
    """And until a branch has ended, its end token included; the others go on."""
    model = micro_model()
    contexts, branches = prompts()
    batch = pack_batch(contexts, branches, CONFIG)
    plain, _ = generate(model, batch, keep_all=False, max_new_tokens=MAX_NEW)
    stop = max(plain, key=lambda answer: len(answer.ids)).ids[1]
    num_steps = 0
    told: list[tuple[int, int, int]] = []

    def count_steps(*_: object) -> None:
        nonlocal num_steps
        num_steps += 1

    model.model.norm.register_forward_hook(count_steps)
    answers, _ = generate(
        model, batch, keep_all=False, max_new_tokens=MAX_NEW, stop_ids={stop},
        on_token=lambda branch, token: told.append((num_steps, branch, token)),
    )  # fmt: skip
    assert [step for step, _, _ in told] == sorted(step for step, _, _ in told)
    has_stopped = 0
    for branch, (answer, whole) in enumerate(zip(answers, plain, strict=True)):
        expected = whole.ids[: whole.ids.index(stop)] if stop in whole.ids else whole.ids
        assert answer.ids == expected
        end = [stop] if stop in whole.ids else [CONFIG.eos_token_id]
        said = [*expected, *end][:MAX_NEW]
        assert [(step, token) for step, b, token in told if b == branch] == list(enumerate(said, start=1))
        has_stopped += stop in whole.ids
    assert 0 < has_stopped < len(answers)


@pytest.mark.parametrize("keep_all", [True, False])
def test_likelihoods_of_options_equal_running_each_after_its_prompt(keep_all: bool) -> None:
    """Unequal numbers and lengths of options, one of them empty but for its end token, a question without any."""
    model = micro_model()
    contexts, branches = prompts()
    end = CONFIG.eos_token_id
    options = [
        [[3, end], [4, 5, 6, end], [3, 5, end]],
        [[end]],
        [],
        [[7, 7, 7, 7, 7, end], [1, end]],
        [[2, end], [2, end], [9, 8, end], [end]],
    ]
    given = [[torch.tensor(option) for option in each] for each in options]
    batch = pack_batch(contexts, branches, CONFIG)
    found = option_log_likelihoods(model, ask_batch(model, batch, keep_all=keep_all), given)
    assert [each.shape[0] for each in found] == [3, 1, 0, 2, 4] and all(each.dtype == torch.float64 for each in found)
    for branch, each, sums in zip(branches, given, found, strict=True):
        for option, log_p in zip(each, sums, strict=True):
            logits = whole_logits(model, contexts[branch.context], branch.input_ids, option[:-1], keep_all=keep_all)
            expected = logits.double().log_softmax(-1).gather(-1, option[:, None]).sum()
            assert float(log_p) == pytest.approx(float(expected), abs=1e-5)
    assert float(found[4][0]) == pytest.approx(float(found[4][1]), abs=1e-5)


def test_likelihoods_with_every_token_are_those_of_the_training_loss() -> None:
    """One ordinary forward pass for each option, as a branch with labels."""
    model = micro_model()
    contexts, branches = prompts()
    options = [[torch.tensor([3, 4, CONFIG.eos_token_id]), torch.tensor([5, CONFIG.eos_token_id])]] * len(branches)
    read = ask_batch(model, pack_batch(contexts, branches, CONFIG), keep_all=True)
    for branch, given, sums in zip(branches, options, option_log_likelihoods(model, read, options), strict=True):
        for option, log_p in zip(given, sums, strict=True):
            labels = torch.cat([torch.full_like(branch.input_ids, IGNORE_INDEX), option])
            whole = Branch(0, torch.cat([branch.input_ids, option]), labels)
            batch = pack_batch([contexts[branch.context]], [whole], CONFIG)
            with torch.no_grad():
                output = model(batch, "full")
                rows, targets, _ = answer_targets(batch)
                all_log_p = model.logits(output.hidden[output.branch_rows[rows]]).double().log_softmax(-1)
            assert float(log_p) == pytest.approx(float(all_log_p.gather(-1, targets[:, None]).sum()), abs=1e-5)


def test_a_greedy_answer_is_as_likely_as_its_confidence() -> None:
    model = micro_model()
    contexts, branches = prompts()
    read = ask_batch(model, pack_batch(contexts, branches, CONFIG), keep_all=False)
    answers = decode(model, read, max_new_tokens=MAX_NEW)
    said = [[torch.tensor([*answer.ids, CONFIG.eos_token_id][:MAX_NEW])] for answer in answers]
    for answer, sums in zip(answers, option_log_likelihoods(model, read, said), strict=True):
        assert math.exp(float(sums[0])) == pytest.approx(answer.confidence, rel=1e-4)


def test_options_that_make_no_sense() -> None:
    model = micro_model()
    contexts, branches = prompts()
    read = ask_batch(model, pack_batch(contexts, branches, CONFIG), keep_all=False)
    option = torch.tensor([CONFIG.eos_token_id])
    for options in ([[option]] * 4, [[option]] * 4 + [[option, option[:0]]]):
        with pytest.raises(PhotonError) as caught:
            option_log_likelihoods(model, read, options)
        assert caught.value.code == "PROMPT_INVALID"
    bad = dataclasses.replace(read, logits=read.logits.index_fill(0, torch.tensor([1, 3]), torch.inf))
    with pytest.raises(PhotonError, match="branch 1, 3") as caught:
        option_log_likelihoods(model, bad, [[option]] * 5)
    assert caught.value.code == "ANSWER_NOT_FINITE"


@pytest.mark.parametrize("keep_all", [True, False])
def test_a_scan_of_nan_gives_no_answer(keep_all: bool) -> None:
    context = random_context(CONFIG, [(1, 4, 4)], seed=0)
    context.patches[3, 2] = torch.nan
    batch: PackedBatch = pack_batch([context], [random_branch(CONFIG, 0, num_question=3)], CONFIG)
    with pytest.raises(PhotonError) as caught:
        generate(micro_model(), batch, keep_all=keep_all, max_new_tokens=2)
    assert caught.value.code == "ANSWER_NOT_FINITE"


@pytest.mark.parametrize("keep_all", [True, False])
def test_a_scan_of_nan_beside_others_names_its_branches(keep_all: bool) -> None:
    """The others' logits, and those of the tokens after, are what they are alone."""
    model = micro_model()
    contexts, branches = prompts()
    contexts[0].patches.fill_(torch.nan)
    batch = pack_batch(contexts, branches, CONFIG)
    with pytest.raises(PhotonError, match="branch 0, 2, 4:") as caught:
        generate(model, batch, keep_all=keep_all, max_new_tokens=4)
    assert caught.value.code == "ANSWER_NOT_FINITE"

    together = ask_batch(model, batch, keep_all=keep_all, room=3)
    good = [1, 3]
    apart = ask_batch(model, pack_batch(contexts, [branches[place] for place in good], CONFIG), keep_all=keep_all)
    torch.testing.assert_close(together.logits[good], apart.logits, atol=1e-5, rtol=0)
    ids = torch.arange(5)
    with torch.no_grad():
        logits, _ = decode_step(model, ids, together.positions + 1, together.cache)
        expected, _ = decode_step(model, ids[good], apart.positions + 1, apart.cache.with_room(1))
    assert not logits[[0, 2, 4]].isfinite().any(-1).any()
    torch.testing.assert_close(logits[good], expected, atol=1e-5, rtol=0)
