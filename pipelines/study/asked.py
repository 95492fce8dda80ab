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
from pipelines.regions import BoolArray, organ_tokens
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
    label_map = resample_labels(source, spec, affine)
    return {question.question_id: _region(question, label_map, values) for question in questions}


def other_place(regions: Mapping[str, AskedRegion], question: Question, other: Question) -> bool:
    """Whether another question about the same scan is about another place.

    Without a label map, or for organs that it does not know, a different organ's name is taken for another place.
    """
    mine, theirs = (regions.get(each.question_id) for each in (question, other))
    if mine is None or theirs is None or not mine.labels.any() or not theirs.labels.any():
        return question.organ != other.organ
    return not bool((mine.labels & theirs.labels).any())


def _region(question: Question, label_map: np.ndarray, values: Mapping[str, int]) -> AskedRegion:
    organ = [values[name] for name in REGIONS.get(question.organ, (question.organ,)) if name in values]
    lesion = [values[name] for name in lesion_labels(question, values)]
    labels = np.zeros(256, dtype=bool)
    labels[organ] = True
    return AskedRegion(organ=_tokens(label_map, organ), lesion=_tokens(label_map, lesion), labels=labels)


def _tokens(label_map: np.ndarray, labels: Sequence[int]) -> BoolArray | None:
    mask = np.isin(label_map, labels)
    return organ_tokens(mask) if mask.any() else None


def _is_lesion(name: str) -> bool:
    return name.split()[-1] in LESION_WORDS
