"""One scan of an archive: its volume, and its row of the manifest. This is what a worker does."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any, Literal

from photon.errors import PhotonError
from pipelines.claims import claim
from pipelines.files import file_digest
from pipelines.scans.checks import Trust
from pipelines.scans.find import Source, located
from pipelines.scans.scan import Scan, read_scan
from pipelines.source_index import Known, signature_of
from pipelines.volume_files import is_foreign
from pipelines.volumes import VolumeRecord, VolumeSpec, read_volume_record, store_scan

VOLUME_ENDING = ".safetensors"
MAYBE_DETACHED = (".mhd", ".nhdr", ".hdr", ".mha", ".nrrd")
"""Files whose voxels may lie in another file, so that what the file system says of them proves nothing about a scan."""
NOT_ITS_OWN_FAULT = ("SCAN_TOO_LARGE", "SCAN_FAULT", "WORKER_KILLED", "OUTPUT_TAKEN")
"""Refusals that the same bytes need not meet again, on another day or a larger machine."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScanJob:
    """A scan to be done, and how.

    Args:
        trust: see :func:`read_scan`.
        known: what an earlier run learned about the source.
        code: digest of the source code: refusals of other code are not believed.
        is_waiting: wait where another process is doing the same scan.
    """

    source: Source
    output: Path
    spec: VolumeSpec
    modality: str
    trust: Trust | None = None
    known: Known | None = None
    code: str = ""
    is_waiting: bool = False
    is_listed: bool = False
    """Whether the last manifest names a volume of this scan, so that its file is ours whatever it holds."""
    num_threads: int = 1
    """That resample and pack: more than one where there are cores to spare."""
    device: str | None = None
    """Where torch resamples, if it can; None: compiled loops on the CPU do."""

    @property
    def target(self) -> Path:
        """The volume's file."""
        return self.output / f"{self.source.scan_id}{VOLUME_ENDING}"

    @property
    def settings(self) -> str:
        """What a refusal depends on besides the source's bytes."""
        return f"{self.spec.digest()} {self.modality} {self.trust} {self.code}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a job: its row, None where another process is at it, and what was learned about the source."""

    state: Literal["new", "unchanged", "refused", "busy"]
    row: dict[str, Any] | None = None
    known: Known | None = None


def do_scan(job: ScanJob) -> Outcome:
    """Do one scan unless it is done already; the volume is written on the way.

    Raises:
        PhotonError: ``OUTPUT_UNWRITABLE``. Whatever else is wrong becomes the row's ``status``.
    """
    with claim(job.output, job.source.scan_id, is_waiting=job.is_waiting) as is_ours:
        if not is_ours:
            return Outcome(state="busy")
        signature = signature_of(job.source.path)
        known = job.known if job.known and job.known.signature == signature else None
        if known and known.refusal and known.refusal[2] == job.settings:
            return _refused(job, *known.refusal[:2], known=known)
        try:
            return _do(job, signature, known)
        except Exception as error:  # one scan must not cost the archive
            told = _told(error, job)
            if told.code == "OUTPUT_UNWRITABLE":
                raise told from error
        # Of a series it is one file that is at fault, and there may be hundreds.
        part = f"{Path(told.subject).name}: " if (job.source.path / Path(told.subject).name).is_file() else ""
        learned, message = None, f"{part}{told.fact} {told.remedy}"
        if signature and not _maybe_detached(job.source.path) and told.code not in NOT_ITS_OWN_FAULT:
            learned = Known(signature=signature, refusal=(told.code, message, job.settings))
        return _refused(job, told.code, message, known=learned)


def refused_row(job: ScanJob, code: str, message: str) -> dict[str, Any]:
    """The manifest row of a scan that cannot be used."""
    return _row(job) | {"status": code, "message": message}


def _refused(job: ScanJob, code: str, message: str, *, known: Known | None) -> Outcome:
    return Outcome(state="refused", row=refused_row(job, code, message), known=known)


def _row(job: ScanJob) -> dict[str, Any]:
    return {"scan_id": job.source.scan_id, "source": job.source.relative, "spec_digest": job.spec.digest()}


def _do(job: ScanJob, signature: str | None, known: Known | None) -> Outcome:
    earlier = _earlier_volume(job)
    sha256 = known.sha256 if known else job.source.sha256
    if earlier and sha256 and sha256 == earlier.metadata["source_sha256"]:
        return _done(job, "unchanged", earlier, signature)
    with located(job.source) as path:
        # The hash of a scan of several files is another than that of the file that is named.
        if earlier and path.is_file() and file_digest(path) == earlier.metadata["source_sha256"]:
            return _done(job, "unchanged", earlier, signature)
        scan = read_scan(path, series=job.source.series, trust=job.trust)
    if _maybe_detached(job.source.path):
        signature = None
    if earlier and scan.sha256 == earlier.metadata["source_sha256"]:
        return _done(job, "unchanged", earlier, signature)
    if not job.is_listed and is_foreign(job.target):
        fact = "the folder of the volumes holds a file of this name that is no volume."
        raise PhotonError("OUTPUT_TAKEN", job.target, fact, "Move it, or give another folder for the volumes.")
    return _done(job, "new", _make_volume(job, scan), signature)


def _done(job: ScanJob, state: Literal["new", "unchanged"], volume: VolumeRecord, signature: str | None) -> Outcome:
    stored = {"volume": job.target.name, "volume_sha256": volume.slabs_sha256, "status": "ok", "message": ""}
    known = Known(signature=signature, sha256=volume.metadata["source_sha256"]) if signature else None
    return Outcome(state=state, row=_row(job) | volume.metadata | stored, known=known)


def _earlier_volume(job: ScanJob) -> VolumeRecord | None:
    """The volume of an earlier run, if its bytes are whole and it was made with the same settings."""
    try:
        volume = read_volume_record(job.target, job.spec)
    except PhotonError:
        return None
    is_declared = volume.metadata["modality_source"] == "declared"
    made_as = volume.metadata["modality"] if is_declared else "auto"
    is_same = made_as == job.modality and volume.metadata.get("trust") == job.trust
    return volume if is_same else None


def _maybe_detached(path: Path) -> bool:
    return path.suffix.lower() in MAYBE_DETACHED


def _told(error: Exception, job: ScanJob) -> PhotonError:
    """What is wrong, with a code.

    Of a fault that nobody foresaw only kind and place are told: its words may quote a header.
    """
    if isinstance(error, PhotonError):
        return error
    if isinstance(error, MemoryError):
        fact = "there is not enough memory for it."
        return PhotonError("SCAN_TOO_LARGE", job.source.path, fact, "Crop it or use a larger machine.")
    place = traceback.extract_tb(error.__traceback__)[-1]
    fact = f"its reader failed ({type(error).__name__} in {Path(place.filename).name}, line {place.lineno})."
    return PhotonError("SCAN_FAULT", job.source.path, fact, "Convert it to .nii.gz, and report the fault.")


def _make_volume(job: ScanJob, scan: Scan) -> VolumeRecord:
    more = {"trust": job.trust} if job.trust else {}  # only then: volumes made without it keep their bytes
    try:
        return store_scan(
            scan, job.spec, job.target, job.modality, more, num_threads=job.num_threads, device=job.device
        )
    except OSError as error:
        fact = f"the volume cannot be written ({error.strerror or error})."
        raise PhotonError("OUTPUT_UNWRITABLE", job.target, fact, "Free space; what is done is kept.") from error
