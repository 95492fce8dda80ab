"""CT-RATE: headers from its table, rescaling once and only once, findings and conversations."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from photon.errors import PhotonError
from pipelines.datasets.base import ImportOptions, KnownHeader, Refusal, ScanFile
from pipelines.datasets.catalogue import DATASETS
from pipelines.datasets.ct_rate import FINDINGS
from pipelines.datasets.mending import write_mended
from pipelines.datasets.placing import air_hu, place_scans
from pipelines.scans.nifti import write_scan
from pipelines.scans.scan import read_scan

SHAPE = (40, 44, 30)
NAME = "valid_1_a_1"
RAW = f"dataset/valid/valid_1/valid_1_a/{NAME}.nii.gz"
FIXED = f"dataset/valid_fixed/valid_1/valid_1_a/{NAME}.nii.gz"


def scan_files(folder: Path, *names: str, **options: Any) -> list[ScanFile | Refusal]:
    wanted = frozenset(names or (NAME,))
    return list(DATASETS["ct-rate"].scan_files(folder, wanted, ImportOptions(**options)))


def place(found: list[ScanFile | Refusal], folder: Path, mode: str = "link") -> list[dict[str, Any]]:
    scans = [scan for scan in found if isinstance(scan, ScanFile)]
    return place_scans(scans, folder / "images", folder / "scans.parquet", mode, num_workers=1).to_dicts()


@pytest.fixture
def original(tmp_path: Path, made: Any) -> Path:
    """A copy of the original release: a blank header, stored values 1024 above HU, and the table."""
    folder = tmp_path / "CT-RATE"
    made.write_blank_nifti(made.chest(1) + 1024, folder / RAW)
    row = made.metadata_row(f"{NAME}.nii.gz", SHAPE)
    made.write_csv(folder / "dataset/metadata/validation_metadata.csv", made.METADATA_HEADER, [row])
    return folder


def test_geometry_and_hu_come_from_the_table(original: Path, tmp_path: Path, made: Any) -> None:
    (row,) = place(scan_files(original), tmp_path)
    assert row["status"] == "ok" and row["image"] == f"{NAME}.nii.gz"
    assert row["notes"][-2:] == [
        "spacing and orientation from dataset/metadata/validation_metadata.csv",
        "rescaled by 1 and -1024 from dataset/metadata/validation_metadata.csv",
    ]
    scan = read_scan(tmp_path / "images" / row["image"])
    assert np.array_equal(scan.array, made.chest(1))
    expected = [[-7, 0, 0, 100], [0, -7.5, 0, 90], [0, 0, 10, 10], [0, 0, 0, 1]]
    assert np.allclose(scan.affine, expected)  # columns 7.0 mm apart, rows 7.5; DICOM's LPS into RAS
    assert scan.orientation == "LPS" and scan.spacing_mm == (7.0, 7.5, 10.0)
    assert not list((tmp_path / "images").glob(".*"))


def test_stored_bytes_of_the_voxels_stay(original: Path, tmp_path: Path) -> None:
    place(scan_files(original), tmp_path)
    before = gzip.decompress((original / RAW).read_bytes())
    after = gzip.decompress((tmp_path / "images" / f"{NAME}.nii.gz").read_bytes())
    assert after[352:] == before[352:] and after[:352] != before[:352]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", ["train_3_b_2.nii", "train_3_b_2.nii.gz"])
def test_either_byte_order_compressed_or_not(tmp_path: Path, made: Any, order: str, name: str) -> None:
    made.write_blank_nifti(made.chest(2) + 1024, tmp_path / "in" / name, order)
    row = made.metadata_row("train_3_b_2.nii.gz", SHAPE, ImageOrientationPatient="[0.8, 0.6, 0, -0.6, 0.8, 0]")
    made.write_csv(tmp_path / "in/train_metadata.csv", made.METADATA_HEADER, [row])
    (placed,) = place(scan_files(tmp_path / "in", "train_3_b_2"), tmp_path)
    assert placed["status"] == "ok"
    scan = read_scan(tmp_path / "images/train_3_b_2.nii.gz")
    assert np.array_equal(scan.array, made.chest(2))
    assert np.allclose(scan.affine[:3, 0], [-0.8 * 7, -0.6 * 7, 0])
    assert np.allclose(scan.affine[:3, 1], [0.6 * 7.5, -0.8 * 7.5, 0])


def test_the_corrected_copy_is_taken_as_it_is(original: Path, tmp_path: Path, made: Any) -> None:
    (original / FIXED).parent.mkdir(parents=True)
    write_scan(made.chest(1), np.diag([-7.0, -7.5, 10.0, 1.0]), original / FIXED)
    (found,) = scan_files(original)
    assert isinstance(found, ScanFile) and found.header is None and found.path == original / FIXED
    (row,) = place([found], tmp_path)
    image = tmp_path / "images" / row["image"]
    assert row["status"] == "ok" and image.is_symlink() and image.resolve() == (original / FIXED).resolve()
    (row,) = place([found], tmp_path, "copy")
    assert not image.is_symlink() and image.read_bytes() == (original / FIXED).read_bytes()


@pytest.mark.parametrize(("path", "rescale"), [(FIXED, "csv"), (RAW, "header")])
def test_rescaling_twice_or_not_at_all_is_refused(
    original: Path, tmp_path: Path, made: Any, path: str, rescale: str
) -> None:
    if path == FIXED:
        (original / FIXED).parent.mkdir(parents=True)
        write_scan(made.chest(1), np.diag([-7.0, -7.5, 10.0, 1.0]), original / FIXED)
    (row,) = place(scan_files(original, rescale=rescale), tmp_path)
    assert row["status"] == "HU_IMPLAUSIBLE" and "--rescale" in row["message"]
    assert not list((tmp_path / "images").iterdir())


def test_a_table_that_rescales_by_8192(tmp_path: Path, made: Any) -> None:
    hu = made.chest(5)
    hu[:3] = -8192  # the corners of slices, which hold the lowest value there is
    made.write_blank_nifti(hu.astype(np.int32) + 8192, tmp_path / "in" / f"{NAME}.nii.gz")
    row = made.metadata_row(f"{NAME}.nii.gz", SHAPE, RescaleIntercept="-8192")
    made.write_csv(tmp_path / "in/m.csv", made.METADATA_HEADER, [row])
    (placed,) = place(scan_files(tmp_path / "in"), tmp_path)
    assert placed["status"] == "ok" and -1100 < placed["air_hu"] < -950


def test_air() -> None:
    generator = np.random.default_rng(0)
    hu = generator.normal(-1000, 10, (40, 40, 40)).round()
    hu[10:30] = 40
    assert -1030 < air_hu(hu) < -1000
    padded = hu.copy()
    padded[:8] = -3024
    assert -1030 < air_hu(padded) < -1000
    clipped = np.maximum(hu, -1000) - 1024  # rescaled twice, and its air clipped before
    clipped[12:20] = generator.normal(-850, 30, (8, 40, 40)).round() - 1024
    assert air_hu(clipped) < -1150


def test_scans_that_the_table_does_not_describe_are_refused(original: Path, tmp_path: Path, made: Any) -> None:
    made.write_blank_nifti(made.chest(3), original / "dataset/valid/valid_2_a_1.nii.gz")
    found = scan_files(original, NAME, "valid_2_a_1")
    assert [type(scan) for scan in found] == [ScanFile, Refusal]
    assert isinstance(found[1], Refusal) and "metadata" in found[1].reason


@pytest.mark.parametrize(
    "changed",
    [
        {"XYSpacing": "[0, 0]"},
        {"XYSpacing": "0.7"},
        {"ZSpacing": "nan"},
        {"ImageOrientationPatient": "[1, 0, 0, 1, 0, 0]"},
        {"ImagePositionPatient": ""},
        {"RescaleSlope": "one"},
        {"Rows": "many"},
    ],
)
def test_impossible_table_rows_are_refused(original: Path, made: Any, changed: dict[str, str]) -> None:
    table = original / "dataset/metadata/validation_metadata.csv"
    made.write_csv(table, made.METADATA_HEADER, [made.metadata_row(f"{NAME}.nii.gz", SHAPE, **changed)])
    (found,) = scan_files(original)
    assert isinstance(found, Refusal) and found.place.row == 2


def test_two_table_rows_that_differ_are_refused(original: Path, made: Any) -> None:
    rows = [made.metadata_row(f"{NAME}.nii.gz", SHAPE, ZSpacing=spacing) for spacing in ("10", "5")]
    made.write_csv(original / "dataset/metadata/validation_metadata.csv", made.METADATA_HEADER, rows)
    assert isinstance(scan_files(original)[0], Refusal)


def test_a_transposed_scan_does_not_get_the_table_s_geometry(original: Path, tmp_path: Path, made: Any) -> None:
    made.write_blank_nifti((made.chest(1) + 1024).transpose(2, 1, 0), original / RAW)
    (row,) = place(scan_files(original), tmp_path)
    assert row["status"] == "HEADER_MISMATCH" and "(30, 44, 40)" in row["message"]


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda raw: raw[: len(raw) // 2], "GZIP_CORRUPT"),
        (lambda raw: raw[:5000] + bytes([raw[5000] ^ 4]) + raw[5001:], "GZIP_CORRUPT"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-2]), "SCAN_TRUNCATED"),
        (lambda raw: gzip.compress(gzip.decompress(raw) + b"xx"), "SCAN_TRAILING_DATA"),
        (lambda raw: b"no scan at all", "SCAN_UNREADABLE"),
        (lambda raw: b"", "SCAN_UNREADABLE"),
    ],
)
def test_damaged_originals_are_refused(original: Path, tmp_path: Path, damage: Any, code: str) -> None:
    path = original / RAW
    path.write_bytes(damage(path.read_bytes()))
    (row,) = place(scan_files(original), tmp_path)
    assert row["status"] == code and NAME in row["source"]
    assert not list((tmp_path / "images").iterdir())


def test_a_bomb_is_refused_by_what_it_declares(tmp_path: Path, made: Any) -> None:
    path = made.write_blank_nifti(np.zeros((2, 2, 2), np.int16), tmp_path / "x.nii")
    content = bytearray(path.read_bytes())
    content[42:48] = np.array([32767] * 3, "<i2").tobytes()
    path.write_bytes(gzip.compress(bytes(content)))
    known = KnownHeader(affine=None, slope=1.0, intercept=0.0, shape=None, source="t")
    with pytest.raises(PhotonError, match="SCAN_TOO_LARGE"):
        write_mended(path, known, tmp_path / "y.nii.gz")


def test_unchanged_scans_are_not_read_again(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = place(scan_files(original), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.datasets.placing.read_scan", lambda path: pytest.fail("read again"))
        assert place(scan_files(original), tmp_path) == first
    with monkeypatch.context() as patch:
        seen: list[Path] = []
        patch.setattr("pipelines.datasets.placing.read_scan", lambda path: seen.append(path) or read_scan(path))
        table = original / "dataset/metadata/validation_metadata.csv"
        table.write_text(table.read_text().replace(",10.0,", ",5.0,"))
        place(scan_files(original), tmp_path)
        assert len(seen) == 1
        (tmp_path / "images" / f"{NAME}.nii.gz").unlink()
        place(scan_files(original), tmp_path)
        assert len(seen) == 2


def test_a_scan_has_one_file_whatever_its_ending(original: Path, tmp_path: Path, made: Any) -> None:
    place(scan_files(original), tmp_path)
    (original / FIXED).parent.mkdir(parents=True)
    write_scan(made.chest(1), np.diag([-7.0, -7.5, 10.0, 1.0]), (original / FIXED).with_suffix(""))
    place(scan_files(original), tmp_path)
    assert [path.name for path in (tmp_path / "images").iterdir()] == [f"{NAME}.nii"]


def test_a_kill_keeps_what_is_known_of_the_others(
    original: Path, tmp_path: Path, made: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = scan_files(original)
    assert isinstance(found, ScanFile)
    scans = [dataclasses.replace(found, scan_id=f"s{number}") for number in range(4)]
    place(list(scans), tmp_path)
    monkeypatch.setattr("pipelines.datasets.placing._SAVE_EVERY", 1)

    def kill(done: int, total: int, label: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place_scans(scans, tmp_path / "images", tmp_path / "scans.parquet", "link", kill, num_workers=1)
    assert pl.read_parquet(tmp_path / "scans.parquet")["scan_id"].to_list() == ["s0", "s1", "s2", "s3"]


def test_findings_become_yes_no_questions(tmp_path: Path, made: Any, read: Any) -> None:
    header = ["VolumeName", *(name.capitalize() for name in FINDINGS)]
    rows = [
        ["train_1_a_1.nii.gz", 1, *[0] * 17],
        ["valid_1_a_1.nii.gz", "1.0", 2, *[0] * 16],
        ["other.nii.gz", *[0] * 18],
    ]
    made.write_csv(tmp_path / "labels/train_predicted_labels.csv", header, rows)
    drafts, refusals = read("ct-rate", tmp_path)
    assert len(drafts) == 18 + 17 and len(refusals) == 2
    assert sorted({(draft.scan_id, draft.patient_id, draft.split) for draft in drafts}) == [
        ("train_1_a_1", "train_1", "train"),
        ("valid_1_a_1", "valid_1", "test"),
    ]
    assert [draft.subtype for draft in drafts if draft.answer == "yes"] == ["medical material existence"] * 2
    assert len({draft.question for draft in drafts}) == 18


def test_conversations(tmp_path: Path, read: Any) -> None:
    def talk(*turns: tuple[str, str]) -> list[dict[str, str]]:
        return [{"from": who, "value": value} for who, value in turns]

    samples = [
        {
            "id": "1",
            "image": "valid_1_a_1.nii.gz",
            "conversations": talk(
                ("human", "<image>\nWhere is the nodule?<short_answer>"),
                ("gpt", "Right lower lobe."),
                ("human", "Write the report.<report_generation>"),
                ("gpt", "..."),
            ),
        },
        {"image": "valid_1_a_1.nii.gz", "conversations": talk(("gpt", "Hello"))},
        {"image": "a.jpg", "conversations": talk(("human", "?"), ("gpt", "!"))},
        {"image": "valid_1_a_1.nii.gz"},
    ]
    (tmp_path / "valid_vqa.json").write_text(json.dumps(samples))
    (draft,), refusals = read("ct-rate", tmp_path)
    assert (draft.question, draft.answer, draft.subtype) == (
        "Where is the nodule?",
        "Right lower lobe.",
        "short answer",
    )
    assert [refusal.place.row for refusal in refusals] == [1, 2, 3, 4]
