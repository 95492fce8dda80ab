"""What the parts of a study leave behind: one record a start and one a variant and seed."""

from __future__ import annotations

import dataclasses

from pipelines.results import Record


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionsRecord(Record):
    """What the questions that are answered in the end ask about."""

    table: str
    num_questions: int
    num_with_organ: int
    num_with_lesion: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionRecord(Record):
    """A model whose vision tower was pretrained, everything else as the seed made it."""

    seed: int
    checkpoint: str
    num_steps: int
    final_loss: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmUpRecord(Record):
    """The decoder trained with all tokens, and the model of the text alone with its answers.

    `num_steps` is the length that the warm-up took, which the variants with one of their own repeat.
    """

    seed: int
    checkpoint: str
    blind_checkpoint: str
    history: str
    answers: str
    num_steps: int
    validation_accuracy: float
    blind_accuracy: float
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """A variant trained from one seed and what it answered.

    `accuracy`, `num_kept` and `num_tokens` are means over the questions of the split. `questions_per_second` is of a
    step of the last training stage, batches already made; `step_seconds` is its median time. `train_peak_mib` and
    `answer_peak_mib` are the largest resident memory of the process that trained and of the one that answered, the
    scans that it holds included; `*_cuda_peak_mib` what PyTorch took on a GPU (0 without one). `encode_seconds` is the
    mean time of a scan's encoding, `answer_seconds` that of a question after it."""

    variant: str
    seed: int
    checkpoint: str
    history: str
    answers: str
    num_warm_up_steps: int
    num_steps: int
    kept_fraction: float
    step_seconds: float
    questions_per_second: float
    train_seconds: float
    train_peak_mib: float
    train_cuda_peak_mib: float
    answer_peak_mib: float
    answer_cuda_peak_mib: float
    encode_seconds: float
    answer_seconds: float
    accuracy: float
    num_kept: float
    num_tokens: float
