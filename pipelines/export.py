"""The export stage: ONNX graphs with dynamic token axes, accepted only if they answer as PyTorch does.

The only importer of `onnx` and of torch's exporter.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from photon.checkpoint import read_config, read_model, replace_folder
from photon.errors import PhotonError
from photon.export import DecodeGraph, QuestionGraph, ScanGraph, require_exportable
from photon.generate import generate, last_rows
from photon.grid import patchify
from photon.model.network import Photon
from photon.model.packing import Branch, Context, pack_batch
from pipelines.answers import MAX_ANSWER_TOKENS
from pipelines.dataset import LabelledScan, context_of, read_split
from pipelines.files import file_digest, prepare_output_folder, read_json, write_json
from pipelines.onnx_inputs import AXES, GRAPHS, OUTPUTS, Arrays
from pipelines.results import ExportRecord
from pipelines.runtime import MODEL_FILE, OnnxModel
from pipelines.text import PROMPT, TOKENIZER, Prompter
from pipelines.train import PROVENANCE
from pipelines.volumes import normalise

MAX_LOGIT_DIFF = 1e-4
OPSET = 20
_MAX_AXIS = {"questions": 1024}
_LONGEST_AXIS = 65536
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """Something to answer, for tracing and for the gate: a scan's context and its questions' token ids."""

    context: Context
    branches: tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateResult:
    """How far the graphs are from PyTorch over all cases."""

    max_abs_logit_diff: float
    kept_sets_equal: bool
    answers_equal: bool
    token_counts: tuple[int, ...]

    @property
    def is_accepted(self) -> bool:
        """Whether the export may be used."""
        return self.kept_sets_equal and self.answers_equal and self.max_abs_logit_diff <= MAX_LOGIT_DIFF


def export(
    checkpoint: Path,
    data: Path,
    output: Path,
    *,
    data_version: str,
    split: str = "test",
    on_progress: Progress | None = None,
) -> ExportRecord:
    """Export a checkpoint as ``output/model/``: three ONNX graphs, model.json, tokenizer.json, prompt.json.

    The graphs are compared with PyTorch on scans of ``split`` at several token counts and numbers of questions; only
    graphs that keep the same tokens, agree in every logit to 1e-4 and answer alike replace an earlier export.

    Raises:
        PhotonError: ``EXPORT_REJECTED`` with the numbers when they do not, ``EXPORT_UNSUPPORTED`` for a checkpoint with
            another policy than "photon", before anything is written; whatever reading the checkpoint and the data
            raises.
    """
    require_exportable(read_config(checkpoint))
    prepare_output_folder(output)
    tell = on_progress or (lambda done, total, label: None)
    model = read_model(checkpoint)
    prompter = Prompter.read(checkpoint / TOKENIZER)
    provenance = read_json(checkpoint / PROVENANCE, "CHECKPOINT_MISSING", "Train the model again.")
    cases = gate_cases(read_split(data, split), model, prompter)
    files = {name: f"{name}.onnx" for name in GRAPHS}
    result: list[GateResult] = []

    def build(folder: Path) -> None:
        for number, name in enumerate(GRAPHS):
            tell(number, len(GRAPHS) + 1, f"{name} graph")
            write_graph(model, name, cases[0], folder / files[name])
        tell(len(GRAPHS), len(GRAPHS) + 1, "comparing with PyTorch")
        result.append(compare(model, OnnxModel(folder, model.config, files), cases))
        if not result[0].is_accepted:
            raise PhotonError(
                "EXPORT_REJECTED",
                output,
                f"the ONNX graphs differ from PyTorch ({dataclasses.asdict(result[0])}).",
                "Keep the earlier export and report the numbers; the exporter or runtime changed behaviour.",
            )
        prompter.write(folder / TOKENIZER)
        digests = {name: file_digest(folder / name) for name in [*files.values(), TOKENIZER, PROMPT]}
        identity = {"config": model.config.to_hf(), "config_digest": model.config.digest(), **provenance}
        write_json(folder / MODEL_FILE, {**identity, "files": files, "sha256": digests})

    replace_folder(output / "model", build)
    tell(len(GRAPHS) + 1, len(GRAPHS) + 1, "accepted")
    record = ExportRecord(
        folder=str(output / "model"),
        files=files,
        max_abs_logit_diff=result[0].max_abs_logit_diff,
        kept_sets_equal=result[0].kept_sets_equal,
        answers_equal=result[0].answers_equal,
        token_counts_checked=list(result[0].token_counts),
        config_digest=model.config.digest(),
        data_version=data_version,
    )
    record.write(output / "record.json")
    return record


def gate_cases(scans: Sequence[LabelledScan], model: Photon, prompter: Prompter) -> list[Case]:
    """Real scans at their own size, cut smaller and laid out larger, with one, three and many questions each."""
    vision = model.config.vision
    step = np.array([vision.temporal_patch_size, *[vision.patch_size * vision.spatial_merge_size] * 2])
    cases = []
    for number, change in enumerate([(0, 0, 0), (-1, 0, -1), (1, 1, 0), (-2, -1, -1)]):
        scan = scans[number % len(scans)]
        shape = np.maximum(np.array(scan.volume.voxels.shape) + np.array(change) * step, step)
        voxels = np.full(shape, scan.volume.spec.window_hu[0], scan.volume.voxels.dtype)
        common = tuple(slice(0, min(a, b)) for a, b in zip(shape, scan.volume.voxels.shape, strict=True))
        voxels[common] = scan.volume.voxels[common]
        values = torch.from_numpy(normalise(voxels, scan.volume.spec.window_hu))
        context = context_of(*patchify(values, vision), prompter, model.config)
        questions = scan.questions[: (11, 1, 3, 20)[number]]
        cases.append(Case(context, tuple(prompter.branch_ids(q.question) for q in questions)))
    return cases


def write_graph(model: Photon, name: str, case: Case, target: Path) -> None:
    """Trace one graph on an example and write it with named dynamic axes.

    Raises:
        PhotonError: ``EXPORT_REJECTED`` when an axis that should be dynamic came out fixed.
    """
    module, inputs = _example(model, name, case)
    axes = {key: {axis: _dimension(label) for axis, label in named.items()} for key, named in AXES[name].items()}
    for name_of_logger in ("torch.onnx", "torch.fx.experimental.symbolic_shapes"):
        logging.getLogger(name_of_logger).setLevel(logging.ERROR)
    # The exporter prints its whole graph whenever a size depends on the data, which is the point here.
    quiet = io.StringIO()
    with warnings.catch_warnings(), torch.no_grad(), redirect_stdout(quiet), redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            kwargs=inputs,
            dynamo=True,
            dynamic_shapes=axes,
            input_names=list(inputs),
            output_names=list(OUTPUTS[name]),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    program.save(str(target), include_initializers=True)
    graph = onnx.load(str(target), load_external_data=False).graph
    for value in graph.input:
        for axis in AXES[name][value.name]:
            if not value.type.tensor_type.shape.dim[axis].dim_param:
                raise PhotonError(
                    "EXPORT_REJECTED",
                    target,
                    f"axis {axis} of {value.name} was frozen at the example's size.",
                    "Report it; the exporter changed behaviour.",
                )


def compare(model: Photon, exported: OnnxModel, cases: Sequence[Case]) -> GateResult:
    """Answer every case with PyTorch and with the graphs."""
    differences, kept_equal, answers_equal, counts = [], True, True, []
    for case in cases:
        batch = pack_batch([case.context], [Branch(0, ids) for ids in case.branches], model.config)
        answers, output = generate(model, batch, keep_all=False, max_new_tokens=MAX_ANSWER_TOKENS)
        assert output.schedule is not None
        with torch.no_grad():
            logits = model.logits(output.hidden[last_rows(batch, output)]).numpy()
        first = exported.first_logits(case.context, case.branches)
        differences.append(float(np.abs(first["logits"] - logits).max()))
        kept_equal &= bool((first["kept"] == output.schedule.keep.numpy()).all())
        said = exported.answer_ids(first, MAX_ANSWER_TOKENS)
        answers_equal &= [answer.ids for answer in said] == [answer.ids for answer in answers]
        counts.append(batch.visual_rows.numel())
    return GateResult(
        max_abs_logit_diff=max(differences),
        kept_sets_equal=kept_equal,
        answers_equal=answers_equal,
        token_counts=tuple(counts),
    )


def _example(model: Photon, name: str, case: Case) -> tuple[nn.Module, dict[str, Tensor]]:
    """A graph's module and example inputs, made by running the graphs before it in PyTorch."""
    from pipelines.onnx_inputs import question_inputs, scan_inputs

    def tensors(arrays: Arrays) -> dict[str, Tensor]:
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in arrays.items()}

    def outputs(graph: str, values: Sequence[Tensor]) -> Arrays:
        return {key: value.detach().numpy() for key, value in zip(OUTPUTS[graph], values, strict=True)}

    inputs = tensors(scan_inputs(case.context, model.config))
    if name == "scan":
        return ScanGraph(model), inputs
    with torch.no_grad():
        encoded = outputs("scan", ScanGraph(model)(**inputs))
        inputs = tensors(question_inputs(case.context, case.branches, model.config, encoded))
        if name == "question":
            return QuestionGraph(model), inputs
        first = outputs("question", QuestionGraph(model)(**inputs))
    count = len(case.branches)
    ids = torch.zeros(count, dtype=torch.long)
    caches = tensors({key: first[key] for key in ("cache_keys", "cache_values", "cache_mask")})
    return DecodeGraph(model), {"ids": ids, "positions": torch.full((count,), 40), **caches}


def _dimension(label: str) -> Any:
    return Dim(label, min=1 if label == "questions" else 2, max=_MAX_AXIS.get(label, _LONGEST_AXIS))
