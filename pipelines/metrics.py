"""Answer metrics: text equality, thresholded and linear relative accuracy, BLEU-1, ROUGE-1 and findings.

Every score is a fraction in [0, 1]. Text is compared the way Photon's own evaluation does it, so that numbers
stay comparable; the normalised variants, which forgive a final full stop, are separate functions with their
own names.
"""

from __future__ import annotations

import html
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.questions import Question

MRA_THRESHOLDS = ("0.50", "0.55", "0.60", "0.65", "0.70", "0.75", "0.80", "0.85", "0.90", "0.95")
_SMALLEST_GOLD = "1e-6"
_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_TRAILING_PUNCTUATION = " .,:;!?。，：；！？"
_PRESENT = frozenset({"yes", "true", "present", "positive", "exist", "exists", "1"})
_ABSENT = frozenset({"no", "false", "absent", "negative", "not exist", "0"})


def fold_text(text: str) -> str:
    """``text`` casefolded, with runs of white space made one space and none at the ends."""
    return " ".join(text.split()).casefold()


def normalise_answer(text: str) -> str:
    """:func:`fold_text` without punctuation at the end: ``"Right  lobe."`` becomes ``"right lobe"``."""
    return fold_text(text).rstrip(_TRAILING_PUNCTUATION)


def closed_accuracy(predicted: str, gold: str) -> float:
    """1.0 when the two texts are equal after :func:`fold_text`, else 0.0 (``Yes.`` is not ``Yes``)."""
    return float(fold_text(predicted) == fold_text(gold))


def closed_accuracy_normalised(predicted: str, gold: str) -> float:
    """1.0 when the two texts are equal after :func:`normalise_answer`, else 0.0."""
    return float(normalise_answer(predicted) == normalise_answer(gold))


def parse_number(answer: str | float) -> float | None:
    """The first number of ``answer``: optional sign, digits with or without a point, optional exponent.

    ``"1,234"`` is 1, ``"5-10"`` is 5, ``"T2 stage 7"`` is 2; no number, or one too large for a float, is
    None.
    """
    number = _number_text(answer)
    if number is None:
        return None
    value = float(number)
    return value if math.isfinite(value) else None


def mra_threshold_photon(predicted: str | float, gold: str | float, exact_decimal: bool = False) -> float:
    """Photon's mean relative accuracy: the share of the ten thresholds t in .50, .55 ... .95 for which
    ``|predicted - gold| / max(|gold|, 1e-6) < 1 - t``, strictly.

    Args:
        predicted: a number or the text to take the first number from.
        gold: the same for the truth.
        exact_decimal: compare in decimal arithmetic. Binary floats, the default and the published behaviour,
            call an error of exactly 5 % smaller than ``1 - 0.95``; exact decimals do not.

    Returns:
        A multiple of 0.1; 0.0 when either side holds no number.
    """
    predicted_value, gold_value = parse_number(predicted), parse_number(gold)
    if predicted_value is None or gold_value is None:
        return 0.0
    if not exact_decimal:
        error = abs(predicted_value - gold_value) / max(abs(gold_value), float(_SMALLEST_GOLD))
        return sum(error < 1 - float(threshold) for threshold in MRA_THRESHOLDS) / len(MRA_THRESHOLDS)
    exact_predicted, exact_gold = Decimal(str(_number_text(predicted))), Decimal(str(_number_text(gold)))
    scale = max(abs(exact_gold), Decimal(_SMALLEST_GOLD))
    distance = abs(exact_predicted - exact_gold)  # compared without dividing, which would round
    num_met = sum(distance < (1 - Decimal(threshold)) * scale for threshold in MRA_THRESHOLDS)
    return num_met / len(MRA_THRESHOLDS)


def mra_linear_v2(predicted: str | float, gold: str | float) -> float:
    """Linear relative accuracy of DeepTumorVQA 2: ``max(0, 1 - |predicted - gold| / |gold|)``.

    A truth of 0 asks for exactly 0; 0.0 when either side holds no number.
    """
    predicted_value, gold_value = parse_number(predicted), parse_number(gold)
    if predicted_value is None or gold_value is None:
        return 0.0
    if gold_value == 0:
        return float(predicted_value == 0)
    return max(0.0, 1 - abs(predicted_value - gold_value) / abs(gold_value))


def score_answer(question: Question, predicted: str) -> float:
    """Score of one answer: equality for kind closed and text, :func:`mra_threshold_photon` for numbers.

    The truth of a number is the one written in the answer text, which is what the model was taught to write.
    """
    if question.kind == "number":
        return mra_threshold_photon(predicted, question.answer)
    return closed_accuracy(predicted, question.answer)


