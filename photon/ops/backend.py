"""Which implementation of the pruning operators runs."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from typing import Literal, get_args

import torch

from photon.errors import PhotonError

Backend = Literal["auto", "reference", "triton"]
Implementation = Literal["reference", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)
OLDEST_CAPABILITY = (8, 0)
"""Compute capability of the oldest GPUs that the kernels are built for."""


def resolve(backend: str, device: torch.device) -> Implementation:
    """The implementation for tensors on a device: "auto" takes the kernels on a CUDA GPU that can run them.

    Raises:
        PhotonError: ``BACKEND_UNKNOWN`` for another name, ``BACKEND_UNAVAILABLE`` when the kernels are asked for and
            cannot run; nothing else is taken in their place.
    """
    if backend not in BACKENDS:
        raise PhotonError("BACKEND_UNKNOWN", str(backend), f"it is not one of {BACKENDS}.", "Choose one of them.")
    if backend == "reference" or (backend == "auto" and device.type != "cuda"):
        return "reference"
    obstacle = _obstacle(device)
    if obstacle is None:
        return "triton"
    if backend == "triton":
        remedy = "Use a GPU and a PyTorch with Triton, or the backend auto or reference."
        raise PhotonError("BACKEND_UNAVAILABLE", "triton", obstacle, remedy)
    return "reference"


@torch.compiler.assume_constant_result  # torch.compile asks, and does not trace how it is found out
def _obstacle(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device; None when they can."""
    if not _is_installed():
        return "Triton is not installed."
    if device.type != "cuda":
        where = f"the tensors are on the device {device.type}"
        return None if is_interpreted() else f"{where}, and Triton's interpreter (TRITON_INTERPRET=1) is off."
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU."
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return f"{torch.cuda.get_device_name(device)} is older than compute capability {OLDEST_CAPABILITY}."
    return None if _has_compiler() else "there is no C compiler, with which Triton builds its launchers."


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _has_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if name)


def is_interpreted() -> bool:
    """Whether Triton's interpreter is on: kernels then run as Python on CPU tensors, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
