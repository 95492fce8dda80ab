"""What changed between versions of the data, and back to an older one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from photon.errors import PhotonError
from pipelines.data_changes import changes_between, count_changes, record_data
from pipelines.manifest import SCHEMA, read_manifest
from pipelines.old_versions import find_version, list_versions, restore_version
from pipelines.preprocess import preprocess
from pipelines.scans.nifti import write_scan
from pipelines.tracking import MemoryTracker, NullTracker, open_store, tracked_run
from pipelines.version_owners import NOTES
from pipelines.versioning import cache_folder, folder_version, read_version
from pipelines.volumes import VolumeSpec

SPEC = VolumeSpec(spacing_mm=6.0, shape=(14, 28, 28), window_hu=(-200, 300))


def put_scan(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.RandomState(seed).randint(-900, 900, (12, 13, 14)).astype(np.int16)
    write_scan(array, np.diag([4.0, 4.0, 5.0, 1.0]), path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "project" / "data"
    for seed, name in enumerate(("kept", "redone", "removed", "breaks")):
        put_scan(folder / "raw" / f"{name}.nii", seed)
    (folder / "raw" / "mended.nii").write_bytes(b"no scan yet")
    return folder


def run(data: Path, tracker: MemoryTracker) -> tuple[str, pl.DataFrame]:
    preprocess(data / "raw", data / "volumes", SPEC, is_pruning=True)
    record, changes = record_data(data, tracker)
    return record.data_version, changes


def change(data: Path) -> None:
    """Add, remove, redo, break and mend scans."""
    put_scan(data / "raw" / "deep" / "added.nii", 7)
    put_scan(data / "raw" / "redone.nii", 8)
    put_scan(data / "raw" / "mended.nii", 9)
    (data / "raw" / "removed.nii").unlink()
    breaks = data / "raw" / "breaks.nii"
    breaks.write_bytes(breaks.read_bytes()[:1000])


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".tmp"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_tells_what_changed_and_an_older_version_comes_back(data: Path) -> None:
    first_tracker, second_tracker = MemoryTracker(), MemoryTracker()
    first, changes = run(data, first_tracker)
    assert count_changes(changes) == {"added": 4, "removed": 0, "redone": 0, "refused": 1}
    before = contents(data)
    manifest = read_manifest(data / "volumes" / "manifest.parquet")
    change(data)
    second, changes = run(data, second_tracker)
    after = contents(data)
    assert dict(changes.select("scan_id", "change").iter_rows()) == {
        "added": "added",
        "mended": "added",
        "removed": "removed",
        "redone": "redone",
        "breaks": "refused",
    }
    redone = changes.row(by_predicate=pl.col("scan_id") == "redone", named=True)
    assert (
        redone["volume_sha256_before"]
        == manifest.row(by_predicate=pl.col("scan_id") == "redone", named=True)["volume_sha256"]
    )
    assert redone["volume_sha256"] != redone["volume_sha256_before"]
    assert second_tracker.tables["changes"]["change"] == changes["change"].to_list()
    assert second_tracker.summary == {"scans_added": 2, "scans_removed": 1, "scans_redone": 1, "scans_refused": 1}
    assert second_tracker.datasets == [("data", second, "data.dvc")]

    assert {old.version for old in list_versions(data)} == {first, second}
    assert [old.version for old in list_versions(data) if old.is_current] == [second]
    assert find_version(data, first[:12]) == first
    restore_version(data, first)
    assert contents(data) == before
    assert read_version(data.with_name("data.dvc")) == first == folder_version(data)
    # Nothing has to be done again, and the version is recorded already.
    record = preprocess(data / "raw", data / "volumes", SPEC, is_pruning=True)
    assert (record.num_new, record.num_unchanged) == (0, 4)
    assert record_data(data, NullTracker())[0].status == "matches"
    restore_version(data, second)
    assert contents(data) == after
    assert count_changes(changes_between(data, second, first)) == {"added": 2, "removed": 1, "redone": 1, "refused": 1}
    assert changes_between(data, first, first).is_empty()


def test_restored_data_is_what_dvc_expects(data: Path) -> None:
    first, _ = run(data, MemoryTracker())
    pointer = data.with_name("data.dvc").read_bytes()
    change(data)
    run(data, MemoryTracker())
    restore_version(data, first)
    assert data.with_name("data.dvc").read_bytes() == pointer


def test_what_is_in_no_version_is_not_lost(data: Path) -> None:
    first, _ = run(data, MemoryTracker())
    change(data)
    with pytest.raises(PhotonError, match="DATA_UNRECORDED"):
        restore_version(data, first)
    assert (data / "raw" / "deep" / "added.nii").exists() and not (data / "raw" / "removed.nii").exists()
    restore_version(data, first, is_forced=True)
    assert folder_version(data) == first
    # Started again after a kill in the middle: what is missing comes back without force.
    (data / "raw" / "kept.nii").unlink()
    restore_version(data, first)
    assert folder_version(data) == first


def test_rotten_caches_restore_nothing(data: Path) -> None:
    first, _ = run(data, MemoryTracker())
    (old,) = [
        file for file in cache_folder(data.parent).rglob("*") if file.is_file() and file.read_bytes() == b"no scan yet"
    ]
    change(data)
    run(data, MemoryTracker())
    old.chmod(0o644)
    old.write_bytes(b"no scan yes")
    before = contents(data)
    with pytest.raises(PhotonError, match="VERSION_INCOMPLETE"):
        restore_version(data, first)
    assert contents(data) == before, "no file of the old version beside those of the new one"
    old.unlink()
    with pytest.raises(PhotonError, match="VERSION_INCOMPLETE"):
        restore_version(data, first)
    listing = cache_folder(data.parent) / first[:2] / first[2:]
    listing.chmod(0o644)
    listing.write_bytes(listing.read_bytes().replace(b"raw/kept.nii", b"../kept0.nii"))
    with pytest.raises(PhotonError, match="VERSION_UNKNOWN"):
        restore_version(data, first)
    for start in ("", "zz"):
        with pytest.raises(PhotonError, match="VERSION_UNKNOWN"):
            find_version(data, start)


def test_a_version_belongs_to_its_data_folder(data: Path, tmp_path: Path) -> None:
    other = data.with_name("other")
    put_scan(other / "raw" / "theirs.nii", 20)
    theirs = record_data(other, NullTracker())[0].data_version
    put_scan(other / "raw" / "more.nii", 21)
    record_data(other, NullTracker())
    ours = record_data(data, NullTracker())[0].data_version
    folders = {old.version: old.folders for old in list_versions(data)}
    assert (folders[ours], folders[theirs]) == (("data",), ("other",))
    assert [old.version for old in list_versions(data) if old.is_for(data)] == [ours]
    before = contents(data.parent)
    with pytest.raises(PhotonError, match="VERSION_FOREIGN") as refused:
        restore_version(data, find_version(data, theirs[:12]), is_forced=True)
    assert "data folder other, not of data" in refused.value.fact and "--from-other" in refused.value.remedy
    assert contents(data.parent) == before
    restore_version(data, theirs, is_any=True)
    assert folder_version(data) == theirs
    assert {old.version: old.folders for old in list_versions(data)}[theirs] == ("data", "other")
    restore_version(data, ours)
    restore_version(data, theirs)  # it is a version of both now
    restore_version(other, theirs)


def test_versions_of_which_nobody_noted_the_folder_are_for_everybody(data: Path) -> None:
    first = record_data(data, NullTracker())[0].data_version
    put_scan(data / "raw" / "kept.nii", 30)
    second = record_data(data, NullTracker())[0].data_version
    notes = cache_folder(data.parent).parents[1] / NOTES
    assert len(notes.read_text(encoding="utf-8").split()) > 2
    notes.unlink()  # as in a project from before there were notes
    other = data.with_name("other")
    put_scan(other / "raw" / "theirs.nii", 20)
    folders = {old.version: old.folders for old in list_versions(other)}
    assert folders == {first: (), second: ("data",)}, "the pointer tells of its present version"
    restore_version(other, first, is_forced=True)
    restore_version(data, second)
    with pytest.raises(PhotonError, match="VERSION_FOREIGN"):
        restore_version(other, second)
    put_scan(other / "raw" / "theirs.nii", 22)
    record_data(other, NullTracker())
    notes.write_text(notes.read_text(encoding="utf-8") + '\n[]\n{"version": "', encoding="utf-8")  # a torn line
    record_data(data, NullTracker())
    assert {old.version: old.folders for old in list_versions(other)}[second] == ("data",)


def test_restoring_what_is_nobodys_takes_it_from_nobody(data: Path) -> None:
    first = record_data(data, NullTracker())[0].data_version
    put_scan(data / "raw" / "kept.nii", 30)
    second = record_data(data, NullTracker())[0].data_version
    (cache_folder(data.parent).parents[1] / NOTES).unlink()
    other = data.with_name("other")
    other.mkdir()
    restore_version(other, first)
    restore_version(data, first)
    with pytest.raises(PhotonError, match="VERSION_FOREIGN"):
        restore_version(other, second)  # of which only data's pointer told, before it was written anew
    put_scan(other / "raw" / "theirs.nii", 22)
    record_data(other, NullTracker())
    restore_version(data, second)
    restore_version(data, first)
    assert all(old.is_for(data) for old in list_versions(data) if old.version in (first, second))


def test_a_renamed_data_folder_keeps_its_versions(data: Path) -> None:
    first = record_data(data, NullTracker())[0].data_version
    put_scan(data / "raw" / "kept.nii", 30)
    record_data(data, NullTracker())
    renamed = data.with_name("study")
    data.rename(renamed)
    data.with_name("data.dvc").rename(data.with_name("study.dvc"))
    assert all(old.is_for(renamed) for old in list_versions(renamed))
    restore_version(renamed, first)
    assert folder_version(renamed) == first


def test_the_version_before_notes_is_noted_with_the_next(data: Path) -> None:
    first = record_data(data, NullTracker())[0].data_version
    (cache_folder(data.parent).parents[1] / NOTES).unlink()
    put_scan(data / "raw" / "kept.nii", 30)
    record_data(data, NullTracker())
    assert {old.version: old.folders for old in list_versions(data)}[first] == ("data",)


def test_notes_are_no_part_of_what_dvc_keeps(data: Path) -> None:
    first = record_data(data, NullTracker())[0].data_version
    put_scan(data / "raw" / "kept.nii", 30)
    record_data(data, NullTracker())
    environment = {**os.environ, "DVC_SITE_CACHE_DIR": str(data.parent / ".dvc" / "site"), "DVC_NO_ANALYTICS": "true"}
    for command in (("status",), ("gc", "--workspace", "--force")):
        done = subprocess.run(
            [sys.executable, "-m", "dvc", *command], cwd=data.parent, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert first not in {old.version for old in list_versions(data)}
    assert (cache_folder(data.parent).parents[1] / NOTES).is_file()


def test_the_table_reaches_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")  # MLflow changes it by itself
    columns = {"scan_id": ["a", "b"], "change": ["added", "removed"]}
    store = open_store()
    with tracked_run(store, "record") as tracker:
        tracker.log_table("changes", columns)
        tracker.log_table("others", columns)
        tracker.log_table("others", columns)
    ours = store.client.download_artifacts(tracker.run_id, "changes.json")
    with tracked_run(store, "as MLflow does it") as other:
        store.client.log_table(other.run_id, columns, "changes.json")
        store.client.download_artifacts(other.run_id, "changes.json", str(tmp_path))
    theirs = tmp_path / "changes.json"
    assert json.loads(Path(ours).read_text()) == json.loads(theirs.read_text())
    tags = [store.client.get_run(run.run_id).data.tags["mlflow.loggedArtifacts"] for run in (tracker, other)]
    assert json.loads(tags[0])[:1] == json.loads(tags[1]) and len(json.loads(tags[0])) == 2


def test_manifests_without_columns_of_today_can_be_compared(data: Path) -> None:
    first, _ = run(data, MemoryTracker())
    path = data / "volumes" / "manifest.parquet"
    pl.read_parquet(path).drop("notes", "min_hu").write_parquet(path)
    second = record_data(data, NullTracker())[0].data_version
    assert first != second and "notes" in SCHEMA
    assert changes_between(data, first, second).is_empty()
