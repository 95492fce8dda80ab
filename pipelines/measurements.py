"""What a label map and its scan say in numbers: volumes, densities, sizes, counts and sides."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from pipelines.anatomy import LABELS
from pipelines.grids import frame_of
from pipelines.shapes import components

REGIONS = {
    "liver": ("liver", "liver cyst", "liver tumor"),
    "left lung": ("left lung", "left nodule", "left effusion"),
    "right lung": ("right lung", "right nodule", "right effusion"),
    "lungs": ("left lung", "left nodule", "left effusion", "right lung", "right nodule", "right effusion"),
    "left kidney": ("left kidney", "left kidney cyst"),
    "right kidney": ("right kidney", "right kidney cyst"),
    "kidneys": ("left kidney", "left kidney cyst", "right kidney", "right kidney cyst"),
    "lungs and kidneys": (
        *("left lung", "left nodule", "left effusion", "right lung", "right nodule", "right effusion"),
        *("left kidney", "left kidney cyst", "right kidney", "right kidney cyst"),
    ),
}
"""The labels that make up an organ that a question asks about; every other label stands for itself."""

MIN_LESION_ML = 0.5
FATTY_LIVER_DIFFERENCE_HU = -20.0
SPLENOMEGALY_ML = (250.0, 480.0)
ANEURYSM_MM = 30.0
CARDIOMEGALY_RATIO = 0.5


def organ_mask(labels: np.ndarray, organ: str, values: Mapping[str, int] = LABELS) -> np.ndarray:
    """Bool array of ``labels``' shape: where an organ that a question asks about lies, its lesions included.

    Args:
        values: the value of every label by its name.
    """
    return np.isin(labels, [values[name] for name in REGIONS.get(organ, (organ,)) if name in values])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesion:
    """A connected region of one lesion label: volume, and centre in voxels (Z, Y, X) of the measured map."""

    label: str
    volume_ml: float
    centre: tuple[float, float, float]

    @property
    def diameter_mm(self) -> float:
        """Diameter of the sphere of the same volume."""
        return 2.0 * (self.volume_ml * 1000.0 * 3.0 / (4.0 * math.pi)) ** (1.0 / 3.0)


class Measurements:
    """Measurements of one scan.

    Args:
        hu: scan in HU [i, j, k], any axes.
        labels: label map of the same shape.
        affine: [4, 4], array index to world RAS mm.
        values: the value of every label by its name.
    """

    def __init__(
        self, hu: np.ndarray, labels: np.ndarray, affine: np.ndarray, values: Mapping[str, int] = LABELS
    ) -> None:
        self.values = values
        frame = frame_of(labels.shape, affine)
        self.hu = frame.canonical(hu)
        self.labels = frame.canonical(labels)
        self.spacing_mm = frame.spacing_mm
        self.voxel_ml = math.prod(frame.spacing_mm) / 1000.0
        self._num_voxels = np.bincount(self.labels.ravel(), minlength=256)

    def volume_ml(self, label: str) -> float:
        """Volume of a label, without the lesions that have their own."""
        return float(self._num_voxels[self.values[label]]) * self.voxel_ml

    def mean_hu(self, label: str) -> float:
        """Mean density of a label; it must be there."""
        is_organ = self.labels == self.values[label]
        return int(self.hu[is_organ].sum(dtype=np.int64)) / int(self._num_voxels[self.values[label]])

    def lesions(self, label: str) -> list[Lesion]:
        """Connected regions of a lesion label of at least 0.5 mL, largest first."""
        found = []
        for points in components(self.labels == self.values[label]):
            volume_ml = len(points) * self.voxel_ml
            if volume_ml >= MIN_LESION_ML:
                centre = tuple(int(points[:, axis].sum()) / len(points) for axis in range(3))
                found.append(Lesion(label=label, volume_ml=volume_ml, centre=centre))  # type: ignore[arg-type]
        return sorted(found, key=lambda lesion: (-lesion.volume_ml, lesion.centre))

    def has(self, label: str) -> bool:
        """Whether a lesion label is there."""
        return bool(self.lesions(label))

    def is_in_upper_half(self, lesion: Lesion, organ: str) -> bool:
        """Whether the lesion's centre lies above the middle of the organ's extent along Z."""
        slices = np.flatnonzero(organ_mask(self.labels, organ).any(axis=(1, 2)))
        return lesion.centre[0] > (int(slices[0]) + int(slices[-1])) / 2

    def abdominal_aorta_mm(self) -> float:
        """Largest diameter of the aorta in the axial slices below the heart (circle of the same area)."""
        first = int(np.flatnonzero((self.labels == self.values["heart"]).any(axis=(1, 2)))[0])
        counts = np.count_nonzero(self.labels[:first] == self.values["aorta"], axis=(1, 2))
        return 2.0 * math.sqrt(int(counts.max()) * self.spacing_mm[1] * self.spacing_mm[2] / math.pi)

    def heart_to_chest_ratio(self) -> float:
        """Width of the heart over the width of both lungs together."""
        heart = np.flatnonzero((self.labels == self.values["heart"]).any(axis=(0, 1)))
        lungs = np.flatnonzero(organ_mask(self.labels, "lungs").any(axis=(0, 1)))
        return (int(heart[-1]) - int(heart[0]) + 1) / (int(lungs[-1]) - int(lungs[0]) + 1)
