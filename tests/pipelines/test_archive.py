"""The archive that is scored."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from photon.errors import PhotonError
from pipelines.archive import make_archive
from pipelines.manifest import read_manifest
from pipelines.phantoms import PhantomSpec, generate
from pipelines.preprocess import preprocess
from pipelines.questions import questions_about, read_questions
from pipelines.scans.nifti import sample_scans
from pipelines.scans.scan import read_scan
from pipelines.volumes import VOLUME_SPECS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    generate(PhantomSpec(num_train=1, num_val=1, num_test=3, second_visit_fraction=1.0), folder)
    return folder


def test_an_archive_holds_good_broken_and_real_scans(data: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    (more / "ward").mkdir(parents=True)
    sample = next(path for path in sample_scans() if path.name == "anatomical.nii")
    (more / "ward" / "mine.nii").write_bytes(sample.read_bytes())
    archive = make_archive(data, tmp_path / "archive", num_scans=3, more_scans=more)
    preprocess(archive, tmp_path / "volumes", VOLUME_SPECS["smoke"])
    table = read_manifest(tmp_path / "volumes" / "manifest.parquet")
    status = dict(zip(table["scan_id"], table["status"], strict=True))
    assert {name: code for name, code in status.items() if name.startswith("broken")} == {
        "broken-truncated": "SCAN_TRUNCATED",
        "broken-bitflip": "GZIP_CORRUPT",
        "broken-4d": "SCAN_NOT_3D",
        "broken-nan": "VOXELS_NOT_FINITE",
    }
    good = {name for name, code in status.items() if code == "ok"}
    assert {"p0003-v1", "p0004-v1", "p0005-v1", "anatomical", "ward_mine"} <= good
    assert status["example4d"] == "SCAN_NOT_3D"
    modality = dict(zip(table["scan_id"], table["modality"], strict=True))
    assert (modality["p0003-v1"], modality["anatomical"]) == ("ct", "mr")


def test_questions_are_the_held_out_ones_and_the_protocol(data: Path, tmp_path: Path) -> None:
    archive = make_archive(data, tmp_path / "archive", num_scans=2, real_scans=False)
    questions = read_questions(archive / "questions.jsonl")
    assert {question.scan_id for question in questions} == {"p0003-v1", "p0004-v1", "*"}
    assert {question.split for question in questions} == {"test", ""}
    protocol = questions_about(questions, "someone-new")
    assert len(protocol) == 4 and not any(question.answer for question in protocol)
    assert not (archive / "scans" / "nibabel-samples").exists()


def test_scans_are_unchanged_and_bytes_are_deterministic(data: Path, tmp_path: Path) -> None:
    for name in ("1", "2"):
        make_archive(data, tmp_path / name, num_scans=2, real_scans=False)
    for path in sorted((tmp_path / "1").rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "2" / path.relative_to(tmp_path / "1")).read_bytes()
    packed = tmp_path / "1" / "scans" / "p0004-v1.nii.gz"
    assert gzip.decompress(packed.read_bytes()) == (data / "raw" / "images" / "p0004-v1.nii").read_bytes()
    assert read_scan(tmp_path / "1" / "scans" / "p0003-v1.nii").notes == ()


def test_what_is_missing_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="ARCHIVE_EMPTY"):
        make_archive(data, tmp_path / "a", split="holdout")
    with pytest.raises(PhotonError, match="INPUT_MISSING"):
        make_archive(tmp_path / "none", tmp_path / "a")
    with pytest.raises(PhotonError, match="INPUT_MISSING"):
        make_archive(data, tmp_path / "a", more_scans=tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(PhotonError, match="OUTPUT_UNWRITABLE"):
        make_archive(data, tmp_path / "file")
