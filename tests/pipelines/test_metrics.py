"""Metrics against values computed by hand or with the reference implementations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import metrics

BLEU_AND_ROUGE = [
    ("Right lung lower lobe", "Right lung lower lobe.", 0.778801, 1.0),
    ("7 mm", "7-8 mm", 0.367879, 0.8),
    ("right lower lobe", "Right lung lower lobe.", 0.342278, 0.857143),
    ("55x19 mm", "55 x 19 mm", 0.183940, 0.333333),
    ("2.5cm", "2.5 cm", 0.0, 0.4),
]


def _question(kind: str, answer: str, options: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(kind=kind, answer=answer, options=options)


@pytest.mark.parametrize(("predicted", "gold", "bleu", "rouge"), BLEU_AND_ROUGE)
def test_bleu_and_rouge_of_single_pairs(predicted: str, gold: str, bleu: float, rouge: float) -> None:
    assert metrics.bleu1([predicted], [gold]) == pytest.approx(bleu, abs=1e-6)
    assert metrics.rouge1([predicted], [gold]) == pytest.approx(rouge, abs=1e-6)


def test_bleu_is_a_corpus_score_and_rouge_a_mean() -> None:
    predictions = [BLEU_AND_ROUGE[0][0], BLEU_AND_ROUGE[1][0], "Left kidney."]
    golds = [BLEU_AND_ROUGE[0][1], BLEU_AND_ROUGE[1][1], "Right kidney."]
    assert metrics.bleu1(predictions, golds) == pytest.approx(0.636917, abs=1e-6)
    assert metrics.rouge1(predictions, golds) == pytest.approx(0.766667, abs=1e-6)


def test_empty_texts_score_zero_and_unequal_lengths_are_refused() -> None:
    assert metrics.bleu1([""], ["liver"]) == 0.0
    assert metrics.bleu1(["liver"], [""]) == 0.0
    assert metrics.bleu1([], []) == 0.0
    assert metrics.rouge1([], []) == 0.0
    assert metrics.rouge1([""], [""]) == 0.0
    with pytest.raises(ValueError, match="zip"):
        metrics.bleu1(["a"], [])


def test_tokens_13a() -> None:
    assert metrics.tokenise_13a("1,234.5 mL, left-sided (7-8 mm).") == [
        *("1,234.5", "mL", ",", "left-sided", "(", "7", "-", "8", "mm", ")", ".")
    ]
    assert metrics.tokenise_13a("a &lt; b &copy;") == ["a", "<", "b", "&", "copy", ";"]
    assert metrics.tokenise_13a("patient's") == ["patient's"]


@pytest.mark.parametrize(
    ("predicted", "gold", "score"),
    [
        (100, 100, 1.0), (105, 100, 1.0), (110, 100, 0.8), (120, 100, 0.6), (145, 100, 0.1),
        (150, 100, 0.0), (50, 100, 0.0), (0, 0, 1.0), (1, 0, 0.0), ("1e-7", 0, 0.8),
        ("about 110 mL", "100 mL", 0.8), ("none", "100 mL", 0.0), ("100", "unknown", 0.0),
    ],
)  # fmt: skip
def test_thresholded_mra_golden_values(predicted: str | float, gold: str | float, score: float) -> None:
    assert metrics.mra_threshold_photon(predicted, gold) == pytest.approx(score, abs=1e-12)


def test_exact_decimals_differ_only_on_a_boundary() -> None:
    assert metrics.mra_threshold_photon(105, 100, exact_decimal=True) == 0.9
    assert metrics.mra_threshold_photon("115", "100", exact_decimal=True) == 0.7
    assert metrics.mra_threshold_photon("104.9", "100", exact_decimal=True) == 1.0
    assert metrics.mra_threshold_photon("0", "0", exact_decimal=True) == 1.0
    assert metrics.mra_threshold_photon("1", "0", exact_decimal=True) == 0.0


def test_linear_mra() -> None:
    assert metrics.mra_linear_v2("110", "100") == pytest.approx(0.9)
    assert metrics.mra_linear_v2("300", "100") == 0.0
    assert metrics.mra_linear_v2("-90", "-100") == pytest.approx(0.9)
    assert metrics.mra_linear_v2("0 mL", "0") == 1.0
    assert metrics.mra_linear_v2("1", "0") == 0.0
    assert metrics.mra_linear_v2("nothing", "1") == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234", 1.0), ("5-10", 5.0), ("T2 stage 7", 2.0), ("nan", None), ("", None), ("-3.5e2 HU", -350.0),
        ("about .5 cm", 0.5), ("+7.", 7.0), ("1e999", None), (42, 42.0), ("٣", None),
    ],
)  # fmt: skip
def test_first_number_of_a_text(text: str | float, number: float | None) -> None:
    assert metrics.parse_number(text) == number


def test_closed_equality_folds_case_and_space_alone() -> None:
    assert metrics.closed_accuracy("  LEFT \n kidney", "left kidney") == 1.0
    assert metrics.closed_accuracy("Yes.", "Yes") == 0.0
    assert metrics.closed_accuracy("", "") == 1.0
    assert metrics.closed_accuracy_normalised("Yes.", "yes") == 1.0
    assert metrics.closed_accuracy_normalised("yes", "no") == 0.0


def test_score_answer_by_kind() -> None:
    assert metrics.score_answer(_question("number", "100 mL"), "110 mL") == pytest.approx(0.8)
    assert metrics.score_answer(_question("closed", "Yes"), "yes") == 1.0
    assert metrics.score_answer(_question("text", "Right lung"), "left lung") == 0.0


def test_parse_failures() -> None:
    closed = _question("closed", "yes", ("yes", "no"))
    assert not metrics.is_parse_failure(closed, "No.")
    assert metrics.is_parse_failure(closed, "12 mL")
    assert metrics.is_parse_failure(_question("number", "3"), "many")
    assert not metrics.is_parse_failure(_question("number", "3"), "about 4")
    assert metrics.is_parse_failure(_question("text", "liver"), " .")


def test_confusion_counts_what_is_unreadable_as_wrong() -> None:
    counts = metrics.confusion(
        ["yes", "Yes.", "no", "maybe", "no", "present", ""], ["yes", "yes", "yes", "yes", "no", "no", "no"]
    )
    assert counts == metrics.Confusion(tp=2, fp=2, tn=1, fn=2, num_unparsed=2)
    assert counts.sensitivity == 0.5
    assert counts.specificity == pytest.approx(1 / 3)
    assert counts.balanced_accuracy == pytest.approx(5 / 12)
    assert counts.accuracy == pytest.approx(3 / 7)
    assert counts.unparsed_rate == pytest.approx(2 / 7)


def test_confusion_without_a_class_is_zero_not_an_error() -> None:
    counts = metrics.confusion(["no"], ["no"])
    assert counts.sensitivity == 0.0
    assert counts.specificity == 1.0
    assert metrics.confusion([], []).accuracy == 0.0
    with pytest.raises(ValueError, match="neither yes nor no"):
        metrics.confusion(["yes"], ["perhaps"])
