"""What a question asks about: organ, lesion, and other places."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipelines.anatomy import LABELS
from pipelines.dataset import LabelledScan, read_split
from pipelines.measurements import REGIONS
from pipelines.questions import Question
from pipelines.regions import organ_tokens
from pipelines.study.asked import AskedRegion, lesion_labels, other_place, read_asked_regions
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


def test_other_places_share_no_label() -> None:
    def region(*values: int) -> AskedRegion:
        labels = np.zeros(256, dtype=bool)
        labels[list(values)] = True
        return AskedRegion(organ=None, lesion=None, labels=labels)

    liver, lungs, lung = question("a", "liver", 1), question("b", "lungs", 2), question("c", "left lung", 3)
    regions = {"s.1": region(5, 11), "s.2": region(1, 2), "s.3": region(1)}
    assert other_place(regions, liver, lungs) and other_place(regions, lungs, liver)
    assert not other_place(regions, lungs, lung) and not other_place(regions, liver, liver)
    assert other_place({}, lungs, lung), "by name alone, they are different organs"
    assert not other_place({}, lung, dataclasses.replace(lung, question_id="s.4"))
