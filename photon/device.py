"""Where a model runs: the CPU or a CUDA GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from photon.errors import PhotonError

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str) -> torch.device:
    """The device of a setting: "cpu", "cuda", or "auto" for a GPU where there is one.

    Raises:
        PhotonError: ``DEVICE_UNKNOWN`` for another name, ``GPU_UNAVAILABLE`` when a GPU is asked for and PyTorch sees
            none.
    """
    if name not in DEVICES:
        raise PhotonError("DEVICE_UNKNOWN", name, f"it is not one of {DEVICES}.", "Choose one of them.")
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        fact = f"PyTorch {torch.__version__}, built for {build}, sees no GPU."
        remedy = "Use auto or cpu, or install a driver and a PyTorch for CUDA."
        raise PhotonError("GPU_UNAVAILABLE", name, fact, remedy)
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


@contextlib.contextmanager
def sums_in_order(device: torch.device) -> Iterator[None]:
    """On the CPU, add up rows of one index in a fixed order. With several threads PyTorch otherwise adds as they come,
    and the same training from the same seed ends in other weights. GPUs are left as they are set."""
    if device.type != "cpu" or torch.are_deterministic_algorithms_enabled():
        yield
        return
    settings: Any = torch.utils.deterministic
    was_filling = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # for debugging, and takes time
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        settings.fill_uninitialized_memory = was_filling


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``, without waiting for what a GPU still has to do."""
    if device.type != "cuda":
        return x.to(device)
    # A plain copy waits for the GPU; one from memory that stays in place does not.
    return x.pin_memory().to(device, non_blocking=True)


def column(values: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Numbers of the host on ``device``, without waiting for it: [n]."""
    return to_device(torch.tensor(values, dtype=dtype), device)
