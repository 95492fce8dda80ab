"""An exported model on onnxruntime: the answers of PyTorch, and every way its folder can be wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from photon.config import PhotonConfig
from photon.errors import PhotonError
from pipelines import dataset
from pipelines.dataset import LabelledScan, read_split
from pipelines.files import file_digest
from pipelines.predict import TorchAnswerer
from pipelines.runtime import MODEL_FILE, OnnxAnswerer, read_model_file


@pytest.fixture(scope="module")
def answerer(exported: Path) -> OnnxAnswerer:
    return OnnxAnswerer(exported / "model")


@pytest.fixture(scope="module")
def scans(smoke_data: Path) -> list[LabelledScan]:
    return read_split(smoke_data, "test")


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy of the exported model to spoil; files are links until they are replaced."""
    return Path(shutil.copytree(exported / "model", tmp_path / "model", copy_function=os.link))


def replace(path: Path, content: bytes) -> None:
    """Write a new file in place of a link."""
    path.unlink()
    path.write_bytes(content)


def edit_model_file(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / MODEL_FILE).read_text())
    edit(content)
    replace(folder / MODEL_FILE, json.dumps(content).encode())


def test_answers_are_those_of_torch(answerer: OnnxAnswerer, trained: Path, scans: list[LabelledScan]) -> None:
    torch_answerer = TorchAnswerer(trained / "checkpoint")
    for scan in scans[:3]:
        ours, theirs = (each.answer(scan.volume, scan.questions) for each in (answerer, torch_answerer))
        assert [dataclasses.replace(a, confidence=0.0, seconds=0.0) for a in ours] == [
            dataclasses.replace(a, confidence=0.0, seconds=0.0) for a in theirs
        ]
        assert [a.confidence for a in ours] == pytest.approx([a.confidence for a in theirs], rel=1e-3)
        assert all(0 < len(a.kept) <= a.num_tokens == 12 and a.seconds > 0 for a in ours)


