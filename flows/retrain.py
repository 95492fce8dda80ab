"""The retraining flow: `pipelines.retraining` with every stage as a Prefect sub-flow."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows import settings

settings.apply()

from prefect import flow  # noqa: E402

from flows.progress import show_progress  # noqa: E402
from pipelines.retraining import RetrainSpec, retrain  # noqa: E402


def call_as_flow(stage: Callable[..., Any], *arguments: Any) -> Any:
    """Run one stage as a sub-flow. Prefect sees no arguments: it would store them, and needs none."""

    def run_stage() -> Any:
        return stage(*arguments)

    name = stage.__name__.replace("_", "-")
    return flow(name=name, persist_result=False)(run_stage)()


@flow(name="retrain", persist_result=False)
def retrain_flow(
    preset: str = "demo",
    output: Path | None = None,
    data: Path | None = None,
    seed: int = 0,
    more_scans: Path | None = None,
    is_fresh: bool = False,
) -> str:
    """Data, training, evaluation, ONNX, scoring and report. Returns the path of ``summary.json``.

    Args:
        preset: ``demo`` or ``smoke``. output: folder of the results; without it ``out/retrain-<UTC time>``,
        so every scheduled run has its own. data: data folder; default the preset's. seed: of phantoms and
        training. more_scans: folder of further scans to score. is_fresh: repeat stages that are finished and unchanged.
    """
    folder = output or Path("out") / f"retrain-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    spec = RetrainSpec.preset(preset, output=folder, data=data, seed=seed, more_scans=more_scans)
    return str(retrain(spec, call=call_as_flow, show_progress=show_progress, is_fresh=is_fresh))


def run_retrain(**parameters: Any) -> Path:
    """Run :func:`retrain_flow` on the configured Prefect server or on its own; returns the summary's path."""
    with settings.embedded_server(), settings.quiet_flow_errors():
        return Path(retrain_flow(**parameters))
