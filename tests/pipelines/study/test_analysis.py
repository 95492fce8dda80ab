"""From tables to numbers, on a table small enough to count by hand."""

from __future__ import annotations

import json
from typing import Any

import polars as pl
import pytest

from pipelines.study.analysis import COSTS, analyse
from pipelines.study.looking import JOINED_SCHEMA
from pipelines.study.records import RunRecord

RARE = "bone lesion existence"


def run(variant: str, seed: int) -> RunRecord:
    numbers = {name: float(10 * seed + place) for place, name in enumerate(COSTS)}
    return RunRecord(
        variant=variant,
        seed=seed,
        checkpoint="",
        history="",
        answers="",
        num_warm_up_steps=1,
        num_steps=2,
        kept_fraction=0.5,
        accuracy=0.5,
        num_kept=3.0,
        num_tokens=10.0,
        **numbers,
    )


def rows_of(variant: str, seed: int, right: str, kept: list[int], condition: str = "trained") -> list[dict[str, Any]]:
    """Four yes/no questions about two patients; ``right`` has a letter a question, "x" for a wrong answer."""
    found = []
    for place, (patient, gold, subtype) in enumerate(
        [("a", "yes", "cyst existence"), ("a", "no", "cyst existence"), ("b", "yes", RARE), ("b", "no", RARE)]
    ):
        wrong = right[place] == "x"
        found.append(
            {
                "variant": variant,
                "seed": seed,
                "condition": condition,
                "question_id": f"{patient}.{place}",
                "scan_id": patient,
                "patient_id": patient,
                "family": "recognition" if place < 2 else "medical reasoning",
                "subtype": subtype,
                "organ": f"organ {place}",
                "kind": "closed",
                "num_options": 2 if place < 2 else 4,
                "gold": gold,
                "predicted": {"yes": "no", "no": "yes"}[gold] if wrong else gold,
                "score": float(not wrong),
                "gold_probability": 0.25 if wrong else 0.75,
                "num_tokens": 10,
                "num_kept": len(kept),
                "kept": kept,
                "organ_region": [0, 1, 2, 3],
                "lesion_region": [0, 1] if gold == "yes" else None,
                "place": [place],
            }
        )
    return found


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    rows = [
        *rows_of("photon", 0, "ooox", [0, 1, 9]),
        *rows_of("photon", 1, "ooxx", [0, 4, 5]),
        *rows_of("photon", 0, "oooo", list(range(10)), "all tokens"),
        *rows_of("photon", 1, "oooo", list(range(10)), "all tokens"),
        *rows_of("photon", 0, "xxox", [2, 3, 4, 5, 6, 7, 8], "removed"),
        *rows_of("photon", 1, "xxxx", [1, 2, 3, 6, 7, 8, 9], "removed"),
        *rows_of("all", 0, "xoxx", list(range(10))),
        *rows_of("all", 1, "xoxx", list(range(10))),
    ]
    majority = [{**row, "kept": None, "num_kept": 0, "num_tokens": 0} for row in rows_of("majority", 0, "oxox", [])]
    answers = pl.DataFrame(rows + majority, schema=JOINED_SCHEMA, orient="row")
    runs = [run(variant, seed) for variant in ("photon", "all") for seed in (0, 1)]
    return analyse(answers, runs, rare_subtypes=(RARE,))


def test_it_is_json(content: dict[str, Any]) -> None:
    assert json.loads(json.dumps(content, allow_nan=False)).keys() == content.keys()


def test_questions_and_chance(content: dict[str, Any]) -> None:
    assert content["questions"] == {
        "num_questions": 4,
        "num_patients": 2,
        "num_scans": 2,
        "by_family": {"medical reasoning": 2, "recognition": 2},
        "chance": (0.5 + 0.5 + 0.25 + 0.25) / 4,
        "seeds": [0, 1],
    }


