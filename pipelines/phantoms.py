"""A deterministic archive of CT phantoms: scans, label maps, their patients and the questions about them.

Every number comes from `numpy.random.RandomState`, whose streams are frozen, and from arithmetic that every
machine rounds alike; files are uncompressed, so no zlib decides their bytes.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from pipelines.anatomy import FINDINGS, LABELS, TRAITS, Canvas, draw_patient, paint_patient
from pipelines.files import prepare_output_folder, write_json, write_text
from pipelines.questions import Question, questions_for_scan, write_questions
from pipelines.results import DataRecord
from pipelines.scans.nifti import write_scan

Progress = Callable[[int, int, str], None]

ORIENTATIONS = ("LPS", "RAS", "LAS", "RPS", "PIR", "PSR", "SRP", "ASL")
"""Where the array axes (i, j, k) point to: left, right, anterior, posterior, superior, inferior."""

_NOISE_HU = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhantomSpec:
    """How many patients, and which."""

    num_train: int = 180
    num_val: int = 16
    num_test: int = 48
    second_visit_fraction: float = 0.15
    seed: int = 0


PHANTOM_SPECS = {
    "demo": PhantomSpec(),
    "smoke": PhantomSpec(num_train=12, num_val=4, num_test=6),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visit:
    """One scan to make. ``findings`` and ``traits`` map each of FINDINGS and TRAITS to 0 or 1."""

    scan_id: str
    patient_id: str
    visit: int
    split: str
    patient_seed: int
    findings: dict[str, int]
    traits: dict[str, int]


def plan_visits(spec: PhantomSpec) -> list[Visit]:
    """All visits. Within a split each finding and trait is present in half of the first visits."""
    visits, number = [], 0
    for index, (split, count) in enumerate((("train", spec.num_train), ("val", spec.num_val), ("test", spec.num_test))):
        random = np.random.RandomState([spec.seed, index])
        present = {name: random.permutation(count) < (count + 1) // 2 for name in FINDINGS + TRAITS}
        has_second = random.permutation(count) < int(count * spec.second_visit_fraction + 0.5)
        for patient in range(count):
            number += 1
            findings = {name: int(present[name][patient]) for name in FINDINGS}
            traits = {name: int(present[name][patient]) for name in TRAITS}
            changes = random.randint(0, 10, len(FINDINGS)) < 3
            later = {name: value ^ int(change) for (name, value), change in zip(findings.items(), changes, strict=True)}
            for visit, shown in ((1, findings), (2, later)):
                if visit == 1 or has_second[patient]:
                    visits.append(
                        Visit(
                            scan_id=f"p{number:04d}-v{visit}",
                            patient_id=f"p{number:04d}",
                            visit=visit,
                            split=split,
                            patient_seed=number,
                            findings=shown,
                            traits=traits,
                        )
                    )
    return visits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phantom:
    """A made scan: HU int16 and labels uint8, both [i, j, k], and the affine to RAS mm."""

    hu: np.ndarray
    labels: np.ndarray
    affine: np.ndarray


def make_phantom(visit: Visit, seed: int) -> Phantom:
    """Draw, paint, blur and add noise; then store along axes that differ from scan to scan."""
    anatomy = np.random.RandomState([seed, visit.patient_seed])
    patient = draw_patient(anatomy, visit.traits)
    random = np.random.RandomState([seed, visit.patient_seed, visit.visit])
    return take_scan(
        random,
        lambda canvas: paint_patient(canvas, patient, visit.findings, anatomy),
        in_plane_tenths_mm=(34, 44),
        slice_tenths_mm=(30, 51),
    )


def take_scan(
    random: np.random.RandomState,
    paint: Callable[[Canvas], None],
    *,
    in_plane_tenths_mm: tuple[int, int],
    slice_tenths_mm: tuple[int, int],
    values: Mapping[str, int] = LABELS,
) -> Phantom:
    """Paint a body on a grid drawn from ``random``, blur it, add noise, store it along axes drawn from it.

    Args:
        paint: paints the body.
        in_plane_tenths_mm, slice_tenths_mm: range of voxel edges, its end left out.
        values: the value of every label by its name.
    """
    in_plane_mm = float(random.randint(*in_plane_tenths_mm)) / 10
    slice_mm = float(random.randint(*slice_tenths_mm)) / 10
    spacing = (in_plane_mm, in_plane_mm, slice_mm)
    extent = (322 + random.randint(0, 14), 256 + random.randint(0, 31), 240 + random.randint(0, 12))
    centre = [float(random.randint(-60, 61)) / 10 for _ in range(3)]
    shape = [int(length / step) for length, step in zip(extent, spacing, strict=True)]
    axes = tuple(
        middle + step * (np.arange(n) - (n - 1) / 2) for middle, step, n in zip(centre, spacing, shape, strict=True)
    )
    canvas = Canvas(axes, values)  # type: ignore[arg-type]
    paint(canvas)
    hu = _noisy(_blurred(canvas.hu), random)
    origin = [float(random.randint(-2000, 2001)) / 10 for _ in range(3)]
    first = [float(axis[0]) + shift for axis, shift in zip(axes, origin, strict=True)]
    return _stored(hu, canvas.labels, spacing, first, ORIENTATIONS[random.randint(len(ORIENTATIONS))])


def generate(spec: PhantomSpec, output: Path, on_progress: Progress | None = None) -> DataRecord:
    """Write the raw archive into the folder ``output`` (``raw/images``, ``raw/labels``, ``raw/labels.json``,
    ``raw/scans.csv``) and ``questions.jsonl``.

    Raises:
        PhotonError: ``OUTPUT_UNWRITABLE``.
    """
    images = prepare_output_folder(output / "raw" / "images")
    labels = prepare_output_folder(output / "raw" / "labels")
    visits = plan_visits(spec)
    questions: list[Question] = []
    for done, visit in enumerate(visits):
        phantom = make_phantom(visit, spec.seed)
        write_scan(phantom.hu, phantom.affine, images / f"{visit.scan_id}.nii")
        write_scan(phantom.labels, phantom.affine, labels / f"{visit.scan_id}.nii")
        questions += questions_for_scan(
            phantom.hu,
            phantom.labels,
            phantom.affine,
            scan_id=visit.scan_id,
            patient_id=visit.patient_id,
            split=visit.split,
        )
        if on_progress:
            on_progress(done + 1, len(visits), visit.scan_id)
    write_json(output / "raw" / "labels.json", LABELS)
    write_text(output / "raw" / "scans.csv", _scans_table(visits))
    write_questions(questions, output / "questions.jsonl")
    splits = ("train", "val", "test")
    return DataRecord(
        folder=str(output),
        num_scans=len(visits),
        num_patients=len({visit.patient_id for visit in visits}),
        num_questions=len(questions),
        num_questions_by_split={split: sum(q.split == split for q in questions) for split in splits},
    )


def _scans_table(visits: list[Visit]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("scan_id", "patient_id", "visit", "split"))
    writer.writerows((visit.scan_id, visit.patient_id, visit.visit, visit.split) for visit in visits)
    return text.getvalue()


def _blurred(hu: np.ndarray) -> np.ndarray:
    """(1, 2, 1) / 4 along each axis in integers: the soft edges of a reconstruction kernel."""
    smooth = hu.astype(np.int32)
    for axis in range(3):
        moved = np.moveaxis(smooth, axis, 0)
        padded = np.concatenate([moved[:1], moved, moved[-1:]])
        smooth = np.moveaxis((padded[:-2] + 2 * padded[1:-1] + padded[2:] + 2) >> 2, 0, axis)
    return smooth


def _noisy(hu: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Add noise of about 15 HU: the sum of four uniform integers is close to normal."""
    bytes_ = random.randint(0, 256, (4, *hu.shape), dtype=np.uint8)
    total = bytes_.astype(np.int32).sum(axis=0) - 510  # standard deviation 148
    return np.clip(hu + total * _NOISE_HU // 148, -1024, 3071).astype(np.int16)


def _stored(
    hu: np.ndarray, labels: np.ndarray, spacing: tuple[float, ...], first_mm: list[float], orientation: str
) -> Phantom:
    """Permute and flip [x, y, z] arrays (to left, back, head) into an orientation, with its affine."""
    world = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}
    order = [world[letter][0] for letter in orientation]
    signs = [world[letter][1] for letter in orientation]
    steps = tuple(slice(None, None, sign) for sign in signs)
    to_ras = (-1.0, -1.0, 1.0)
    affine = np.eye(4)
    for column, (axis, sign) in enumerate(zip(order, signs, strict=True)):
        affine[:3, column] = 0.0
        affine[axis, column] = to_ras[axis] * sign * spacing[axis]
        start = first_mm[axis] + (0.0 if sign > 0 else spacing[axis] * (hu.shape[axis] - 1))
        affine[axis, 3] = to_ras[axis] * start
    return Phantom(
        hu=np.ascontiguousarray(hu.transpose(order)[steps]),
        labels=np.ascontiguousarray(labels.transpose(order)[steps]),
        affine=affine,
    )
