"""The benchmark of the operators with a micro model's shapes: what it compares, counts and measures."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from photon.testing import micro_config

FOLDER = Path(__file__).parents[2] / "benchmarks"
OPERATIONS = {"saliency", "schedule", "selection", "compaction", "pack", "pack_backward", "step"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_ops", FOLDER / "bench_ops.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_ops"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def small_caches(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["probes"], "CPU_CACHE_BYTES", 2**20)


def case_of(bench: ModuleType, dtype: torch.dtype = torch.bfloat16, tokens: int = 40, kept: int = 16) -> Any:
    return bench.Case(config=micro_config(), num_tokens=tokens, num_kept=kept, dtype=dtype)


def run(bench: ModuleType, folder: Path) -> tuple[int, dict[str, Any]]:
    options = ["--device", "cpu", "--sizes", "40", "--repeats", "2", "--output", str(folder)]
    code = bench.main(options, micro_config())
    return code, json.loads((folder / "ops.json").read_text())


def test_all_operations_agree_and_are_measured(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = run(bench, tmp_path)
    assert code == 0 and {"machine", "versions", "commit", "triton", "configuration"} <= found.keys()
    names = [f"40 tokens, {kept} kept, {dtype}" for dtype in ("float32", "bfloat16") for kept in (39, 16)]
    assert [case["case"] for case in found["cases"]] == names
    for case in found["cases"]:
        assert case["auto"] == "reference" and case.keys() > OPERATIONS
        for name in OPERATIONS:
            row = case[name]["auto"]
            assert case[name]["floor_ms"] == pytest.approx(1000 * case[name]["bytes"] / found["bandwidth_bytes_per_s"])
            assert row["median_ms"] >= row["best_ms"] > 0 and row["peak_over_output"] >= 1
            if name in ("schedule", "selection"):
                assert "naive" not in case[name]
            else:
                naive = case[name]["naive"]
                assert row["naive_over_this"] == pytest.approx(naive["median_ms"] / row["median_ms"])
        for name in ("saliency", "pack_backward"):
            row = case[name]["auto"]
            assert max(row["error"], row["naive_error"]) <= row["error_allowed"] < 1e-4
    assert [aim["wanted"] for aim in found["aims"]] == [2, 10, 50] * 4
    for aim in found["aims"]:
        is_met = aim["found"] <= 2 if aim["wanted"] == 2 else aim["found"] >= aim["wanted"]
        assert aim["is_met"] == is_met
    output = capsys.readouterr().out
    assert output.count("x faster") == 4 and output.count("pack_backward  naive") == 4
    assert output.count("MISSED 40") + output.count("met    40") == len(found["aims"])


def changed(function: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: change(function(*arguments, **options))


def one_number_off(tensors: list[Tensor]) -> list[Tensor]:
    tensors[-1].view(-1)[-1] += 1
    return tensors


WRONG: dict[str, tuple[str, Callable[[Any], Any], set[str]]] = {
    "scores rounded to half precision": ("saliency", lambda u: u.bfloat16().float(), {"saliency"}),
    "one token's score": ("saliency", lambda u: u + 1e-3 * (torch.arange(u.shape[1]) == 7), {"saliency"}),
    "one number moved": ("compact", one_number_off, {"compaction"}),
    "a row less": ("compact", lambda moved: [x[:-1] for x in moved], {"compaction"}),
    "another type": ("compact", lambda moved: [x.double() for x in moved], {"compaction"}),
    "packed rows": ("pack", lambda packed: packed * (1 + 2**-7), {"pack", "pack_backward"}),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_operator_is_not_timed(
    bench: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    name, change, expected = WRONG[kind]
    monkeypatch.setattr(bench, name, changed(getattr(bench, name), change))
    monkeypatch.setattr(bench, "KEPT_COUNT", 16)  # the share of 40: one case a type
    code, found = run(bench, tmp_path)
    assert code == 1
    for case in found["cases"]:
        assert {name for name in OPERATIONS if "refused" in case[name]} == expected
        assert all("auto" not in case[name] and "naive" not in case[name] for name in expected)
    assert f"40 tokens, 16 kept, bfloat16, {min(expected)}: " in capsys.readouterr().out


def test_a_wrong_decision_selection_or_rule_is_refused(bench: ModuleType) -> None:
    inputs = bench.Inputs(case_of(bench, torch.float32), CPU)
    ours, naive = bench.ours(inputs, "auto"), bench.naive(inputs)
    decision = ours["schedule"]()
    bench.compare("schedule", decision, None, inputs)
    with pytest.raises(AssertionError, match="above the threshold"):
        bench.compare("schedule", decision._replace(keep=~decision.keep), None, inputs)
    lower = decision._replace(theta=decision.theta / 2, keep=decision.rho > decision.theta / 2)
    with pytest.raises(AssertionError, match="number of tokens"):
        bench.compare("schedule", lower, None, inputs)
    everything = bench.select_rows(torch.ones_like(decision.keep), inputs.layout)
    with pytest.raises(AssertionError, match="other rows"):
        bench.compare("selection", everything, None, inputs)
    grads = ours["pack_backward"]()
    bench.compare("pack_backward", grads, naive["pack_backward"](), inputs)
    with pytest.raises(AssertionError, match="exceed"):
        bench.compare("pack_backward", (*grads[:2], grads[2] * (1 + 2**-8)), naive["pack_backward"](), inputs)


def test_the_wanted_number_of_tokens_stays(bench: ModuleType) -> None:
    for kept in (1, 16, 39):
        inputs = bench.Inputs(case_of(bench, kept=kept), CPU)
        assert int(inputs.decision.keep.sum()) == kept
        assert inputs.selection.rows.tolist() == inputs.stays.nonzero().flatten().tolist()
        assert len(inputs.grad) == len(inputs.selection.rows) == kept + 90


def test_bytes_by_hand(bench: ModuleType) -> None:
    """4 query and 2 key heads of 8 numbers, rows of 32, two layers' keys and values, 4 hidden units; two bytes each."""
    case = case_of(bench, tokens=10, kept=4)
    assert case.row_bytes == 64 + 2 * 2 * 32 + 2 * 32
    assert bench.moved_bytes(case) == {
        "saliency": 10 * 32 + 60 * 96 + 40,
        "schedule": 40 + 130 + 4 * (48 + 4 + 4 + 1),
        "selection": 10 + 8 * 32 + 8 * 94 + 8 * 94 + 8 * 100 + 8 * 68,
        "compaction": 8 * 94 + 2 * 94 * 256,
        "pack": 8 * 94 + 2 * 94 * 64,
        "pack_backward": 94 * 64 + 4 * 64 + 100 * 64 + 8 * 100 + 40 + 40,
        "step": 6120 + 398 + 3114 + 48880,
    }
    moved = bench.ours(bench.Inputs(case, CPU), "auto")["compaction"]()
    assert sum(x.nbytes for x in moved) == 94 * case.row_bytes


