"""What a question asks about, in visual tokens: its organ, its lesion, and which questions are about other places."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelines.anatomy import LABELS
from pipelines.files import read_json
from pipelines.measurements import REGIONS
from pipelines.questions import Question
from pipelines.regions import TOKEN_BOX, BoolArray, token_grid
from pipelines.resample import VolumeSpec
from pipelines.volumes import resample_labels

LESION_WORDS = ("cyst", "tumor", "tumour", "nodule", "effusion", "lesion", "mass")
_ANY_LESION = ("lesion", "finding")


@dataclass(frozen=True, kw_only=True)
class AskedRegion:
    """The tokens that one question asks about.

    Attributes:
        organ: bool [N] tokens that hold the organ; None where the scan shows none, or its place is not known.
        lesion: bool [N] tokens that hold the lesion, likewise.
        labels: bool [256] label values that the organ is made of; two questions without a common one are about
            different places.
    """

    organ: BoolArray | None
    lesion: BoolArray | None
    labels: BoolArray


def lesion_labels(question: Question, values: Mapping[str, int]) -> tuple[str, ...]:
    """Names of the labels of the lesion that a question asks about, empty when it asks about none.

    A subtype "<label> existence" names its label. Otherwise those of the organ's own lesions count whose kind the
    subtype names ("nodule side"), or all of them where it says lesion or finding.
    """
    named = question.subtype.removesuffix(" existence")
    if named in values and _is_lesion(named):
        return (named,)
    words = {word.removesuffix("s") for word in re.findall(r"[a-z]+", question.subtype.lower())}
    return tuple(
        name
        for name in REGIONS.get(question.organ, ())
        if name in values and _is_lesion(name) and (name.split()[-1] in words or words & set(_ANY_LESION))
    )


def read_asked_regions(
    data: Path, scan_id: str, spec: VolumeSpec, affine: np.ndarray, questions: Sequence[Question]
) -> dict[str, AskedRegion]:
    """The region of every question about one scan, by question id; empty when the scan has no label map.

    Args:
        data: folder with ``raw/labels/<scan_id>.nii`` and perhaps ``raw/labels.json``.
        spec, affine: of the scan's preprocessed volume.

    Raises:
        PhotonError: what reading a label map raises; ``LABELS_INVALID`` when ``labels.json`` is damaged.
    """
    source = data / "raw" / "labels" / f"{scan_id}.nii"
    if not source.exists():
        return {}
    names = data / "raw" / "labels.json"
    values = read_json(names, "LABELS_INVALID", "Write it again, or take it away.") if names.exists() else LABELS
    held = tokens_by_label(resample_labels(source, spec, affine))
    return {question.question_id: _region(question, held, values) for question in questions}


def tokens_by_label(label_map: np.ndarray) -> BoolArray:
    """Which visual tokens hold at least one voxel of each label value: bool [256, N].

    Args:
        label_map: uint8 [Z, Y, X], a whole number of token boxes along each axis.
    """
    gz, gy, gx = token_grid(label_map.shape)
    dz, dy, dx = TOKEN_BOX
    boxes = label_map.reshape(gz, dz, gy, dy, gx, dx).transpose(0, 2, 4, 1, 3, 5).reshape(gz * gy * gx, -1)
    pairs = boxes.astype(np.int64) * len(boxes) + np.arange(len(boxes))[:, None]
    held: BoolArray = np.bincount(pairs.ravel(), minlength=256 * len(boxes)).reshape(256, -1) > 0
    return held


def _region(question: Question, held: BoolArray, values: Mapping[str, int]) -> AskedRegion:
    organ = [values[name] for name in REGIONS.get(question.organ, (question.organ,)) if name in values]
    lesion = [values[name] for name in lesion_labels(question, values)]
    labels = np.zeros(256, dtype=bool)
    labels[organ] = True
    return AskedRegion(organ=_any(held[organ]), lesion=_any(held[lesion]), labels=labels)


def _any(held: BoolArray) -> BoolArray | None:
    """Tokens [N] that hold any of the labels [L, N]; None when none does."""
    tokens = np.logical_or.reduce(held, axis=0)
    return tokens if tokens.any() else None


def _is_lesion(name: str) -> bool:
    return name.split()[-1] in LESION_WORDS
