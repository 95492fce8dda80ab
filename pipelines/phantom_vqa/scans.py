"""The scans of PhantomVQA: the demo's patients with wider variation, more voxels and findings in unusual places."""

from __future__ import annotations

import numpy as np

from pipelines.anatomy import Canvas, Patient, Point, draw_patient, paint_patient
from pipelines.phantom_vqa.cohort import VQA_LABELS, PhantomVqaSpec, Subject
from pipelines.phantoms import Phantom, take_scan

# Unit directions in plane (x to the left, y to the back): cosines and sines written down, which round alike everywhere.
_DIRECTIONS = (
    (0.966, -0.259), (0.866, -0.5), (0.707, -0.707), (0.5, -0.866), (0.259, -0.966), (0.940, 0.342), (0.766, 0.643),
    (-0.966, -0.259), (-0.866, -0.5), (-0.707, -0.707), (-0.5, -0.866), (-0.259, -0.966), (-0.940, 0.342),
    (-0.766, 0.643),
)  # fmt: skip


def make_scan(subject: Subject, spec: PhantomVqaSpec) -> Phantom:
    """Draw, paint, blur, add noise, and store along axes that differ from scan to scan."""
    anatomy = np.random.RandomState([spec.seed, subject.number, 23])
    patient = draw_patient(anatomy, subject.traits, spread=spec.size_spread)
    places = np.random.RandomState([spec.seed, subject.number, 29])

    def paint(canvas: Canvas) -> None:
        paint_patient(canvas, patient, subject.findings, anatomy)
        _paint_rare(canvas, patient, subject.rare, places)

    return take_scan(
        np.random.RandomState([spec.seed, subject.number, 31]),
        paint,
        in_plane_tenths_mm=spec.in_plane_tenths_mm,
        slice_tenths_mm=spec.slice_tenths_mm,
        values=VQA_LABELS,
    )


def _paint_rare(canvas: Canvas, patient: Patient, rare: dict[str, int], random: np.random.RandomState) -> None:
    """Spheres outside the organs; what is drawn does not depend on which of them are there."""
    nodule = _in_body_wall(patient, random), float(random.randint(120, 161)) / 10
    bone = _in_spine(patient, random), float(random.randint(120, 151)) / 10
    mass = _in_mesentery(patient, random), float(random.randint(140, 181)) / 10
    for name, (centre, radius), hu in (
        ("subcutaneous nodule", nodule, 95),
        ("bone lesion", bone, 15),
        ("mesenteric mass", mass, 110),
    ):
        if rare[name]:
            canvas.ellipsoid(centre, (radius,) * 3, hu, name)


def _in_body_wall(patient: Patient, random: np.random.RandomState) -> Point:
    """Just under the skin, at any height, in front and at the sides."""
    cosine, sine = _DIRECTIONS[random.randint(len(_DIRECTIONS))]
    a, b = (edge - 19.0 for edge in patient.body_mm)
    return (a * cosine, b * sine, float(random.randint(-95, 96)))


def _in_spine(patient: Patient, random: np.random.RandomState) -> Point:
    x, y, z = patient.shift_mm
    return (x + random.randint(-8, 9), 68 + y, z + random.randint(-100, 101))


def _in_mesentery(patient: Patient, random: np.random.RandomState) -> Point:
    """In the fat between the organs of the lower abdomen."""
    x, y, z = patient.shift_mm
    return (x + random.randint(-45, 46), y + random.randint(-20, 21), z - random.randint(70, 106))
