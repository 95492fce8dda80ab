"""The data folder that `photon questions` fills: what is there before, and the scans themselves."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from photon.errors import PhotonError
from pipelines.files import prepare_output_folder
from pipelines.mask_questions.pairs import Pair
from pipelines.questions import EVERY_SCAN, read_questions
from pipelines.scans.find import scan_id_of
from pipelines.scans.nifti import write_scan
from pipelines.scans.scan import Scan, scan_ending

WHOLE_FILES = (".nii.gz", ".nii", ".mha", ".nrrd")
"""Endings of files that hold a scan by themselves."""


def prepare_data_folder(output: Path, scan_ids: set[str]) -> None:
    """Make the folders; what an earlier run has about the same scans goes, since this run may refuse them.

    Raises:
        PhotonError: ``DATA_FOREIGN`` when the folder holds scans, or questions, that are of others;
            ``QUESTIONS_UNREADABLE``, ``OUTPUT_UNWRITABLE``.
    """
    raw, earlier = output / "raw", output / "questions.jsonl"
    folders = [prepare_output_folder(raw / part) for part in ("images", "labels")]
    files = [path for folder in folders for path in folder.iterdir() if not path.name.startswith(".")]
    questions = read_questions(earlier) if earlier.is_file() and earlier.stat().st_size else []
    foreign = sorted(path.name for path in files if scan_id_of(path) not in scan_ids)
    foreign += sorted({question.scan_id for question in questions} - scan_ids - {EVERY_SCAN})
    if foreign:
        fact = f"it holds scans that are not among the images, such as {foreign[0]}."
        raise PhotonError("DATA_FOREIGN", raw, fact, "Choose another data folder, or move this one away.")
    for path in (*files, *([earlier] if questions else [])):
        path.unlink()


def put_scan(scan: Scan, pair: Pair, folder: Path) -> None:
    """Put the scan into the data folder under its id.

    A file that holds all of it is linked, or copied to another disk; what was read from several files or from an
    archive, such as a DICOM series with all that its headers tell, is written as NIfTI.
    """
    source = pair.image.path
    ending = scan_ending(source)
    if pair.image.series or pair.image.member or ending not in WHOLE_FILES:
        write_scan(scan.array, scan.affine, folder / f"{pair.scan_id}.nii.gz")
        return
    target = folder / f"{pair.scan_id}{ending}"
    try:
        os.link(source.resolve(), target)  # a link to a link would point elsewhere from here
    except OSError:
        shutil.copyfile(source, target)
