"""The table of preprocessed scans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars
import pytest

from photon.errors import PhotonError
from pipelines.manifest import SCHEMA, read_manifest, write_manifest

GOOD: dict[str, Any] = {
    "scan_id": "b",
    "source": "b.nii",
    "source_sha256": "00",
    "status": "ok",
    "message": "",
    "volume": "b.safetensors",
    "volume_sha256": "11",
    "spec_digest": "22",
    "shape": [3, 4, 5],
    "spacing_mm": [1.0, 2.0, 3.0],
    "orientation": "RAS",
    "modality": "ct",
    "modality_source": "declared",
    "min_hu": -1000.0,
    "max_hu": 900.0,
    "notes": [],
}
REFUSED = {"scan_id": "a", "source": "a.nii", "status": "GZIP_CORRUPT", "message": "m", "spec_digest": "22"}


def test_round_trip_is_sorted_and_deterministic(tmp_path: Path) -> None:
    write_manifest([GOOD, REFUSED], tmp_path / "1")
    write_manifest([REFUSED, GOOD], tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    table = read_manifest(tmp_path / "1")
    assert dict(table.schema) == SCHEMA
    assert table["scan_id"].to_list() == ["a", "b"]
    assert table.row(1, named=True) == GOOD
    assert table.row(0, named=True)["volume"] is None


@pytest.mark.parametrize(
    "rows",
    [[GOOD, GOOD], [GOOD | {"volume_sha256": None}], [REFUSED | {"status": None}]],
    ids=["twice", "no checksum", "no status"],
)
def test_wrong_rows_are_not_written(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    with pytest.raises(PhotonError, match="MANIFEST_INVALID"):
        write_manifest(rows, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_wrong_files_are_not_read(tmp_path: Path) -> None:
    for name, content in (("text", b"no table"), ("empty", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PhotonError, match="MANIFEST_INVALID"):
            read_manifest(tmp_path / name)
    polars.DataFrame({"scan_id": ["a"], "colour": ["red"]}).write_parquet(tmp_path / "other")
    with pytest.raises(PhotonError, match="colour"):
        read_manifest(tmp_path / "other")
    with pytest.raises(PhotonError, match="MANIFEST_INVALID"):
        read_manifest(tmp_path / "none")
