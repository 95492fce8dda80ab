"""What every benchmark does: say where it ran, time several runs, write a results file."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from photon.model.network import Photon
from photon.model.packing import PackedBatch

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """Machine, versions and commit; the commit from the variable PHOTON_COMMIT where the folder is no checkout."""
    has_gpu = torch.cuda.is_available()
    return {
        "machine": {
            "system": platform.platform(),
            "device": torch.cuda.get_device_name() if has_gpu else "cpu",
            "threads": torch.get_num_threads(),
            "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if has_gpu else None,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy")},
            "cuda": torch.version.cuda,
        },
        "commit": _commit(),
    }


def _commit() -> str:
    git = shutil.which("git")

    def ask(*command: str) -> str:
        root = Path(__file__).parent.parent
        done = subprocess.run([str(git), *command], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = ask("rev-parse", "HEAD") if git else ""
    if not commit:
        return os.environ.get("PHOTON_COMMIT", "unknown")
    return commit + ("+changes" if ask("status", "--porcelain") else "")


def best_of(function: Callable[[], object], repeats: int) -> float:
    """Shortest of several runs in seconds, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def measure(function: Callable[[], object], repeats: int, device: torch.device) -> dict[str, float]:
    """Median time in ms of several runs after one that does not count, and on a GPU their peak memory in GiB.

    The peak is of everything the process holds there, weights included.
    """
    function()
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    times = [_time_on_gpu(function) if is_gpu else _time_on_cpu(function) for _ in range(repeats)]
    peak = {"peak_gib": torch.cuda.max_memory_allocated(device) / 2**30} if is_gpu else {}
    return {"median_ms": statistics.median(times), "best_ms": min(times), **peak}


def _time_on_gpu(function: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _time_on_cpu(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started)


_INNERMOST = (re.compile(r"\[[^\[\]{}]*\]"), re.compile(r"\{[^{}]*\}"))
"""Lists, and then objects, that hold no objects."""


def save_results(name: str, content: dict[str, Any], folder: Path = RESULTS, *, is_compact: bool = False) -> Path:
    """Write ``<name>.json`` with provenance; compact, lists and objects that hold no objects take one line each."""
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.json"
    temporary = target.with_suffix(".tmp")
    text = json.dumps({**provenance(), **content}, indent=1, sort_keys=True)
    if is_compact:
        for innermost in _INNERMOST:
            text = innermost.sub(lambda found: re.sub(r"\s*\n\s*", " ", found.group()), text)
    temporary.write_text(text + "\n")
    temporary.replace(target)
    return target


def write_results(name: str, content: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` with provenance, and print it."""
    target = save_results(name, content)
    print(f"{target}\n{json.dumps(content, indent=1)}")
    return target


@torch.no_grad()
def set_kept_share(model: Photon, batch: PackedBatch, share: float) -> list[float]:
    """Move the last bias of the threshold network to where ``share`` of the visual tokens of a batch stay.

    Returns:
        The share that each question of the batch keeps then; they differ, and ``share`` is their mean.
    """
    decision = model(batch, "hard").schedule
    assert decision is not None
    scale = model.config.pruning.threshold_scale
    logit = torch.logit(decision.theta.double() / scale)
    rho = decision.rho.double()
    low, high = -12.0, 12.0
    for _ in range(50):
        middle = (low + high) / 2
        kept = (rho > scale * torch.sigmoid(logit + middle)[:, None])[decision.valid].float().mean()
        low, high = (middle, high) if float(kept) > share else (low, middle)
    last = model.model.predictor.mlp[2]
    assert isinstance(last, nn.Linear)
    last.bias += low
    decision = model(batch, "hard").schedule
    assert decision is not None
    rows = zip(decision.keep, decision.valid, strict=True)
    return [float(keep[valid].float().mean()) for keep, valid in rows]


def typical_first(shares: list[float], share: float) -> list[int]:
    """Numbers of the questions, those first that keep a share close to ``share``: what one question costs is measured
    with the first."""
    return sorted(range(len(shares)), key=lambda number: abs(shares[number] - share))
