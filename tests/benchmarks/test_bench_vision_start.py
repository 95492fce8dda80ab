"""The benchmark of a vision start: its areas by hand, and a probe that finds what is there and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import bench_vision_start as bench  # noqa: E402


def test_areas_by_hand() -> None:
    is_there = np.array([True, True, False, False])
    assert bench.area(np.array([4.0, 3.0, 2.0, 1.0]), is_there) == 1.0
    assert bench.area(np.array([1.0, 2.0, 3.0, 4.0]), is_there) == 0.0
    assert bench.area(np.array([4.0, 2.0, 3.0, 1.0]), is_there) == 0.75
    assert bench.area(np.ones(4), is_there) == 0.5
    assert bench.area(np.ones(4), np.ones(4, bool)) is None


def test_a_probe_tells_scans_apart_only_by_what_their_tokens_hold() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(80, 12, 8, generator=generator)
    held = torch.zeros(80, 12, 2)
    is_ill = torch.rand(80, generator=generator) < 0.5
    held[is_ill, 3] = 1
    tokens[is_ill, 3, 0] += 6
    held[..., 1] = held[torch.randperm(80, generator=generator)][..., 1]  # the second goes to scans at random
    scores = bench.probe(tokens[:40], held[:40], tokens[40:])
    seen, unseen = (bench.told_apart(scores[..., k], held[40:, ..., k]) for k in (0, 1))
    assert seen["scan_auc"] > 0.9 and abs(unseen["scan_auc"] - 0.5) < 0.25
    assert seen["tokens_with_it"] == pytest.approx(float(held[40:, ..., 0].mean()))
