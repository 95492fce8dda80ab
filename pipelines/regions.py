"""Where the visual tokens lie: which of them hold an organ, and how many of those a question kept.

Organ masks are bool [Z, Y, X] on the grid of the preprocessed volume, tokens are boxes of 14 x 28 x 28 voxels
in the order of :func:`photon.grid.token_boxes`: z slowest, then y, then x.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from photon.errors import PhotonError
from pipelines.anatomy import LABELS
from pipelines.files import read_json
from pipelines.measurements import REGIONS, organ_mask
from pipelines.resample import VolumeSpec
from pipelines.volumes import resample_labels

TOKEN_BOX = (14, 28, 28)
"""Voxels of a visual token along z, y and x."""

Shape = tuple[int, int, int]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What became of the tokens of one organ when one question was asked."""

    num_tokens: int
    num_kept: int
    organ_tokens: int
    organ_tokens_kept: int

    @property
    def organ_share(self) -> float | None:
        """Share of the organ's tokens that were kept; None where the volume shows no such organ."""
        return self.organ_tokens_kept / self.organ_tokens if self.organ_tokens else None

    @property
    def overall_share(self) -> float | None:
        """Share of all tokens that were kept: what keeping tokens at random would give the organ."""
        return self.num_kept / self.num_tokens if self.num_tokens else None


def read_organ_masks(data: Path, scan_id: str, spec: VolumeSpec, organs: Iterable[str]) -> dict[str, BoolArray]:
    """Masks, bool [Z, Y, X] on the grid of ``spec``, of those ``organs`` that are known and that the scan
    shows.

    Args:
        data: folder with ``raw/labels/<scan_id>.nii``; without that file no organ's place is known. What its values
            mean is told by ``raw/labels.json``, name to value; without it they are those of `anatomy.LABELS`.
        scan_id: which scan.
        spec: of the preprocessed volume.
        organs: names as questions use them.

    Raises:
        PhotonError: what reading a label map raises; ``LABELS_INVALID`` when ``labels.json`` is damaged.
    """
    source = data / "raw" / "labels" / f"{scan_id}.nii"
    if not source.exists():
        return {}
    names = data / "raw" / "labels.json"
    values = read_json(names, "LABELS_INVALID", "Write it again, or take it away.") if names.exists() else LABELS
    labels = resample_labels(source, spec)
    known = sorted({organ for organ in organs if organ in REGIONS or organ in values})
    masks = {organ: organ_mask(labels, organ, values) for organ in known}
    return {organ: mask for organ, mask in masks.items() if mask.any()}


def token_grid(shape: Sequence[int]) -> Shape:
    """Tokens along z, y and x of a volume of ``shape`` voxels.

    Raises:
        PhotonError: ``GRID_INVALID`` when a side is not a whole number of token boxes.
    """
    if len(shape) != 3 or any(side == 0 or side % box for side, box in zip(shape, TOKEN_BOX, strict=True)):
        raise PhotonError(
            "GRID_INVALID",
            f"volume of {tuple(shape)} voxels",
            f"its sides are not multiples of {TOKEN_BOX}.",
            "Preprocess it with a volume specification whose shape is.",
        )
    return (shape[0] // TOKEN_BOX[0], shape[1] // TOKEN_BOX[1], shape[2] // TOKEN_BOX[2])


def organ_tokens(organ: BoolArray, min_voxels: int = 1) -> BoolArray:
    """Which visual tokens hold at least ``min_voxels`` voxels of an organ.

    Args:
        organ: bool [Z, Y, X] on the volume's grid, such as :func:`pipelines.measurements.organ_mask` gives.
        min_voxels: how many voxels count as holding it.

    Returns:
        bool [N].

    Raises:
        PhotonError: ``GRID_INVALID`` when the mask is not a whole number of token boxes.
    """
    gz, gy, gx = token_grid(organ.shape)
    boxes = organ.reshape(gz, TOKEN_BOX[0], gy, TOKEN_BOX[1], gx, TOKEN_BOX[2])
    counts: NDArray[np.int64] = boxes.sum(axis=(1, 3, 5), dtype=np.int64).ravel()
    return counts >= min_voxels


def kept_mask(kept: Sequence[int], num_tokens: int) -> BoolArray:
    """Kept visual token indices as bool [num_tokens].

    Raises:
        ValueError: an index is negative or not below ``num_tokens``.
    """
    indices = np.asarray(kept, dtype=np.int64)
    if indices.size and (indices.min() < 0 or indices.max() >= num_tokens):
        raise ValueError(f"kept token indices {indices.min()}..{indices.max()} do not fit {num_tokens} tokens")
    mask = np.zeros(num_tokens, dtype=bool)
    mask[indices] = True
    return mask


def voxel_mask(tokens: BoolArray, shape: Sequence[int]) -> BoolArray:
    """Spread a mark per token [N] over the voxels of its box: bool [Z, Y, X] of ``shape``.

    Raises:
        PhotonError: ``GRID_INVALID`` when ``shape`` is not a whole number of token boxes.
        ValueError: ``tokens`` does not have one mark a token.
    """
    boxes = np.asarray(tokens, dtype=bool).reshape(token_grid(shape))
    for axis, side in enumerate(TOKEN_BOX):
        boxes = boxes.repeat(side, axis=axis)
    return boxes


def retention(kept: Sequence[int], num_tokens: int, in_organ: BoolArray | None) -> Retention:
    """Count kept tokens inside and outside an organ.

    Args:
        kept: kept visual token indices.
        num_tokens: visual tokens before pruning.
        in_organ: bool [num_tokens] of :func:`organ_tokens`; None for a question about no organ.

    Raises:
        ValueError: the indices or the mask do not fit ``num_tokens``.
    """
    mask = kept_mask(kept, num_tokens)
    if in_organ is None:
        in_organ = np.zeros(num_tokens, dtype=bool)
    if in_organ.shape != mask.shape:
        raise ValueError(f"the organ mask has {in_organ.size} tokens, the answer {num_tokens}")
    return Retention(
        num_tokens=num_tokens,
        num_kept=int(mask.sum()),
        organ_tokens=int(in_organ.sum()),
        organ_tokens_kept=int((mask & in_organ).sum()),
    )
