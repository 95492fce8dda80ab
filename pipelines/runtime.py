"""An exported model on onnxruntime, as an answerer. The only importer of `onnxruntime`."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from photon.config import PhotonConfig, content_digest
from photon.errors import PhotonError
from photon.grid import num_visual_tokens
from photon.model.packing import Context
from photon.sampling import AnswerDecoder, Generated
from pipelines.answers import MAX_ANSWER_TOKENS, Answer
from pipelines.dataset import scan_context
from pipelines.files import file_digest, read_json
from pipelines.onnx_inputs import GRAPHS, OUTPUTS, Arrays, question_inputs, scan_inputs
from pipelines.questions import Question
from pipelines.text import TOKENIZER, Prompter
from pipelines.volumes import Volume, VolumeSpec

MODEL_FILE = "model.json"
_REMEDY = "Export the checkpoint again with `photon export`."


class OnnxModel:
    """The three graphs of an exported model."""

    def __init__(self, folder: Path, config: PhotonConfig, files: dict[str, str]) -> None:
        self.config = config
        self._sessions = {name: _open_session(folder / files[name], name) for name in GRAPHS}

    def run(self, graph: str, inputs: Arrays) -> Arrays:
        """Run one graph."""
        outputs = self._sessions[graph].run(list(OUTPUTS[graph]), inputs)
        return dict(zip(OUTPUTS[graph], outputs, strict=True))

    def first_logits(self, context: Context, branches: Sequence[torch.Tensor]) -> Arrays:
        """Outputs of the question graph for questions about one scan, and where decoding starts."""
        encoded = self.run("scan", scan_inputs(context, self.config))
        inputs = question_inputs(context, branches, self.config, encoded)
        lengths = inputs["branch_valid"].sum(1)
        last = inputs["branch_positions"][np.arange(len(branches)), lengths - 1]
        return self.run("question", inputs) | {"positions": last}

    def answer_ids(self, first: Arrays, max_new_tokens: int) -> list[Generated]:
        """Greedy answers from the outputs of :meth:`first_logits`.

        Raises:
            PhotonError: ``ANSWER_NOT_FINITE``.
        """
        logits, positions = first["logits"], first["positions"]
        cache = {name: first[name] for name in ("cache_keys", "cache_values", "cache_mask")}
        end_ids = {self.config.eos_token_id}
        decoder = AnswerDecoder(logits.shape[0], end_ids=end_ids, max_new_tokens=max_new_tokens)
        ids = decoder.choose(torch.from_numpy(logits))
        while not decoder.is_done:
            positions = positions + 1
            step = self.run("decode", {"ids": ids.numpy(), "positions": positions, **cache})
            cache = {name: step[f"next_{name}"] for name in cache}
            ids = decoder.choose(torch.from_numpy(step["logits"]))
        return decoder.answers()


class OnnxAnswerer:
    """Answers questions with an exported model: one encoding of the scan, all its questions in one batch."""

    def __init__(self, folder: Path) -> None:
        """Open a folder that ``photon export`` wrote.

        Raises:
            PhotonError: ``MODEL_UNREADABLE`` when a file is missing or is no ONNX graph of this export,
                ``MODEL_MISMATCH`` when a file or the configuration is not the one that was exported.
        """
        content = read_model_file(folder)
        if content_digest(content["config"]) != content["config_digest"]:
            fact = f"its configuration is not the one that was exported here ({content['config_digest']})."
            raise PhotonError("MODEL_MISMATCH", folder / MODEL_FILE, fact, _REMEDY)
        self.config = PhotonConfig.from_hf(content["config"])
        self.config_digest: str = content["config_digest"]
        self.data_version: str = content["data_version"]
        self.volume_spec = VolumeSpec.from_dict(content["volume_spec"])
        for name, digest in content["sha256"].items():
            path = folder / name
            if not path.is_file():
                raise PhotonError("MODEL_UNREADABLE", path, "the file does not exist.", _REMEDY)
            if file_digest(path) != digest:
                raise PhotonError("MODEL_MISMATCH", path, "it is not the file that was exported here.", _REMEDY)
        self.prompter = Prompter.read(folder / TOKENIZER)
        self.model = OnnxModel(folder, self.config, content["files"])

    def answer(self, volume: Volume | None, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the order of the questions."""
        if not questions:
            return []
        if volume is None:
            raise PhotonError("PROMPT_INVALID", "question", "it comes without a scan.", "Give the scan.")
        started = time.perf_counter()
        context = scan_context(volume, self.prompter, self.config)
        branches = [self.prompter.branch_ids(question.question) for question in questions]
        first = self.model.first_logits(context, branches)
        generated = self.model.answer_ids(first, MAX_ANSWER_TOKENS)
        seconds = (time.perf_counter() - started) / len(questions)
        num_tokens = sum(num_visual_tokens(grid, self.config.vision) for grid in context.grids)
        return [
            Answer(
                question_id=question.question_id,
                text=self.prompter.text(said.ids),
                confidence=said.confidence,
                num_tokens=num_tokens,
                kept=tuple(context.grid_tokens(torch.from_numpy(np.flatnonzero(kept))).tolist()),
                seconds=seconds,
            )
            for question, said, kept in zip(questions, generated, first["kept"], strict=True)
        ]


def read_model_file(folder: Path) -> dict[str, Any]:
    """The description of an exported model.

    Raises:
        PhotonError: ``MODEL_UNREADABLE``.
    """
    content = read_json(folder / MODEL_FILE, "MODEL_UNREADABLE", _REMEDY)
    expected = {"config", "config_digest", "data_version", "volume_spec", "sha256", "files"}
    if not isinstance(content, dict) or not expected <= content.keys():
        raise PhotonError("MODEL_UNREADABLE", folder / MODEL_FILE, "it does not describe an exported model.", _REMEDY)
    return content


def _open_session(path: Path, graph: str) -> Any:
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # An arena keeps the largest scan's memory for ever; without it memory falls back after each run.
    options.enable_cpu_mem_arena = False
    providers = ["CPUExecutionProvider"]
    if torch.cuda.is_available():
        onnxruntime.preload_dlls()
        providers.insert(0, "CUDAExecutionProvider")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's own exceptions share no base class
        raise PhotonError("MODEL_UNREADABLE", path, f"it is not an ONNX graph ({error}).", _REMEDY) from error
    if session.get_providers()[0] != providers[0]:
        raise PhotonError(
            "GPU_UNAVAILABLE",
            path,
            f"onnxruntime could not use {providers[0]}.",
            "Install the CUDA libraries that onnxruntime-gpu needs, or hide the GPU with CUDA_VISIBLE_DEVICES=.",
        )
    names = {value.name for value in session.get_outputs()}
    if names != set(OUTPUTS[graph]):
        raise PhotonError("MODEL_UNREADABLE", path, f"its outputs are not those of the {graph} graph.", _REMEDY)
    return session
