from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from photon.errors import PhotonError
from pipelines import versioning
from pipelines.versioning import folder_version, read_version, version_folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "project" / "data"
    (folder / "raw" / "a-b").mkdir(parents=True)
    (folder / "raw" / "a-b" / "1.nii").write_bytes(bytes(range(256)) * 40)
    (folder / "raw" / "a" / "deep").mkdir(parents=True)
    (folder / "raw" / "a" / "deep" / "ü 2.csv").write_text("scan,ü\n", encoding="utf-8")
    (folder / "raw" / "a.txt").write_text("")
    (folder / "questions.jsonl").write_text('{"a": 1}\n')
    return folder


def dvc(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dvc", *arguments]
    private = {"DVC_SITE_CACHE_DIR": str(project / ".dvc" / "site"), "DVC_NO_ANALYTICS": "true"}
    environment = {**os.environ, **private}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=120)


def refuse_dvc(*_: object) -> None:
    raise AssertionError("DVC was started")


def test_the_version_equals_what_dvc_itself_counts(data: Path) -> None:
    dvc(data.parent, "init", "-q", "--no-scm")
    done = dvc(data.parent, "add", "data")
    assert done.returncode == 0, done.stderr
    assert read_version(data.with_name("data.dvc")) == folder_version(data)


def test_first_then_matching_then_new(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = version_folder(data)
    assert (first.status, first.recorded_version) == ("first", None)
    assert first.data_version == read_version(data.parent / "data.dvc") == folder_version(data)
    pointer = data.parent / "data.dvc"
    before = pointer.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(versioning, "_call_dvc", refuse_dvc)
        again = version_folder(data, pointer)
    assert (again.status, again.recorded_version) == ("matches", first.data_version)
    assert "exactly the bytes" in again.message
    assert pointer.read_bytes() == before
    (data / "raw" / "a.txt").write_text("changed")
    new = version_folder(data)
    assert (new.status, new.recorded_version) == ("new", first.data_version)
    assert new.data_version == read_version(pointer) != first.data_version
    assert first.data_version in new.message
    assert new.data_version in new.message


def test_a_fresh_clone_matches_and_gets_its_cache_filled(data: Path, tmp_path: Path) -> None:
    version = version_folder(data).data_version
    clone = tmp_path / "clone"
    shutil.copytree(data, clone / "data")
    shutil.copy(data.parent / "data.dvc", clone)
    before = (clone / "data.dvc").read_bytes()
    record = version_folder(clone / "data")
    assert (record.status, record.data_version) == ("matches", version)
    assert (clone / "data.dvc").read_bytes() == before
    assert len([file for file in (clone / ".dvc" / "cache").rglob("*") if file.is_file()]) == 5


def test_an_ordinary_remote_works_with_push_and_pull(data: Path, tmp_path: Path) -> None:
    version = version_folder(data).data_version
    assert dvc(data.parent, "remote", "add", "-d", "store", str(tmp_path / "remote")).returncode == 0
    pushed = dvc(data.parent, "push")
    assert pushed.returncode == 0, pushed.stderr
    shutil.rmtree(data)
    shutil.rmtree(data.parent / ".dvc" / "cache")
    pulled = dvc(data.parent, "pull")
    assert pulled.returncode == 0, pulled.stderr
    assert folder_version(data) == version


def test_rotten_bytes_are_a_new_version_even_when_size_and_time_are_kept(data: Path) -> None:
    version_folder(data)
    target = data / "raw" / "a-b" / "1.nii"
    times = target.stat()
    content = bytearray(target.read_bytes())
    content[100] ^= 1
    target.write_bytes(content)
    os.utime(target, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert version_folder(data).status == "new"


def test_half_written_files_of_a_killed_job_do_not_count(data: Path) -> None:
    version = version_folder(data).data_version
    (data / "raw" / ".1.nii.abc123.tmp").write_bytes(b"half")
    assert version_folder(data).data_version == version
    shutil.rmtree(data.parent / ".dvc" / "cache")
    assert version_folder(data).status == "matches"  # DVC, started anew, ignores it too


def test_callers_at_the_same_time_wait_for_each_other(data: Path) -> None:
    records = []
    threads = [threading.Thread(target=lambda: records.append(version_folder(data))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {record.data_version for record in records} == {folder_version(data)}
    assert len(records) == 3


def test_a_lock_held_elsewhere_is_waited_for_then_reported(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LockError(Exception): ...

    calls = []

    def locked(*_: object) -> None:
        calls.append(1)
        raise LockError("Unable to acquire lock")

    monkeypatch.setattr(versioning, "_call_dvc", locked)
    monkeypatch.setattr(versioning.time, "sleep", lambda _: None)
    with pytest.raises(PhotonError, match="DVC_FAILED.*Unable to acquire lock"):
        version_folder(data)
    assert len(calls) == versioning.LOCK_ATTEMPTS


@pytest.mark.parametrize("content", ["", "outs: []", "[1, 2", "outs:\n- md5: abc\n", "text", "outs:\n- path: data\n"])
def test_a_broken_pointer_is_one_clear_error(data: Path, content: str) -> None:
    (data.parent / "data.dvc").write_text(content)
    with pytest.raises(PhotonError, match="POINTER_UNREADABLE"):
        version_folder(data)
    assert (data.parent / "data.dvc").read_text() == content


def test_missing_or_empty_data_and_a_misplaced_pointer_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="DATA_MISSING.*does not exist"):
        version_folder(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PhotonError, match="DATA_MISSING.*holds no files"):
        version_folder(tmp_path / "empty")
    with pytest.raises(PhotonError, match="POINTER_UNREADABLE.*does not exist"):
        read_version(tmp_path / "data.dvc")
    with pytest.raises(PhotonError, match="POINTER_MISPLACED"):
        version_folder(data, tmp_path / "other.dvc")


def test_the_committed_settings_are_those_a_new_project_gets() -> None:
    project = Path(__file__).resolve().parents[2]
    for name, content in versioning.DVC_FILES.items():
        assert (project / name).read_text(encoding="utf-8") == content
