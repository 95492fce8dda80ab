"""A trained checkpoint as an answerer: PyTorch inference with one encoding of the scan for all its questions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from photon.checkpoint import read_model
from photon.errors import PhotonError
from photon.generate import generate
from photon.model.packing import Branch, pack_batch
from pipelines.answers import Answer
from pipelines.dataset import empty_context, scan_context
from pipelines.questions import Question
from pipelines.text import TOKENIZER, Prompter
from pipelines.volumes import Volume

MAX_ANSWER_TOKENS = 12
POLICIES = ("photon", "all_tokens", "blind")


class TorchAnswerer:
    """Answers with a checkpoint: pruned ("photon"), with every token ("all_tokens") or without a scan ("blind")."""

    def __init__(self, checkpoint: Path, policy: str = "photon") -> None:
        """Open a checkpoint folder.

        Raises:
            PhotonError: whatever reading the weights, the configuration or the tokenizer raises.
        """
        if policy not in POLICIES:
            raise PhotonError("POLICY_UNKNOWN", policy, f"it is not one of {POLICIES}.", "Choose one of them.")
        self.policy = policy
        self.model = read_model(checkpoint)
        self.prompter = Prompter.read(checkpoint / TOKENIZER)

    def answer(self, volume: Volume | None, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the order of the questions; `volume` is None for the blind policy and only then."""
        started = time.perf_counter()
        config = self.model.config
        has_volume = volume is not None
        context = scan_context(volume, self.prompter, config) if volume is not None else empty_context(config)
        branches = [
            Branch(0, self.prompter.branch_ids(question.question, has_volume=has_volume)) for question in questions
        ]
        batch = pack_batch([context], branches, config)
        keep_all = self.policy == "all_tokens"
        generated, output = generate(self.model, batch, keep_all=keep_all, max_new_tokens=MAX_ANSWER_TOKENS)
        num_tokens = int(batch.visual_counts[0])
        if output.schedule is None or keep_all:
            kept = [tuple(range(num_tokens))] * len(questions)
        else:
            kept = [tuple(row.nonzero().flatten().tolist()) for row in output.schedule.keep]
        seconds = (time.perf_counter() - started) / len(questions)
        return [
            Answer(
                question_id=question.question_id,
                text=self.prompter.text(said.ids),
                confidence=said.confidence,
                num_tokens=num_tokens,
                kept=tokens,
                seconds=seconds,
            )
            for question, said, tokens in zip(questions, generated, kept, strict=True)
        ]
