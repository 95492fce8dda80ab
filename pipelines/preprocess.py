"""From a folder of scans to volumes and a manifest. One bad scan costs one row."""

from __future__ import annotations

import dataclasses
import hashlib
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
from pipelines.volumes import (
    Volume,
    VolumeSpec,
    is_nifti_name,
    read_scan,
    read_volume,
    resample,
    scan_id_of,
    voxels_sha256,
    write_volume,
)

Progress = Callable[[int, int, str], None]

MIN_JOBS_FOR_WORKERS = 16
MAX_NAME = 200

OTHER_FORMATS = (".mha", ".mhd", ".nrrd", ".nhdr", ".mgz", ".mgh", ".hdr", ".mnc")
"""Image files that are listed as refused; files of other endings are no scans and are passed over."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A scan found in a folder: a file, or a folder of DICOM slices."""

    scan_id: str
    path: Path
    relative: str


def find_scans(folder: Path) -> list[Source]:
    """Every scan below ``folder``, sorted; hidden files and folders are passed over.

    The id is the file name without its ending; where two have the same, the path within ``folder`` with ``_``
    for ``/``, and a checksum of it if that is not enough or the path is long.

    Raises:
        PhotonError: ``INPUT_MISSING`` when the folder is not there, ``ARCHIVE_EMPTY`` when it holds no scan.
    """
    if not folder.is_dir():
        raise PhotonError("INPUT_MISSING", folder, "there is no such folder.", "Check the path.")
    paths = sorted(_scan_paths(folder), key=lambda path: path.relative_to(folder).as_posix())
    if not paths:
        fact = "it holds no scan (.nii, .nii.gz)."
        raise PhotonError("ARCHIVE_EMPTY", folder, fact, "Put scans into it or give another folder.")
    names = {path: _names(path.relative_to(folder)) for path in paths}
    level = dict.fromkeys(paths, 0)
    while repeated := _repeated([names[path][level[path]] for path in paths]):
        for path in paths:
            if names[path][level[path]] in repeated:
                level[path] += 1
    return [
        Source(scan_id=names[path][level[path]], path=path, relative=path.relative_to(folder).as_posix())
        for path in paths
    ]


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


def _scan_paths(folder: Path) -> Iterator[Path]:
    """Scan files below a folder, and folders that hold DICOM slices."""
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = [Path(parent) / name for name in files if not name.startswith(".")]
        if any(path.suffix.lower() in (".dcm", ".ima") for path in paths):
            yield Path(parent)
        yield from (path for path in paths if is_nifti_name(path) or path.suffix.lower() in OTHER_FORMATS)


def _names(relative: Path) -> tuple[str, str, str]:
    """Candidates for a scan's id, each longer and rarer than the one before; the last is unique."""
    whole = relative.as_posix().replace("/", "_")
    digest = hashlib.sha256(relative.as_posix().encode("utf-8", "surrogateescape")).hexdigest()[:12]
    unique = f"{whole[:40]}-{digest}"
    if len(os.fsencode(whole)) > MAX_NAME:
        return unique, unique, unique
    return scan_id_of(relative), scan_id_of(Path(whole)), unique


def _repeated(names: list[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}
