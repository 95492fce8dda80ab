"""The data of a study: a folder that is there, or PhantomVQA made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from photon.errors import PhotonError
from pipelines.grids import VOLUME_SPECS
from pipelines.phantom_vqa.cohort import PHANTOM_VQA_SPECS
from pipelines.phantom_vqa.stage import SPEC_FILE, generate
from pipelines.preprocess import preprocess

OnProgress = Callable[[int, int, str], None]


def prepare_data(phantoms: str | None, data: Path, on_progress: OnProgress | None = None) -> None:
    """Make PhantomVQA in an empty folder and preprocess it; other data is left as it is.

    Interrupted, it goes on: what is preprocessed and unchanged is not done again.

    Args:
        phantoms: preset of the benchmark; None when the data must be there already.

    Raises:
        PhotonError: ``DATA_MISSING`` when there are no questions and nothing to make them from.
    """
    has_questions = (data / "questions.jsonl").is_file()
    is_ours = (data / "raw" / SPEC_FILE).is_file()
    if has_questions and not is_ours:
        return
    holds_other = data.is_dir() and any(path.name != "raw" for path in data.iterdir()) and not is_ours
    if not has_questions and (phantoms is None or holds_other):
        remedy = "Make them by `photon questions` or `photon import`, or give an empty folder for PhantomVQA."
        raise PhotonError("DATA_MISSING", data, "the folder holds no questions.jsonl.", remedy)
    if not has_questions:
        generate(PHANTOM_VQA_SPECS[str(phantoms)], data, on_progress)
    if phantoms is not None:
        spec = VOLUME_SPECS[PHANTOM_VQA_SPECS[phantoms].volumes]
        preprocess(data / "raw" / "images", data / "volumes", spec, modality="ct", on_progress=on_progress)
