"""Scans and masks of boxes and balls whose numbers are known, written as a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.scans.nifti import write_scan

LPS_2MM = np.diag([-2.0, -2.0, 2.0, 1.0])  # arrays [x, y, z] to left, back and head; a voxel is 0.008 cm3


@pytest.fixture
def write_pair(tmp_path: Path) -> Callable[..., None]:
    """Write a scan and its label map as ``images/<name>.nii`` and ``masks/<name>.nii``."""

    def write(
        name: str,
        values: np.ndarray,
        labels: np.ndarray,
        affine: np.ndarray = LPS_2MM,
        mask_affine: np.ndarray | None = None,
    ) -> None:
        for folder, array, matrix in (
            ("images", values, affine),
            ("masks", labels, affine if mask_affine is None else mask_affine),
        ):
            path = tmp_path / folder / f"{name}.nii"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_scan(array, matrix, path)

    return write


@pytest.fixture
def write_names(tmp_path: Path) -> Callable[[Any], Path]:
    """Write a names file."""

    def write(content: Any) -> Path:
        path = tmp_path / "names.json"
        path.write_text(json.dumps(content))
        return path

    return write
