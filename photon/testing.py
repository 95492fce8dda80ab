"""A seeded model small enough to run hundreds of times, and prompts for it: for tests and experiments.

The architecture is the real one; only the numbers are small (patches of 2x2x2 voxels, 40 token ids).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from photon.config import PhotonConfig, PruningConfig, VisionConfig
from photon.grid import Grid, num_visual_tokens, patch_rows
from photon.model.contexts import reduced
from photon.model.network import Photon
from photon.model.packing import IGNORE_INDEX, Branch, Context, pack_batch
from photon.ops.layout import Layout
from photon.training.step import TrainingBatch

NUM_WORDS = 36
"""Token ids below this one are words; the four after them are special."""


def micro_config(
    *, vision: Mapping[str, Any] | None = None, pruning: Mapping[str, Any] | None = None, **changes: Any
) -> PhotonConfig:
    """A configuration of a few ten thousand parameters: 5 decoder layers, pruning after the second.

    Args:
        vision, pruning, changes: fields of the three configurations that should be different.
    """
    defaults: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": NUM_WORDS + 4,
        "mrope_section": (1, 1, 2),
        "rope_theta": 100.0,
        "initializer_range": 0.5,
        "vision_start_token_id": NUM_WORDS,
        "vision_end_token_id": NUM_WORDS + 1,
        "video_token_id": NUM_WORDS + 2,
        "eos_token_id": NUM_WORDS + 3,
        "vision": VisionConfig(
            depth=3,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            out_hidden_size=32,
            patch_size=2,
            temporal_patch_size=2,
            window_size=8,
            fullatt_block_indexes=(1,),
            intensity_mean=0.5,
            intensity_std=0.3,
        ),
        "pruning": PruningConfig(layer=1, seconds_per_grid=1.0),
    }
    defaults["vision"] = dataclasses.replace(defaults["vision"], **(vision or {}))
    defaults["pruning"] = dataclasses.replace(defaults["pruning"], **(pruning or {}))
    return PhotonConfig(**defaults | changes)


def micro_model(config: PhotonConfig | None = None, *, seed: int = 0) -> Photon:
    """A model with every parameter drawn from ``seed``; norms and biases too, so that none is the neutral element."""
    model = Photon(config or micro_config()).initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def random_context(config: PhotonConfig, grids: Sequence[Grid], *, seed: int, air: Sequence[int] = ()) -> Context:
    """A prompt's shared part: a few words and each volume's tokens; empty without volumes.

    Args:
        air: visual tokens, counted through all volumes, whose voxels are 0. They are left out if ``config`` says so, as
            are those that its policy leaves out.
    """
    if not grids:
        return Context(torch.zeros(0, dtype=torch.long), torch.zeros(0, config.vision.patch_voxels), ())
    generator = torch.Generator().manual_seed(seed)
    parts = [_words(3, generator)]
    for grid in grids:
        count = num_visual_tokens(grid, config.vision)
        parts.append(torch.tensor([config.vision_start_token_id]))
        parts.append(torch.full((count,), config.video_token_id))
        parts.append(torch.tensor([config.vision_end_token_id]))
    num_patches = sum(gz * gy * gx for gz, gy, gx in grids)
    patches = torch.rand(num_patches, config.vision.patch_voxels, generator=generator)
    patches[patch_rows(torch.tensor(list(air), dtype=torch.long), config.vision)] = 0.0
    return reduced(Context(torch.cat(parts), patches, tuple(grids)), config)


def random_branch(
    config: PhotonConfig, context: int, *, num_question: int, num_answer: int = 0, seed: int = 0
) -> Branch:
    """A question of random words, an end of turn, two words, and an answer with its end of turn and labels.

    With ``num_answer=0`` the branch ends where the answer would begin, and has no labels.
    """
    generator = torch.Generator().manual_seed(seed)
    end = torch.tensor([config.eos_token_id])
    asked = torch.cat([_words(num_question, generator), end, _words(2, generator)])
    if not num_answer:
        return Branch(context, asked)
    answer = torch.cat([_words(num_answer, generator), end])
    return Branch(context, torch.cat([asked, answer]), torch.cat([torch.full_like(asked, IGNORE_INDEX), answer]))


def ragged_contexts(config: PhotonConfig) -> list[Context]:
    """Three contexts: 24 visual tokens in one volume; 8 and 6 in two; none."""
    return [
        random_context(config, [(2, 6, 8)], seed=0),
        random_context(config, [(2, 4, 4), (1, 4, 6)], seed=1),
        random_context(config, [], seed=2),
    ]


def ragged_branches(config: PhotonConfig) -> list[Branch]:
    """Five questions of 1 to 5 tokens about :func:`ragged_contexts`, in no order, answers of two tokens."""
    about = [(0, 3), (1, 5), (0, 2), (2, 4), (1, 1)]
    return [
        random_branch(config, context, num_question=asked, num_answer=2, seed=number)
        for number, (context, asked) in enumerate(about)
    ]


def training_batch(
    contexts: Sequence[Context],
    branches: Sequence[Branch],
    config: PhotonConfig,
    *,
    perturbed: Sequence[int] = (),
    flipped: Sequence[int] = (),
    whole: Sequence[int] = (),
) -> TrainingBatch:
    """Pack contexts and branches for training; ``perturbed``, ``flipped`` and ``whole`` name branches by number."""
    numbers = torch.arange(len(branches))
    is_bad, is_flipped, is_whole = (
        torch.isin(numbers, torch.tensor(list(chosen), dtype=torch.long)) for chosen in (perturbed, flipped, whole)
    )
    return TrainingBatch(pack_batch(contexts, branches, config), is_bad, is_flipped, is_whole)


def ragged_layouts() -> dict[str, Layout]:
    """Small batches for the pruning operators, by what is special about them."""
    return {
        "one question": Layout.build([6], [[(1, 4)]], [3], [2], [0]),
        "a single visual token": Layout.build([1], [[(0, 1)]], [1], [1], [0]),
        "no branch": Layout.build([4, 3], [[(1, 2)], [(0, 3)]], [], [], []),
        "no volume": Layout.build([3, 0], [[], []], [2, 4, 1], [1, 3, 1], [0, 1, 0]),
        "text only beside a scan": Layout.build([5, 0], [[(1, 3)], []], [2, 3], [1, 2], [0, 1]),
        "no rows of its own": Layout.build([6], [[(1, 4)]], [0, 0], [0, 0], [0, 0]),
        "empty question": Layout.build([4], [[(0, 4)]], [2, 2], [0, 2], [0, 0]),
        "a scan nobody asks about": Layout.build([4, 5], [[(1, 3)], [(2, 2)]], [2], [1], [1]),
        "two volumes of different sizes": Layout.build([12], [[(1, 3), (5, 6)]], [2, 1], [2, 1], [0, 0]),
        "branches in any order of contexts": Layout.build(
            [5, 4, 0, 9],
            [[(1, 2), (3, 1)], [], [], [(0, 7)]],
            [2, 3, 1, 4, 1, 2],
            [1, 2, 1, 2, 1, 0],
            [3, 0, 2, 1, 0, 3],
        ),
        "many questions about one scan": Layout.build([5], [[(1, 3)]], [1, 2] * 10, [1, 1] * 10, [0] * 20),
    }


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer, until they are written; only deterministic operators may run."""
    was_on = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on)


def _words(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(NUM_WORDS, (count,), generator=generator)
