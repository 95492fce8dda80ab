"""A trained checkpoint as an answerer: PyTorch inference with one encoding of the scan for all its questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from photon.checkpoint import read_model
from photon.device import choose_device
from photon.errors import PhotonError
from photon.generate import Prompted, ask, decode, encode_scan
from photon.grid import num_visual_tokens
from photon.likelihood import option_log_likelihoods
from photon.ops.backend import Backend, resolve
from photon.training.optimiser import Precision
from pipelines.answers import MAX_ANSWER_TOKENS, Answer
from pipelines.dataset import empty_context, scan_context
from pipelines.questions import Question
from pipelines.text import TOKENIZER, Prompter
from pipelines.volumes import Volume

MAX_BRANCHES = 64
"""Questions that run at a time: each holds a copy of the rows it kept."""
POLICIES = ("photon", "all_tokens", "blind")

ClosedBy = Literal["generation", "likelihood"]
"""How closed questions are answered: in the model's own words, or by the likeliest of their options."""

_DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Said = tuple[str, float]
"""Text and confidence of an answer."""


class TorchAnswerer:
    """Answers with a checkpoint: pruned ("photon"), with every token ("all_tokens") or without a scan ("blind").

    "photon" prunes by the policy of the checkpoint's configuration, whichever that is. "all_tokens" uses every token
    that enters the decoder: of a checkpoint with the policy "slices" or "pooled" these are fewer than the grid has.
    """

    def __init__(
        self,
        checkpoint: Path,
        policy: str = "photon",
        *,
        closed_by: ClosedBy = "generation",
        max_branches: int = MAX_BRANCHES,
        device: str = "cpu",
        precision: Precision = "float32",
        backend: Backend = "auto",
    ) -> None:
        """Open a checkpoint folder.

        Args:
            closed_by: how questions of kind closed that list options are answered. By likelihood the answer is the
                option whose tokens are likeliest together, and its confidence its share among the options.
            max_branches: questions that run at a time; a matter of memory and time, not of the answers.
            device: "cpu", "cuda" or "auto".
            precision: of weights and arithmetic, whatever the files hold; "bfloat16" halves the memory.
            backend: implementation of the pruning operators, "auto", "reference" or "triton".

        Raises:
            PhotonError: ``POLICY_UNKNOWN``, ``GENERATION_INVALID``, ``PRECISION_UNKNOWN``, ``GPU_UNAVAILABLE``,
                ``DEVICE_UNKNOWN``, ``BACKEND_UNAVAILABLE``, ``BACKEND_UNKNOWN``, and whatever reading the weights, the
                configuration or the tokenizer raises.
        """
        if policy not in POLICIES:
            raise PhotonError("POLICY_UNKNOWN", policy, f"it is not one of {POLICIES}.", "Choose one of them.")
        if closed_by not in get_args(ClosedBy):
            fact = f"it is not one of {get_args(ClosedBy)}."
            raise PhotonError("GENERATION_INVALID", closed_by, fact, "Choose one of them.")
        if precision not in _DTYPES:
            fact = f"it is not one of {get_args(Precision)}."
            raise PhotonError("PRECISION_UNKNOWN", precision, fact, "Choose one of them.")
        self.policy, self.closed_by, self.max_branches = policy, closed_by, max_branches
        place = choose_device(device)
        resolve(backend, place)  # what cannot run is refused before a scan is read
        self.model = read_model(checkpoint, dtype=_DTYPES[precision], device=place)
        self.model.backend = backend
        self.prompter = Prompter.read(checkpoint / TOKENIZER)

    def answer(self, volume: Volume | None, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the order of the questions; `volume` is None for the blind policy and only then.

        Raises:
            PhotonError: ``QUESTION_NOT_UNDERSTOOD`` when a question, or an option to be compared, has a word that is
                not in the vocabulary; ``ANSWER_NOT_FINITE``.
        """
        if not questions:
            return []
        started = time.perf_counter()
        config = self.model.config
        has_volume = volume is not None
        branches = [self.prompter.branch_ids(each.question, has_volume=has_volume) for each in questions]
        context = scan_context(volume, self.prompter, config) if volume is not None else empty_context(config)
        num_tokens = sum(num_visual_tokens(grid, config.vision) for grid in context.grids)
        present = torch.arange(int((context.input_ids == config.video_token_id).sum()))
        scan = encode_scan(self.model, context)
        keep_all = self.policy == "all_tokens"
        said: dict[int, Said] = {}
        kept: dict[int, tuple[int, ...]] = {}
        for places, reply in self._chunks(questions):
            asked = [branches[place] for place in places]
            prompted = ask(self.model, scan, asked, keep_all=keep_all, room=MAX_ANSWER_TOKENS)
            said |= zip(places, reply(prompted, [questions[place] for place in places]), strict=True)
            decision = None if keep_all else prompted.output.schedule
            for branch, place in enumerate(places):
                tokens = present if decision is None else decision.kept_tokens(branch).cpu()
                kept[place] = tuple(context.grid_tokens(tokens).tolist())
        seconds = (time.perf_counter() - started) / len(questions)
        return [
            Answer(
                question_id=question.question_id,
                text=said[place][0],
                confidence=said[place][1],
                num_tokens=num_tokens,
                kept=kept[place],
                seconds=seconds,
            )
            for place, question in enumerate(questions)
        ]

    def _chunks(
        self, questions: Sequence[Question]
    ) -> Iterator[tuple[list[int], Callable[[Prompted, Sequence[Question]], list[Said]]]]:
        """Places of questions that run at a time, and how these are answered."""
        is_compared = [
            self.closed_by == "likelihood" and question.kind == "closed" and bool(question.options)
            for question in questions
        ]
        for wanted, reply in ((False, self._generate), (True, self._compare)):
            places = [place for place, compared in enumerate(is_compared) if compared == wanted]
            for start in range(0, len(places), self.max_branches):
                yield places[start : start + self.max_branches], reply

    def _generate(self, prompted: Prompted, questions: Sequence[Question]) -> list[Said]:
        answers = decode(self.model, prompted, max_new_tokens=MAX_ANSWER_TOKENS)
        return [(self.prompter.text(answer.ids), answer.confidence) for answer in answers]

    def _compare(self, prompted: Prompted, questions: Sequence[Question]) -> list[Said]:
        options = [[self._option_ids(option) for option in question.options] for question in questions]
        said = []
        for question, sums in zip(questions, option_log_likelihoods(self.model, prompted, options), strict=True):
            best = int(sums.argmax())
            said.append((question.options[best], float(sums.softmax(0)[best])))
        return said

    def _option_ids(self, option: str) -> Tensor:
        if unknown := self.prompter.unknown_words(option):
            raise PhotonError(
                "QUESTION_NOT_UNDERSTOOD",
                f"option {option!r}",
                f"the model was trained without the words {', '.join(unknown)}.",
                "Offer options in the words of the training answers, or let the answer be generated.",
            )
        return self.prompter.answer_ids(option)
