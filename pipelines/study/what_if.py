"""Every question of a split answered by a checkpoint, from its own tokens and from others: what if it looked elsewhere?

Every condition of :data:`pipelines.study.answer_table.CONDITIONS` uses the same weights and one encoding of the scan.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import Tensor

from photon.generate import EncodedScan
from photon.grid import num_visual_tokens
from pipelines.metrics import score_answer
from pipelines.questions import Question, read_questions
from pipelines.regions import BoolArray
from pipelines.study.answer_table import TRAINED, asked_columns, write_study_answers
from pipelines.study.answering import Said, StudyAnswerer
from pipelines.study.region_table import asked_scans, elsewhere, read_regions
from pipelines.volumes import read_volume

Progress = Callable[[int, int, str], None]


def answer_split(
    checkpoint: Path,
    data: Path,
    target: Path,
    *,
    regions: Path,
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
        data: folder with ``questions.jsonl`` and ``volumes/``.
        target: Parquet file.
        regions: table of :func:`pipelines.study.region_table.write_regions`, from which questions about other places
            are known.
        variant, seed: what the rows are called.
        conditions: which conditions beside "trained".
        has_volume: False for a model of the text alone.
        max_scans: only the first scans of the split, in order of their ids.

    Raises:
        PhotonError: ``SPLIT_EMPTY``, and what reading the data or the checkpoint raises.
    """
    answerer = StudyAnswerer(checkpoint, device=device)
    wordings = other_wordings(read_questions(data / "questions.jsonl"))
    table = read_regions(regions)
    places = dict(zip(table["question_id"].to_list(), table["place"].to_list(), strict=True))
    scans = asked_scans(data, split, max_scans)
    rows: list[dict[str, object]] = []
    for done, (scan_id, path, asked) in enumerate(scans, start=1):
        scan, encode_seconds = answerer.encode(read_volume(path) if has_volume else None)
        own = answerer.ask(scan, asked)
        answered = {TRAINED: dict(enumerate(own))}
        if has_volume:
            is_elsewhere = elsewhere([q.organ for q in asked], [places.get(q.question_id) for q in asked])
            answered |= _counterfactuals(answerer, scan, asked, own, is_elsewhere, wordings, conditions)
        names: dict[str, object] = {"variant": variant, "seed": seed, "encode_seconds": encode_seconds}
        for condition, given in answered.items():
            for place, said in given.items():
                rows.append(names | {"condition": condition} | _row(asked[place], said, scan, answerer))
        if on_progress:
            on_progress(done, len(scans), scan_id)
    return write_study_answers(rows, target)


def other_wordings(questions: Sequence[Question]) -> dict[str, str]:
    """For every question id another wording of the same question that the data uses, the first in the alphabet.

    Our question ids are the scan's id, a point and what is asked; the data picks a wording by the whole id, so the
    other wordings are found at other scans. Questions with other ids, and those with one wording, are left out."""
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


def donors(question_ids: Sequence[str], is_elsewhere: BoolArray) -> list[int | None]:
    """For each question about a scan the place of a question about another place in it, by a checksum; None if none.

    Args:
        is_elsewhere: bool [Q, Q] as :func:`pipelines.study.region_table.elsewhere` gives it.
    """
    chosen: list[int | None] = []
    for question_id, others in zip(question_ids, is_elsewhere, strict=True):
        places = np.flatnonzero(others)
        chosen.append(int(places[_checksum(question_id) % len(places)]) if len(places) else None)
    return chosen


def _counterfactuals(
    answerer: StudyAnswerer,
    scan: EncodedScan,
    asked: Sequence[Question],
    own: Sequence[Said],
    is_elsewhere: BoolArray,
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
        found_donors = donors([question.question_id for question in asked], is_elsewhere)
        pairs = [(place, donor) for place, donor in enumerate(found_donors) if donor is not None]
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


def _grid_tokens(answerer: StudyAnswerer, scan: EncodedScan, said: Said) -> list[int] | None:
    """Numbers in the scan's whole grid of the tokens used; None where tokens have no place in it."""
    if said.keep is None or answerer.model.config.pruning.policy == "pooled":
        return None
    return [int(token) for token in scan.context.grid_tokens(said.keep.nonzero().flatten())]


def _known(keep: Tensor | None) -> Tensor:
    assert keep is not None, "a scan has visual tokens"
    return keep


def _row(question: Question, said: Said, scan: EncodedScan, answerer: StudyAnswerer) -> dict[str, object]:
    vision = answerer.model.config.vision
    return {
        **asked_columns(question),
        "predicted": said.text,
        "score": score_answer(question, said.text),
        "confidence": said.confidence,
        "gold_probability": said.gold_probability,
        "num_tokens": sum(num_visual_tokens(grid, vision) for grid in scan.context.grids),
        "num_kept": 0 if said.keep is None else int(said.keep.sum()),
        "kept": _grid_tokens(answerer, scan, said),
        "seconds": said.seconds,
    }
