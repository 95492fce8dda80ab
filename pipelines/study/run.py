"""Run a study: starts, variants and answers of every seed, in parallel where nothing waits for the other.

The output folder::

    regions.parquet           which visual tokens the questions ask about
    seed-0/vision/            checkpoint of the vision start
    seed-0/warm-up/           checkpoint/, blind/, history.jsonl, blind.parquet
    seed-0/<variant>/         train/ (and warm-up/, start/ where it has its own), answers.parquet
    records/                  what every part found, and from which inputs
    study.json  study.html    the analysis
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from photon.device import choose_device
from photon.training.optimiser import Precision
from pipelines.results import Record
from pipelines.stages import OnProgress, open_job
from pipelines.study.data import prepare_data
from pipelines.study.parts import StudyParts
from pipelines.study.processes import Launch, launch_in_process
from pipelines.study.records import RunRecord
from pipelines.study.schedule import SharedProgress, run_parts
from pipelines.study.spec import StudySpec
from pipelines.tracking import open_store
from pipelines.versioning import folder_version
from pipelines.workers import default_num_workers


def run_study(
    spec: StudySpec,
    data: Path,
    output: Path,
    *,
    workers: int = 1,
    threads: int = 1,
    device: str = "cpu",
    launch: Launch = launch_in_process,
    on_progress: OnProgress | None = None,
    tracking_uri: str | None = None,
    is_fresh: bool = False,
) -> Path:
    """Train and question every variant from every seed, and write ``study.json`` and ``study.html``.

    Run again after an interruption, it skips the parts that are finished and unchanged, and goes on with those it was
    in the middle of from their last saved step.

    Args:
        data: preprocessed data folder with questions in the splits train, val and ``spec.split``.
        workers: parts that run at a time, each in a process of its own.
        threads: of computation, for each part; the starts have at least those that the spec says.
        launch: how a part's computation is run.
        on_progress: called with steps done, steps in all and what is going on.
        tracking_uri: MLflow store; None is the environment's.
        is_fresh: do finished parts again.

    Returns:
        Path of ``study.json``.

    Raises:
        PhotonError: whatever a part finds wrong; the parts that run beside it are finished first.
    """
    from pipelines.study.report import write_study

    store = open_store(tracking_uri, "photon-study")
    version = folder_version(data)
    settings = {**dataclasses.asdict(spec), "data_version": version}
    with open_job(output, store, name=f"study-{spec.name}", settings=settings, is_fresh=is_fresh) as job:
        job.tag_all({"data_version": version})
        study = StudyParts(
            spec=spec,
            data=data.resolve(),
            output=output.resolve(),
            version=version,
            device=device,
            launch=launch,
            threads=threads,
            job=job,
        )
        parts = study.parts()
        study.progress = SharedProgress(on_progress, {part.name: part.num_units for part in parts})
        records = run_parts(parts, workers)
        with job.open_stage("analysis") as tracker:
            target = write_study(spec, study.data, study.output, records, data_version=version)
            tracker.log_artifact(target)
            tracker.log_artifact(target.with_suffix(".html"))
        job.parent.log_summary(_headline(records))
        return target


def run_preset(
    preset: str,
    data: Path,
    output: Path,
    *,
    seeds: Sequence[int] | None = None,
    variants: Collection[str] | None = None,
    keep_ratio: float | None = None,
    workers: int | None = None,
    device: str = "auto",
    precision: Precision = "float32",
    is_fresh: bool = False,
    on_progress: OnProgress | None = None,
) -> Path:
    """:func:`run_study` of a preset, with as many processes and threads as fit this machine.

    Args:
        data: data folder; where it is empty, the preset's PhantomVQA is made in it.
        seeds, variants, keep_ratio, precision: as :meth:`StudySpec.preset` has them.
        workers: parts that run at a time; default two on a CPU with two cores, one on a GPU.
        device: "cpu", "cuda" or "auto".

    Raises:
        PhotonError: as :func:`run_study`; ``PRESET_UNKNOWN``, ``VARIANT_UNKNOWN``, ``DATA_MISSING``.
    """
    spec = StudySpec.preset(preset, seeds=seeds, variants=variants, keep_ratio=keep_ratio, precision=precision)
    prepare_data(spec.phantoms, data, on_progress)
    place, cores = choose_device(device).type, default_num_workers()
    num_workers = workers or (min(2, cores) if place == "cpu" else 1)
    return run_study(
        spec,
        data,
        output,
        workers=num_workers,
        threads=max(1, cores // num_workers),
        device=place,
        on_progress=on_progress,
        is_fresh=is_fresh,
    )


def _headline(records: Mapping[str, Record]) -> dict[str, float]:
    """Mean accuracy and tokens of every variant, for comparing studies."""
    runs = [record for record in records.values() if isinstance(record, RunRecord)]
    found = {}
    for variant in {run.variant for run in runs}:
        mine = [run for run in runs if run.variant == variant]
        found[f"accuracy/{variant}"] = sum(run.accuracy for run in mine) / len(mine)
        found[f"tokens/{variant}"] = sum(run.num_kept for run in mine) / len(mine)
    return found
