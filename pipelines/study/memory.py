"""The largest memory that a piece of work takes: of the process, and on a GPU."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch


def reset_peak() -> None:
    """Begin a new measurement; where the system cannot forget a peak, that of the process' whole life counts."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, float]:
    """``peak_mib`` of the process' resident memory since :func:`reset_peak`; ``cuda_peak_mib``, 0 without a GPU."""
    has_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "peak_mib": _resident_peak_mib(),
        "cuda_peak_mib": torch.cuda.max_memory_allocated() / 2**20 if has_gpu else 0.0,
    }


def _resident_peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
