"""Where a training starts: from nothing, or from a checkpoint and its tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from photon.checkpoint import CONFIG, read_pretrained, read_pretrained_config
from photon.config import PhotonConfig, PruningConfig, VisionConfig, tiny
from photon.errors import PhotonError
from photon.model.network import Photon
from photon.weights import INDEX, Inventory
from pipelines.files import file_digest
from pipelines.text import PROMPT, TOKENIZER, Prompter, build_tokenizer

_NUM_SHOWN = 12
_Config = TypeVar("_Config", PhotonConfig, VisionConfig, PruningConfig)


@dataclass(frozen=True, kw_only=True)
class Start:
    """What the first step of a training finds.

    Attributes:
        prompter, config: of the model.
        folder: the checkpoint; None from scratch.
        digest: twelve hex digits that name the checkpoint's content; "" from scratch.
    """

    prompter: Prompter
    config: PhotonConfig
    folder: Path | None = None
    digest: str = ""

    def build_model(self, seed: int, device: torch.device | str = "cpu") -> tuple[Photon, tuple[str, ...]]:
        """The float32 model on ``device``, and the parameters of it that a checkpoint did not have.

        Raises:
            PhotonError: whatever reading the checkpoint raises.
        """
        if self.folder is None:
            with torch.device(device):
                model = Photon(self.config)
            return model.initialise(seed), ()
        return read_pretrained(self.folder, seed=seed, device=device, config=self.config)

    def with_pruning(self, changes: Mapping[str, Any]) -> Start:
        """The start with other settings of the pruning.

        Raises:
            PhotonError: ``CONFIG_INVALID`` for a setting that does not exist or that does not fit.
        """
        if not changes:
            return self
        pruning = _changed(self.config.pruning, changes)
        return dataclasses.replace(self, config=dataclasses.replace(self.config, pruning=pruning))


def start_from_scratch(texts: Sequence[str], model: Mapping[str, Any] | None = None) -> Start:
    """The tiny model over the words of the training texts.

    Args:
        model: fields of :class:`photon.config.PhotonConfig` that are to be other than those of
            :func:`photon.config.tiny`, and under ``vision`` such of its vision tower. What follows from the width and
            is not given follows it: the tower's output width and the rotary sections.

    Raises:
        PhotonError: ``CONFIG_INVALID`` for a setting that does not exist or numbers that do not fit together.
    """
    prompter = Prompter(build_tokenizer(texts))
    config = tiny(prompter.vocab_size, special_ids=prompter.special_ids)
    return Start(prompter=prompter, config=_resized(config, model) if model else config)


def _resized(config: PhotonConfig, model: Mapping[str, Any]) -> PhotonConfig:
    changes = dict(model)
    width = changes.get("hidden_size", config.hidden_size)
    heads = changes.get("num_attention_heads", config.num_attention_heads)
    vision = {"out_hidden_size": width, **changes.pop("vision", {})}
    if isinstance(width, int) and isinstance(heads, int) and heads > 0:
        half = width // heads // 2
        depth, height = (part * half * 2 // config.head_dim for part in config.mrope_section[:2])
        changes.setdefault("mrope_section", (depth, height, half - depth - height))
    return _changed(config, {**changes, "vision": _changed(config.vision, vision)})


def _changed(config: _Config, changes: Mapping[str, Any]) -> _Config:
    known = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(set(changes) - known):
        fact = f"there is no setting {', '.join(unknown)}."
        raise PhotonError("CONFIG_INVALID", type(config).__name__, fact, f"Choose among: {', '.join(sorted(known))}.")
    # JSON and the command line have lists where a configuration has tuples.
    fitted: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in changes.items()
    }
    return dataclasses.replace(config, **fitted)


def start_from_checkpoint(folder: Path, texts: Sequence[str]) -> Start:
    """A Photon checkpoint or a plain Qwen2.5-VL, with the tokenizer beside it.

    Args:
        folder: config.json, weights, tokenizer.json and perhaps prompt.json.
        texts: training texts; a closed vocabulary has to know their words.

    Raises:
        PhotonError: ``CHECKPOINT_MISSING``, ``CHECKPOINT_CORRUPT``, ``CONFIG_INVALID``, ``TOKENIZER_UNREADABLE``;
            ``CHECKPOINT_MISMATCH`` when the tokenizer is of another model; ``QUESTION_NOT_UNDERSTOOD``.
    """
    config = read_pretrained_config(folder)
    prompter = Prompter.read(folder / TOKENIZER)
    expected = {
        "vision_start": config.vision_start_token_id,
        "vision_end": config.vision_end_token_id,
        "video": config.video_token_id,
        "eos": config.eos_token_id,
    }
    if prompter.special_ids != expected or prompter.vocab_size > config.vocab_size:
        fact = f"its {prompter.vocab_size} ids, special {prompter.special_ids}, are not those of {CONFIG}."
        raise PhotonError("CHECKPOINT_MISMATCH", folder / TOKENIZER, fact, "Use the tokenizer of this checkpoint.")
    if missing := sorted({word for text in texts for word in prompter.unknown_words(text)}):
        shown = ", ".join(missing[:_NUM_SHOWN]) + (", ..." if len(missing) > _NUM_SHOWN else "")
        fact = f"the vocabulary of {folder} lacks {len(missing)} words of them: {shown}."
        remedy = "Train from scratch, or start from a checkpoint that knows them."
        raise PhotonError("QUESTION_NOT_UNDERSTOOD", "training texts", fact, remedy)
    return Start(prompter=prompter, config=config, folder=folder, digest=_content_digest(folder))


def _content_digest(folder: Path) -> str:
    """Twelve hex digits of every byte that decides the start: configuration, weights, tokenizer, prompt."""
    weights = {stored.path for stored in Inventory(folder).tensors.values()}
    others = {folder / name for name in (CONFIG, INDEX, TOKENIZER, PROMPT)}
    lines = [f"{path.name} {file_digest(path)}\n" for path in sorted(weights | others) if path.is_file()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:12]
