"""Golden folders: a checkpoint and what another implementation computes with it.

tests/golden/README.md describes the layout. This module takes a cases file apart and refuses one that cannot be run.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from photon.checkpoint import load_tensors
from photon.config import PhotonConfig
from photon.errors import PhotonError
from photon.model.packing import Branch, Context, PackedBatch, pack_batch, split_prompt
from photon.model.pruning import Mode
from photon.training.stages import Stage

INPUTS = ("input_ids", "labels", "pixel_values", "grid_thw")
MASKS = ("vision_mask", "question_mask")
SECONDS_PER_GRID = "second_per_grid_ts"
OPERATORS = {"sgp": "paper", "sgp_strict": "taylor"}
"""Prefix of the packing operator's cases, and the sign convention they were made with."""
OPERATOR_INPUTS = ("x", "p", "presence", "vision_mask", "grad_out")
BAND_DELTA, BAND_LOSS = "band.delta", "band.loss"
Tensors = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenMode:
    """How a mode of the golden numbers runs here.

    Attributes:
        forward: what happens to visual tokens.
        stage: which training loss; None where nothing is trained.
        rule: sign convention of the surrogate gradient.
        absent: losses that the mode does not have; they are NaN in the file.
    """

    forward: Mode
    stage: Stage | None
    rule: str = "paper"
    absent: tuple[str, ...] = ()


