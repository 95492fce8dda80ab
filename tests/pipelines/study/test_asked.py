"""What a question asks about: organ, lesion, and other places."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from photon.errors import PhotonError
from pipelines.anatomy import LABELS
from pipelines.dataset import LabelledScan, read_split
from pipelines.measurements import REGIONS
from pipelines.questions import Question
from pipelines.regions import organ_tokens
from pipelines.study.asked import lesion_labels, read_asked_regions, tokens_by_label
from pipelines.study.region_table import asked_scans, elsewhere, read_regions, write_regions
from pipelines.volumes import resample_labels


def question(subtype: str, organ: str, number: int = 0) -> Question:
    return Question(
        question_id=f"s.{number}",
        scan_id="s",
        patient_id="p",
        split="test",
        family="recognition",
        subtype=subtype,
        organ=organ,
        kind="closed",
        question="?",
        options=("yes", "no"),
        answer="yes",
    )


@pytest.mark.parametrize(
    ("subtype", "organ", "expected"),
    [
        ("liver cyst existence", "liver", ("liver cyst",)),
        ("kidney cyst existence", "left kidney", ("left kidney cyst",)),
        ("left nodule existence", "left lung", ("left nodule",)),
        ("nodule side", "lungs", ("left nodule", "right nodule")),
        ("effusion side", "lungs", ("left effusion", "right effusion")),
        ("lesion counting", "liver", ("liver cyst", "liver tumor")),
        ("lung finding", "right lung", ("right nodule", "right effusion")),
        ("organ volume", "liver", ()),
        ("splenomegaly", "spleen", ()),
        ("bone lesion existence", "bone lesion", ("bone lesion",)),
        ("organs compared", "", ()),
    ],
)
def test_lesions_that_a_question_asks_about(subtype: str, organ: str, expected: tuple[str, ...]) -> None:
    assert lesion_labels(question(subtype, organ), LABELS | {"bone lesion": 20}) == expected


def test_regions_are_the_label_maps_tokens(smoke_data: Path) -> None:
    scan = read_split(smoke_data, "test")[0]
    regions = read_asked_regions(smoke_data, *_place(scan), scan.questions)
    scan_id = scan.questions[0].scan_id
    labels = resample_labels(smoke_data / "raw" / "labels" / f"{scan_id}.nii", scan.volume.spec)
    for asked in scan.questions:
        region = regions[asked.question_id]
        names = REGIONS.get(asked.organ, (asked.organ,))
        mask = np.isin(labels, [LABELS[name] for name in names])
        assert region.organ is not None and (region.organ == organ_tokens(mask)).all()
        there = np.isin(labels, [LABELS[name] for name in lesion_labels(asked, LABELS)])
        assert (region.lesion is None) == (not there.any())
        if region.lesion is not None:
            assert (region.organ | ~region.lesion).all(), "a lesion lies in its organ's tokens"


def test_without_a_label_map_nothing_is_known(smoke_data: Path, tmp_path: Path) -> None:
    scan = read_split(smoke_data, "test")[0]
    assert read_asked_regions(tmp_path, *_place(scan), scan.questions) == {}


def _place(scan: LabelledScan) -> tuple[str, object, np.ndarray]:
    return scan.questions[0].scan_id, scan.volume.spec, scan.volume.affine


def test_tokens_by_label_by_hand() -> None:
    labels = np.zeros((14, 28, 84), dtype=np.uint8)
    labels[3, 5, 27], labels[3, 5, 28], labels[0, 0, 83] = 7, 7, 255
    held = tokens_by_label(labels)
    assert held.shape == (256, 3)
    assert held[7].tolist() == [True, True, False] and held[255].tolist() == [False, False, True]
    assert held[0].all() and held.sum() == 6


def test_other_places_share_no_label() -> None:
    organs = ["liver", "lungs", "left lung", "left lung", "spleen"]
    places = [[5, 11], [1, 2], [1], None, None]
    assert elsewhere(organs, places).astype(int).tolist() == [
        [0, 1, 1, 1, 1],
        [1, 0, 0, 1, 1],
        [1, 0, 0, 0, 1],
        [1, 1, 0, 0, 1],
        [1, 1, 1, 1, 0],
    ]


def test_the_table_of_regions(smoke_data: Path, tmp_path: Path) -> None:
    made = write_regions(smoke_data, tmp_path / "regions.parquet", split="test", max_scans=2)
    assert made.equals(read_regions(tmp_path / "regions.parquet"))
    scans = asked_scans(smoke_data, "test", 2)
    assert made["question_id"].to_list() == [q.question_id for _, _, asked in scans for q in asked]
    scan = next(each for each in read_split(smoke_data, "test") if each.questions[0].scan_id == scans[0][0])
    regions = read_asked_regions(smoke_data, *_place(scan), scan.questions)
    for row in made.filter(pl.col("question_id").is_in(list(regions))).iter_rows(named=True):
        region = regions[row["question_id"]]
        assert region.organ is not None and row["organ_region"] == np.flatnonzero(region.organ).tolist()
        assert row["lesion_region"] == (None if region.lesion is None else np.flatnonzero(region.lesion).tolist())
        assert row["place"] == np.flatnonzero(region.labels).tolist()


def test_what_the_table_refuses(smoke_data: Path, tmp_path: Path) -> None:
    with pytest.raises(PhotonError) as caught:
        asked_scans(smoke_data, "none")
    assert caught.value.code == "SPLIT_EMPTY"
    pl.DataFrame({"question_id": ["q"]}).write_parquet(tmp_path / "other.parquet")
    for name in ("other.parquet", "missing.parquet"):
        with pytest.raises(PhotonError) as caught:
            read_regions(tmp_path / name)
        assert caught.value.code == "TABLE_UNREADABLE"
