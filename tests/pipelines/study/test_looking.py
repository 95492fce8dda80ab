"""Where a model looks: distances, shares and permutation tests against values by hand and known truths."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from pipelines.study.looking import (
    JOINED_SCHEMA,
    jaccard_distances,
    place_test,
    region_shares,
    scan_looks,
    wording_test,
)

NUM_TOKENS = 40


def answer(scan: str, number: int, organ: str, kept: list[int] | None, **more: Any) -> dict[str, Any]:
    """A row of the answers table."""
    return {
        "variant": "photon",
        "seed": 0,
        "condition": "trained",
        "question_id": f"{scan}.q{number:02d}",
        "scan_id": scan,
        "patient_id": f"patient of {scan}",
        "family": "recognition",
        "subtype": organ,
        "organ": organ,
        "kind": "closed",
        "num_tokens": NUM_TOKENS,
        "num_kept": len(kept or []),
        "kept": kept,
    } | more


def table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=JOINED_SCHEMA, orient="row")


def test_jaccard_distances_by_hand() -> None:
    first = np.array([[1, 1, 0, 0], [0, 0, 0, 0]], dtype=bool)
    second = np.array([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=bool)
    expected = [[0.0, 1 - 1 / 3, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]
    assert jaccard_distances(first, second) == pytest.approx(np.array(expected))


def test_region_shares_by_hand() -> None:
    rows = table(
        [
            answer("s", 0, "liver", [0, 1, 5], organ_region=[0, 1, 2, 3], place=[5, 11]),
            answer("s", 1, "liver", [0, 9], organ_region=[0, 1, 2, 3], lesion_region=[3], place=[5, 11]),
            answer("s", 2, "spleen", [2, 3, 8, 9], organ_region=[8, 9], place=[6]),
            answer("s", 3, "kidney", [1], place=[7]),
        ]
    )
    (look,) = scan_looks(rows)
    shares = region_shares([look]).sort("question_id")
    assert shares["question_id"].to_list() == ["s.q00", "s.q01", "s.q02"]  # no kidney in the scan
    assert shares["about"].to_list() == ["organ", "lesion", "organ"]
    assert shares["asked_share"].to_list() == pytest.approx([2 / 4, 0.0, 1.0])
    assert shares["overall_share"].to_list() == pytest.approx([3 / 40, 2 / 40, 4 / 40])
    # The liver's tokens kept by spleen and kidney; the lesion's; the spleen's by liver, liver and kidney.
    assert shares["unasked_share"].to_list() == pytest.approx([(2 / 4 + 1 / 4) / 2, 1 / 2, (0 + 1 / 2 + 0) / 3])


def test_places_that_are_not_known_differ_by_the_organs_name() -> None:
    rows = table([answer("s", 0, "liver", [0]), answer("s", 1, "liver", [1]), answer("s", 2, "spleen", [2])])
    (look,) = scan_looks(rows)
    assert look.is_elsewhere.tolist() == [[False, False, True], [False, False, True], [True, True, False]]


def test_pooled_tokens_have_no_place() -> None:
    assert list(scan_looks(table([answer("s", 0, "liver", None)]))) == []


def _looks(depends: bool, num_scans: int = 12) -> Any:
    """Scans with two questions about each of four organs, and a paraphrase of each."""
    generator = np.random.default_rng(4)
    rows = []
    for scan in range(num_scans):
        for number in range(8):
            organ = number // 2
            for condition in ("trained", "paraphrase"):
                chosen = range(10 * organ, 10 * organ + 10) if depends else range(NUM_TOKENS)
                kept = sorted(generator.choice(list(chosen), 8 if depends else 10, replace=False).tolist())
                rows.append(answer(f"s{scan:02d}", number, f"organ {organ}", kept, condition=condition))
    return list(scan_looks(table(rows)))


def test_tokens_that_follow_the_organ_are_told_apart() -> None:
    looks = _looks(depends=True)
    place, wording = place_test(looks), wording_test(looks)
    assert place is not None and wording is not None
    assert place["p_value"] == pytest.approx(1 / 2000)
    assert place["other_organ"]["value"] == 1.0 and place["same_organ"]["value"] < 0.6
    assert place["difference"]["low"] > 0.3
    assert wording["p_value"] == pytest.approx(1 / 2000)
    assert wording["difference"]["low"] > 0.2
    assert place["num_scans"] == wording["num_scans"] == 12


def test_random_tokens_are_not() -> None:
    looks = _looks(depends=False)
    place, wording = place_test(looks), wording_test(looks)
    assert place is not None and wording is not None
    assert place["p_value"] > 0.02 and wording["p_value"] > 0.02
    assert place["difference"]["low"] < 0 < place["difference"]["high"]


def test_p_values_of_random_tokens_are_uniform() -> None:
    """Under the null hypothesis a p below 0.25 comes about one time in four."""
    generator = np.random.default_rng(0)
    low = []
    for _ in range(60):
        rows = []
        for scan in range(3):
            for number in range(5):
                for condition in ("trained", "paraphrase"):
                    kept = sorted(generator.choice(12, 4, replace=False).tolist())
                    rows.append(answer(f"s{scan}", number, f"organ {number % 2}", kept, condition=condition))
        looks = list(scan_looks(table(rows)))
        for test in (place_test(looks), wording_test(looks)):
            assert test is not None
            low.append(test["p_value"] < 0.25)
    assert 0.12 < np.mean(low) < 0.38


def test_the_same_tokens_for_all_questions_are_no_evidence() -> None:
    rows = [
        answer("s", number, f"organ {number % 2}", [1, 2, 3], condition=condition)
        for number in range(6)
        for condition in ("trained", "paraphrase")
    ]
    looks = list(scan_looks(table(rows)))
    place, wording = place_test(looks), wording_test(looks)
    assert place is not None and place["p_value"] == 1.0
    assert wording is not None and wording["p_value"] == 1.0


def test_nothing_to_compare() -> None:
    one = list(scan_looks(table([answer("s", 0, "liver", [1])])))
    assert place_test(one) is None and wording_test(one) is None
    same = list(scan_looks(table([answer("s", number, "liver", [1]) for number in range(3)])))
    assert place_test(same) is None


def test_seeds_are_averaged_and_not_counted_as_scans() -> None:
    rows = [
        answer("s", number, f"organ {number % 2}", [number % 2, 5], seed=seed) for seed in (0, 1) for number in range(4)
    ]
    found = place_test(list(scan_looks(table(rows))))
    assert found is not None and found["num_scans"] == 1
    assert found["same_organ"]["num_questions"] == 4
    assert found["statistic"] == pytest.approx(2 / 3)
