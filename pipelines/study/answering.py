"""A trained checkpoint answers a split's questions, from its own tokens and from others: what if it had looked elsewhere?

Closed questions are answered by the likeliest of their options, others by greedy generation. Every condition of
:data:`pipelines.study.answer_table.CONDITIONS` uses the same weights and one encoding of the scan.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import torch
from torch import Tensor

from photon.checkpoint import read_model
from photon.device import choose_device
from photon.errors import PhotonError
from photon.generate import EncodedScan, Prompted, ask, decode, encode_scan
from photon.grid import num_visual_tokens
from photon.likelihood import option_log_likelihoods
from pipelines.answers import MAX_ANSWER_TOKENS
from pipelines.dataset import empty_context, scan_context
from pipelines.manifest import MANIFEST_NAME, read_manifest
from pipelines.metrics import score_answer
from pipelines.questions import Question, read_questions
from pipelines.study.answer_table import TRAINED, write_study_answers
from pipelines.study.asked import AskedRegion, other_place, read_asked_regions
from pipelines.text import TOKENIZER, Prompter
from pipelines.volumes import Volume, read_volume

MAX_BRANCHES = 64
"""Questions that run at a time: each holds a copy of the rows it kept."""

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class Said:
    """One answer.

    Attributes:
        text: the answer.
        confidence: its share among the options; of a generated answer, its probability.
        gold_probability: the right option's share; None without options.
        keep: bool [N] which of the present tokens it was given from; None without a scan.
        seconds: its share of the time of all that were asked together.
    """

    text: str
    confidence: float
    gold_probability: float | None
    keep: Tensor | None
    seconds: float


class StudyAnswerer:
    """A checkpoint that answers questions about a scan from the tokens it chooses, or from given ones."""

    def __init__(self, checkpoint: Path, *, device: str = "cpu", max_branches: int = MAX_BRANCHES) -> None:
        """Open a checkpoint folder; raises what reading weights, configuration and tokenizer raises."""
        self.device = choose_device(device)
        self.model = read_model(checkpoint, device=self.device)
        self.prompter = Prompter.read(checkpoint / TOKENIZER)
        self.max_branches = max_branches

    def encode(self, volume: Volume | None) -> tuple[EncodedScan, float]:
        """A scan, or nothing for a model that does not look, and the seconds that took."""
        started = time.perf_counter()
        config = self.model.config
        context = empty_context(config) if volume is None else scan_context(volume, self.prompter, config)
        scan = encode_scan(self.model, context)
        self._wait()
        return scan, time.perf_counter() - started

    def ask(
        self,
        scan: EncodedScan,
        questions: Sequence[Question],
        *,
        texts: Sequence[str] | None = None,
        keep_all: bool = False,
        keep: Tensor | None = None,
    ) -> list[Said]:
        """Answers in the order of the questions.

        Args:
            texts: what is asked instead of the questions' own words.
            keep_all: answer from every token; keep: bool [Q, N], answer each from these of the present tokens.

        Raises:
            PhotonError: ``QUESTION_NOT_UNDERSTOOD``, ``ANSWER_NOT_FINITE``.
        """
        has_volume = bool(scan.context.grids)
        wordings = texts or [question.question for question in questions]
        branches = [self.prompter.branch_ids(text, has_volume=has_volume) for text in wordings]
        said: dict[int, Said] = {}
        for places, is_compared in _chunks(questions, self.max_branches):
            started = time.perf_counter()
            chosen = None if keep is None else keep[places].to(self.device)
            room = 0 if is_compared else MAX_ANSWER_TOKENS
            asked = [branches[place] for place in places]
            prompted = ask(self.model, scan, asked, keep_all=keep_all, keep=chosen, room=room)
            members = [questions[place] for place in places]
            replies = self._compare(prompted, members) if is_compared else self._generate(prompted)
            self._wait()
            seconds = (time.perf_counter() - started) / len(places)
            used = _used_tokens(prompted, len(places), keep_all, chosen)
            for place, (text, confidence, gold), mask in zip(places, replies, used, strict=True):
                said[place] = Said(text=text, confidence=confidence, gold_probability=gold, keep=mask, seconds=seconds)
        return [said[place] for place in range(len(questions))]

    def _compare(self, prompted: Prompted, questions: Sequence[Question]) -> list[tuple[str, float, float | None]]:
        options = [[self.prompter.answer_ids(option) for option in question.options] for question in questions]
        replies: list[tuple[str, float, float | None]] = []
        for question, sums in zip(questions, option_log_likelihoods(self.model, prompted, options), strict=True):
            shares, best = sums.softmax(0), int(sums.argmax())
            is_listed = question.answer in question.options
            gold = float(shares[question.options.index(question.answer)]) if is_listed else None
            replies.append((question.options[best], float(shares[best]), gold))
        return replies

    def _generate(self, prompted: Prompted) -> list[tuple[str, float, float | None]]:
        answers = decode(self.model, prompted, max_new_tokens=MAX_ANSWER_TOKENS)
        return [(self.prompter.text(answer.ids), answer.confidence, None) for answer in answers]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def answer_split(
    checkpoint: Path,
    data: Path,
    target: Path,
    *,
    variant: str,
    seed: int,
    conditions: Collection[str],
    split: str = "test",
    has_volume: bool = True,
    device: str = "cpu",
    max_scans: int | None = None,
    on_progress: Progress | None = None,
) -> pl.DataFrame:
    """Answer every question of a split and write the table :data:`pipelines.study.answer_table.STUDY_SCHEMA`.

    Args:
        checkpoint: trained model with its tokenizer.
        data: folder with ``questions.jsonl``, ``volumes/`` and, for the regions, ``raw/labels/``.
        target: Parquet file.
        variant, seed: what the rows are called.
        conditions: which conditions beside "trained".
        has_volume: False for a model of the text alone.
        max_scans: only the first scans of the split, in order of their ids.

    Raises:
        PhotonError: ``SPLIT_EMPTY``, and what reading the data or the checkpoint raises.
    """
    answerer = StudyAnswerer(checkpoint, device=device)
    questions = read_questions(data / "questions.jsonl")
    wordings = other_wordings(questions)
    scans = _scans(data, questions, split)[:max_scans]
    rows: list[dict[str, object]] = []
    for done, (scan_id, path, asked) in enumerate(scans, start=1):
        volume = read_volume(path)
        regions = read_asked_regions(data, scan_id, volume.spec, volume.affine, asked)
        scan, encode_seconds = answerer.encode(volume if has_volume else None)
        own = answerer.ask(scan, asked)
        answered = {TRAINED: dict(zip(range(len(asked)), own, strict=True))}
        if has_volume:
            answered |= _counterfactuals(answerer, scan, asked, own, regions, wordings, conditions)
        names: dict[str, object] = {"variant": variant, "seed": seed, "encode_seconds": encode_seconds}
        for condition, given in answered.items():
            for place, said in given.items():
                region = regions.get(asked[place].question_id) if condition == TRAINED else None
                places = _grid_tokens(answerer, scan, said)
                rows.append(names | {"condition": condition} | _row(asked[place], said, scan, answerer, places, region))
        if on_progress:
            on_progress(done, len(scans), scan_id)
    return write_study_answers(rows, target)


def other_wordings(questions: Sequence[Question]) -> dict[str, str]:
    """For every question id another wording of the same question that the data uses, the first in the alphabet.

    Our question ids are the scan's id, a point and what is asked; the data picks a wording by the whole id, so the other
    wordings are found at other scans. Questions with other ids, and those with one wording, are left out.
    """
    texts: dict[str, set[str]] = defaultdict(set)
    for question in questions:
        if key := _identity(question):
            texts[key].add(question.question)
    found: dict[str, str] = {}
    for question in questions:
        others = sorted(texts[_identity(question)] - {question.question}) if _identity(question) else []
        if others:
            found[question.question_id] = others[0]
    return found


def donors(questions: Sequence[Question], regions: Mapping[str, AskedRegion]) -> list[int | None]:
    """For each question about a scan the place of a question about another place in it, by a checksum; None if none."""
    chosen: list[int | None] = []
    for question in questions:
        others = [place for place, other in enumerate(questions) if other_place(regions, question, other)]
        chosen.append(others[_checksum(question.question_id) % len(others)] if others else None)
    return chosen


def _counterfactuals(
    answerer: StudyAnswerer,
    scan: EncodedScan,
    asked: Sequence[Question],
    own: Sequence[Said],
    regions: Mapping[str, AskedRegion],
    wordings: Mapping[str, str],
    conditions: Collection[str],
) -> dict[str, dict[int, Said]]:
    """Answers by condition and place of the question; a question that a condition does not fit has none."""
    found: dict[str, dict[int, Said]] = {}

    def note(condition: str, places: Sequence[int], said: Sequence[Said]) -> None:
        found[condition] = dict(zip(places, said, strict=True))

    everything = list(range(len(asked)))
    keep = torch.stack([_known(said.keep) for said in own])
    if "all tokens" in conditions:
        note("all tokens", everything, answerer.ask(scan, asked, keep_all=True))
    if "removed" in conditions:
        note("removed", everything, answerer.ask(scan, asked, keep=~keep))
    if "none" in conditions:
        note("none", everything, answerer.ask(scan, asked, keep=torch.zeros_like(keep)))
    if "random" in conditions:
        drawn = [_random_tokens(mask, question.question_id) for mask, question in zip(keep, asked, strict=True)]
        note("random", everything, answerer.ask(scan, asked, keep=torch.stack(drawn)))
    if "swapped" in conditions:
        pairs = [(place, donor) for place, donor in enumerate(donors(asked, regions)) if donor is not None]
        if pairs:
            places = [place for place, _ in pairs]
            swapped = keep[[donor for _, donor in pairs]]
            note("swapped", places, answerer.ask(scan, [asked[place] for place in places], keep=swapped))
    if "paraphrase" in conditions:
        places = [place for place, question in enumerate(asked) if question.question_id in wordings]
        if places:
            members = [asked[place] for place in places]
            texts = [wordings[question.question_id] for question in members]
            note("paraphrase", places, answerer.ask(scan, members, texts=texts))
    return found


def _chunks(questions: Sequence[Question], size: int) -> Iterator[tuple[list[int], bool]]:
    """Places of questions that run at a time, and whether their options are compared."""
    compared = [question.kind == "closed" and bool(question.options) for question in questions]
    for wanted in (True, False):
        places = [place for place, is_compared in enumerate(compared) if is_compared == wanted]
        for start in range(0, len(places), size):
            yield places[start : start + size], wanted


def _used_tokens(
    prompted: Prompted, num_branches: int, keep_all: bool, chosen: Tensor | None
) -> list[Tensor] | list[None]:
    """Bool [N] on the CPU for each branch: the present tokens that its answer was given from."""
    decision = prompted.output.schedule
    if decision is None:
        return [None] * num_branches
    # One volume a prompt: a branch has one row.
    mask = decision.valid if keep_all else decision.keep if chosen is None else chosen
    return list(mask.cpu())


def _random_tokens(keep: Tensor, question_id: str) -> Tensor:
    """As many tokens as ``keep`` [N] has, drawn from the question's id."""
    generator = torch.Generator().manual_seed(_checksum(question_id))
    drawn = torch.zeros_like(keep)
    drawn[torch.randperm(keep.numel(), generator=generator)[: int(keep.sum())]] = True
    return drawn


