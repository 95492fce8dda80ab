"""Questions of val and test in words of train."""

from __future__ import annotations

from typing import Any

from pipelines.mask_questions.wording import in_words_of_train
from pipelines.questions import Question


def question(number: int, split: str, text: str, **more: Any) -> Question:
    fields: dict[str, Any] = {"family": "recognition", "subtype": "x", "organ": "", "kind": "closed", "answer": "yes"}
    return Question(question_id=str(number), scan_id="s", patient_id="p", split=split, question=text, **(fields | more))


def test_a_wording_that_train_knows_is_taken() -> None:
    questions = [
        question(0, "train", "Is there any tumour?"),
        question(1, "val", "Does the scan show any tumour?"),
        question(2, "test", "Is there any tumour?"),
        question(3, "test", "Is there any spleen?"),
    ]
    wordings = {q.question_id: (q.question,) for q in questions}
    wordings["1"] = ("Does the scan show any tumour?", "Is any tumour visible?", "Is there any tumour?")
    asked, left_out = in_words_of_train(questions, wordings)
    assert [(q.question_id, q.question) for q in asked] == [(n, "Is there any tumour?") for n in "012"]
    assert left_out == [questions[3]]


def test_without_train_nothing_changes() -> None:
    questions = [question(1, "test", "Is there any tumour?")]
    assert in_words_of_train(questions, {"1": ("Is there any tumour?",)}) == (questions, [])