def test_accuracy_and_differences(content: dict[str, Any]) -> None:
    accuracy = content["accuracy"]
    assert accuracy["photon"]["all"]["value"] == pytest.approx((0.75 + 0.5) / 2)
    assert accuracy["photon"]["all"]["by_seed"] == [0.75, 0.5]
    assert accuracy["photon"]["family"]["recognition"]["value"] == 1.0
    assert accuracy["all"]["all"]["value"] == 0.25
    assert accuracy["majority"]["all"]["by_seed"] == [0.5]
    gaps = content["differences"]
    assert set(gaps) == {"photon - all", "photon - majority"}
    assert gaps["photon - all"]["all"]["value"] == pytest.approx(0.375)
    assert gaps["photon - all"]["all"]["by_seed"] == [0.5, 0.25]
    assert gaps["photon - majority"]["all"]["value"] == pytest.approx(0.625 - 0.5)


def test_findings(content: dict[str, Any]) -> None:
    found = {(row["variant"], row["name"]): row for row in content["findings"]}
    every = found["photon", "all yes/no questions"]
    assert (every["num_present"], every["num_absent"]) == (2, 2)
    assert every["sensitivity"]["value"] == pytest.approx((1.0 + 0.5) / 2)
    assert every["specificity"]["value"] == pytest.approx((1.0 + 0.0) / 2)
    rare = found["photon", "rare findings"]
    assert (rare["sensitivity"]["value"], rare["specificity"]["value"]) == (0.5, 0.0)
    assert found["all", "cyst existence"]["balanced_accuracy"]["value"] == 0.5


def test_tokens(content: dict[str, Any]) -> None:
    tokens = content["tokens"]["photon"]
    assert (tokens["mean"], tokens["sd"], tokens["min"], tokens["max"], tokens["of"]) == (3.0, 0.0, 3, 3, 10.0)
    assert tokens["share"]["value"] == pytest.approx(0.3)


def test_regions(content: dict[str, Any]) -> None:
    region = {row["name"]: row for row in content["regions"]["photon"]}
    # Seed 0 keeps 2 of the lesions' 2 and 2 of the organs' 4, seed 1 one of both.
    assert region["lesion"]["asked_share"]["value"] == pytest.approx((1.0 + 0.5) / 2)
    assert region["organ"]["asked_share"]["value"] == pytest.approx((0.5 + 0.25) / 2)
    assert region["all"]["overall_share"]["value"] == pytest.approx(0.3)
    assert region["all"]["ratio"]["value"] == pytest.approx(((0.75 + 0.375) / 2) / 0.3)
    assert region["all"]["above_unasked"]["value"] == pytest.approx(0.0)
    everything = {row["name"]: row for row in content["regions"]["all"]}
    assert everything["all"]["ratio"]["value"] == 1.0
    gap = content["region_differences"]["photon - all"]
    assert gap["value"] == pytest.approx((0.75 + 0.375) / 2 - 0.3)


def test_what_if(content: dict[str, Any]) -> None:
    found = content["what_if"]["photon"]
    assert list(found) == ["trained", "all tokens", "removed"]
    assert found["removed"]["all"]["change"]["value"] == pytest.approx(0.125 - 0.625)
    assert found["removed"]["all"]["probability_change"]["value"] == pytest.approx(-0.25)
    assert found["removed"]["lesion present"]["score"]["num_questions"] == 2
    assert found["removed"]["lesion present"]["change"]["value"] == pytest.approx(0.25 - 0.75)
    assert found["removed"]["about a lesion"]["score"]["num_questions"] == 4
    assert found["trained"]["all"]["change"] is None
    assert found["all tokens"]["all"]["num_kept"] == 10.0


def test_rare_findings(content: dict[str, Any]) -> None:
    rare = content["rare"]
    assert rare["photon"]["recall"]["value"] == 0.5
    assert rare["photon"]["recall_all_tokens"]["value"] == 1.0
    assert rare["photon"]["difference"]["value"] == -0.5
    assert set(rare["all"]) == {"recall"}


def test_costs_are_means_over_seeds(content: dict[str, Any]) -> None:
    assert content["cost"]["all"]["questions_per_second"] == 5.0
    assert set(content["cost"]["all"]) == set(COSTS)
