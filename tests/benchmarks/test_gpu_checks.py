"""The GPU checks on the CPU with a micro model: the same code, in seconds."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_checks.py"
OPERATORS = ("ops 64 tokens, 63 kept, bfloat16", "ops 64 tokens, 25 kept, bfloat16")
MORE = {"vanilla": "pruning_saves", "all_tokens": "pruning_saves", "photon": "backends"}
PARTS = ("build", "prefill", "generation", "sharing 1", "sharing 3", "training", "training_checkpointed")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_checks", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_checks"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.QUESTIONS = (1, 3)
    sys.modules["probes"].CPU_CACHE_BYTES = 2**20  # type: ignore[attr-defined]
    return module


@pytest.fixture(scope="module")
def everything(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any]]:
    return run(script, tmp_path_factory.mktemp("gpu"))


def run(script: ModuleType, folder: Path, *more: str) -> tuple[int, dict[str, Any]]:
    code = script.main(
        ["--device", "cpu", "--size", "micro", "--repeats", "1", "--output", str(folder), "--tests", "", *more]
    )
    return code, json.loads((folder / "gpu.json").read_text())


def test_all_parts(everything: tuple[int, dict[str, Any]]) -> None:
    code, found = everything
    parts = found["parts"]
    assert code == 0 and found["failed"] == []
    of_models = {f"{name} {part}" for name, more in MORE.items() for part in (*PARTS, more)}
    assert set(parts) == {*OPERATORS, *of_models}
    assert [parts[f"{name} build"]["visual_tokens"] for name in ("vanilla", "all_tokens", "photon")] == [128, 64, 64]
    assert {parts[f"{name} build"]["text_tokens"] for name in ("vanilla", "photon")} == {90}
    assert parts["photon build"]["dtype"] == "torch.bfloat16"
    assert parts["photon build"]["kept_share"] == pytest.approx(0.39, abs=0.03)
    assert parts["all_tokens prefill"]["cached_rows"] == 154 and 90 < parts["photon prefill"]["cached_rows"] < 140
    for name in ("vanilla", "all_tokens", "photon"):
        assert parts[f"{name} generation"]["questions_3"]["tokens_per_s"] > 0
        plain, again = (parts[f"{name} {part}"] for part in ("training", "training_checkpointed"))
        assert plain["loss"] == again["loss"] > 0
    assert parts["photon training"]["parameters_without_gradient"] == ["model.layers.1.atp.pos_proj.weight"]
    assert found["ratios"]["training vanilla over photon, median_ms"] == pytest.approx(
        parts["vanilla training"]["median_ms"] / parts["photon training"]["median_ms"]
    )
    assert {"machine", "versions", "commit", "configuration"} <= found.keys()


def test_operators_beside_the_model(everything: tuple[int, dict[str, Any]]) -> None:
    _, found = everything
    parts, ratios = found["parts"], found["ratios"]
    for name in OPERATORS:
        step, saved = parts[name]["step"]["auto"]["median_ms"], parts["all_tokens pruning_saves"]["saved_ms"]
        assert ratios[f"{name}, step over the prefill saved"] == pytest.approx(step / saved)
    assert parts["all_tokens pruning_saves"]["kept_share"] == pytest.approx(0.39, abs=0.03)
    compared = parts["photon backends"]
    assert compared["auto"] == "reference" and {"prefill", "training"} < compared.keys()
    assert compared["training"]["auto_over_reference"] > 0


def test_a_part_that_fails_is_recorded_and_the_others_run(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_memory(self: Any) -> dict[str, Any]:
        raise torch.OutOfMemoryError("40 GiB")

    random_model = script.random_model

    def overflowing(config: Any, device: torch.device) -> Any:
        model = random_model(config, device)
        model.model.layers[0].mlp.down_proj.weight.register_hook(lambda gradient: gradient * torch.inf)
        return model

    monkeypatch.setattr(script, "CONTENDERS", ("photon",))
    monkeypatch.setattr(script, "random_model", overflowing)
    monkeypatch.setattr(script.Contender, "generation", no_memory)
    code, found = run(script, tmp_path)
    assert code == 1 and found["failed"] == ["photon training", "photon training_checkpointed"]
    statuses = {name: part["status"] for name, part in found["parts"].items()}
    assert statuses.pop("photon generation") == "out of memory"
    of_model = {f"photon {part}" for part in (*PARTS, MORE["photon"]) if part != "generation"}
    assert set(statuses) == {*OPERATORS, *of_model}
    assert [statuses[f"photon {part}"] for part in ("build", "prefill", "sharing 3")] == ["ok"] * 3
    error = found["parts"]["photon training"]["error"]
    assert "gradient of model.layers.0.mlp.down_proj.weight" in error and "not finite" in error
    assert "failed photon training" in capsys.readouterr().out


def test_operators_that_disagree_fail(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compact = script.bench_ops.compact
    monkeypatch.setattr(script, "CONTENDERS", ())
    monkeypatch.setattr(script.bench_ops, "compact", lambda *a, **k: [x.flip(0) for x in compact(*a, **k)])
    code, found = run(script, tmp_path)
    assert code == 1 and found["failed"] == list(OPERATORS)
    assert "compaction: moved rows differ" in found["parts"][OPERATORS[0]]["error"]


def test_questions_that_disagree_fail(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contender = script.Contender("all_tokens", script.size_of("micro"), torch.device("cpu"), 1)
    first_logits = contender.first_logits

    def swapped(batch: Any) -> torch.Tensor:
        return first_logits(batch).roll(1, 0)

    monkeypatch.setattr(contender, "first_logits", swapped)
    with pytest.raises(AssertionError, match="shared and separate"):
        contender.sharing(3)


def test_tests_are_run_and_counted(script: ModuleType, tmp_path: Path) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    source = tmp_path / "test_some.py"
    source.write_text("import pytest\n\ndef test_well(): pass\n\n@pytest.mark.skip\ndef test_later(): pass\n")
    assert script.run_tests(str(source), gpu, "not gpu") == {"passed": 1, "skipped": 1}
    source.write_text("import pytest\n\n@pytest.mark.skip\ndef test_later(): pass\n")
    assert script.run_tests(str(source), cpu, "not gpu") == {"skipped": 1}
    with pytest.raises(AssertionError, match="'skipped': 1"):
        script.run_tests(str(source), gpu, "not gpu")
    source.write_text("def test_ill(): assert 0, 'wrong by far'\n")
    with pytest.raises(AssertionError, match="wrong by far"):
        script.run_tests(str(source), cpu, "not gpu")


def test_without_a_gpu(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert script.main(["--output", str(tmp_path)]) == 2
    output = capsys.readouterr().out
    assert output.startswith("No GPU") and output.count("\n") == 1
    assert not list(tmp_path.iterdir())
