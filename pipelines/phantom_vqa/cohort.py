"""Who is in PhantomVQA: patients with their findings, balanced so that no question can be answered from its text."""

from __future__ import annotations

import dataclasses

import numpy as np

from pipelines.anatomy import FINDINGS, LABELS, TRAITS

RARE_FINDINGS = ("subcutaneous nodule", "bone lesion", "mesenteric mass")
"""Findings outside the organs that everything else is about, in few patients and anywhere along the body."""

QUICKLY_LEARNT = (
    "cardiomegaly",
    "effusion side",
    "kidney comparison",
    "left effusion existence",
    "left nodule existence",
    "lung finding",
    "nodule location",
    "nodule side",
    "organs compared",
    "right effusion existence",
    "right nodule existence",
    "splenomegaly",
)
"""Subtypes of questions that the model with all tokens answers 15 points better than from the text alone in the study
of vqa-small (docs/evidence.md). At the others it stays near chance there; they would only cost a short study steps."""

VQA_LABELS = LABELS | {name: 1 + max(LABELS.values()) + index for index, name in enumerate(RARE_FINDINGS)}
"""Name -> value in the label maps of PhantomVQA."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhantomVqaSpec:
    """How many patients, how finely they are scanned, and from which seed."""

    num_train: int
    num_val: int
    num_test: int
    volumes: str
    """Preset of `VOLUME_SPECS` that the benchmark is meant to be preprocessed with."""
    in_plane_tenths_mm: tuple[int, int]
    """Range of voxel edges in plane, tenths of millimetres, its end left out."""
    slice_tenths_mm: tuple[int, int]
    """The same for the distance of slices."""
    rare_fraction: float = 0.12
    """Share of patients with each rare finding; as many without it are asked about it, and nobody else is."""
    rare_test_fraction: float = 0.5
    """The same among the test patients: recall of what training has seldom shown wants many of them."""
    size_spread: float = 0.14
    """Organs' edges vary by this much either way."""
    subtypes: tuple[str, ...] | None = None
    """Subtypes of the questions that are asked; None: all."""
    seed: int = 0


_SMALL = PhantomVqaSpec(
    num_train=400,
    num_val=32,
    num_test=200,
    volumes="vqa-small",
    in_plane_tenths_mm=(30, 38),
    slice_tenths_mm=(32, 44),
)

PHANTOM_VQA_SPECS = {
    "vqa-smoke": PhantomVqaSpec(
        num_train=8,
        num_val=4,
        num_test=6,
        volumes="vqa-small",
        in_plane_tenths_mm=(48, 56),
        slice_tenths_mm=(56, 64),
        rare_fraction=0.25,
    ),
    "vqa-quick": dataclasses.replace(_SMALL, num_test=80, subtypes=QUICKLY_LEARNT),
    "vqa-small": _SMALL,
    "vqa-medium": PhantomVqaSpec(
        num_train=480,
        num_val=32,
        num_test=120,
        volumes="vqa-medium",
        in_plane_tenths_mm=(21, 27),
        slice_tenths_mm=(24, 33),
    ),
    "vqa-full": PhantomVqaSpec(
        num_train=1200,
        num_val=64,
        num_test=240,
        volumes="vqa-full",
        in_plane_tenths_mm=(14, 18),
        slice_tenths_mm=(18, 26),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """One patient with one scan.

    Args:
        findings, traits: each of `anatomy.FINDINGS` and `anatomy.TRAITS` to 0 or 1.
        rare: each of RARE_FINDINGS to 0 or 1.
        asked: the rare findings that this patient is asked about.
    """

    scan_id: str
    split: str
    number: int
    findings: dict[str, int]
    traits: dict[str, int]
    rare: dict[str, int]
    asked: tuple[str, ...]


def plan_cohort(spec: PhantomVqaSpec) -> list[Subject]:
    """All patients. Within a split every finding and trait holds for half of them, each rare finding for
    ``rare_fraction`` (in the test split ``rare_test_fraction``) of them, at least one, and as many others are asked
    about it."""
    subjects: list[Subject] = []
    for index, (split, count) in enumerate((("train", spec.num_train), ("val", spec.num_val), ("test", spec.num_test))):
        random = np.random.RandomState([spec.seed, index, 17])
        halves = {name: random.permutation(count) < (count + 1) // 2 for name in FINDINGS + TRAITS}
        fraction = spec.rare_test_fraction if split == "test" else spec.rare_fraction
        num_rare = max(int(count * fraction + 0.5), 1)
        ranks = {name: random.permutation(count) for name in RARE_FINDINGS}
        for patient in range(count):
            number = len(subjects) + 1
            subjects.append(
                Subject(
                    scan_id=f"v{number:04d}",
                    split=split,
                    number=number,
                    findings={name: int(halves[name][patient]) for name in FINDINGS},
                    traits={name: int(halves[name][patient]) for name in TRAITS},
                    rare={name: int(ranks[name][patient] < num_rare) for name in RARE_FINDINGS},
                    asked=tuple(name for name in RARE_FINDINGS if ranks[name][patient] < 2 * num_rare),
                )
            )
    return subjects
