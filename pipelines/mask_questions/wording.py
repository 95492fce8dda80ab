"""Questions of val and test in words that train has, since a vocabulary learned from train knows no others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from pipelines.questions import Question
from pipelines.text import Prompter, build_tokenizer


def in_words_of_train(
    questions: Sequence[Question], wordings: Mapping[str, tuple[str, ...]]
) -> tuple[list[Question], list[Question]]:
    """Questions as they can be asked, and those that cannot be asked in words of train; order as before.

    A question keeps its wording where train has all of its words; else it takes the first of its other wordings of
    which that is true. In data sets of more than a few patients this changes nothing.

    Args:
        wordings: all wordings of every question by its id.
    """
    train = [text for q in questions if q.split == "train" for text in (q.question, q.answer)]
    if not train:
        return list(questions), []
    prompter = Prompter(build_tokenizer(train))
    asked, left_out = [], []
    for question in questions:
        texts = (question.question, *wordings[question.question_id])
        text = next((text for text in texts if not prompter.unknown_words(text)), None)
        if text is None:
            left_out.append(question)
        else:
            asked.append(dataclasses.replace(question, question=text))
    return asked, left_out
