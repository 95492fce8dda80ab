"""The study flow: `pipelines.study.run` under Prefect, which watches it; its parts run in processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flows import settings

settings.apply()

from prefect import flow  # noqa: E402

from flows.progress import show_progress  # noqa: E402
from photon.training.optimiser import Precision  # noqa: E402
from pipelines.study.run import run_preset  # noqa: E402


@flow(name="study", persist_result=False)
def study_flow(
    preset: str = "small",
    data: Path = Path("data"),
    output: Path = Path("out/study"),
    seeds: list[int] | None = None,
    variants: list[str] | None = None,
    keep_ratio: float | None = None,
    workers: int | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    is_fresh: bool = False,
) -> str:
    """Token policies trained side by side. Returns the path of ``study.json``.

    Args:
        preset: ``quick``, ``small``, ``medium``, ``full``, ``real``, ``ablations`` or ``smoke``. data: preprocessed
        data folder. output: folder of the results; a repeated call goes on where the last one stopped. seeds, variants:
        others than the preset's. keep_ratio: share of tokens of the policies that keep a set number. workers: trainings
        that run at a time. device: ``auto``, ``cpu`` or ``cuda``. precision: ``float32`` or ``bfloat16``. is_fresh:
        repeat parts that are finished and unchanged.
    """
    with show_progress("study") as on_progress:
        result = run_preset(
            preset,
            data,
            output,
            seeds=seeds,
            variants=variants,
            keep_ratio=keep_ratio,
            workers=workers,
            device=device,
            precision=precision,
            is_fresh=is_fresh,
            on_progress=on_progress,
        )
    return str(result)


def run_study_flow(**parameters: Any) -> Path:
    """Run :func:`study_flow` on the configured Prefect server or on its own; returns the path of ``study.json``."""
    with settings.embedded_server(), settings.quiet_flow_errors():
        return Path(study_flow(**parameters))