def _checksum(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])


def _identity(question: Question) -> str:
    """What a question asks, whatever the scan and the words; "" where the id does not tell."""
    start = f"{question.scan_id}."
    return question.question_id.removeprefix(start) if question.question_id.startswith(start) else ""


def _scans(data: Path, questions: Sequence[Question], split: str) -> list[tuple[str, Path, list[Question]]]:
    """Scans of a split that preprocessing accepted: id, volume and questions."""
    accepted = read_manifest(data / "volumes" / MANIFEST_NAME).filter(status="ok")
    volumes = {scan_id: data / "volumes" / name for scan_id, name in accepted.select("scan_id", "volume").iter_rows()}
    by_scan: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        if question.split == split and question.scan_id in volumes:
            by_scan[question.scan_id].append(question)
    if not by_scan:
        fact = f"no accepted scan has questions in split {split!r}."
        raise PhotonError("SPLIT_EMPTY", data, fact, "Choose a split that has questions, and preprocess its scans.")
    return [
        (scan_id, volumes[scan_id], sorted(asked, key=lambda question: question.question_id))
        for scan_id, asked in sorted(by_scan.items())
    ]


def _grid_tokens(answerer: StudyAnswerer, scan: EncodedScan, said: Said) -> list[int] | None:
    """Numbers in the scan's whole grid of the tokens used; None where tokens have no place in it."""
    if said.keep is None or answerer.model.config.pruning.policy == "pooled":
        return None
    return [int(token) for token in scan.context.grid_tokens(said.keep.nonzero().flatten())]


