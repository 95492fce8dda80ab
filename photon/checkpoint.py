"""Weights on disk: safetensors and JSON in one folder, written atomically, never pickled."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from photon.config import PhotonConfig
from photon.errors import PhotonError
from photon.model.network import Photon

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
_REMEDY = "Point to a checkpoint folder that `photon train` wrote, or train again."


def replace_folder(target: Path, build: Any) -> None:
    """Write a folder as a whole: ``build(folder)`` fills a temporary sibling, which then takes ``target``'s place.

    At every moment ``target`` is the old folder, the new one, or (between two renames) absent with the old one
    beside it as ``<name>.old``; :func:`settle_folder` ends that last state.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        build(temporary)
        for path in temporary.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        temporary.chmod(0o755)
        old = target.with_name(target.name + ".old")
        settle_folder(target)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def settle_folder(target: Path) -> None:
    """Undo or finish a replacement that was interrupted between its two renames."""
    old = target.with_name(target.name + ".old")
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def save_tensors(tensors: Mapping[str, Tensor], target: Path) -> None:
    """Write named tensors as one safetensors file."""
    save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, target)


def load_tensors(source: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        PhotonError: ``CHECKPOINT_MISSING`` or ``CHECKPOINT_CORRUPT``.
    """
    if not source.is_file():
        raise PhotonError("CHECKPOINT_MISSING", source, "the file does not exist.", _REMEDY)
    try:
        with safe_open(source, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise PhotonError(
            "CHECKPOINT_CORRUPT", source, f"it is not a whole safetensors file ({error}).", _REMEDY
        ) from error


def write_model(model: Photon, folder: Path) -> None:
    """Write weights and configuration into an existing folder."""
    save_tensors(dict(model.named_parameters()), folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(model.config.to_hf(), indent=1, sort_keys=True) + "\n")


def read_config(folder: Path) -> PhotonConfig:
    """Read a checkpoint folder's configuration.

    Raises:
        PhotonError: ``CHECKPOINT_MISSING``, ``CONFIG_INVALID``.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise PhotonError("CHECKPOINT_MISSING", path, "there is no configuration.", _REMEDY)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PhotonError("CONFIG_INVALID", path, f"it is not JSON ({error}).", _REMEDY) from error
    return PhotonConfig.from_hf(content)


def read_model(folder: Path) -> Photon:
    """Read a model that :func:`write_model` wrote.

    Raises:
        PhotonError: ``CHECKPOINT_MISSING``, ``CHECKPOINT_CORRUPT``, ``CONFIG_INVALID``, or
            ``CHECKPOINT_MISMATCH`` listing the tensors that do not belong to the configuration.
    """
    model = Photon(read_config(folder))
    load_weights(model, load_tensors(folder / WEIGHTS), folder)
    return model.eval()


def load_weights(model: Photon, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy named tensors into a model.

    Raises:
        PhotonError: ``CHECKPOINT_MISMATCH`` listing missing, extra and misshapen tensors.
    """
    expected = dict(model.named_parameters())
    problems = [f"missing {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"extra {name}" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}"
        for name, parameter in sorted(expected.items())
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if problems:
        shown = "; ".join(problems[:12]) + (f"; and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise PhotonError(
            "CHECKPOINT_MISMATCH",
            source,
            f"the weights are of another configuration ({shown}).",
            "Use the config.json that belongs to these weights.",
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])