def test_memory_at_its_peak(bench: ModuleType) -> None:
    """Two temporaries of 4 MiB one after the other, the second beside an output of 1 MiB; inputs do not count."""
    peak_bytes, given = sys.modules["probes"].peak_bytes, torch.ones(2**20)

    def two_temporaries() -> Tensor:
        first = given * 2
        del first
        second = given * 3
        return second[: 2**18].clone()

    assert peak_bytes(two_temporaries, CPU) == pytest.approx(5 * 2**20, abs=4096)
    assert peak_bytes(lambda: given[:7], CPU) == 0
    inside = peak_bytes(lambda: torch.linalg.vector_norm(given.half()), CPU)  # the copy is the operator's own
    assert inside == pytest.approx(2 * 2**20, abs=4096)


def test_turns(bench: ModuleType) -> None:
    called = []
    clock = sys.modules["probes"].Clock(CPU)
    found = clock.in_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 3)
    assert called == ["a", "b"] * 4 and found.keys() == {"a", "b"}
    assert sys.modules["probes"].summary([3.0, 1.0, 5.0]) == {"median_ms": 3.0, "best_ms": 1.0}


def test_bytes_of_results(bench: ModuleType) -> None:
    count = sys.modules["probes"].nbytes
    selection = bench.Inputs(case_of(bench, tokens=10, kept=4), CPU).selection
    assert count([torch.ones(3), (torch.ones(2, dtype=torch.bfloat16), None)]) == 16
    assert count(selection) == 8 * (94 + 94 + 100 + 1 + 1 + 68)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(bench: ModuleType) -> None:
    clock = bench.Clock(torch.device("cuda"))
    result = bench.measure_case(case_of(bench), clock, 1e12, 3)
    assert not bench.refused([result])
    step = result["step"]
    assert step["auto"]["host_waits"] == 1 and step["naive"]["host_waits"] > 1
    assert step["auto"].keys() == step["reference"].keys() > {"plain_ms", "launch_ms", "kernels_ms"}
    assert 0 < step["auto"]["num_kernels"] < step["naive"]["num_kernels"]
    given = torch.ones(2**20, device="cuda")
    assert sys.modules["probes"].peak_bytes(lambda: (given * 2)[:7].clone(), clock.device) == 4 * 2**20 + 512
