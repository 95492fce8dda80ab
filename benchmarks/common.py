"""What every benchmark does: say where it ran, take the best of several runs, write a results file."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, Any]:
    """Machine, versions and commit."""
    root = Path(__file__).parent.parent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "machine": {"system": platform.platform(), "device": device, "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
        "commit": commit.stdout.strip() + ("+changes" if dirty.stdout.strip() else ""),
    }


def best_of(function: Callable[[], object], repeats: int) -> float:
    """Shortest of several runs in seconds, after one that does not count."""
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def write_results(name: str, content: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` with provenance, and print it."""
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    target.write_text(json.dumps({**provenance(), **content}, indent=1, sort_keys=True) + "\n")
    print(f"{target}\n{json.dumps(content, indent=1)}")
    return target
