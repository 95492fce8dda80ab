"""One synthetic patient: analytic thorax and abdomen in Hounsfield units with its label map.

Coordinates are patient millimetres (x to the left, y to the back, z to the head), origin in the middle of the
body. Array arithmetic is restricted to + - * /, comparisons and integers, which every machine rounds alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

LABELS = {
    "left lung": 1,
    "right lung": 2,
    "heart": 3,
    "aorta": 4,
    "liver": 5,
    "spleen": 6,
    "left kidney": 7,
    "right kidney": 8,
    "spine": 9,
    "stomach": 10,
    "liver cyst": 11,
    "liver tumor": 12,
    "left kidney cyst": 13,
    "right kidney cyst": 14,
    "left nodule": 15,
    "right nodule": 16,
    "left effusion": 17,
    "right effusion": 18,
}
"""Name -> value in the label maps; 0 is everything else."""

FINDINGS = (
    "liver cyst",
    "liver tumor",
    "left kidney cyst",
    "right kidney cyst",
    "left nodule",
    "right nodule",
    "left effusion",
    "right effusion",
    "fatty liver",
    "splenomegaly",
    "aneurysm",
    "cardiomegaly",
)
"""What a visit may show; each is present in half of the patients."""

TRAITS = (
    "larger left kidney",
    "high left nodule",
    "high right nodule",
    "larger left effusion",
    "severe splenomegaly",
)
"""How a patient's organs and findings look at every visit; each holds for half of the patients."""

# Free places for liver lesions: offset from the right lobe's centre in units of its semi-axes.
_LIVER_SLOTS = (
    (-0.35, -0.35, 0.30),
    (-0.30, 0.40, -0.05),
    (0.25, -0.10, -0.45),
    (0.45, 0.15, 0.30),
    (-0.50, -0.25, -0.45),
)