def is_parse_failure(question: Question, predicted: str) -> bool:
    """Whether ``predicted`` is no answer of the question's kind: not an option, not a number, or empty."""
    if question.kind == "number":
        return parse_number(predicted) is None
    if question.kind == "closed":
        return normalise_answer(predicted) not in {normalise_answer(option) for option in question.options}
    return not normalise_answer(predicted)


def tokenise_13a(text: str) -> list[str]:
    """Words and punctuation of ``text`` by the 13a rules of machine translation scoring; case is kept.

    Apostrophe, comma, hyphen and point stay inside words, save that comma and point are split off unless they
    stand between digits, and a hyphen is split off after a digit.
    """
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    text = html.unescape(re.sub(r"&(?!(?:quot|amp|lt|gt);)", "&amp;", text))
    text = re.sub(r"[!-&(-+/:-@\[-`{-~]", r" \g<0> ", text)
    text = re.sub(r"(?<![0-9])[.,]|[.,](?![0-9])", r" \g<0> ", text)
    return re.sub(r"(?<=[0-9])-", " - ", text).split()


def bleu1(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """Corpus BLEU-1 with 13a tokens: clipped unigram precision over all pairs times one brevity penalty.

    0.0 when nothing matches or either side is empty throughout. Raises ValueError for unequal lengths.
    """
    num_matches = num_predicted = num_gold = 0
    for predicted, gold in zip(predictions, golds, strict=True):
        predicted_tokens, gold_tokens = tokenise_13a(predicted), tokenise_13a(gold)
        num_matches += (Counter(predicted_tokens) & Counter(gold_tokens)).total()
        num_predicted += len(predicted_tokens)
        num_gold += len(gold_tokens)
    if num_matches == 0:
        return 0.0
    brevity = 1.0 if num_predicted > num_gold else math.exp(1 - num_gold / num_predicted)
    return brevity * num_matches / num_predicted


def rouge1(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """Mean over pairs of the ROUGE-1 F measure on lower-case alphanumeric words, without stemming.

    The reference reports the median of unseeded bootstrap means; this is the plain mean, which can be
    repeated. 0.0 for no pairs. Raises ValueError for unequal lengths.
    """
    scores = [_rouge1_pair(predicted, gold) for predicted, gold in zip(predictions, golds, strict=True)]
    return math.fsum(scores) / len(scores) if scores else 0.0


def parse_presence(answer: str) -> bool | None:
    """True for yes, present, positive ..., False for no, absent, negative ..., None for anything else."""
    word = normalise_answer(answer)
    if word in _PRESENT:
        return True
    return False if word in _ABSENT else None


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Counts of a yes/no finding. An answer that is neither yes nor no counts as wrong: it is in `fn` or
    `fp`, and in `num_unparsed` as well, so that refusing to answer cannot look better than answering."""

    tp: int
    fp: int
    tn: int
    fn: int
    num_unparsed: int

    @property
    def sensitivity(self) -> float:
        """tp / (tp + fn), 0.0 without positives."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def specificity(self) -> float:
        """tn / (tn + fp), 0.0 without negatives."""
        return _ratio(self.tn, self.tn + self.fp)

    @property
    def balanced_accuracy(self) -> float:
        """Mean of sensitivity and specificity; 0.5 is chance."""
        return (self.sensitivity + self.specificity) / 2

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0.0 without any."""
        return _ratio(self.tp + self.tn, self.tp + self.tn + self.fp + self.fn)

    @property
    def unparsed_rate(self) -> float:
        """Share of answers that are neither yes nor no."""
        return _ratio(self.num_unparsed, self.tp + self.tn + self.fp + self.fn)


def confusion(predictions: Sequence[str], golds: Sequence[str]) -> Confusion:
    """Count the answers to a yes/no finding.

    Raises:
        ValueError: lengths differ, or a gold answer is neither yes nor no.
    """
    tp = fp = tn = fn = num_unparsed = 0
    for predicted, gold in zip(predictions, golds, strict=True):
        is_present, is_said = parse_presence(gold), parse_presence(predicted)
        if is_present is None:
            raise ValueError(f"the gold answer {gold!r} of a finding is neither yes nor no")
        num_unparsed += is_said is None
        tp += is_present and is_said is True
        fn += is_present and is_said is not True
        tn += not is_present and is_said is False
        fp += not is_present and is_said is not False
    return Confusion(tp=tp, fp=fp, tn=tn, fn=fn, num_unparsed=num_unparsed)


def _number_text(answer: str | float) -> str | None:
    match = _NUMBER.search(str(answer))
    return match.group() if match else None


def _rouge1_pair(predicted: str, gold: str) -> float:
    predicted_words = re.findall(r"[a-z0-9]+", predicted.lower())
    gold_words = re.findall(r"[a-z0-9]+", gold.lower())
    num_matches = (Counter(predicted_words) & Counter(gold_words)).total()
    return _ratio(2 * num_matches, len(predicted_words) + len(gold_words))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else 0.0
