"""Questions about public scans, where a copy of them is there: PHOTON_REAL_SCANS names its folder.

The expected numbers were found otherwise: counted with nibabel and numpy, or written by the segmenting program.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pipelines.mask_questions.stage import make_questions
from pipelines.questions import read_questions

FOLDER = os.environ.get("PHOTON_REAL_SCANS", "")
pytestmark = pytest.mark.skipif(not Path(FOLDER).is_dir() or not FOLDER, reason="PHOTON_REAL_SCANS names no folder")


def test_organs_of_an_abdominal_ct(tmp_path: Path) -> None:
    source = Path(FOLDER) / "wasserth+TotalSegmentator"
    labels = json.loads((source / "label_names.json").read_text())["total"]
    names = {
        key: name for key, name in labels.items() if name in ("liver", "kidney_left", "kidney_right", "gallbladder")
    }
    (tmp_path / "names.json").write_text(json.dumps(names))
    for folder, file in (("images", "example_ct"), ("masks", "example_seg_fast_force_split")):
        (tmp_path / folder).mkdir()
        shutil.copyfile(source / "tests/reference_files" / f"{file}.nii.gz", tmp_path / folder / "scan.nii.gz")
    record = make_questions(tmp_path / "images", tmp_path / "masks", tmp_path / "names.json", tmp_path / "data")
    answers = {q.question_id[5:]: q.answer for q in read_questions(tmp_path / "data" / "questions.jsonl")}
    assert answers["volume-left-kidney"] == "137 cm3" and answers["volume-right-kidney"] == "193 cm3"
    assert answers["volume-gallbladder"] == "35.6 cm3" and answers["mean-HU-gallbladder"] == "2 HU"
    assert "volume-liver" not in answers  # the scan ends within it
    assert answers["larger-side-left-kidney,-right-kidney"] == "right kidney"
    assert answers["higher-side-left-kidney,-right-kidney"] == "left kidney"
    assert answers["largest-slice-right-kidney"] == "80"
    assert answers["third-right-kidney"] == "upper third"
    assert record.num_refused == 0


def test_mask_of_a_dicom_series_with_the_other_y_axis(tmp_path: Path) -> None:
    source = Path(FOLDER) / "wasserth+TotalSegmentator"
    shutil.copytree(source / "derived/example_ct_dicom_stripped", tmp_path / "images" / "scan")
    (tmp_path / "masks").mkdir()
    mask = source / "tests/reference_files/example_seg_dicom.nii.gz"
    shutil.copyfile(mask, tmp_path / "masks" / "scan.nii.gz")
    labels = json.loads((source / "label_names.json").read_text())["total"]
    names = {key: name for key, name in labels.items() if name in ("liver", "spleen", "aorta")}
    (tmp_path / "names.json").write_text(json.dumps(names))
    record = make_questions(tmp_path / "images", tmp_path / "masks", tmp_path / "names.json", tmp_path / "data")
    assert record.refused_by_code == {}
    questions = read_questions(tmp_path / "data" / "questions.jsonl")
    means = {q.organ: float(q.value or 0.0) for q in questions if q.subtype == "mean HU"}
    assert means["liver"] == 89  # upside down, the mask would take in air and bone
    assert means["spleen"] == 80


def test_tumours_of_three_modalities(tmp_path: Path) -> None:
    scans = Path(FOLDER) / "theibsi+data_sets" / "ibsi_validation" / "nifti"
    names = {
        "structures": {"1": "tumour"},
        "image": "{patient}/{modality}_image",
        "mask": "{patient}/{modality}_mask",
        "modality": {"CT": "ct", "MR_T1": "mr", "PET": "pt"},
        "pet_unit": "SUV",
    }
    (tmp_path / "names.json").write_text(json.dumps(names))
    record = make_questions(scans, scans, tmp_path / "names.json", tmp_path / "data")
    assert record.num_refused == 0 and record.num_scans == 3 * record.num_patients
    answers = {q.question_id: q.answer for q in read_questions(tmp_path / "data" / "questions.jsonl")}
    assert answers["STS_002_CT.volume-tumour"] == answers["STS_002_MR_T1.volume-tumour"] == "53.3 cm3"
    assert answers["STS_002_CT.mean-HU-tumour"] == "59 HU"
    assert "STS_002_MR_T1.mean-HU-tumour" not in answers
    assert answers["STS_002_PET.mean-SUV-tumour"].endswith(" SUV")
