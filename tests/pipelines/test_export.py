"""The export gate: what it accepts, what it rejects, and that a rejected export loses nothing."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from photon.checkpoint import read_model, write_model
from photon.config import POLICIES
from photon.errors import PhotonError
from photon.export import QuestionGraph, ScanGraph
from photon.grid import patchify
from photon.model.network import Photon
from pipelines import export as stage
from pipelines.dataset import context_of, read_split
from pipelines.export import Case, GateResult, compare, export, gate_cases
from pipelines.files import file_digest
from pipelines.onnx_inputs import AXES, GRAPHS
from pipelines.results import ExportRecord
from pipelines.runtime import MODEL_FILE, OnnxModel
from pipelines.text import PROMPT, TOKENIZER, Prompter

FILES = {name: f"{name}.onnx" for name in GRAPHS}


@pytest.fixture(scope="module")
def model(trained: Path) -> Photon:
    return read_model(trained / "checkpoint")


@pytest.fixture(scope="module")
def prompter(trained: Path) -> Prompter:
    return Prompter.read(trained / "checkpoint" / TOKENIZER)


@pytest.fixture(scope="module")
def graphs(exported: Path, model: Photon) -> OnnxModel:
    return OnnxModel(exported / "model", model.config, FILES)


@pytest.fixture
def without_exporter(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports copy the graphs made before, so that only the gate runs."""

    def copy(model: Photon, name: str, case: Case, target: Path) -> None:
        shutil.copyfile(exported / "model" / FILES[name], target)

    monkeypatch.setattr(stage, "write_graph", copy)


