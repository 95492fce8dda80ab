"""The champion measured anew: its accuracy on data it was not registered with."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import numpy as np

from photon.errors import PhotonError
from pipelines.answers import Answerer
from pipelines.manifest import MANIFEST_NAME, read_manifest
from pipelines.metrics import score_answer
from pipelines.questions import read_questions
from pipelines.volumes import read_volume


def accuracy_of(model: Path, data: Path, split: str = "test", answerer: Answerer | None = None) -> float:
    """Mean score of an exported model over a split, the number that `evaluate` calls photon's accuracy.

    Args:
        model: export folder.
        data: folder with ``questions.jsonl`` and ``volumes/``.
        split: which questions.
        answerer: what answers; default the export folder's model.

    Raises:
        PhotonError: ``MODEL_MISMATCH`` when the volumes are not on the model's grid, ``SPLIT_EMPTY``, and what
            reading the model, the questions and the volumes raise.
    """
    from pipelines.runtime import OnnxAnswerer

    if answerer is None:
        answerer = OnnxAnswerer(model)
    volumes = dict(
        read_manifest(data / "volumes" / MANIFEST_NAME).filter(status="ok").select("scan_id", "volume").rows()
    )
    asked = sorted(
        (q for q in read_questions(data / "questions.jsonl") if q.split == split and q.scan_id in volumes),
        key=lambda q: (q.scan_id, q.question_id),
    )
    if not asked:
        fact = f"no accepted scan has questions in split {split!r}."
        raise PhotonError("SPLIT_EMPTY", data, fact, "Preprocess the scans of that split first.")
    scores = []
    for scan_id, group in groupby(asked, key=lambda q: q.scan_id):
        questions = list(group)
        volume = read_volume(data / "volumes" / volumes[scan_id])
        wanted = getattr(answerer, "volume_spec", volume.spec)
        if wanted != volume.spec:
            fact = "the model wants another grid of voxels than these volumes have."
            raise PhotonError("MODEL_MISMATCH", scan_id, fact, "Preprocess with the model's own settings.")
        answers = answerer.answer(volume, questions)
        scores += [score_answer(q, answer.text) for q, answer in zip(questions, answers, strict=True)]
    return float(np.mean(scores))