Point = tuple[float, float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Patient:
    """What stays the same between visits: millimetres, HU, factors around 1, and each of TRAITS as 0 or 1."""

    body_mm: tuple[float, float]
    fat_mm: float
    shift_mm: Point
    scale: Mapping[str, float]
    hu: Mapping[str, int]
    traits: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lesion:
    """A sphere: its label, centre and radius in mm, and HU."""

    label: str
    centre_mm: Point
    radius_mm: float
    hu: int


def draw_patient(random: np.random.RandomState, traits: Mapping[str, int], *, spread: float = 0.07) -> Patient:
    """A patient's constant anatomy; organs' edges vary by ``spread`` either way."""

    def around(width: float) -> float:
        return float(1.0 + width * random.randint(-1000, 1001) / 1000)

    def between(low: float, high: float) -> float:
        return float(low + (high - low) * random.randint(0, 1001) / 1000)

    scale = {
        name: around(spread)
        for name in ("left lung", "right lung", "heart", "aorta", "liver", "spleen", "spine", "stomach")
    }
    larger = 1.0 + between(0.08, 0.16)
    kidneys = (larger, 2.0 - larger) if traits["larger left kidney"] else (2.0 - larger, larger)
    scale |= {"left kidney": kidneys[0], "right kidney": kidneys[1]}
    contrast = int(random.randint(-25, 26))
    hu = {
        "heart": 140 + contrast + int(random.randint(-5, 6)),
        "aorta": 190 + contrast + int(random.randint(-5, 6)),
        "liver": 112 + contrast + int(random.randint(-8, 9)),
        "fatty liver": 56 + contrast // 2 + int(random.randint(-8, 9)),
        "spleen": 116 + contrast + int(random.randint(-7, 8)),
        "kidney": 175 + contrast + int(random.randint(-10, 11)),
        "lung": -820 + int(random.randint(-40, 41)),
        "muscle": 50 + int(random.randint(-5, 6)),
        "fat": -95 + int(random.randint(-8, 9)),
    }
    return Patient(
        body_mm=(between(146, 157), between(104, 118)),
        fat_mm=between(8, 16),
        shift_mm=(between(-5, 5), between(-5, 5), between(-8, 8)),
        scale=scale,
        hu=hu,
        traits=traits,
    )


class Canvas:
    """HU and labels on a raw grid, painted in order: later things cover earlier ones.

    Args:
        axes_mm: voxel centres along x, y, z in patient millimetres; arrays are [x, y, z].
        values: the value of every label by its name.
    """

    def __init__(self, axes_mm: tuple[np.ndarray, np.ndarray, np.ndarray], values: Mapping[str, int] = LABELS) -> None:
        self.axes_mm, self.values = axes_mm, values
        shape = tuple(len(axis) for axis in axes_mm)
        self.hu = np.full(shape, -1000, np.int16)
        self.labels = np.zeros(shape, np.uint8)

    def ellipsoid(
        self,
        centre_mm: Point,
        semi_mm: Point,
        hu: int,
        label: str | None = None,
        *,
        within: tuple[str, ...] | None = None,
        behind_mm: float | None = None,
    ) -> None:
        """Paint an ellipsoid.

        Args:
            label: its label; None paints background.
            within: only over voxels that have one of these labels.
            behind_mm: only where y is greater.
        """
        box, parts = [], []
        for axis, middle, semi in zip(self.axes_mm, centre_mm, semi_mm, strict=True):
            inside = np.flatnonzero((axis >= middle - semi) & (axis <= middle + semi))
            if len(inside) == 0:
                return
            box.append(slice(int(inside[0]), int(inside[-1]) + 1))
            scaled = (axis[box[-1]] - middle) / semi
            parts.append(scaled * scaled)
        mask = parts[0][:, None, None] + parts[1][:, None] + parts[2] <= 1.0
        if behind_mm is not None:
            mask &= (self.axes_mm[1][box[1]] > behind_mm)[:, None]
        self._paint(tuple(box), mask, hu, label, within)

    def cylinder(
        self,
        centre_mm: tuple[float, float],
        semi_mm: tuple[float, float],
        z_mm: tuple[float, float],
        hu: int,
        label: str | None = None,
    ) -> None:
        """Paint an elliptic cylinder along z."""
        x, y, z = self.axes_mm
        a, b = (x - centre_mm[0]) / semi_mm[0], (y - centre_mm[1]) / semi_mm[1]
        mask = (a * a)[:, None] + b * b <= 1.0
        inside = np.flatnonzero((z >= z_mm[0]) & (z <= z_mm[1]))
        if len(inside):
            box = (slice(None), slice(None), slice(int(inside[0]), int(inside[-1]) + 1))
            self._paint(box, np.broadcast_to(mask[:, :, None], self.hu[box].shape), hu, label, None)

    def _paint(
        self,
        box: tuple[slice, ...],
        mask: np.ndarray,
        hu: int,
        label: str | None,
        within: tuple[str, ...] | None,
    ) -> None:
        if within is not None:
            mask = mask & np.isin(self.labels[box], [self.values[name] for name in within])
        self.hu[box][mask] = hu
        self.labels[box][mask] = self.values[label] if label else 0


def paint_patient(canvas: Canvas, patient: Patient, findings: Mapping[str, int], random: np.random.RandomState) -> None:
    """Paint one visit.

    Args:
        findings: each of FINDINGS to 0 or 1.
        random: seeded by the patient alone; what is drawn does not depend on the findings, so that a
            lesion seen at two visits is the same lesion.
    """
    _paint_body(canvas, patient)
    _paint_chest(canvas, patient, findings, random)
    _paint_abdomen(canvas, patient, findings, random)


def _moved(patient: Patient, centre: Point) -> Point:
    return tuple(c + s for c, s in zip(centre, patient.shift_mm, strict=True))  # type: ignore[return-value]


def _paint_body(canvas: Canvas, patient: Patient) -> None:
    """Skin, fat, muscle wall, ribs and spine."""
    (a, b), z_all, hu = patient.body_mm, (-1000.0, 1000.0), patient.hu
    canvas.cylinder((0, 0), (a, b), z_all, 10)
    canvas.cylinder((0, 0), (a - 3, b - 3), z_all, hu["fat"])
    a, b = a - patient.fat_mm, b - patient.fat_mm
    canvas.cylinder((0, 0), (a, b), z_all, hu["muscle"])
    _paint_ribs(canvas, (a - 4, b - 4), patient.shift_mm[2])
    canvas.cylinder((0, 0), (a - 13, b - 13), z_all, hu["fat"] + 10)
    canvas.cylinder((0, 0), (a - 13, b - 13), (patient.shift_mm[2] - 10, 1000.0), 25)
    x, y, z = _moved(patient, (0, 68, 0))
    for side in (-1, 1):
        canvas.cylinder((x + side * 26, y + 12), (22, 18), z_all, hu["muscle"])
    size = patient.scale["spine"]
    canvas.cylinder((x, y + 24), (8 * size, 16 * size), z_all, 280, "spine")
    canvas.cylinder((x, y), (21 * size, 17 * size), z_all, 110, "spine")
    for number in range(-5, 6):
        body = (z + 30 * number - 11, z + 30 * number + 11)
        canvas.cylinder((x, y), (21 * size, 17 * size), body, 420, "spine")
        canvas.cylinder((x, y), (17 * size, 13 * size), body, 230, "spine")
    canvas.cylinder((x, y + 21), (8, 6), z_all, 30)


def _paint_ribs(canvas: Canvas, semi_mm: tuple[float, float], shift_mm: float) -> None:
    """Bands of bone in the chest wall, falling towards the front."""
    x, y, z = canvas.axes_mm
    a, b = x / semi_mm[0], y / semi_mm[1]
    outer = (a * a)[:, None] + b * b
    a, b = x / (semi_mm[0] - 7), y / (semi_mm[1] - 7)
    ring = (outer <= 1.0) & ((a * a)[:, None] + b * b > 1.0)
    height = (z - shift_mm)[None, :] - 0.35 * y[:, None] + 560.0
    band = (np.floor(height / 2.0).astype(np.int64) % 14 < 5) & ((z - shift_mm)[None, :] > -40)
    mask = ring[:, :, None] & band[None, :, :]
    canvas.hu[mask] = 380


def _paint_chest(canvas: Canvas, patient: Patient, findings: Mapping[str, int], random: np.random.RandomState) -> None:
    hu, scale = patient.hu, patient.scale
    for side, sign in (("left", 1), ("right", -1)):
        centre = _moved(patient, (sign * 70, -2, 58))
        size = scale[f"{side} lung"]
        semi = (52 * size, 74 * size, 80 * size)
        lung = f"{side} lung"
        canvas.ellipsoid(centre, semi, hu["lung"], lung)
        up, down = int(random.randint(32, 41)), int(random.randint(18, 27))
        spot = (
            centre[0] + sign * random.randint(16, 24),
            centre[1] - random.randint(-3, 8),
            centre[2] + (up if patient.traits[f"high {side} nodule"] else -down),
        )
        radius = float(random.randint(150, 201)) / 10
        has_more = patient.traits["larger left effusion"] == (side == "left")
        more, less = int(random.randint(14, 24)), int(random.randint(36, 44))
        level = centre[1] + (more if has_more else less)
        if findings[f"{side} effusion"]:
            canvas.ellipsoid(centre, semi, 8, f"{side} effusion", within=(lung,), behind_mm=level)
        if findings[f"{side} nodule"]:
            canvas.ellipsoid(spot, (radius,) * 3, 45, f"{side} nodule", within=(lung,))
    x, y, z = _moved(patient, (18, -20, 36))
    size = scale["heart"] * (1.0 if not findings["cardiomegaly"] else 1.42)
    canvas.ellipsoid((x, y, z), (49 * size, 38 * scale["heart"] * 1.05, 44 * size), hu["heart"], "heart")
    x, y, z = _moved(patient, (2, 6, 0))
    canvas.cylinder((x, y), (9, 8), (z + 70, 1000.0), -980)
    x, y, z = _moved(patient, (16, 40, 0))
    radius = 11.5 * scale["aorta"]
    canvas.cylinder((x, y), (radius, radius), (-1000.0, z + 85), hu["aorta"], "aorta")
    canvas.ellipsoid((x - 4, y - 30, z + 84), (15, 42, 13), hu["aorta"], "aorta")


def _paint_abdomen(
    canvas: Canvas, patient: Patient, findings: Mapping[str, int], random: np.random.RandomState
) -> None:
    hu, scale = patient.hu, patient.scale
    for number in range(6):
        loop = (
            -45 + 22 * number + random.randint(-5, 6),
            -42 + random.randint(-12, 13),
            -98 + random.randint(-14, 15),
        )
        canvas.ellipsoid(_moved(patient, loop), (13, 13, 16), 32)
        canvas.ellipsoid(_moved(patient, (loop[0], loop[1] - 6, loop[2])), (5, 4, 6), -400)
    _paint_liver(canvas, patient, findings, random)
    centre = _moved(patient, (46, -44, -26))
    size = scale["stomach"]
    canvas.ellipsoid(centre, (40 * size, 30 * size, 42 * size), 28, "stomach")
    canvas.ellipsoid((centre[0], centre[1] - 12, centre[2]), (22, 11, 22), -850, "stomach", within=("stomach",))
    enlarged = 1.62 if patient.traits["severe splenomegaly"] else 1.34
    size = scale["spleen"] * (enlarged if findings["splenomegaly"] else 1.0)
    canvas.ellipsoid(
        _moved(patient, (97 - 9 * (size - 1), 30, -34)),
        (24 * size, 34 * size, 44 * size),
        hu["spleen"],
        "spleen",
    )
    for side, sign in (("left", 1), ("right", -1)):
        size = scale[f"{side} kidney"]
        centre = _moved(patient, (sign * 58, 46, -76))
        canvas.ellipsoid(centre, (27 * size, 24 * size, 46 * size), hu["kidney"], f"{side} kidney")
        canvas.ellipsoid((centre[0] - sign * 14, *centre[1:]), (10, 9, 16), hu["fat"] + 10)
        radius = float(random.randint(150, 201)) / 10
        pole = 1 if random.randint(2) else -1
        spot = (
            centre[0] + sign * 20,
            centre[1] - random.randint(8, 19),
            centre[2] + pole * random.randint(12, 23),
        )
        if findings[f"{side} kidney cyst"]:
            canvas.ellipsoid(spot, (radius,) * 3, 4, f"{side} kidney cyst")
    x, y, z = _moved(patient, (16, 40, -78))
    radius = 11.5 * scale["aorta"]
    canvas.cylinder((x, y), (radius, radius), (-1000.0, z + 40), hu["aorta"], "aorta")
    wide = float(random.randint(240, 281)) / 10
    if findings["aneurysm"]:
        canvas.ellipsoid((x + 2, y - 12, z), (wide, wide, 40), hu["aorta"], "aorta")


def _paint_liver(canvas: Canvas, patient: Patient, findings: Mapping[str, int], random: np.random.RandomState) -> None:
    size = patient.scale["liver"]
    tissue = patient.hu["fatty liver" if findings["fatty liver"] else "liver"]
    centre = _moved(patient, (-66, -8, -34))
    semi = (56 * size, 66 * size, 54 * size)
    canvas.ellipsoid(centre, semi, tissue, "liver")
    canvas.ellipsoid(_moved(patient, (-8, -46, -18)), (52 * size, 32 * size, 28 * size), tissue, "liver")
    slots = [_LIVER_SLOTS[index] for index in random.permutation(len(_LIVER_SLOTS))]
    radii = [float(radius) / 10 for radius in random.randint(120, 191, len(slots))]
    places = {"liver cyst": slice(0, random.randint(1, 4)), "liver tumor": slice(3, random.randint(4, 6))}
    for label, hu in (("liver cyst", 4), ("liver tumor", 215)):
        if not findings[label]:
            continue
        for offset, radius in zip(slots[places[label]], radii[places[label]], strict=True):
            spot = tuple(c + o * s for c, o, s in zip(centre, offset, semi, strict=True))
            canvas.ellipsoid(spot, (radius,) * 3, hu, label, within=("liver",))  # type: ignore[arg-type]
