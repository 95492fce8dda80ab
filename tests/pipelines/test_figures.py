"""Charts and slices: what is drawn where, and that odd input still gives a picture."""

from __future__ import annotations

import io
import xml.etree.ElementTree as ElementTree
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from photon.errors import PhotonError
from pipelines import figures, slices
from pipelines.statistics import Score

SHAPE = (28, 56, 84)  # 2 x 2 x 3 tokens


def _score(value: float) -> Score:
    return Score(value=value, low=max(value - 0.1, 0), high=min(value + 0.1, 1), num_questions=9, num_patients=3)


def _texts(svg: bytes) -> list[str]:
    root = ElementTree.fromstring(svg)
    return [node.text or "" for node in root.iter("{http://www.w3.org/2000/svg}text")]


def _history() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": step, "stage": "warm-up" if step < 60 else "hard pruning", "loss": 3 / (1 + step)}
        for step in range(100)
    ]
    rows[50]["validation_accuracy"] = 0.5
    rows[51] |= {"validation_accuracy": None, "kept_fraction": float("nan")}
    return rows


def test_training_curves_show_what_was_measured() -> None:
    texts = _texts(figures.training_curves(_history()))
    assert {"Loss", "Accuracy"} <= set(texts)
    assert "Visual tokens kept" not in texts  # never measured as a number
    assert figures.stage_starts(_history()) == [(0, "warm-up"), (60, "hard pruning")]


@pytest.mark.parametrize("history", [[], [{"step": 3}], [{"step": 0, "loss": float("inf")}]])
def test_training_curves_without_anything_measured(history: list[dict[str, Any]]) -> None:
    ElementTree.fromstring(figures.training_curves(history))


def test_charts_follow_the_page_and_repeat_byte_for_byte() -> None:
    groups = {"All questions": {policy: _score(0.7) for policy in figures.COLOURS}, "one": {"blind": _score(0.0)}}
    svg = figures.accuracy_intervals(groups)
    assert b"currentColor" in svg
    assert figures.INK.encode() not in svg
    assert b"DejaVu" not in svg
    assert svg == figures.accuracy_intervals(groups)
    assert {"All questions", "one", *figures.LABELS.values()} <= set(_texts(svg))


def test_histograms_are_sorted_by_mean() -> None:
    texts = _texts(figures.kept_histograms({"many": [0.9, 1.0], "few": [0.1], "none": [0.0, 0.0, 0.0]}))
    names = [text for text in texts if "(" in text and "bar" not in text]
    assert names == ["none (3)", "few (1)", "many (2)"]


def _planes(voxels: np.ndarray, **options: Any) -> dict[str, slices.Plane]:
    settings: dict[str, Any] = {"centre": (14, 28, 42), "spacing_mm": (2.0, 1.0, 1.0), "window_hu": (0, 100)}
    return {plane.name: plane for plane in slices.make_planes(voxels, **settings | options)}


def _brightest(plane: slices.Plane) -> tuple[float, float]:
    """Place of the brightest pixels from the top left, as fractions of height and width."""
    grey = plane.pixels.mean(axis=2)
    rows, columns = np.nonzero(grey == grey.max())
    return float(rows.mean() / grey.shape[0]), float(columns.mean() / grey.shape[1])


def test_planes_follow_the_radiological_convention() -> None:
    voxels = np.zeros(SHAPE, dtype=np.int16)
    voxels[20:28, 50:56, 70:84] = 100  # head, back, patient's left
    row, column = _brightest(_planes(voxels, centre=(24, 28, 42))["axial"])
    assert row > 0.8  # back is at the bottom
    assert column > 0.8  # patient's left is on the right
    row, column = _brightest(_planes(voxels, centre=(14, 52, 42))["coronal"])
    assert row < 0.3  # head is at the top
    assert column > 0.8
    row, column = _brightest(_planes(voxels, centre=(14, 28, 75))["sagittal"])
    assert row < 0.3
    assert column > 0.8  # front on the left, back on the right


def test_planes_keep_millimetres() -> None:
    planes = _planes(np.zeros(SHAPE, dtype=np.int16))
    assert (planes["axial"].height_mm, planes["axial"].width_mm) == (56, 84)
    assert (planes["coronal"].height_mm, planes["coronal"].width_mm) == (56, 84)
    assert (planes["sagittal"].height_mm, planes["sagittal"].width_mm) == (56, 56)


def test_kept_tokens_are_bright_and_outlined_and_the_others_dimmed() -> None:
    voxels = np.full(SHAPE, 50, dtype=np.int16)
    kept = np.zeros(12, dtype=bool)
    kept[8] = True  # slab 1, row 0, column 2: patient's left, front
    pixels = _planes(voxels, kept=kept)["axial"].pixels
    height, width = pixels.shape[:2]
    assert pixels[height // 4, width * 5 // 6].mean() > 0.45
    assert pixels[height * 3 // 4, width * 5 // 6].mean() == pytest.approx(0.5 * slices.DROPPED_BRIGHTNESS)
    assert pixels[height // 4, width // 6].mean() == pytest.approx(0.5 * slices.DROPPED_BRIGHTNESS)
    assert np.allclose(pixels[0, -1], slices.KEPT_EDGE)


def test_the_organ_is_outlined_not_filled() -> None:
    organ = np.zeros(SHAPE, dtype=bool)
    organ[:, 10:40, 20:60] = True
    pixels = _planes(np.full(SHAPE, 50, dtype=np.int16), organ=organ)["axial"].pixels
    is_edge = np.isclose(pixels, slices.ORGAN_EDGE).all(axis=2)
    factor = pixels.shape[0] // 56
    assert is_edge[10 * factor, 40 * factor]
    assert not is_edge[25 * factor, 40 * factor]
    assert not is_edge[5 * factor, 40 * factor]


def test_window_and_middle_of_odd_volumes() -> None:
    low, high = slices.display_window(np.full((2, 2, 2), 7, dtype=np.int16))
    assert low < 7 < high
    low, high = slices.display_window(np.array([-1000] * 50 + [2000] * 50, dtype=np.int16))
    assert (low, high) == slices.DISPLAY_WINDOW_HU
    low, high = slices.display_window(np.array([900, 1000] * 50, dtype=np.int16))  # nothing soft in it
    assert low < 900 < 1000 < high
    assert slices.middle_of(np.zeros(SHAPE, dtype=bool)) == (14, 28, 42)


def test_tokens_need_a_volume_of_whole_boxes() -> None:
    with pytest.raises(PhotonError) as caught:
        _planes(np.zeros((15, 56, 84), dtype=np.int16), kept=np.zeros(6, dtype=bool))
    assert caught.value.code == "GRID_INVALID"


def test_picture_is_a_png_at_one_scale() -> None:
    planes = list(_planes(np.zeros(SHAPE, dtype=np.int16)).values())
    image = matplotlib.image.imread(io.BytesIO(figures.planes_picture(planes, plane_in=1.0)))
    height, width = image.shape[:2]
    assert width == 300
    assert height / width == pytest.approx(56 / (84 + 84 + 56) / 1.04, abs=0.01)
