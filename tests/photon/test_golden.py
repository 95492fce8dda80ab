"""The published implementation's numbers, `tests/golden`: all of them hold, and they are worth holding."""

from __future__ import annotations

from pathlib import Path

import pytest

from photon.checkpoint import load_tensors
from photon.golden import MODES
from photon.parity import FORWARD_TOLERANCE, GRADIENT_TOLERANCE, KEPT_SET, ParityRow, check_parity, largest_errors

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = load_tensors(GOLDEN / "cases.safetensors")
SAMPLES = ("s0", "s1")
THRESHOLD_NETWORK = ".atp.predictor."


@pytest.fixture(scope="module")
def rows() -> list[ParityRow]:
    return check_parity(GOLDEN, GOLDEN / "cases.safetensors")


def test_every_number_holds(rows: list[ParityRow]) -> None:
    assert not [row for row in rows if not row.holds]
    assert (FORWARD_TOLERANCE, GRADIENT_TOLERANCE) == (1e-4, 1e-3)
    # Far inside what is tolerated: a step towards the limit is worth a look.
    errors = largest_errors(rows)
    assert 0 < errors["forward"] < 2e-5 and 0 < errors["gradient"] < 2e-4


def test_every_golden_tensor_is_checked(rows: list[ParityRow]) -> None:
    inputs = {f"{sample}.{name}" for sample in SAMPLES for name in ("input_ids", "labels", "pixel_values", "grid_thw")}
    operator = ("x", "p", "presence", "vision_mask", "grad_out")
    inputs |= {f"{rule}.{name}" for rule in ("sgp", "sgp_strict") for name in operator}
    inputs |= {f"band.delta{offset}" for offset in ("-1.0", "0.0", "1.0")}
    names = [".".join(filter(None, (row.sample, row.mode, row.quantity))) for row in rows if row.quantity != KEPT_SET]
    assert sorted(names) == sorted(CASES.keys() - inputs)


def test_every_mode_of_every_sample_compares_its_kept_set(rows: list[ParityRow]) -> None:
    assert [(row.sample, row.mode) for row in rows if row.quantity == KEPT_SET] == [
        (sample, mode) for sample in SAMPLES for mode in MODES
    ]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("mode", MODES)
def test_kept_sets_are_neither_empty_nor_all(sample: str, mode: str) -> None:
    kept = CASES[f"{sample}.{mode}.delta"] > 0
    assert 0 < int(kept.sum()) < kept.numel()


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "eval"])
def test_gradients_are_there(rows: list[ParityRow], sample: str, mode: str) -> None:
    """The threshold network learns in neither the warm-up nor a disturbed branch; everything else always does."""
    compared = {
        row.quantity
        for row in rows
        if (row.sample, row.mode) == (sample, mode) and row.quantity.startswith("grad.") and row.error is not None
    }
    golden = {name.removeprefix(f"{sample}.{mode}.") for name in CASES if name.startswith(f"{sample}.{mode}.grad.")}
    has_no_gradient = {name for name in golden if THRESHOLD_NETWORK in name and mode in ("warmup", "robust", "flip")}
    assert compared == golden - has_no_gradient
    assert len(compared) >= 3
    assert all(bool(CASES[f"{sample}.{mode}.{name}"].any()) for name in compared)


@pytest.mark.parametrize("rule", ["sgp", "sgp_strict"])
def test_operator_rows_are_ragged(rule: str) -> None:
    taken = CASES[f"{rule}.presence"].bool() | ~CASES[f"{rule}.vision_mask"].bool()
    assert len(set(taken.sum(1).tolist())) > 1


def test_keep_band_agrees(rows: list[ParityRow]) -> None:
    offsets = ("-1.0", "0.0", "1.0")
    assert [row.quantity for row in rows if row.sample == "band" and row.holds] == [f"loss{o}" for o in offsets]
    assert [bool(CASES[f"band.loss{o}"] > 0) for o in offsets] == [True, False, True], "outside the band alone"
