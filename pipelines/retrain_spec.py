"""What a retraining run is made of: presets of each stage, places and names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from photon.errors import PhotonError

PRESETS = ("demo", "smoke")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrainSpec:
    """What to retrain, from what, and where to.

    Args:
        name: preset it came from; name of the MLflow parent run.
        output: folder of this run's results.
        data: data folder; its DVC pointer is ``<data>.dvc`` beside it.
        phantoms: preset of the phantom archive, or None to use the data folder as it is.
        volumes: preset of the preprocessed volumes.
        training: preset of model and training.
        seed: of phantoms and training.
        experiment: MLflow experiment.
        model_name: name in the model registry.
        more_scans: folder of further scans for the archive that is scored at the end.
        tracking_uri: MLflow store; None is the environment's.
    """

    name: str
    output: Path
    data: Path
    phantoms: str | None
    volumes: str
    training: str
    seed: int = 0
    experiment: str = "photon"
    model_name: str = "photon"
    more_scans: Path | None = None
    tracking_uri: str | None = None

    @classmethod
    def preset(
        cls,
        name: str,
        *,
        output: Path,
        data: Path | None = None,
        seed: int = 0,
        more_scans: Path | None = None,
    ) -> RetrainSpec:
        """A shipped configuration.

        ``demo`` keeps its data in ``data/`` of the working folder, where the committed ``data.dvc`` is.
        ``smoke`` is the same job at a size of seconds; it keeps everything in its output folder and under
        its own names, so it never competes with a real model.

        Raises:
            PhotonError: ``PRESET_UNKNOWN``.
        """
        if name not in PRESETS:
            fact = "there is no such preset."
            raise PhotonError("PRESET_UNKNOWN", name, fact, f"Choose one of: {', '.join(PRESETS)}.")
        output = output.resolve()
        place = data or (Path("data") if name == "demo" else output / "data")
        title = "photon" if name == "demo" else f"photon-{name}"
        return cls(
            name=name,
            output=output,
            data=place.resolve(),
            phantoms=name,
            volumes=name,
            training=name,
            seed=seed,
            experiment=title,
            model_name=title,
            more_scans=more_scans.resolve() if more_scans else None,
        )

    def settings(self) -> dict[str, Any]:
        """What makes two runs differ, as plain values without paths."""
        places = ("output", "data", "more_scans", "tracking_uri")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in places}
