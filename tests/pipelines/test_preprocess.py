"""From a folder of scans to volumes and a manifest."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from photon.errors import PhotonError
from pipelines.manifest import read_manifest
from pipelines.preprocess import preprocess
from pipelines.preprocess_scan import Outcome, ScanJob, do_scan
from pipelines.scans.find import find_scans
from pipelines.scans.nifti import write_scan
from pipelines.volumes import VolumeSpec, read_volume

SPEC = VolumeSpec(spacing_mm=6.0, shape=(14, 28, 28), window_hu=(-200, 300))


def put_scan(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.RandomState(seed).randint(-900, 900, (12, 13, 14)).astype(np.int16)
    write_scan(array, np.diag([4.0, 4.0, 5.0, 1.0]), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two good scans, a truncated one, DICOM by name alone, another format and files that are no scans."""
    scans = tmp_path / "in"
    put_scan(scans / "a.nii", 1)
    put_scan(scans / "deep" / "b.nii.gz", 2)
    content = (scans / "a.nii").read_bytes()
    (scans / "cut.nii.gz").write_bytes(gzip.compress(content)[:500])
    for name in ("dicom/1.dcm", "dicom/2.dcm", "c.mgz", "readme.txt", ".hidden.nii"):
        (scans / name).parent.mkdir(exist_ok=True)
        (scans / name).write_bytes(b"x")
    return scans


def test_one_bad_scan_costs_one_row(folder: Path, tmp_path: Path) -> None:
    seen = []
    record = preprocess(folder, tmp_path / "out", SPEC, on_progress=lambda *step: seen.append(step))
    table = {row["scan_id"]: row for row in read_manifest(Path(record.manifest)).iter_rows(named=True)}
    assert {scan_id: row["status"] for scan_id, row in table.items()} == {
        "a": "ok",
        "b": "ok",
        "c.mgz": "FORMAT_UNSUPPORTED",
        "cut": "SCAN_TRUNCATED",
        "unreadable": "SCAN_UNREADABLE",
    }
    assert (record.num_ok, record.num_refused) == (2, 3)
    assert record.refused_by_code == {"FORMAT_UNSUPPORTED": 1, "SCAN_TRUNCATED": 1, "SCAN_UNREADABLE": 1}
    assert [step[:2] for step in seen] == [(n, 5) for n in range(1, 6)]
    row = table["b"]
    assert (row["source"], row["shape"], row["spacing_mm"]) == ("deep/b.nii.gz", [12, 13, 14], [4.0, 4.0, 5.0])
    assert read_volume(tmp_path / "out" / row["volume"], SPEC).metadata["source_sha256"] == row["source_sha256"]
    assert "convert" in table["c.mgz"]["message"].lower()


def test_only_what_changed_is_done_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def run(spec: VolumeSpec = SPEC, modality: str = "auto") -> dict[str, int]:
        preprocess(folder, out, spec, modality=modality)
        return {path.stem: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}

    first = run()
    manifest = (out / "manifest.parquet").read_bytes()
    (out / "manifest.parquet").unlink()  # as after a run that was killed
    assert run() == first
    assert (out / "manifest.parquet").read_bytes() == manifest
    put_scan(folder / "a.nii", 9)
    second = run()
    assert second["a"] != first["a"] and second["b"] == first["b"]
    (out / "b.safetensors").write_bytes((out / "b.safetensors").read_bytes()[:-2] + b"??")
    third = run()
    assert third["b"] != second["b"] and third["a"] == second["a"]
    whole = (out / "b.safetensors").read_bytes()[:-32]
    (out / "b.safetensors").write_bytes(whole + hashlib.sha256(whole).digest())  # as an older version wrote it
    again = run()
    assert again["b"] != third["b"] and again["a"] == third["a"]
    third = again
    fourth = run(modality="ct")
    assert not set(fourth.values()) & set(third.values())
    other = VolumeSpec(spacing_mm=7.0, shape=(14, 28, 28), window_hu=(-200, 300))
    assert not set(run(other, "ct").values()) & set(fourth.values())