def test_tokens_are_counted_in_the_whole_grid(
    folder: Path, trained: Path, scans: list[LabelledScan], tmp_path: Path
) -> None:
    """Air fills the even ones of the 3 x 2 x 2 tokens; answers and pictures must still find the others."""

    def skip(content: dict[str, Any]) -> None:
        content["config"]["vision_config"]["empty_below"] = 0.0
        content["config_digest"] = PhotonConfig.from_hf(content["config"]).digest()

    edit_model_file(folder, skip)
    checkpoint = Path(shutil.copytree(trained / "checkpoint", tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["empty_below"] = 0.0
    (checkpoint / "config.json").write_text(json.dumps(config))
    voxels = scans[0].volume.voxels.copy()
    voxels[:, :, :28] = scans[0].volume.spec.window_hu[0]
    volume, questions = dataclasses.replace(scans[0].volume, voxels=voxels), scans[0].questions[:5]
    ours, theirs, all_tokens = (
        answerer.answer(volume, questions)
        for answerer in (OnnxAnswerer(folder), TorchAnswerer(checkpoint), TorchAnswerer(checkpoint, "all_tokens"))
    )
    assert [(a.text, a.kept) for a in ours] == [(a.text, a.kept) for a in theirs]
    for answer in ours:
        assert answer.num_tokens == 12
        assert set(answer.kept) <= {1, 3, 5, 7, 9, 11} and max(answer.kept) > 5
    assert {a.kept for a in all_tokens} == {(1, 3, 5, 7, 9, 11)} and all_tokens[0].num_tokens == 12


def test_one_question_equals_the_same_among_many(answerer: OnnxAnswerer, scans: list[LabelledScan]) -> None:
    many = answerer.answer(scans[0].volume, scans[0].questions[:8])
    for place in (0, 5):
        (one,) = answerer.answer(scans[0].volume, [scans[0].questions[place]])
        assert (one.text, one.kept) == (many[place].text, many[place].kept)


def test_what_the_folder_tells(answerer: OnnxAnswerer, trained: Path, scans: list[LabelledScan]) -> None:
    assert answerer.volume_spec == scans[0].volume.spec
    assert answerer.config == TorchAnswerer(trained / "checkpoint").model.config
    assert answerer.config_digest == answerer.config.digest()


def test_no_questions(answerer: OnnxAnswerer, scans: list[LabelledScan]) -> None:
    assert answerer.answer(scans[0].volume, []) == []


def test_bad_questions(answerer: OnnxAnswerer, scans: list[LabelledScan]) -> None:
    question = scans[0].questions[0]
    with pytest.raises(PhotonError) as caught:
        answerer.answer(None, [question])
    assert caught.value.code == "PROMPT_INVALID"
    with pytest.raises(PhotonError, match="xylophone") as caught:
        answerer.answer(scans[0].volume, [dataclasses.replace(question, question="the xylophone?")])
    assert caught.value.code == "QUESTION_NOT_UNDERSTOOD"


def test_a_volume_of_nan_gives_an_error_and_the_next_an_answer(
    answerer: OnnxAnswerer, scans: list[LabelledScan], monkeypatch: pytest.MonkeyPatch
) -> None:
    question = scans[0].questions[:2]
    before = answerer.answer(scans[0].volume, question)
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "normalise", lambda voxels, window: np.full(voxels.shape, np.nan, np.float32))
        with pytest.raises(PhotonError) as caught:
            answerer.answer(scans[0].volume, question)
    assert caught.value.code == "ANSWER_NOT_FINITE"
    assert [a.text for a in answerer.answer(scans[0].volume, question)] == [a.text for a in before]


@pytest.mark.parametrize("name", ["scan.onnx", "question.onnx", "decode.onnx", "tokenizer.json", "prompt.json"])
def test_a_flipped_bit_is_a_mismatch(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    replace(folder / name, bytes(content))
    with pytest.raises(PhotonError) as caught:
        OnnxAnswerer(folder)
    assert caught.value.code == "MODEL_MISMATCH" and caught.value.subject.endswith(name)


@pytest.mark.parametrize("name", ["scan.onnx", "tokenizer.json", "prompt.json", MODEL_FILE])
def test_missing_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(PhotonError) as caught:
        OnnxAnswerer(folder)
    assert caught.value.code == "MODEL_UNREADABLE" and caught.value.subject.endswith(name)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_description_that_is_none(folder: Path, content: bytes) -> None:
    replace(folder / MODEL_FILE, content)
    with pytest.raises(PhotonError) as caught:
        read_model_file(folder)
    assert caught.value.code == "MODEL_UNREADABLE"


def test_a_description_of_another_configuration(folder: Path) -> None:
    """The graphs are whole, but positions and placeholders would be computed for another model."""
    edit_model_file(folder, lambda content: content["config"]["photon"].update(seconds_per_grid=14.0))
    with pytest.raises(PhotonError, match="configuration") as caught:
        OnnxAnswerer(folder)
    assert caught.value.code == "MODEL_MISMATCH"


def test_a_description_of_another_export(folder: Path) -> None:
    def another(content: dict[str, Any]) -> None:
        config = PhotonConfig.from_hf(content["config"] | {"rms_norm_eps": 1e-5})
        content.update(config=config.to_hf(), config_digest=config.digest())
        content["sha256"] = {name: "0" * 64 for name in content["sha256"]}

    edit_model_file(folder, another)
    with pytest.raises(PhotonError) as caught:
        OnnxAnswerer(folder)
    assert caught.value.code == "MODEL_MISMATCH"


def test_a_file_that_is_no_graph(folder: Path) -> None:
    replace(folder / "decode.onnx", b"no graph")
    digest = file_digest(folder / "decode.onnx")
    edit_model_file(folder, lambda content: content["sha256"].update({"decode.onnx": digest}))
    with pytest.raises(PhotonError, match="not an ONNX graph") as caught:
        OnnxAnswerer(folder)
    assert caught.value.code == "MODEL_UNREADABLE"


def test_graphs_in_each_others_place(folder: Path) -> None:
    edit_model_file(folder, lambda content: content["files"].update(scan="decode.onnx", decode="scan.onnx"))
    with pytest.raises(PhotonError, match="scan graph") as caught:
        OnnxAnswerer(folder)
    assert caught.value.code == "MODEL_UNREADABLE"
