"""When a question may be asked: thresholds, and the reasons why one is not."""

from __future__ import annotations

import dataclasses
from typing import Literal

Reason = Literal[
    "not outlined",
    "too small",
    "cut by the field of view",
    "in fragments",
    "several of similar size",
    "values have no unit",
    "values are no HU",
    "too close to call",
    "no midline",
    "slices are tilted",
    "over the limit",
    "words not in train",
    "same answer everywhere",
]

REASONS: dict[Reason, str] = {
    "not outlined": "the scan has no mask of the structure, so nobody looked for it",
    "too small": "it is there, but smaller than what can be told from noise of the outline",
    "cut by the field of view": "a part may lie outside the scan or its mask, in the scan but outside its mask, or "
    "outside what the scanner saw",
    "in fragments": "parts lie apart that are too small to be counted, or an organ is in pieces",
    "several of similar size": "which of the lesions is the largest is not clear",
    "values have no unit": "the scan's values have no unit: MR, PET that is not told to be SUV, an unknown modality",
    "values are no HU": "a CT without values below -20, or with a mean that no tissue has: its rescaling was lost",
    "too close to call": "two answers are about equally right",
    "no midline": "a lesion in no organ with a side, and no structure shows where the middle of the body is",
    "slices are tilted": "the scan's slices are not axial",
    "over the limit": "the scan has enough questions of this kind; which ones are asked is drawn by their ids",
    "words not in train": "a question of val or test that has words which no question of train has",
    "same answer everywhere": "of several scans that were asked, and this was to be left out",
}
"""What each reason means."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """Thresholds. What lies between a clear yes and a clear no is not asked.

    Args:
        min_voxels, min_cm3: a structure with less of either is too small to be asked about.
        min_cut_cm3: a structure that is cut must show at least so much of itself to be called visible.
        min_main_share: share of an organ's voxels that its largest part must have to count as one piece.
        min_lead: by which share a volume must exceed another to be called larger.
        max_lead: comparisons whose answer everybody knows (volumes further apart) are not asked.
        min_lead_hu: difference of mean HU to be called denser.
        min_lead_mm: difference of height, side or distance to be called higher, further left or nearer.
        min_hu, max_hu: range of mean HU that a tissue, air or metal can have.
        third_margin: share of the scan's height that a centre must keep from the border of two thirds.
        plateau_share: slices whose cross-section has at least this share of the largest are as good an answer.
        max_plateau: share of the scan's slices that such answers may span.
        max_tilt_deg: tilt up to which slices are called axial.
        max_per_subtype: questions of one subtype about one scan.
    """

    min_voxels: int = 20
    min_cm3: float = 0.1
    min_cut_cm3: float = 1.0
    min_main_share: float = 0.95
    min_lead: float = 0.1
    max_lead: float = 2.0
    min_lead_hu: float = 10.0
    min_lead_mm: float = 5.0
    min_hu: float = -1050.0
    max_hu: float = 3100.0
    third_margin: float = 0.04
    plateau_share: float = 0.97
    max_plateau: float = 0.06
    max_tilt_deg: float = 10.0
    max_per_subtype: int = 12