def altered_checkpoint(trained: Path, model: Photon, folder: Path) -> Path:
    """The same configuration and tokenizer with a few weights changed."""
    shutil.copytree(trained / "checkpoint", folder)
    other = Photon(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.model.norm.weight[0] += 0.5
    write_model(other, folder)
    return folder


def test_an_accepted_export(exported: Path, model: Photon, prompter: Prompter, smoke_data: Path) -> None:
    record = ExportRecord.read(exported / "record.json")
    assert record.kept_sets_equal and record.answers_equal and record.max_abs_logit_diff <= 1e-4
    assert record.token_counts_checked == [12, 4, 24, 1]
    content = json.loads((exported / "model" / MODEL_FILE).read_text())
    assert content["config"] == model.config.to_hf()
    assert content["config_digest"] == record.config_digest == model.config.digest()
    assert content["volume_spec"] == read_split(smoke_data, "test")[0].volume.spec.as_dict()
    assert set(content["sha256"]) == {*FILES.values(), TOKENIZER, PROMPT}
    for name, digest in content["sha256"].items():
        assert file_digest(exported / "model" / name) == digest
    assert sorted(path.name for path in exported.iterdir()) == ["model", "record.json"], "nothing temporary stays"


@pytest.mark.parametrize("name", GRAPHS)
def test_axes_are_dynamic_and_named(exported: Path, name: str) -> None:
    graph = onnx.load(str(exported / "model" / FILES[name]), load_external_data=False).graph
    named = {
        value.name: {i: d.dim_param for i, d in enumerate(value.type.tensor_type.shape.dim) if d.dim_param}
        for value in graph.input
    }
    assert named == AXES[name]


@pytest.mark.parametrize("num_questions", [1, 2, 7])
@pytest.mark.parametrize("shape", [(14, 28, 28), (14, 28, 56), (56, 28, 84), (42, 84, 28)])
def test_graphs_answer_as_torch_does(
    graphs: OnnxModel,
    model: Photon,
    prompter: Prompter,
    smoke_data: Path,
    shape: tuple[int, int, int],
    num_questions: int,
) -> None:
    """Sizes and numbers of questions that the gate did not try; one token is the case of equal scores."""
    generator = torch.Generator().manual_seed(num_questions)
    patches, grid = patchify(torch.rand(shape, generator=generator), model.config.vision)
    questions = read_split(smoke_data, "test")[0].questions[3 : 3 + num_questions]
    branches = tuple(prompter.branch_ids(question.question) for question in questions)
    result = compare(model, graphs, [Case(context_of(patches, grid, prompter, model.config), branches)])
    assert result.is_accepted, result


def test_a_blank_volume_is_answered_alike(
    graphs: OnnxModel, model: Photon, prompter: Prompter, smoke_data: Path
) -> None:
    patches, grid = patchify(torch.zeros(42, 56, 56), model.config.vision)
    branches = tuple(prompter.branch_ids(q.question) for q in read_split(smoke_data, "test")[0].questions[:4])
    result = compare(model, graphs, [Case(context_of(patches, grid, prompter, model.config), branches)])
    assert result.is_accepted, result


@pytest.mark.parametrize("num_present", [1, 2, 3, 7])
def test_a_scan_without_its_empty_tokens_is_answered_alike(
    graphs: OnnxModel,
    model: Photon,
    prompter: Prompter,
    smoke_data: Path,
    num_present: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graphs are told positions and windows, so the same ones serve; also with fewer tokens than always stay."""
    config = dataclasses.replace(model.config, vision=dataclasses.replace(model.config.vision, empty_below=0.1))
    skipping = Photon(config)
    skipping.load_state_dict(model.state_dict())
    patches, grid = patchify(torch.rand(42, 56, 56, generator=torch.Generator().manual_seed(0)), config.vision)
    present = torch.randperm(12, generator=torch.Generator().manual_seed(num_present))[:num_present]
    is_air = torch.ones(12, dtype=torch.bool)
    is_air[present] = False
    patches.view(12, -1)[is_air] *= 0.1
    context = context_of(patches, grid, prompter, config)
    assert context.present is not None and context.present.tolist() == sorted(present.tolist())
    branches = tuple(prompter.branch_ids(q.question) for q in read_split(smoke_data, "test")[0].questions[:4])
    monkeypatch.setattr(graphs, "config", config)
    result = compare(skipping, graphs, [Case(context, branches)])
    assert result.is_accepted, result
    assert result.token_counts == (num_present,)


def test_gate_cases_differ(model: Photon, prompter: Prompter, smoke_data: Path) -> None:
    cases = gate_cases(read_split(smoke_data, "test"), model, prompter)
    assert len({case.context.patches.shape[0] for case in cases}) == 4
    assert sorted(len(case.branches) for case in cases) == [1, 3, 11, 20]


@pytest.mark.parametrize(
    ("change", "is_accepted"),
    [({}, True), ({"max_abs_logit_diff": 2e-4}, False), ({"kept_sets_equal": False}, False),
     ({"answers_equal": False}, False), ({"max_abs_logit_diff": float("nan")}, False)],
)  # fmt: skip
def test_acceptance(change: dict[str, Any], is_accepted: bool) -> None:
    good = GateResult(max_abs_logit_diff=1e-5, kept_sets_equal=True, answers_equal=True, token_counts=(12,))
    assert dataclasses.replace(good, **change).is_accepted is is_accepted


@pytest.mark.usefixtures("without_exporter")
def test_graphs_of_other_weights_are_rejected_and_the_earlier_export_stays(
    trained: Path, model: Photon, smoke_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "export"
    first = export(trained / "checkpoint", smoke_data, output, data_version="v1")
    before = {path: file_digest(path) for path in output.rglob("*") if path.is_file()}
    altered = altered_checkpoint(trained, model, tmp_path / "altered")
    with pytest.raises(PhotonError, match="max_abs_logit_diff") as caught:
        export(altered, smoke_data, output, data_version="v2")
    assert caught.value.code == "EXPORT_REJECTED"
    assert {path: file_digest(path) for path in output.rglob("*") if path.is_file()} == before
    assert ExportRecord.read(output / "record.json") == first


@pytest.mark.usefixtures("without_exporter")
@pytest.mark.parametrize("change", [{"kept_sets_equal": False}, {"answers_equal": False}])
def test_one_difference_is_enough(
    trained: Path, smoke_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    def different(*arguments: Any) -> GateResult:
        return dataclasses.replace(compare(*arguments), **change)

    monkeypatch.setattr(stage, "compare", different)
    with pytest.raises(PhotonError) as caught:
        export(trained / "checkpoint", smoke_data, tmp_path, data_version="v1")
    assert caught.value.code == "EXPORT_REJECTED"
    assert not list(tmp_path.iterdir())


def test_a_frozen_axis_is_rejected(
    exported: Path, model: Photon, prompter: Prompter, smoke_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = onnx.load(str(exported / "model" / "decode.onnx"))
    (ids,) = (value for value in content.graph.input if value.name == "ids")
    ids.type.tensor_type.shape.dim[0].dim_value = 11

    class Program:
        def save(self, target: str, include_initializers: bool) -> None:
            onnx.save(content, target)

    monkeypatch.setattr(torch.onnx, "export", lambda *arguments, **options: Program())
    case = gate_cases(read_split(smoke_data, "test"), model, prompter)[0]
    with pytest.raises(PhotonError, match="axis 0 of ids") as caught:
        stage.write_graph(model, "decode", case, tmp_path / "decode.onnx")
    assert caught.value.code == "EXPORT_REJECTED"


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "photon"])
def test_other_policies_are_refused_before_anything_is_done(
    trained: Path, model: Photon, smoke_data: Path, tmp_path: Path, policy: str
) -> None:
    untaught = {"saliency_gradient": False, "distillation_weight": 0.0}
    pruning = dataclasses.replace(model.config.pruning, policy=policy, **untaught)  # type: ignore[arg-type]
    other = Photon(dataclasses.replace(model.config, pruning=pruning))
    folder = tmp_path / "checkpoint"
    shutil.copytree(trained / "checkpoint", folder)
    write_model(other, folder)
    with pytest.raises(PhotonError, match=policy) as caught:
        export(folder, smoke_data, tmp_path / "out", data_version="0")
    assert caught.value.code == "EXPORT_UNSUPPORTED"
    assert not (tmp_path / "out").exists()
    for graph in (ScanGraph, QuestionGraph):
        with pytest.raises(PhotonError) as caught:
            graph(other)
        assert caught.value.code == "EXPORT_UNSUPPORTED"
