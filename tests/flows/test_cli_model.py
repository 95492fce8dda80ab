"""Commands about a model: what they print, and how they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows import cli
from photon.errors import PhotonError
from pipelines.train_spec import TrainSpec

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CASES = GOLDEN / "cases.safetensors"
NUM_QUANTITIES = 297
Photon = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Photon:
    """Run a command line in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PHOTON_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("PHOTON_DEBUG", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = cli.run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def spoilt(target: Path) -> Path:
    """The golden cases with one number wrong and one tensor of an unknown name."""
    tensors = load_file(CASES)
    tensors["s0.hard.grad.model.layers.7.mlp.down_proj.weight"][3, 5] += 1.0
    tensors["s0.hard.surprise"] = torch.ones(1)
    save_file(tensors, target)
    return target


def test_parity_prints_a_line_a_quantity_and_a_summary(photon: Photon) -> None:
    code, text, error = photon("parity", GOLDEN, CASES)
    assert code == 0 and not error
    lines = text.splitlines()
    assert sum("yes" in line for line in lines) == NUM_QUANTITIES and "NO" not in text
    assert "…" not in text and "grad.visual.vision_patch_embed.proj.weight" in text, "a name is cut"
    assert any(line.split() == ["quantities", f"{NUM_QUANTITIES},", "all", "hold"] for line in lines)
    assert any(line.startswith("largest error gradient") for line in lines)


def test_parity_exits_with_1_when_a_number_is_wrong_and_says_which(photon: Photon, tmp_path: Path) -> None:
    code, text, error = photon("parity", GOLDEN, spoilt(tmp_path / "cases.safetensors"))
    assert code == 1 and not error, "a result, not an error"
    wrong = [line for line in text.splitlines() if "NO" in line]
    assert len(wrong) == 2 and "2 of them do not hold" in text
    assert "down_proj.weight" in wrong[0] and "surprise" in wrong[1] and "not checked" in wrong[1]


def test_parity_as_json_is_one_document(photon: Photon, tmp_path: Path) -> None:
    code, text, error = photon("parity", "--json", GOLDEN, CASES)
    content = json.loads(text)
    assert code == 0 and not error
    assert content["holds"] is True and len(content["rows"]) == NUM_QUANTITIES
    assert 0 < content["max_error"]["forward"] < 1e-4 and 0 < content["max_error"]["gradient"] < 1e-3
    assert content["rows"][2].keys() == {"sample", "mode", "quantity", "holds", "error", "tolerance", "note"}

    code, text, _ = photon("parity", GOLDEN, spoilt(tmp_path / "cases.safetensors"), "--json")
    content = json.loads(text)
    assert code == 1 and content["holds"] is False
    assert [row["quantity"] for row in content["rows"] if not row["holds"]] == [
        "grad.model.layers.7.mlp.down_proj.weight",
        "surprise",
    ]


def test_infinite_errors_have_a_word_in_json(photon: Photon, tmp_path: Path) -> None:
    tensors = load_file(CASES)
    tensors["s0.eval.logits"] = tensors["s0.eval.logits"][:, 1:].clone()
    save_file(tensors, tmp_path / "cases.safetensors")
    code, text, _ = photon("parity", "--json", GOLDEN, tmp_path / "cases.safetensors")
    content = json.loads(text)
    assert code == 1 and content["max_error"]["forward"] is None
    assert [row["error"] for row in content["rows"] if not row["holds"]] == [None]


def test_parity_with_other_seconds_has_other_positions(photon: Photon) -> None:
    code, text, _ = photon("parity", "--json", "--seconds-per-grid", "14", GOLDEN, CASES)
    wrong = {(row["mode"], row["quantity"]) for row in json.loads(text)["rows"] if not row["holds"]}
    assert code == 1 and ("eval", "position_ids") in wrong and ("eval", "visual_embeds") not in wrong


def test_parity_refuses_what_it_cannot_read_in_one_line(photon: Photon, tmp_path: Path) -> None:
    save_file({"weight": torch.ones(1)}, tmp_path / "other.safetensors")
    (tmp_path / "half.safetensors").write_bytes(CASES.read_bytes()[:5000])
    calls = {
        (GOLDEN, tmp_path / "none.safetensors"): "CASES_INVALID",
        (GOLDEN, tmp_path / "half.safetensors"): "CASES_INVALID",
        (GOLDEN, tmp_path / "other.safetensors"): "CASES_INVALID",
        (GOLDEN, tmp_path): "CASES_INVALID",
        (tmp_path / "none", CASES): "CHECKPOINT_MISSING",
    }
    for arguments, expected in calls.items():
        code, text, error = photon("parity", *arguments)
        assert code == 1 and not text, arguments
        assert error.count("\n") == 1 and error.startswith(f"photon: [{expected}] "), error


@pytest.mark.parametrize(
    ("options", "learning_rate", "naming_steps"),
    [
        ((), 3e-3, 4),
        (("--start-from", "model"), 1e-5, 0),
        (("--start-from", "model", "--naming-steps", "7"), 1e-5, 7),
        (("--naming-steps", "0"), 3e-3, 0),
    ],
)
def test_train_starts_from_a_checkpoint_with_settings_of_its_own(
    photon: Photon,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    learning_rate: float,
    naming_steps: int,
) -> None:
    calls: list[tuple[TrainSpec, Path | None]] = []

    def stop(spec: TrainSpec, *_: object, start_from: Path | None, **__: object) -> None:
        calls.append((spec, start_from))
        raise PhotonError("TRAINING_DIVERGED", "step 0", "it is enough.", "Stop.")

    monkeypatch.setattr("pipelines.train.train", stop)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "questions.jsonl").write_text("{}")
    code, _, _ = photon("train", "--data", tmp_path / "data", "--preset", "smoke", "--no-track", *options)
    (spec, start_from) = calls[0]
    assert code == 1 and start_from == (Path("model") if "--start-from" in options else None)
    assert spec.optimiser.learning_rate == learning_rate and spec.naming.num_steps == naming_steps