def test_files_of_others_are_neither_deleted_nor_replaced(tmp_path: Path) -> None:
    """Weights have the same ending as volumes."""
    out = tmp_path / "out"
    put_scan(tmp_path / "in" / "a.nii", 1)
    put_scan(tmp_path / "in" / "gone.nii", 2)
    out.mkdir()
    save_file({"weight": np.zeros(3)}, out / "a.safetensors")
    save_file({"weight": np.zeros(3)}, out / "model.safetensors", metadata={"format": "pt"})
    theirs = [(out / name).read_bytes() for name in ("a.safetensors", "model.safetensors")]
    record = preprocess(tmp_path / "in", out, SPEC)
    assert record.refused_by_code == {"OUTPUT_TAKEN": 1} and record.num_without_row == 0
    (tmp_path / "in" / "gone.nii").unlink()
    preprocess(tmp_path / "in", out, SPEC, is_pruning=True)
    assert not (out / "gone.safetensors").exists()
    assert [(out / name).read_bytes() for name in ("a.safetensors", "model.safetensors")] == theirs


def test_a_volume_whose_header_is_damaged_is_still_ours(tmp_path: Path) -> None:
    out = tmp_path / "out"
    put_scan(tmp_path / "in" / "a.nii", 1)
    preprocess(tmp_path / "in", out, SPEC)
    whole = (out / "a.safetensors").read_bytes()
    (out / "a.safetensors").write_bytes(whole.replace(b'"photon"', b'"phooon"', 1))
    assert preprocess(tmp_path / "in", out, SPEC).num_new == 1
    assert (out / "a.safetensors").read_bytes() == whole


def test_values_that_may_be_no_hu_are_noted(tmp_path: Path) -> None:
    array = np.random.RandomState(0).randint(0, 2000, (12, 13, 14)).astype(np.int16)
    (tmp_path / "in").mkdir()
    write_scan(array, np.diag([4.0, 4.0, 5.0, 1.0]), tmp_path / "in" / "a.nii")
    for modality, words in (("ct", "are these HU"), ("auto", "taken for MR"), ("mr", "")):
        record = preprocess(tmp_path / "in", tmp_path / modality, SPEC, modality=modality)
        (notes,) = read_manifest(Path(record.manifest))["notes"].to_list()
        assert any(words in note for note in notes) if words else not notes


