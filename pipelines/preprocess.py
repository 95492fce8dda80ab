"""From a folder of scans to volumes and a manifest. One bad scan costs one row."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from photon.errors import PhotonError
from pipelines.files import file_digest, prepare_output_folder
from pipelines.manifest import MANIFEST_NAME, write_manifest
from pipelines.results import PreprocessRecord
from pipelines.scans.find import Source, find_scans
from pipelines.scans.scan import read_scan
from pipelines.volumes import (
    Volume,
    VolumeSpec,
    read_volume,
    resample,
    voxels_sha256,
    write_volume,
)

Progress = Callable[[int, int, str], None]

MIN_JOBS_FOR_WORKERS = 16


def preprocess(
    input: Path,
    output: Path,
    spec: VolumeSpec,
    *,
    modality: str = "auto",
    on_progress: Progress | None = None,
    num_workers: int | None = None,
) -> PreprocessRecord:
    """Turn every scan below ``input`` into ``output/<scan_id>.safetensors`` and list them in
    ``output/manifest.parquet``.

    Scans whose source, spec and modality are unchanged and whose volume is whole are not done again. The
    result does not depend on ``num_workers`` (None: one for each core).

    Raises:
        PhotonError: ``INPUT_MISSING``, ``ARCHIVE_EMPTY``, ``OUTPUT_UNWRITABLE`` or ``MODALITY_UNKNOWN``.
            What is wrong with a single scan becomes the ``status`` of its row.
    """
    if modality not in ("auto", "ct", "mr"):
        raise PhotonError("MODALITY_UNKNOWN", modality, "it is not auto, ct or mr.", "Use one of these.")
    sources = find_scans(input)
    prepare_output_folder(output)
    jobs = [_Job(source, output, spec, modality) for source in sources]
    rows = []
    for row in _each(jobs, num_workers or os.cpu_count() or 1):
        rows.append(row)
        if on_progress:
            on_progress(len(rows), len(jobs), row["scan_id"])
    write_manifest(rows, output / MANIFEST_NAME)
    refused = Counter(row["status"] for row in rows if row["status"] != "ok")
    return PreprocessRecord(
        folder=str(output),
        manifest=str(output / MANIFEST_NAME),
        num_ok=len(rows) - sum(refused.values()),
        num_refused=sum(refused.values()),
        refused_by_code=dict(sorted(refused.items())),
        spec=spec.as_dict(),
        spec_digest=spec.digest(),
    )


@dataclasses.dataclass(frozen=True)
class _Job:
    source: Source
    output: Path
    spec: VolumeSpec
    modality: str


def _each(jobs: Sequence[_Job], num_workers: int) -> Iterator[dict[str, Any]]:
    if num_workers == 1 or len(jobs) < MIN_JOBS_FOR_WORKERS:
        yield from map(_row, jobs)
        return
    # A fork of a process with threads (a tracker, torch) can hang, so workers start afresh.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(num_workers, mp_context=context) as pool:
        yield from pool.map(_row, jobs, chunksize=4)


def _row(job: _Job) -> dict[str, Any]:
    """The manifest row of one scan; its volume is written on the way."""
    row: dict[str, Any] = {
        "scan_id": job.source.scan_id,
        "source": job.source.relative,
        "spec_digest": job.spec.digest(),
    }
    target = job.output / f"{job.source.scan_id}.safetensors"
    try:
        volume = _current_volume(job, target) or _new_volume(job, target)
    except PhotonError as error:
        if error.code == "OUTPUT_UNWRITABLE":
            raise
        return row | {"status": error.code, "message": f"{error.fact} {error.remedy}"}
    stored = {"volume": target.name, "volume_sha256": voxels_sha256(volume)}
    return row | volume.metadata | stored | {"status": "ok", "message": ""}


def _new_volume(job: _Job, target: Path) -> Volume:
    try:
        volume = resample(read_scan(job.source.path), job.spec, job.modality)
    except MemoryError as error:
        fact = "there is not enough memory for it."
        raise PhotonError("SCAN_TOO_LARGE", job.source.path, fact, "Crop it or use a larger machine.") from error
    try:
        write_volume(volume, target)
    except OSError as error:
        fact = f"the volume cannot be written ({error.strerror or error})."
        raise PhotonError("OUTPUT_UNWRITABLE", target, fact, "Free space; what is done is kept.") from error
    return volume


def _current_volume(job: _Job, target: Path) -> Volume | None:
    """The volume of an earlier run, if it is whole and was made from the same bytes in the same way."""
    if not target.is_file() or not job.source.path.is_file():
        return None
    try:
        volume = read_volume(target, job.spec)
    except PhotonError:
        return None
    made_as = "auto" if volume.metadata["modality_source"] == "inferred" else volume.metadata["modality"]
    is_same = made_as == job.modality and volume.metadata["source_sha256"] == file_digest(job.source.path)
    return volume if is_same else None
