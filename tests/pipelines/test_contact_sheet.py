"""Pages with three planes of every scan."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines import contact_sheet as module
from pipelines.contact_sheet import write_contact_sheet
from pipelines.preprocess import preprocess
from pipelines.scans.nifti import write_scan
from pipelines.thumbnails import grey_png
from pipelines.volumes import VolumeSpec

SPEC = VolumeSpec(spacing_mm=5.0, shape=(14, 28, 28), window_hu=(-200, 300))


def put_scan(path: Path, affine: np.ndarray) -> None:
    """Air with a bright block towards the patient's left, front and head, whatever the order of the axes."""
    array = np.full((24, 24, 12), -900, np.int16)
    ends = [affine @ [*corner, 1] for corner in np.ndindex(24, 24, 12)]
    world = np.array(ends)[:, :3].reshape(24, 24, 12, 3)
    middle = world.reshape(-1, 3).mean(0)
    x, y, z = np.moveaxis(world - middle, -1, 0)
    array[(x < 10) & (y > -10) & (z > -10)] = 250  # the planes through the centre meet it
    path.parent.mkdir(parents=True, exist_ok=True)
    write_scan(array, affine, path)


@pytest.fixture
def volumes(tmp_path: Path) -> Path:
    """Two scans of the same block in opposite orientations, one that cannot be read, one whose volume is broken."""
    scans = tmp_path / "in"
    put_scan(scans / "ras.nii", np.diag([4.0, 4.0, 5.0, 1.0]))
    put_scan(scans / "lpi.nii", np.diag([-4.0, -4.0, -5.0, 1.0]))
    put_scan(scans / "spoiled.nii", np.diag([4.0, 4.0, 5.0, 1.0]))
    (scans / "<b>cut.nii").write_bytes((scans / "ras.nii").read_bytes()[:800])
    preprocess(scans, tmp_path / "volumes", SPEC)
    broken = tmp_path / "volumes" / "spoiled.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    return tmp_path / "volumes"


def figures(text: str) -> dict[str, str]:
    found = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    return {re.search("<strong>(.*?)</strong>", figure).group(1): figure for figure in found}  # type: ignore[union-attr]


def pictures(figure: str) -> list[np.ndarray]:
    data = re.findall(r"data:image/png;base64,([^\"]+)", figure)
    return [matplotlib.image.imread(io.BytesIO(base64.b64decode(content))) for content in data]


def test_every_scan_stands_the_same_way(volumes: Path, tmp_path: Path) -> None:
    record = write_contact_sheet(volumes, tmp_path / "page" / "scans.html")
    assert (record.num_shown, record.num_refused) == (2, 1)
    text = Path(record.pages[0]).read_text(encoding="utf-8")
    assert not re.search(r"<script|https?://|<link", text)
    shown = figures(text)
    assert set(shown) == {"ras", "lpi", "spoiled"}
    assert "VOLUME_CORRUPT" in shown["spoiled"] and "<img" not in shown["spoiled"]
    assert [(scan["scan_id"], scan["code"]) for scan in record.unread] == [("spoiled", "VOLUME_CORRUPT")]
    for scan_id, axes in (("ras", "RAS"), ("lpi", "LPI")):
        assert axes in shown[scan_id]
        assert re.findall(r'<b class="(\w+)">(\w)</b>', shown[scan_id])[:4] == [
            ("top", "A"), ("bottom", "P"), ("left", "R"), ("right", "L")
        ]  # fmt: skip
        axial, coronal, sagittal = pictures(shown[scan_id])
        for picture, is_right in ((axial, True), (coronal, True), (sagittal, False)):
            height, width = (side // 2 for side in picture.shape)
            halves = picture[:height, :width].mean(), picture[:height, width:].mean()
            assert (halves[1] > halves[0]) == is_right, "the block is at the patient's left and front"
            assert picture[:height].mean() > picture[height:].mean() + 0.1
    assert [len(pictures(shown[name])) for name in ("ras", "lpi")] == [3, 3]
    refused = text[text.index('id="refused"') :]
    assert "VOLUME_CORRUPT: 1" in refused and "Volumes that cannot be read: 1." in text
    assert "SCAN_TRUNCATED: 1" in refused and "&lt;b&gt;cut" in refused and "<b>cut" not in text


def test_the_lines_are_fifty_millimetres_apart(volumes: Path, tmp_path: Path) -> None:
    record = write_contact_sheet(volumes, tmp_path / "scans.html")
    figure = figures(Path(record.pages[0]).read_text(encoding="utf-8"))["ras"]
    sizes = re.findall(r"background-size:([\d.]+)% ([\d.]+)%", figure)
    # The grid is 140 mm wide and deep, 70 mm high.
    assert [tuple(float(value) for value in size) for size in sizes] == [
        pytest.approx((100 * 50 / 140, 100 * 50 / height), abs=0.01) for height in (140, 70, 70)
    ]


def test_many_scans_are_spread_over_pages(volumes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCANS_PER_PAGE", 1)
    target = tmp_path / "scans.html"
    record = write_contact_sheet(volumes, target)
    assert [Path(path).name for path in record.pages] == ["scans.html", "scans-2.html", "scans-3.html"]
    texts = [Path(path).read_text(encoding="utf-8") for path in record.pages]
    assert ['href="scans-2.html"' in text for text in texts] == [True, False, True]
    assert ['id="refused"' in text for text in texts] == [True, False, False]
    assert sum(len(figures(text)) for text in texts) == 3
    monkeypatch.undo()
    assert len(write_contact_sheet(volumes, target).pages) == 1
    assert not (tmp_path / "scans-2.html").exists()


def test_a_volume_that_the_system_does_not_give_costs_its_own_picture(volumes: Path, tmp_path: Path) -> None:
    (volumes / "ras.safetensors").unlink()
    (volumes / "ras.safetensors").mkdir()
    (volumes / "lpi.safetensors").unlink()
    record = write_contact_sheet(volumes, tmp_path / "scans.html")
    codes = {scan["scan_id"]: scan["code"] for scan in record.unread}
    assert codes == {"lpi": "VOLUME_MISSING", "ras": "VOLUME_UNREADABLE", "spoiled": "VOLUME_CORRUPT"}
    assert all("Run `photon preprocess`" in scan["message"] for scan in record.unread if scan["scan_id"] != "ras")
    assert record.num_shown == 0


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(PhotonError, match="MANIFEST_INVALID"):
        write_contact_sheet(tmp_path, tmp_path / "scans.html")


def test_grey_values_survive() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (7, 5)).astype(np.uint8)
    assert np.array_equal(np.rint(matplotlib.image.imread(io.BytesIO(grey_png(pixels))) * 255), pixels)
