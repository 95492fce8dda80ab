"""The checkpoints that a study's variants start from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch

from photon.checkpoint import read_model, replace_folder, write_model
from photon.device import choose_device
from photon.model.network import LAST_THRESHOLD_BIAS, Photon
from photon.training.pretrain import pretrain_vision
from pipelines.dataset import read_split
from pipelines.naming import NamingSource
from pipelines.start import start_from_scratch
from pipelines.study.spec import StudySpec
from pipelines.text import TOKENIZER, Prompter

OnStep = Callable[[int, float], None]


def write_vision_start(
    spec: StudySpec, data: Path, folder: Path, *, seed: int, device: str = "cpu", on_step: OnStep | None = None
) -> Path:
    """A model from the seed whose vision tower has learnt to name the structures of the training label maps.

    Without label maps, or with no steps, it is the model from the seed. Nothing is resumed: an interrupted start is
    made anew.

    Args:
        data: folder with ``volumes/``, ``questions.jsonl`` and perhaps ``raw/labels/``.
        folder: of the checkpoint, written as a whole.
        on_step: gets the step and its loss.

    Raises:
        PhotonError: ``SPLIT_EMPTY``, ``CONFIG_INVALID``, and what reading the data raises.
    """
    scans = read_split(data, "train")
    texts = [text for scan in scans for question in scan.questions for text in (question.question, question.answer)]
    start = start_from_scratch(texts, spec.model).with_pruning(spec.pruning)
    model, _ = start.build_model(seed, choose_device(device))
    labels = data / "raw" / "labels"
    if spec.lengths.naming and labels.is_dir():
        source = NamingSource(scans, labels, start.config, scans_per_step=spec.naming_scans_per_step, seed=seed)
        pretrain_vision(
            model.visual,
            lambda step: source.batch(step, spec.draw.max_shift),
            spec.naming,
            frequencies=source.frequencies(),
            on_step=on_step or (lambda _step, _loss: None),
        )
    _write(model, start.prompter, folder)
    return folder


def write_with_threshold_bias(start: Path, folder: Path, bias: float) -> Path:
    """A copy of a checkpoint whose threshold network begins at another bias, as its configuration will say too.

    Before pruning begins the network has learnt nothing, so this is the same as having started with that bias.
    """
    model = read_model(start)
    model.config = dataclasses.replace(
        model.config, pruning=dataclasses.replace(model.config.pruning, threshold_bias_init=bias)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(LAST_THRESHOLD_BIAS):
                parameter.fill_(bias)
    _write(model, Prompter.read(start / TOKENIZER), folder)
    return folder


def _write(model: Photon, prompter: Prompter, folder: Path) -> None:
    def build(temporary: Path) -> None:
        write_model(model, temporary)
        prompter.write(temporary / TOKENIZER)

    replace_folder(folder, build)
