"""An archive to score: held-out scans as a hospital would hand them over, broken files among them, and
real scans."""

from __future__ import annotations

import csv
import gzip
import shutil
from pathlib import Path

import numpy as np

from photon.errors import PhotonError
from pipelines.files import prepare_output_folder, write_bytes
from pipelines.questions import EVERY_SCAN, Question, read_questions, write_questions
from pipelines.scans.nifti import GZIP_LEVEL, sample_scans, write_scan
from pipelines.scans.scan import FORMAT_OF_ENDING, read_scan, scan_ending

QUESTIONS_NAME = "questions.jsonl"

_PROTOCOL = (
    ("liver cyst existence", "liver", "Is there a cyst in the liver?"),
    ("pleural effusion existence", "left lung", "Is there a left pleural effusion?"),
    ("pleural effusion existence", "right lung", "Is there a right pleural effusion?"),
    ("lung nodule existence", "right lung", "Is there a nodule in the right lung?"),
)


def make_archive(
    data: Path,
    output: Path,
    *,
    split: str = "test",
    num_scans: int = 12,
    real_scans: bool = True,
    more_scans: Path | None = None,
) -> Path:
    """Write an archive folder and its ``questions.jsonl``; returns the folder.

    It holds the first scan of ``num_scans`` patients as ``.nii.gz`` (the first one as ``.nii``), four
    broken copies of the first one (``broken-truncated``, ``broken-bitflip``, ``broken-4d``,
    ``broken-nan``), with ``real_scans`` the MR volumes that ship inside nibabel, and copies of the NIfTI
    scans below ``more_scans``. Questions are the held-out scans' own, with answers, and four that are
    asked of every scan (scan_id ``*``), without.

    Args:
        data: folder that `phantoms.generate` wrote.

    Raises:
        PhotonError: ``ARCHIVE_EMPTY`` when the split has no scan, ``INPUT_MISSING`` when ``data`` or
            ``more_scans`` is missing, ``OUTPUT_UNWRITABLE``, ``QUESTIONS_UNREADABLE``.
    """
    scan_ids = _first_visits(data / "raw" / "scans.csv", split)[:num_scans]
    if not scan_ids:
        raise PhotonError("ARCHIVE_EMPTY", data, f"it has no scan in split '{split}'.", "Choose train, val or test.")
    questions = [q for q in read_questions(data / QUESTIONS_NAME) if q.scan_id in set(scan_ids)]
    scans = prepare_output_folder(output / "scans")
    images = data / "raw" / "images"
    for number, scan_id in enumerate(scan_ids):
        source = images / f"{scan_id}.nii"
        if number == 0:
            shutil.copyfile(source, scans / source.name)
        else:
            write_bytes(scans / f"{scan_id}.nii.gz", gzip.compress(source.read_bytes(), GZIP_LEVEL, mtime=0))
    _write_broken(images / f"{scan_ids[0]}.nii", scans)
    if real_scans:
        _copy_scans(sample_scans(), prepare_output_folder(scans / "nibabel-samples"))
    if more_scans is not None:
        if not more_scans.is_dir():
            raise PhotonError("INPUT_MISSING", more_scans, "there is no such folder.", "Check the path.")
        found = sorted(
            path
            for path in more_scans.rglob("*")
            if path.is_file() and FORMAT_OF_ENDING.get(scan_ending(path)) == "nifti"
        )
        _copy_scans(found, prepare_output_folder(scans / "more"), more_scans)
    write_questions([*questions, *protocol_questions()], output / QUESTIONS_NAME)
    return output


def protocol_questions() -> list[Question]:
    """Questions to ask of every scan of an archive; their answers are not known."""
    return [
        Question(
            question_id=f"protocol.{subtype}-{organ}".replace(" ", "-"),
            scan_id=EVERY_SCAN,
            patient_id="",
            split="",
            family="recognition",
            subtype=subtype,
            organ=organ,
            kind="closed",
            question=text,
            options=("yes", "no"),
        )
        for subtype, organ, text in _PROTOCOL
    ]


def _first_visits(table: Path, split: str) -> list[str]:
    try:
        with table.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream))
    except OSError as error:
        raise PhotonError("INPUT_MISSING", table, "it cannot be read.", "Run `photon generate` first.") from error
    return [row["scan_id"] for row in rows if row["split"] == split and row["visit"] == "1"]


def _write_broken(source: Path, folder: Path) -> None:
    """A scan cut in the middle, one with a flipped bit, one with two frames and one with a NaN."""
    packed = bytearray(gzip.compress(source.read_bytes(), GZIP_LEVEL, mtime=0))
    write_bytes(folder / "broken-truncated.nii.gz", bytes(packed[: len(packed) // 2]))
    packed[len(packed) // 2] ^= 0x10
    write_bytes(folder / "broken-bitflip.nii.gz", bytes(packed))
    scan = read_scan(source)
    write_scan(np.stack([scan.array, scan.array], axis=-1), scan.affine, folder / "broken-4d.nii.gz")
    values = scan.array.astype(np.float32)
    values[tuple(n // 2 for n in values.shape)] = np.nan
    write_scan(values, scan.affine, folder / "broken-nan.nii.gz")


def _copy_scans(paths: list[Path], folder: Path, root: Path | None = None) -> None:
    for path in paths:
        name = path.relative_to(root).as_posix().replace("/", "_") if root else path.name
        shutil.copyfile(path, folder / name)
