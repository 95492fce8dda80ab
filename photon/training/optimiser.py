"""AdamW for the model: settings, learning rates by what a parameter belongs to, and its state by name."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from photon.errors import PhotonError
from photon.model.network import Photon
from photon.training.parallel import like

Precision = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimiserConfig:
    """AdamW, its learning rates, and the arithmetic of a step.

    Raises:
        PhotonError: ``PRECISION_UNKNOWN`` for a precision that is none.
    """

    learning_rate: float
    vision_learning_rate: float
    alignment_learning_rate: float
    """Of the patch embedding while nothing else learns."""
    weight_decay: float = 0.01
    warm_up_fraction: float = 0.05
    floor: float = 0.05
    """Share of the learning rate left at the last step."""
    max_grad_norm: float = 1.0
    precision: Precision = "float32"
    """With "bfloat16" matrices are multiplied in it; weights, scores, thresholds and losses stay float32."""

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            fact = f"it is not one of {get_args(Precision)}."
            raise PhotonError("PRECISION_UNKNOWN", self.precision, fact, "Choose one of them.")


def build_optimiser(model: Photon, config: OptimiserConfig) -> torch.optim.AdamW:
    """The optimiser of the parameters that require a gradient."""
    return torch.optim.AdamW(_parameter_groups(model, config), betas=(0.9, 0.95), eps=1e-8)


def optimiser_tensors(model: Photon, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as tensors named ``<parameter>:<key>``."""
    return {
        f"{name}:{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def load_optimiser(model: Photon, optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take up the state that :func:`optimiser_tensors` gave, whole, on any device."""
    parameters = dict(model.named_parameters())
    for label, value in tensors.items():
        name, key = label.rsplit(":", 1)
        # The step count stays on the CPU, where AdamW keeps it; the moments belong beside their parameter.
        placed = value.cpu() if key == "step" else like(value, parameters[name])
        optimiser.state[parameters[name]][key] = placed


def _parameter_groups(model: Photon, config: OptimiserConfig) -> list[dict[str, Any]]:
    groups: dict[tuple[bool, bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.endswith("pos_proj.weight") or not parameter.requires_grad:
            continue  # the first is unused by the method, kept for its name in public checkpoints
        kind = (name.startswith("visual."), "patch_embed" in name, parameter.ndim > 1)
        groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "base_lr": config.vision_learning_rate if is_vision else config.learning_rate,
            "is_patch_embedding": is_patch,
            "weight_decay": config.weight_decay if is_matrix else 0.0,
        }
        for (is_vision, is_patch, is_matrix), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
