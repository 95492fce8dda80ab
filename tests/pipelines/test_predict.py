"""A checkpoint as an answerer: one encoding of the scan, any number of questions, three policies."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch

from photon.checkpoint import read_model, write_model
from photon.errors import PhotonError
from photon.model.network import Photon
from photon.model.packing import Branch, pack_batch
from pipelines.dataset import LabelledScan, empty_context, read_split, scan_context
from pipelines.predict import POLICIES, ClosedBy, TorchAnswerer
from pipelines.questions import Question
from pipelines.volumes import Volume


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Path:
    return trained / "checkpoint"


@pytest.fixture(scope="module")
def scan(smoke_data: Path) -> LabelledScan:
    return read_split(smoke_data, "test")[0]


def test_pruned_answers(checkpoint: Path, scan: LabelledScan) -> None:
    questions = scan.questions[:6]
    answers = TorchAnswerer(checkpoint).answer(scan.volume, questions)
    assert [answer.question_id for answer in answers] == [question.question_id for question in questions]
    for answer in answers:
        assert answer.num_tokens == 12
        assert 4 <= len(answer.kept) <= 12 and list(answer.kept) == sorted(set(answer.kept))
        assert max(answer.kept) < 12
        assert 0.0 < answer.confidence <= 1.0 and answer.seconds > 0.0
    assert any(len(answer.kept) < 12 for answer in answers)


@pytest.mark.parametrize("policy", ["photon", "all_tokens"])
def test_questions_together_equal_questions_apart(checkpoint: Path, scan: LabelledScan, policy: str) -> None:
    answerer = TorchAnswerer(checkpoint, policy)
    questions = scan.questions[:5]
    together = answerer.answer(scan.volume, questions)
    apart = [answerer.answer(scan.volume, [question])[0] for question in questions]
    assert [(a.text, a.kept) for a in together] == [(a.text, a.kept) for a in apart]
    assert [a.confidence for a in together] == pytest.approx([a.confidence for a in apart], rel=1e-3)


def test_every_token(checkpoint: Path, scan: LabelledScan) -> None:
    (answer,) = TorchAnswerer(checkpoint, "all_tokens").answer(scan.volume, scan.questions[:1])
    assert answer.kept == tuple(range(12)) and answer.num_tokens == 12


def test_without_a_scan(trained: Path, scan: LabelledScan) -> None:
    answers = TorchAnswerer(trained / "blind", "blind").answer(None, scan.questions[:3])
    assert len(answers) == 3
    assert all(answer.num_tokens == 0 and answer.kept == () for answer in answers)


def test_no_questions(checkpoint: Path, scan: LabelledScan) -> None:
    for policy, volume in (("photon", scan.volume), ("all_tokens", scan.volume), ("blind", None)):
        assert TorchAnswerer(checkpoint, policy).answer(volume, []) == []


@pytest.mark.parametrize("closed_by", get_args(ClosedBy))
def test_chunks_of_any_size_give_the_same_answers(checkpoint: Path, scan: LabelledScan, closed_by: ClosedBy) -> None:
    """Closed and open questions mixed; the scan is encoded once, and no pass has more questions than allowed."""
    questions = sorted(scan.questions, key=lambda q: q.question)[:11]
    assert len({question.kind for question in questions}) > 1
    expected = TorchAnswerer(checkpoint, closed_by=closed_by).answer(scan.volume, questions)
    for size in (1, 4, 11):
        answerer = TorchAnswerer(checkpoint, closed_by=closed_by, max_branches=size)
        encoded, widths = _rows_through(answerer.model.visual), _rows_through(answerer.model.model.norm)
        answers = answerer.answer(scan.volume, questions)
        assert [(a.question_id, a.text, a.kept) for a in answers] == [(a.question_id, a.text, a.kept) for a in expected]
        assert [a.confidence for a in answers] == pytest.approx([a.confidence for a in expected], rel=1e-3)
        assert len(encoded) == 1
        if closed_by == "generation":
            assert max(widths) == size


@pytest.mark.parametrize("policy", POLICIES)
def test_closed_questions_by_the_likelihood_of_their_options(trained: Path, scan: LabelledScan, policy: str) -> None:
    """Each option as an ordinary branch behind its question, with every token; other questions are generated."""
    folder = trained / ("blind" if policy == "blind" else "checkpoint")
    volume = None if policy == "blind" else scan.volume
    by_generation, answerer = (TorchAnswerer(folder, policy, closed_by=by) for by in get_args(ClosedBy))
    answers = answerer.answer(volume, scan.questions)
    generated = by_generation.answer(volume, scan.questions)
    assert [answer.kept for answer in answers] == [answer.kept for answer in generated]
    closed = [place for place, question in enumerate(scan.questions) if question.kind == "closed"]
    assert 0 < len(closed) < len(scan.questions)
    for place, question in enumerate(scan.questions):
        if place in closed:
            assert answers[place].text in question.options
            assert 1 / len(question.options) <= answers[place].confidence <= 1
        else:
            assert answers[place].text == generated[place].text
    if policy == "photon":
        return  # an ordinary forward pass lets the first layers of an option see dropped tokens
    for place in closed[:4]:
        sums = _log_likelihoods(answerer, volume, scan.questions[place])
        best = max(range(len(sums)), key=sums.__getitem__)
        assert answers[place].text == scan.questions[place].options[best]
        share = math.exp(sums[best]) / sum(math.exp(each) for each in sums)
        assert answers[place].confidence == pytest.approx(share, rel=1e-4)


def _rows_through(module: torch.nn.Module) -> list[int]:
    """A list that grows by the number of output rows with every call of the module."""
    rows: list[int] = []
    module.register_forward_hook(lambda *call: rows.append(call[2].shape[0]))
    return rows


def _log_likelihoods(answerer: TorchAnswerer, volume: Volume | None, question: Question) -> list[float]:
    model, prompter = answerer.model, answerer.prompter
    context = empty_context(model.config) if volume is None else scan_context(volume, prompter, model.config)
    asked = prompter.branch_ids(question.question, has_volume=volume is not None)
    sums = []
    for option in question.options:
        said = prompter.answer_ids(option)
        batch = pack_batch([context], [Branch(0, torch.cat([asked, said]))], model.config)
        with torch.no_grad():
            output = model(batch, "full")
            log_p = model.logits(output.hidden[output.branch_rows]).double().log_softmax(-1)
        sums.append(float(log_p[asked.numel() - 1 : -1].gather(-1, said[:, None]).sum()))
    return sums


def test_a_closed_question_without_options_is_generated(checkpoint: Path, scan: LabelledScan) -> None:
    question = dataclasses.replace(next(q for q in scan.questions if q.kind == "closed"), options=())
    by_generation, by_likelihood = (TorchAnswerer(checkpoint, closed_by=by) for by in get_args(ClosedBy))
    expected, answer = (each.answer(scan.volume, [question])[0] for each in (by_generation, by_likelihood))
    assert dataclasses.replace(answer, seconds=0.0) == dataclasses.replace(expected, seconds=0.0)


def test_an_option_in_unknown_words(checkpoint: Path, scan: LabelledScan) -> None:
    question = next(q for q in scan.questions if q.kind == "closed")
    question = dataclasses.replace(question, options=(*question.options, "xylophone"))
    assert TorchAnswerer(checkpoint).answer(scan.volume, [question])
    with pytest.raises(PhotonError, match="xylophone") as caught:
        TorchAnswerer(checkpoint, closed_by="likelihood").answer(scan.volume, [question])
    assert caught.value.code == "QUESTION_NOT_UNDERSTOOD"


def test_bad_input(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PhotonError) as caught:
        TorchAnswerer(checkpoint, "psychic")
    assert caught.value.code == "POLICY_UNKNOWN" and all(policy in caught.value.fact for policy in POLICIES)
    with pytest.raises(PhotonError) as caught:
        TorchAnswerer(checkpoint, closed_by="dice")  # type: ignore[arg-type]
    assert caught.value.code == "GENERATION_INVALID" and "likelihood" in caught.value.fact
    with pytest.raises(PhotonError) as caught:
        TorchAnswerer(tmp_path)
    assert caught.value.code == "CHECKPOINT_MISSING"


def test_bfloat16_answers_like_float32(checkpoint: Path, scan: LabelledScan) -> None:
    answerer = TorchAnswerer(checkpoint, precision="bfloat16")
    assert {parameter.dtype for parameter in answerer.model.parameters()} == {torch.bfloat16}
    questions = scan.questions[:4]
    ours, theirs = answerer.answer(scan.volume, questions), TorchAnswerer(checkpoint).answer(scan.volume, questions)
    assert [a.question_id for a in ours] == [a.question_id for a in theirs]
    assert [a.confidence for a in ours] == pytest.approx([a.confidence for a in theirs], rel=0.5)
    assert {parameter.dtype for parameter in TorchAnswerer(checkpoint).model.parameters()} == {torch.float32}


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PhotonError) as caught:
        TorchAnswerer(tmp_path / "nothing", precision="float16")  # type: ignore[arg-type]
    assert caught.value.code == "PRECISION_UNKNOWN"


@pytest.mark.parametrize(
    ("policy", "kept"),
    [("all", 12), ("slices", 4), ("pooled", 4), ("fixed", 5), ("fixed-blind", 5)],
)
def test_the_checkpoint_s_own_policy_is_honoured(
    checkpoint: Path, scan: LabelledScan, tmp_path: Path, policy: str, kept: int
) -> None:
    """12 tokens in three slabs. Kept tokens are told by their places in the whole grid, whatever entered."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, folder)
    model = read_model(checkpoint)
    write_model(_with_policy(model, policy), folder)
    questions = scan.questions[:6]
    answers = TorchAnswerer(folder).answer(scan.volume, questions)
    assert all(answer.num_tokens == 12 and len(answer.kept) == kept for answer in answers)
    if policy in ("slices", "pooled"):  # the middle slab; all three averaged, which are represented by it
        assert {answer.kept for answer in answers} == {(4, 5, 6, 7)}
    assert (len({answer.kept for answer in answers}) > 1) == (policy == "fixed")
    whole = TorchAnswerer(folder, "all_tokens").answer(scan.volume, questions)
    entered = {"slices": 4, "pooled": 4}.get(policy, 12)
    assert all(len(answer.kept) == entered for answer in whole)
    if policy in ("all", "slices", "pooled"):
        assert [(a.text, a.kept) for a in answers] == [(a.text, a.kept) for a in whole]


def _with_policy(model: Photon, policy: str) -> Photon:
    pruning = dataclasses.replace(model.config.pruning, policy=policy, saliency_gradient=False, distillation_weight=0.0)
    other = Photon(dataclasses.replace(model.config, pruning=pruning))
    other.load_state_dict(model.state_dict())
    return other
