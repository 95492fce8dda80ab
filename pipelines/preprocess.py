"""From a folder of scans to volumes and a manifest. One bad scan costs one row."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from photon.errors import PhotonError
from pipelines.claims import claim, share_folder
from pipelines.files import prepare_output_folder
from pipelines.manifest import MANIFEST_NAME, read_manifest, write_manifest
from pipelines.preprocess_scan import VOLUME_ENDING, Outcome, ScanJob, do_scan, refused_row
from pipelines.provenance import source_digest
from pipelines.results import PreprocessRecord
from pipelines.scans.checks import Trust
from pipelines.scans.find import find_scans
from pipelines.source_index import Appender, SourceIndex
from pipelines.volume_files import is_foreign
from pipelines.volumes import MODALITIES, VolumeSpec
from pipelines.workers import default_num_workers, run_in_processes

Progress = Callable[[int, int, str], None]
Runner = Callable[[Sequence[ScanJob]], Iterable[tuple[ScanJob, Outcome | None]]]
"""Does jobs with :func:`do_scan`, somewhere, in any order; None for a job whose worker died."""

FEW_JOBS, FEW_BYTES = 16, 64 << 20
"""Below both, processes cost more than they bring, and no scan is large enough to take this one along."""

MAX_THREADS = 4
"""Of one scan, whose decompression no number of threads makes faster."""


def preprocess(
    input: Path,
    output: Path,
    spec: VolumeSpec,
    *,
    modality: str = "auto",
    trust: Trust | None = None,
    on_progress: Progress | None = None,
    num_workers: int | None = None,
    run_jobs: Runner | None = None,
    is_pruning: bool = False,
    device: str = "cpu",
) -> PreprocessRecord:
    """Turn every scan below ``input``, a folder, archive or scan, into ``output/<scan_id>.safetensors`` and list them
    in ``output/manifest.parquet``.

    Scans whose source, spec and modality are unchanged and whose volume is whole are not done again; after a run that
    was killed the same call goes on where it was. Several processes with the same arguments share the work. The result
    depends on neither number of workers nor of processes.

    Args:
        trust: what counts where a NIfTI header contradicts itself, ``sform`` or ``pixdim``; None refuses such scans.
        num_workers: processes with one scan each; None for one a core, fewer where memory is short.
        run_jobs: does the jobs in another way than with processes of this machine.
        is_pruning: delete volumes without a row: of scans that are gone, or refused now.
        device: where scans are resampled, see :func:`photon.device.choose_device`; the voxels are the same on each.

    Raises:
        PhotonError: ``INPUT_MISSING``, ``ARCHIVE_EMPTY``, ``OUTPUT_UNWRITABLE``, ``OUTPUT_BUSY``, ``MODALITY_UNKNOWN``,
            ``DEVICE_UNKNOWN`` or ``GPU_UNAVAILABLE``. What is wrong with a single scan becomes its row's ``status``.
    """
    if modality not in ("auto", *MODALITIES):
        fact = f"it is not auto, {', '.join(MODALITIES)}."
        raise PhotonError("MODALITY_UNKNOWN", modality, fact, "Use one of these.")
    gpu = _gpu(device)
    sources = find_scans(input)
    prepare_output_folder(output)
    settings = json.dumps([str(input.resolve()), spec.digest(), modality, trust])
    with share_folder(output, settings):
        _remove_half_written(output)
        before = _listed(output)
        index = SourceIndex(output)
        jobs = [
            ScanJob(
                source=source,
                output=output,
                spec=spec,
                modality=modality,
                trust=trust,
                known=index.known.get(source.relative),
                code=source_digest(),
                is_listed=before.get(source.scan_id) is not None,
                device=gpu,
            )
            for source in sources
        ]
        run = _Run(len(jobs), index, on_progress)
        if run_jobs is None:
            jobs, run_jobs = _local(jobs, num_workers or default_num_workers())
        run.do(jobs, run_jobs)
        write_manifest(run.rows, output / MANIFEST_NAME)
        index.keep_only(source.relative for source in sources)
        orphans = _orphans(output, run.rows, set(before.values()))
        if is_pruning:
            for path in orphans:
                path.unlink(missing_ok=True)
    return _record(output, spec, run, sorted(set(before) - {source.scan_id for source in sources}), orphans, is_pruning)


class _Run:
    """Rows and counts of one call, as outcomes come in."""

    def __init__(self, total: int, index: SourceIndex, on_progress: Progress | None) -> None:
        self.rows: list[dict[str, Any]] = []
        self.states: Counter[str] = Counter()
        self._total, self._index, self._on_progress = total, index, on_progress
        self._learned: Appender | None = None

    def do(self, jobs: Sequence[ScanJob], run_jobs: Runner) -> None:
        """Do all jobs: first those that nobody else is at, then what others left, then what killed a worker, alone."""
        with self._index.appending() as learned:
            self._learned = learned
            busy, killed = self._round(jobs, run_jobs)
            _, killed_later = self._round([dataclasses.replace(job, is_waiting=True) for job in busy], run_jobs)
            for job in (*killed, *killed_later):
                # Perhaps memory ran out because of its neighbours.
                if self._round([job], functools.partial(run_in_processes, do_scan, num_workers=1))[1]:
                    message = (
                        "the process reading it was killed, twice, perhaps for want of memory. "
                        "Look at this scan, or use a machine with more memory."
                    )
                    self._take(job, Outcome(state="refused", row=refused_row(job, "WORKER_KILLED", message)))

    def _round(self, jobs: Sequence[ScanJob], run_jobs: Runner) -> tuple[list[ScanJob], list[ScanJob]]:
        busy, killed = [], []
        for job, outcome in run_jobs(jobs) if jobs else ():
            if outcome is None:
                killed.append(dataclasses.replace(job, is_waiting=True))
            elif outcome.row is None:
                busy.append(job)
            else:
                self._take(job, outcome)
        return busy, killed

    def _take(self, job: ScanJob, outcome: Outcome) -> None:
        assert outcome.row is not None
        self.rows.append(outcome.row)
        self.states[outcome.state] += 1
        if outcome.known and self._learned:
            self._learned.note(job.source.relative, outcome.known)
        if self._on_progress:
            self._on_progress(len(self.rows), self._total, job.source.scan_id)


def _local(jobs: list[ScanJob], num_workers: int) -> tuple[list[ScanJob], Runner]:
    """Processes of this machine, or none where the work is small; scans get the cores that are left over."""
    is_small = len(jobs) < FEW_JOBS and sum(_num_bytes(job.source.path) for job in jobs) < FEW_BYTES
    num_at_once = 1 if is_small else min(len(jobs), num_workers)
    num_threads = min(MAX_THREADS, num_workers // num_at_once)
    jobs = [dataclasses.replace(job, num_threads=num_threads) for job in jobs]
    return jobs, _run_here if is_small else functools.partial(run_in_processes, do_scan, num_workers=num_workers)


def _run_here(jobs: Sequence[ScanJob]) -> Iterator[tuple[ScanJob, Outcome | None]]:
    return ((job, do_scan(job)) for job in jobs)


def _gpu(device: str) -> str | None:
    """The GPU that a setting means, None for the CPU, which needs no torch."""
    if device == "cpu":
        return None
    from photon.device import choose_device

    place = choose_device(device).type
    return None if place == "cpu" else place


def _num_bytes(path: Path) -> int:
    try:
        files = path.iterdir() if path.is_dir() else (path,)
        return sum(file.stat().st_size for file in files)
    except OSError:
        return 0


def _remove_half_written(output: Path) -> None:
    """Delete what killed runs left of volumes; a living writer holds the claim of its scan."""
    for path in output.glob(f".*{VOLUME_ENDING}.*.tmp"):
        scan_id = path.name[1:].rpartition(VOLUME_ENDING)[0]
        with claim(output, scan_id) as is_ours:
            if is_ours:
                path.unlink(missing_ok=True)


def _listed(output: Path) -> dict[str, str | None]:
    """Scans of the manifest that an earlier run wrote, and their volumes."""
    try:
        return dict(read_manifest(output / MANIFEST_NAME).select("scan_id", "volume").iter_rows())
    except PhotonError:
        return {}


def _orphans(output: Path, rows: Iterable[dict[str, Any]], earlier: Collection[str | None]) -> list[Path]:
    """Volumes that no row names: what the last manifest named, or what is a volume by itself. Other people's files of
    the same ending are not."""
    named = {row.get("volume") for row in rows}
    unnamed = (path for path in output.glob(f"*{VOLUME_ENDING}") if path.name not in named)
    return sorted(path for path in unnamed if path.name in earlier or not is_foreign(path))


def _record(
    output: Path, spec: VolumeSpec, run: _Run, removed: list[str], orphans: Sequence[Path], is_pruning: bool
) -> PreprocessRecord:
    refused = Counter(row["status"] for row in run.rows if row["status"] != "ok")
    return PreprocessRecord(
        folder=str(output),
        manifest=str(output / MANIFEST_NAME),
        num_ok=len(run.rows) - sum(refused.values()),
        num_refused=sum(refused.values()),
        refused_by_code=dict(sorted(refused.items())),
        spec=spec.as_dict(),
        spec_digest=spec.digest(),
        num_new=run.states["new"],
        num_unchanged=run.states["unchanged"],
        removed=removed,
        num_without_row=0 if is_pruning else len(orphans),
    )