MODES = {
    "eval": GoldenMode(forward="hard", stage=None, absent=("band_loss",)),
    "warmup": GoldenMode(forward="full", stage="warm-up", absent=("band_loss",)),
    "soft": GoldenMode(forward="soft", stage="soft"),
    "hard": GoldenMode(forward="hard", stage="hard"),
    "hard_strict": GoldenMode(forward="hard", stage="hard", rule="taylor"),
    "robust": GoldenMode(forward="hard", stage="hard", absent=("mllm_loss", "band_loss")),
    "flip": GoldenMode(forward="hard", stage="hard", absent=("mllm_loss", "band_loss")),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenSample:
    """One prompt.

    Attributes:
        name: its name in the file.
        inputs: :data:`INPUTS`, and of :data:`MASKS` and :data:`SECONDS_PER_GRID` what the file has.
        outputs: golden tensors by name, for each mode of :data:`MODES` that the file has.
    """

    name: str
    inputs: dict[str, Tensor]
    outputs: dict[str, dict[str, Tensor]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GoldenCases:
    """A cases file taken apart.

    Attributes:
        samples: in order of their names.
        operators: tensors of each of :data:`OPERATORS` that the file has.
        band: tensors of the keep band under their whole names.
        unknown: (sample or "", rest of the name) of tensors that belong to none of these.
    """

    samples: list[GoldenSample]
    operators: dict[str, dict[str, Tensor]]
    band: dict[str, Tensor]
    unknown: list[tuple[str, str]]


def read_cases(path: Path) -> GoldenCases:
    """Read a cases file.

    Raises:
        PhotonError: ``CASES_INVALID`` when it is missing, damaged, of another layout, or when a sample or an operator
            lacks inputs or has nothing to compare.
    """
    if not path.is_file():
        raise invalid_cases(path, "the file does not exist.")
    try:
        tensors = load_tensors(path)
    except PhotonError as error:
        raise invalid_cases(path, error.fact) from error
    names = [name.removesuffix(".input_ids") for name in sorted(tensors) if name.endswith(".input_ids")]
    samples = {name: GoldenSample(name=name, inputs={}, outputs=defaultdict(dict)) for name in names}
    cases = GoldenCases(samples=list(samples.values()), operators=defaultdict(dict), band={}, unknown=[])
    for name in sorted(tensors):
        # Of the samples "a" and "a.b", "a.b.eval.u" belongs to the second.
        owner = max((sample for sample in names if name.startswith(f"{sample}.")), key=len, default="")
        first, _, rest = name.partition(".")
        if owner:
            _place(samples[owner], cases, name.removeprefix(f"{owner}."), tensors[name])
        elif first in OPERATORS:
            cases.operators[first][rest] = tensors[name]
        elif name.startswith((BAND_DELTA, BAND_LOSS)):
            cases.band[name] = tensors[name]
        else:
            cases.unknown.append(("", name))
    if not (samples or cases.operators or cases.band):
        raise invalid_cases(path, "it holds no sample: no tensor is called <sample>.input_ids.")
    for label, given, needed in (
        *((f"sample {sample.name}", sample.inputs, INPUTS) for sample in cases.samples),
        *((f"operator {name}", given, OPERATOR_INPUTS) for name, given in cases.operators.items()),
    ):
        if missing := [name for name in needed if name not in given]:
            raise invalid_cases(path, f"the {label} has no {', '.join(missing)}.")
    for sample in cases.samples:
        if not sample.outputs:
            raise invalid_cases(path, f"the sample {sample.name} has no output of a mode ({', '.join(MODES)}).")
    for name, given in cases.operators.items():
        if not given.keys() - set(OPERATOR_INPUTS):
            raise invalid_cases(path, f"the operator {name} has no output.")
    return cases


def _place(sample: GoldenSample, cases: GoldenCases, quantity: str, tensor: Tensor) -> None:
    mode, _, output = quantity.partition(".")
    if quantity in (*INPUTS, *MASKS, SECONDS_PER_GRID):
        sample.inputs[quantity] = tensor
    elif mode in MODES:
        sample.outputs[mode][output] = tensor
    else:
        cases.unknown.append((sample.name, quantity))


def invalid_cases(path: Path, fact: str) -> PhotonError:
    """The error for a cases file that cannot be run."""
    remedy = "Give the cases.safetensors made with this checkpoint; tests/golden/README.md describes its layout."
    return PhotonError("CASES_INVALID", path, fact, remedy)


def seconds_per_grid(sample: GoldenSample, default: float, path: Path) -> float:
    """What a sample says about the seconds between its depth slabs, else ``default``.

    Raises:
        PhotonError: ``CASES_INVALID`` when its volumes do not share one number, or it is negative or not finite.
    """
    own = sample.inputs.get(SECONDS_PER_GRID)
    if own is None:
        return default
    values = {float(value) for value in own.flatten()}
    if len(values) != 1 or not all(math.isfinite(value) and value >= 0 for value in values):
        raise invalid_cases(path, f"{SECONDS_PER_GRID} of the sample {sample.name} is not one number from 0.")
    return values.pop()


def batch_of(sample: GoldenSample, config: PhotonConfig, path: Path) -> PackedBatch:
    """A sample as a batch of one context and one branch, patches in float32.

    Raises:
        PhotonError: ``CASES_INVALID`` when its tensors do not fit the configuration or each other,
            ``PROMPT_INVALID``.
    """
    ids, labels = (sample.inputs[name].flatten().long() for name in ("input_ids", "labels"))
    sizes = sample.inputs["grid_thw"]
    if sizes.ndim != 2 or sizes.shape[1] != 3 or sizes.is_floating_point() or bool((sizes < 1).any()):
        fact = f"grid_thw of the sample {sample.name} is no [volumes, 3] of positive whole numbers."
        raise invalid_cases(path, fact)
    grids = tuple((int(gz), int(gy), int(gx)) for gz, gy, gx in sizes)
    patches = sample.inputs["pixel_values"].float()
    if ids.numel() == 0 or ids.shape != labels.shape or not bool(((ids >= 0) & (ids < config.vocab_size)).all()):
        raise invalid_cases(path, f"the token ids of the sample {sample.name} fit neither vocabulary nor labels.")
    expected = (sum(gz * gy * gx for gz, gy, gx in grids), config.vision.patch_voxels)
    if tuple(patches.shape) != expected:
        raise invalid_cases(path, f"the sample {sample.name} has patches {tuple(patches.shape)}, not {expected}.")
    length = split_prompt(ids, config)
    return pack_batch([Context(ids[:length], patches, grids)], [Branch(0, ids[length:], labels[length:])], config)
