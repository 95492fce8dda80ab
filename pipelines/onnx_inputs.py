"""What goes into the ONNX graphs, as numpy arrays by name: the one place that lays out a scan and its questions.

Needs no PyTorch model, so scoring and the export gate feed the graphs alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from photon.config import PhotonConfig
from photon.grid import patch_coordinates, patch_rows, window_ids
from photon.model.packing import Context, context_positions, num_question_tokens

GRAPHS = ("scan", "question", "decode")

# Named axes of every input; what is not listed is fixed.
AXES: dict[str, dict[str, dict[int, str]]] = {
    "scan": {
        "patches": {0: "patches"},
        "patch_rows_columns": {0: "patches"},
        "patch_slab": {0: "patches"},
        "patch_window": {0: "patches"},
        "context_ids": {0: "context_tokens"},
        "context_positions": {1: "context_tokens"},
        "visual_rows": {0: "visual_tokens"},
    },
    "question": {
        "hidden": {0: "context_tokens"},
        "keys": {1: "context_tokens"},
        "values": {1: "context_tokens"},
        "context_positions": {1: "context_tokens"},
        "visual_rows": {0: "visual_tokens"},
        "is_text": {0: "context_tokens"},
        "branch_ids": {0: "questions", 1: "question_tokens"},
        "branch_valid": {0: "questions", 1: "question_tokens"},
        "question": {0: "questions", 1: "question_tokens"},
        "branch_positions": {0: "questions", 1: "question_tokens"},
    },
    "decode": {
        "ids": {0: "questions"},
        "positions": {0: "questions"},
        "cache_keys": {1: "questions", 2: "kept_tokens"},
        "cache_values": {1: "questions", 2: "kept_tokens"},
        "cache_mask": {0: "questions", 1: "kept_tokens"},
    },
}

OUTPUTS = {
    "scan": ("hidden", "keys", "values"),
    "question": ("logits", "kept", "cache_keys", "cache_values", "cache_mask"),
    "decode": ("logits", "next_cache_keys", "next_cache_values", "next_cache_mask"),
}

Arrays = dict[str, np.ndarray]


def scan_inputs(context: Context, config: PhotonConfig) -> Arrays:
    """Inputs of the scan graph for a context of one volume."""
    (grid,) = context.grids
    coordinates = patch_coordinates(grid, config.vision)
    windows = window_ids(coordinates, config.vision)
    if context.present is not None:
        rows = patch_rows(context.present, config.vision)
        coordinates, windows = coordinates[rows], windows[rows]
    positions, _ = context_positions(context, config)
    return {
        "patches": context.patches.numpy(),
        "patch_rows_columns": coordinates[:, 1:].numpy(),
        "patch_slab": coordinates[:, 0].contiguous().numpy(),
        "patch_window": windows.numpy(),
        "context_ids": context.input_ids.numpy(),
        "context_positions": positions.numpy(),
        "visual_rows": _visual_rows(context, config),
    }


def question_inputs(
    context: Context, branches: Sequence[torch.Tensor], config: PhotonConfig, encoded: Arrays
) -> Arrays:
    """Inputs of the question graph.

    Args:
        context: context of the scan; branches: token ids [L] of each question.
        encoded: outputs of the scan graph by name.
    """
    positions, start = context_positions(context, config)
    length = max(ids.numel() for ids in branches)
    shape = (len(branches), length)
    ids, valid, asked = np.zeros(shape, np.int64), np.zeros(shape, bool), np.zeros(shape, bool)
    for row, branch in enumerate(branches):
        ids[row, : branch.numel()] = branch.numpy()
        valid[row, : branch.numel()] = True
        asked[row, : num_question_tokens(branch, config.eos_token_id)] = True
    is_text = np.ones(context.input_ids.numel(), bool)
    is_text[_visual_rows(context, config)] = False
    return {
        "hidden": encoded["hidden"],
        "keys": encoded["keys"],
        "values": encoded["values"],
        "context_positions": positions.numpy(),
        "visual_rows": _visual_rows(context, config),
        "is_text": is_text,
        "branch_ids": ids,
        "branch_valid": valid,
        "question": asked,
        "branch_positions": np.broadcast_to(start + np.arange(length), shape).copy(),
    }


def _visual_rows(context: Context, config: PhotonConfig) -> np.ndarray:
    rows: np.ndarray = (context.input_ids == config.video_token_id).nonzero().flatten().numpy()
    return rows
