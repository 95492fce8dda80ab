"""The resumable state of a training as a folder: weights, the optimiser's moments, and how far the run is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from photon.checkpoint import read_config, replace_folder, save_tensors, write_model
from photon.config import PhotonConfig
from photon.errors import PhotonError
from photon.model.network import Photon

OPTIMISER = "optimiser.safetensors"
PROGRESS = "progress.json"


def write_state(
    folder: Path,
    model: Photon,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    progress: Mapping[str, Any],
) -> None:
    """Write a state, atomically as one folder.

    Args:
        weights, moments: whole tensors by name.
        progress: ``run_digest``, ``num_steps_done`` and what else is JSON.
    """

    def build(temporary: Path) -> None:
        write_model(model, temporary, weights=weights)
        save_tensors(moments, temporary / OPTIMISER)
        (temporary / PROGRESS).write_text(json.dumps(progress))

    replace_folder(folder, build)


def read_progress(folder: Path, run_digest: str, config: PhotonConfig) -> dict[str, Any] | None:
    """How far the run was that left a state; None when there is none.

    Raises:
        PhotonError: ``CHECKPOINT_MISMATCH`` when it belongs to another run, ``CHECKPOINT_CORRUPT``.
    """
    path = folder / PROGRESS
    if not path.is_file():
        return None
    with refusing_damage(path):
        progress: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, progress["num_steps_done"] = str(progress["run_digest"]), int(progress["num_steps_done"])
    if found != run_digest or read_config(folder) != config:
        raise PhotonError(
            "CHECKPOINT_MISMATCH",
            folder,
            "it was saved by a run with other settings or other data.",
            "Choose another output folder, or remove this one to start anew.",
        )
    return progress


@contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """Around the reading of a progress: what it lacks is told as damage.

    Raises:
        PhotonError: ``CHECKPOINT_CORRUPT``.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        fact = f"it does not tell how far the run was ({type(error).__name__}: {error})."
        remedy = "Remove this folder to start the run anew."
        raise PhotonError("CHECKPOINT_CORRUPT", path, fact, remedy) from error
