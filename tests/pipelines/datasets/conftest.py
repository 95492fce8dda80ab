"""Small made-up copies of public datasets with their real column layouts; no row of any of them is real."""

from __future__ import annotations

import csv
import gzip
import json
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from pipelines.datasets.base import Draft, ImportOptions, Refusal
from pipelines.datasets.catalogue import DATASETS

RAD_HEADER = [
    "Task",
    "Subtask",
    "VolumeName",
    "Question",
    "Answer",
    "QuestionType",
    "AnswerChoice",
    "Choice A",
    "Choice B",
    "Choice C",
    "Choice D",
]
TEMPORAL = (
    "Refractory Lesion (Persistent or recurrent, now present)",
    "Resolved Lesion (Previously present or recurrent, now absent)",
    "New Lesion (Absent previously, now present)",
    "No Abnormality (Always absent)",
)
METADATA_HEADER = [
    "VolumeName",
    "Manufacturer",
    "PatientSex",
    "PatientAge",
    "RescaleIntercept",
    "RescaleSlope",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "Rows",
    "Columns",
    "NumberofSlices",
    "XYSpacing",
    "ZSpacing",
    "StudyDate",
]


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path


def rad_open(task: int, subtask: int, volume: str, question: str, answer: str) -> list[object]:
    return [task, subtask, volume, question, answer, "Open", *"-----"]


def rad_yes_no(subtask: int, volume: str, question: str, answer: str) -> list[object]:
    return [4, subtask, volume, question, answer, "Close", "AB"[answer == "No"], "Yes", "No", "-", "-"]


def rad_temporal(task: int, subtask: int, volume: str, question: str, letter: str) -> list[object]:
    return [task, subtask, volume, question, TEMPORAL["ABCD".index(letter)], "Close", letter, *TEMPORAL]


def history(values: Sequence[int]) -> str:
    return (
        f"The findings of nodule in earlier scans were {list(values)}. (Note: 0 indicates absence, and 1 indicates "
        "presence.) What has become of it?"
    )


def metadata_row(volume: str, shape: tuple[int, int, int], **changed: str) -> list[str]:
    row = {
        "VolumeName": volume,
        "Manufacturer": "Maker",
        "PatientSex": "F",
        "PatientAge": "036Y",
        "RescaleIntercept": "-1024.0",
        "RescaleSlope": "1.0",
        "ImagePositionPatient": "[-100.0, -90.0, 10.0]",
        "ImageOrientationPatient": "[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]",
        "Rows": str(shape[1]),
        "Columns": str(shape[0]),
        "NumberofSlices": str(shape[2]),
        "XYSpacing": "[7.5, 7.0]",
        "ZSpacing": "10.0",
        "StudyDate": "20200101",
    }
    assert set(changed) <= set(row)
    return [(row | changed)[name] for name in METADATA_HEADER]


def chest(seed: int, shape: tuple[int, int, int] = (40, 44, 30)) -> np.ndarray:
    """A box of soft tissue with two lungs in air, HU [i, j, k], with noise."""
    hu = np.full(shape, -1000.0)
    hu[6:34, 8:36] = 40
    hu[9:18, 12:30, 4:26] = -820
    hu[22:31, 12:30, 4:26] = -820
    return (hu + np.random.default_rng(seed).normal(0, 15, shape)).astype(np.int16)


def write_blank_nifti(array: np.ndarray, path: Path, order: str = "<") -> Path:
    """NIfTI-1 that says no more than size and type of its voxels, as CT-RATE's original files do."""
    header = bytearray(352)
    struct.pack_into(f"{order}i", header, 0, 348)
    struct.pack_into(f"{order}8h", header, 40, 3, *array.shape, 1, 1, 1, 1)
    struct.pack_into(f"{order}2h", header, 70, 4, 16)
    struct.pack_into(f"{order}8f", header, 76, 1, 1, 1, 1, 0, 0, 0, 0)
    struct.pack_into(f"{order}f", header, 108, 352)
    header[344:348] = b"n+1\0"
    voxels = array.astype(f"{order}i2").tobytes(order="F")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(bytes(header) + voxels, 1) if path.suffix == ".gz" else bytes(header) + voxels)
    return path


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


Read = Callable[..., tuple[list[Draft], list[Refusal]]]


@pytest.fixture
def read() -> Read:
    """Drafts and refusals of a dataset."""

    def read(name: str, folder: Path, **options: object) -> tuple[list[Draft], list[Refusal]]:
        rows = list(DATASETS[name].drafts(folder, ImportOptions(**options)))  # type: ignore[arg-type]
        drafts = [row for row in rows if isinstance(row, Draft)]
        return drafts, [row for row in rows if isinstance(row, Refusal)]

    return read


@pytest.fixture
def made() -> ModuleType:
    """This module, for tests cannot import it: what writes the made-up copies."""
    return sys.modules[__name__]
