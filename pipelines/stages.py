"""One run of many stages: which are done, in which MLflow run, and from what; so that a killed job goes on.

The output folder of a run keeps ``records/<stage>.json`` (what the stage found) and ``records/stages.json``
(from which inputs, and the digest of what it wrote). A stage is skipped when its inputs, the code and every
byte it wrote are unchanged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from photon.errors import PhotonError
from pipelines.files import file_digest, lock_output, prepare_output_folder, write_json
from pipelines.provenance import source_digest
from pipelines.results import Record
from pipelines.tracking import MlflowTracker, Store, run_status, terminate_abandoned_runs, tracked_run
from pipelines.versioning import folder_version

OnProgress = Callable[[int, int, str], None]
ShowProgress = Callable[[str], AbstractContextManager[OnProgress]]
AnyRecord = TypeVar("AnyRecord", bound=Record)


@contextlib.contextmanager
def no_progress(_title: str) -> Iterator[OnProgress]:
    """Show nothing."""
    yield lambda _done, _total, _label="": None  # type: ignore[misc]


@dataclass(kw_only=True)
class Job:
    """An open run: its folder, its parent MLflow run and its stages so far.

    Args:
        folder: output folder of the run.
        store: MLflow store of all its runs.
        parent: the run the stages are nested under.
        show_progress: makes a progress callback for a stage.
        entries: what ``records/stages.json`` holds.
        run_ids: MLflow run of each stage of this job.
        tags: what the runs of further stages are tagged with.

    Stages of different names may run in threads of their own.
    """

    folder: Path
    store: Store
    parent: MlflowTracker
    show_progress: ShowProgress = no_progress
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    run_ids: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    _noting: threading.Lock = field(default_factory=threading.Lock)

    def run_stage(
        self,
        name: str,
        record_type: type[AnyRecord],
        work: Callable[[MlflowTracker, OnProgress], AnyRecord],
        *,
        inputs: Mapping[str, Any],
        outputs: Sequence[Path] = (),
        scratch: Sequence[Path] = (),
        other_code: tuple[str, ...] = (),
    ) -> AnyRecord:
        """Do a stage in its own MLflow run, or take its record when nothing has changed since.

        Args:
            name: stage, record and run name.
            record_type: class of the stage's record.
            work: does the stage; gets a tracker and a progress callback.
            inputs: everything the result depends on besides the code, as JSON values.
            outputs: files and folders whose bytes must be as the stage left them.
            scratch: files and folders to delete before a start from other inputs; with the same inputs an
                interrupted stage finds what it had.
            other_code: source files that have no part in the result, see :func:`source_digest`.
        """
        key = _digest({"inputs": inputs, "code": source_digest(other_code)})
        known = self.entries.get(name, {})
        is_same = known.get("key") == key
        target = self.folder / "records" / f"{name}.json"
        if is_same and known.get("outputs") == _output_digests(outputs):
            finished = _record_or_none(record_type, target)
            if finished is not None:
                self._reuse(name, finished, known)
                return finished
        if not is_same:
            for path in scratch:
                _delete(path)
        resumed = known.get("run_id") if is_same and known.get("parent") == self.parent.run_id else None
        with self.open_stage(name, resumed) as tracker, self.show_progress(name) as on_progress:
            entry = {"key": key, "run_id": tracker.run_id, "parent": self.parent.run_id, "outputs": None}
            self._note(name, entry)
            tracker.log_hyperparameters(inputs)
            record = work(tracker, on_progress)
            record.write(target)
            tracker.log_summary(_numbers(record))
            tracker.log_artifact(target, "records")
        self._note(name, {**entry, "outputs": _output_digests(outputs)})
        return record

    def tag_all(self, tags: Mapping[str, str]) -> None:
        """Tag the parent and the runs of all stages, those to come too."""
        self.tags.update(tags)
        self.parent.log_tags(tags)
        for run_id in self.run_ids.values():
            MlflowTracker(self.store.client, run_id).log_tags(tags)

    @contextlib.contextmanager
    def open_stage(self, name: str, resume_run_id: str | None = None) -> Iterator[MlflowTracker]:
        """The MLflow run of a stage, nested under the parent; for stages that are never skipped."""
        with tracked_run(
            self.store,
            name,
            parent_run_id=self.parent.run_id,
            resume_run_id=resume_run_id,
            tags=self.tags,
        ) as tracker:
            self.run_ids[name] = tracker.run_id
            yield tracker

    def _reuse(self, name: str, record: Record, known: Mapping[str, Any]) -> None:
        if known.get("parent") == self.parent.run_id:
            self.run_ids[name] = known["run_id"]
            return
        with self.open_stage(name) as tracker:  # its numbers for comparison; curves stay in the earlier run
            tracker.log_tags({"reused_run_id": known["run_id"]})
            tracker.log_summary(_numbers(record))

    def _note(self, name: str, entry: dict[str, Any]) -> None:
        with self._noting:
            self.entries[name] = entry
            write_json(self.folder / "records" / "stages.json", self.entries)


@contextlib.contextmanager
def open_job(
    folder: Path,
    store: Store,
    *,
    name: str,
    settings: Mapping[str, Any],
    show_progress: ShowProgress = no_progress,
    is_fresh: bool = False,
) -> Iterator[Job]:
    """Open the run in ``folder``: a new one, or the one that was interrupted there.

    The MLflow run of an interrupted job is continued; a finished one is left alone and gets a successor.
    Runs of other jobs that were killed on this machine are ended.

    Args:
        folder: output folder; created.
        store: MLflow store.
        name: name of the parent run.
        settings: hyperparameters of the parent run; another value means another run.
        show_progress: makes a progress callback for each stage.
        is_fresh: forget all finished stages.

    Raises:
        PhotonError: ``OUTPUT_UNWRITABLE``; ``OUTPUT_BUSY`` when another process works in the folder.
    """
    records = prepare_output_folder(prepare_output_folder(folder) / "records")
    with lock_output(folder):
        terminate_abandoned_runs(store)
        if is_fresh:
            _delete(records)
            records.mkdir()
        digest = _digest(settings)
        known = _read_or_empty(records / "run.json")
        resumed = known.get("run_id") if known.get("settings") == digest else None
        if resumed and run_status(store, resumed) not in ("FAILED", "KILLED"):
            resumed = None
        with tracked_run(store, name, resume_run_id=resumed) as parent:
            write_json(records / "run.json", {"run_id": parent.run_id, "settings": digest})
            parent.log_hyperparameters(settings)
            entries = _read_or_empty(records / "stages.json")
            yield Job(folder=folder, store=store, parent=parent, show_progress=show_progress, entries=entries)


def content_digest(path: Path) -> str:
    """Digest of a file's bytes or of a folder's files and names; ``missing`` when there is neither."""
    if path.is_file():
        return file_digest(path)
    try:
        return folder_version(path)
    except PhotonError:
        return "missing"


def _output_digests(outputs: Sequence[Path]) -> dict[str, str]:
    return {path.name: content_digest(path) for path in outputs}


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _numbers(record: Record) -> dict[str, float]:
    return {name: float(value) for name, value in record.as_dict().items() if isinstance(value, int | float)}


def _record_or_none(record_type: type[AnyRecord], source: Path) -> AnyRecord | None:
    try:
        return record_type.read(source)
    except PhotonError:
        return None


def _read_or_empty(source: Path) -> dict[str, Any]:
    """A note of an earlier job; without one, or with a broken one, everything is done again."""
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
