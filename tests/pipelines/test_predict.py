"""A checkpoint as an answerer: one encoding of the scan, any number of questions, three policies."""

from __future__ import annotations

from pathlib import Path

import pytest

from photon.errors import PhotonError
from pipelines.dataset import LabelledScan, read_split
from pipelines.predict import POLICIES, TorchAnswerer


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


def test_bad_input(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PhotonError) as caught:
        TorchAnswerer(checkpoint, "psychic")
    assert caught.value.code == "POLICY_UNKNOWN" and all(policy in caught.value.fact for policy in POLICIES)
    with pytest.raises(PhotonError) as caught:
        TorchAnswerer(tmp_path)
    assert caught.value.code == "CHECKPOINT_MISSING"