def _known(keep: Tensor | None) -> Tensor:
    assert keep is not None, "a scan has visual tokens"
    return keep


def _row(
    question: Question,
    said: Said,
    scan: EncodedScan,
    answerer: StudyAnswerer,
    kept: list[int] | None,
    region: AskedRegion | None,
) -> dict[str, object]:
    vision = answerer.model.config.vision
    return {
        "question_id": question.question_id,
        "scan_id": question.scan_id,
        "patient_id": question.patient_id,
        "family": question.family,
        "subtype": question.subtype,
        "organ": question.organ,
        "kind": question.kind,
        "question": question.question,
        "num_options": len(question.options),
        "gold": question.answer,
        "predicted": said.text,
        "score": score_answer(question, said.text),
        "confidence": said.confidence,
        "gold_probability": said.gold_probability,
        "num_tokens": sum(num_visual_tokens(grid, vision) for grid in scan.context.grids),
        "num_kept": 0 if said.keep is None else int(said.keep.sum()),
        "kept": kept,
        "organ_region": _listed(None if region is None else region.organ),
        "lesion_region": _listed(None if region is None else region.lesion),
        "place": _listed(region.labels) if region is not None and region.labels.any() else None,
        "seconds": said.seconds,
    }


def _listed(mask: object) -> list[int] | None:
    return None if mask is None else [int(token) for token in torch.as_tensor(mask).nonzero().flatten()]