def test_the_number_of_workers_does_not_matter(tmp_path: Path) -> None:
    for number in range(17):
        put_scan(tmp_path / "in" / f"{number:02d}.nii", number)
    for workers in (1, 2):
        preprocess(tmp_path / "in", tmp_path / str(workers), SPEC, num_workers=workers)
    names = sorted(path.name for path in (tmp_path / "1").iterdir() if not path.name.startswith("."))
    assert len(names) == 18
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_few_scans_share_the_cores_that_are_left_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The volumes are the same, and no scan gets more threads than help it."""
    for number in range(2):
        put_scan(tmp_path / "in" / f"{number}.nii", number)
    given: list[list[int]] = []

    def here(_: object, jobs: Sequence[ScanJob], num_workers: int) -> Iterator[tuple[ScanJob, Outcome]]:
        given.append([job.num_threads for job in jobs])
        return ((job, do_scan(job)) for job in jobs)

    monkeypatch.setattr("pipelines.preprocess.FEW_BYTES", 0)
    monkeypatch.setattr("pipelines.preprocess.run_in_processes", here)
    for workers in (1, 5, 64):
        preprocess(tmp_path / "in", tmp_path / str(workers), SPEC, num_workers=workers)
    assert given == [[1, 1], [2, 2], [4, 4]]
    monkeypatch.undo()
    here_alone = Mock(side_effect=do_scan)
    monkeypatch.setattr("pipelines.preprocess.do_scan", here_alone)
    preprocess(tmp_path / "in", tmp_path / "alone", SPEC, num_workers=3)
    assert [call.args[0].num_threads for call in here_alone.call_args_list] == [3, 3], "one small scan after another"
    for path in (tmp_path / "1").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "5" / path.name).read_bytes()
        assert path.read_bytes() == (tmp_path / "64" / path.name).read_bytes()


def test_scans_are_resampled_on_the_device_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_scan(tmp_path / "in" / "a.nii")
    preprocess(tmp_path / "in", tmp_path / "cpu", SPEC)
    monkeypatch.setattr("pipelines.preprocess._gpu", lambda device: {"cuda": "cpu"}[device])  # torch, but no GPU
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.resample.slab_makers", None)
        patch.setattr("pipelines.volumes.slab_makers", None)
        preprocess(tmp_path / "in", tmp_path / "cuda", SPEC, device="cuda")
    assert (tmp_path / "cpu/a.safetensors").read_bytes() == (tmp_path / "cuda/a.safetensors").read_bytes()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="GPU_UNAVAILABLE"):
        preprocess(tmp_path / "missing", tmp_path / "out", SPEC, device="cuda")
    put_scan(tmp_path / "in" / "a.nii")
    assert preprocess(tmp_path / "in", tmp_path / "out", SPEC, device="auto").num_ok == 1


def test_equal_names_get_different_ids(tmp_path: Path) -> None:
    for name in ("a.nii", "a.nii.gz", "x/a.nii", "x_a.nii", "x/" + "long" * 52 + ".nii"):
        put_scan(tmp_path / name)
    sources = find_scans(tmp_path)
    ids = [source.scan_id for source in sources]
    assert len(set(ids)) == 5 and ids == [source.scan_id for source in find_scans(tmp_path)]
    assert all(len(scan_id) < 200 and "/" not in scan_id for scan_id in ids)
    assert preprocess(tmp_path, tmp_path / "out", SPEC).num_ok == 5


def test_a_scan_file_alone(tmp_path: Path) -> None:
    put_scan(tmp_path / "a.nii.gz")
    put_scan(tmp_path / "b.nii.gz", seed=1)
    record = preprocess(tmp_path / "a.nii.gz", tmp_path / "out", SPEC)
    assert record.num_ok == 1 and [path.stem for path in (tmp_path / "out").glob("*.safetensors")] == ["a"]
    both = preprocess(tmp_path, tmp_path / "both", SPEC)
    assert both.num_ok == 2
    assert (
        read_volume(tmp_path / "both" / "a.safetensors", SPEC).metadata
        == read_volume(tmp_path / "out" / "a.safetensors", SPEC).metadata
    )


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="INPUT_MISSING"):
        preprocess(tmp_path / "none", tmp_path / "out", SPEC)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PhotonError, match="ARCHIVE_EMPTY"):
        preprocess(tmp_path / "empty", tmp_path / "out", SPEC)
    put_scan(tmp_path / "in" / "a.nii")
    (tmp_path / "file").touch()
    with pytest.raises(PhotonError, match="OUTPUT_UNWRITABLE"):
        preprocess(tmp_path / "in", tmp_path / "file", SPEC)
    with pytest.raises(PhotonError, match="MODALITY_UNKNOWN"):
        preprocess(tmp_path / "in", tmp_path / "out", SPEC, modality="xray")


def test_a_scan_that_breaks_later_keeps_the_old_volume_but_not_the_row(tmp_path: Path) -> None:
    path = put_scan(tmp_path / "in" / "a.nii")
    put_scan(tmp_path / "in" / "b.nii")
    preprocess(tmp_path / "in", tmp_path / "out", SPEC)
    path.write_bytes(path.read_bytes()[:1000])
    record = preprocess(tmp_path / "in", tmp_path / "out", SPEC)
    row = read_manifest(Path(record.manifest)).row(0, named=True)
    assert (row["status"], row["volume"]) == ("SCAN_TRUNCATED", None)
    assert (tmp_path / "out" / "a.safetensors").is_file()
