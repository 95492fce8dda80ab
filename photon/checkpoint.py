"""Models on disk: safetensors and JSON in one folder, written atomically, never pickled."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from photon.config import PhotonConfig
from photon.errors import PhotonError
from photon.model.network import PATCH_EMBEDDING, Photon
from photon.weights import (
    HEAD,
    INDEX,
    WEIGHTS,
    Inventory,
    index_of,
    open_tensors,
    plan_shards,
)

CONFIG = "config.json"
MAX_SHARD_BYTES = 5 * 10**9
QWEN_PATCH_EMBEDDING = "visual.patch_embed.proj.weight"
"""Patch embedding of a plain Qwen2.5-VL: for pictures of three colours."""
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


def remove_leftovers(target: Path) -> None:
    """Remove what killed writers of ``target`` left beside it; only for those who know that nobody writes it now."""
    for path in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def save_tensors(tensors: Mapping[str, Tensor], target: Path) -> None:
    """Write named tensors as one safetensors file."""
    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(on_cpu, target, metadata={"format": "pt"})


def load_tensors(source: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        PhotonError: ``CHECKPOINT_MISSING`` or ``CHECKPOINT_CORRUPT``.
    """
    with open_tensors(source) as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 - not a mapping


def write_model(
    model: Photon,
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights and configuration into an existing folder, in place of the weights that are there.

    The weights become one file, or shards of at most ``max_shard_bytes`` with an index when that is not enough. One
    file's worth of tensors is on the CPU at a time. To replace a folder as a whole, see :func:`replace_folder`.

    Args:
        weights: the whole parameters by name, where the model has only parts of them.
    """
    for stale in (folder / INDEX, folder / WEIGHTS, *folder.glob("model-?????-of-?????.safetensors")):
        stale.unlink(missing_ok=True)
    parameters = dict(model.named_parameters()) if weights is None else weights
    sizes = {name: parameter.numel() * parameter.element_size() for name, parameter in parameters.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    for file, names in shards.items():
        save_tensors({name: parameters[name] for name in names}, folder / file)
    if WEIGHTS not in shards:
        (folder / INDEX).write_text(index_of(shards, sizes))
    (folder / CONFIG).write_text(json.dumps(model.config.to_hf(), indent=1, sort_keys=True) + "\n")


def read_config(folder: Path) -> PhotonConfig:
    """Read a checkpoint folder's configuration.

    Raises:
        PhotonError: ``CHECKPOINT_MISSING``, ``CONFIG_INVALID``.
    """
    return PhotonConfig.from_hf(_read_config_content(folder))


def read_pretrained_config(folder: Path) -> PhotonConfig:
    """Read the configuration of a folder for :func:`read_pretrained`; of a plain Qwen2.5-VL as Photon's.

    Raises:
        PhotonError: ``CHECKPOINT_MISSING``, ``CONFIG_INVALID``.
    """
    return PhotonConfig.from_qwen(_read_config_content(folder))


def read_model(folder: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Photon:
    """Read a model from a folder in the form that :func:`write_model` leaves, or with the newer names of Qwen2.5-VL.

    Every tensor goes by itself from its file to its type and place, so there is never a second copy of the model.
    Nothing is loaded before all headers are checked.

    Args:
        dtype, device: of every parameter, whatever the files hold.

    Raises:
        PhotonError: ``CONFIG_INVALID``; or, listing all that is wrong, ``CHECKPOINT_MISSING`` (files),
            ``CHECKPOINT_CORRUPT`` (damaged files, an index that they contradict) or ``CHECKPOINT_MISMATCH``
            (missing, extra and misshapen tensors).
    """
    model = _empty_model(read_config(folder))
    _fill(model, _checked(model, folder), dtype, device)
    return model.eval()


def read_pretrained(
    folder: Path,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config: PhotonConfig | None = None,
) -> tuple[Photon, tuple[str, ...]]:
    """Read a model to train further: a Photon checkpoint, or a plain Qwen2.5-VL, which lacks some of its parameters.

    The patch embedding and the pruning parameters, where the folder has none, start as
    :meth:`Photon.initialise` defines them; a patch embedding for pictures is ignored. The log names both.

    Args:
        config: of the model, where it is to be another than the folder's (:func:`read_pretrained_config`).

    Returns:
        The model, and the names of the parameters that were initialised.

    Raises:
        PhotonError: as :func:`read_model`.
    """
    model = _empty_model(config or read_pretrained_config(folder))
    inventory = Inventory(folder)
    pruning = [name for name, _ in model.named_parameters() if ".atp." in name]
    # A part of the threshold network is not completed: its other part would belong to other numbers.
    fresh = [
        name
        for group in ([PATCH_EMBEDDING], pruning)
        for name in group
        if not any(member in inventory.tensors or member in inventory.lost for member in group)
    ]
    shapes = {name: shape for name, shape in _shapes(model).items() if name not in fresh}
    inventory.expect(shapes, optional={QWEN_PATCH_EMBEDDING, *_tied_names(model.config)})
    inventory.problems.refuse(folder)
    _fill(model, inventory, dtype, device, fresh=fresh)
    model.initialise(seed, fresh)
    log = logging.getLogger("photon")
    log.info("Initialised from seed %d: %s.", seed, ", ".join(fresh) or "nothing")
    log.info("Ignored in the checkpoint: %s.", ", ".join(sorted(inventory.tensors.keys() - shapes.keys())) or "nothing")
    return model.eval(), tuple(fresh)


def restore_weights(model: Photon, folder: Path) -> None:
    """Copy a checkpoint's weights into the parameters that a model has, keeping their types and places.

    Raises:
        PhotonError: as :func:`read_model`; the model is then unchanged.
    """
    inventory = _checked(model, folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(inventory.tensors[name].read())


def _read_config_content(folder: Path) -> Any:
    path = folder / CONFIG
    if not path.is_file():
        raise PhotonError("CHECKPOINT_MISSING", path, "there is no configuration.", _REMEDY)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PhotonError("CONFIG_INVALID", path, f"it is not JSON ({error}).", _REMEDY) from error


def _empty_model(config: PhotonConfig) -> Photon:
    """A model without memory behind its parameters. It has no buffers, so parameters are all that is to be filled."""
    with torch.device("meta"):
        return Photon(config)


def _shapes(model: Photon) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _tied_names(config: PhotonConfig) -> set[str]:
    return {HEAD} if config.tie_word_embeddings else set()


def _checked(model: Photon, folder: Path) -> Inventory:
    """What a folder holds, all of which and nothing else belongs to the model."""
    inventory = Inventory(folder)
    inventory.expect(_shapes(model), optional=_tied_names(model.config))
    inventory.problems.refuse(folder)
    return inventory


def _fill(
    model: Photon, inventory: Inventory, dtype: torch.dtype, device: torch.device | str, *, fresh: Collection[str] = ()
) -> None:
    """Give every parameter its stored tensor; those of ``fresh`` get memory with anything in it."""
    for name, parameter in list(model.named_parameters()):
        if name in fresh:
            tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
        else:
            tensor = inventory.tensors[name].read().to(device, dtype, copy=True)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))
