"""How `bench_ops.py` measures: time in turns and from cold caches, memory at its peak, bandwidth, waits for the GPU."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

Function = Callable[[], object]
CPU_CACHE_BYTES, GPU_CACHE_BYTES = 128 * 2**20, 2 * 2**30
"""Written before every timed run, so that it finds its inputs in memory and not in a cache. On a GPU that takes half a
millisecond, in which the launches of what is timed are queued."""


class Clock:
    """Times functions on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_gpu = device, device.type == "cuda"
        size = GPU_CACHE_BYTES if self.is_gpu else CPU_CACHE_BYTES
        self._cold = torch.empty(size // 4, device=device)

    def finish(self) -> None:
        """Wait for what the device still does."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def time_ms(self, function: Function, *, is_queued: bool = True) -> float:
        """One run in ms, on a GPU between two events: what the GPU did, and when it waited for the host in between.

        Args:
            is_queued: the host launches while the GPU is still busy; else the GPU waits for the first launch too.
        """
        self._cold.fill_(0.0)
        if not self.is_gpu:
            started = time.perf_counter()
            function()
            return 1000 * (time.perf_counter() - started)
        if not is_queued:
            self.finish()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        self.finish()
        return float(start.elapsed_time(end))

    def in_turns(self, functions: Mapping[str, Function], repeats: int) -> dict[str, dict[str, float]]:
        """Median and shortest time in ms of each, taken in turns, so that a slow moment of the machine hits all."""
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(repeats + 1):
            for name, function in functions.items():
                times[name].append(self.time_ms(function))
        return {name: summary(found[1:]) for name, found in times.items()}  # the first does not count

    def copy_bandwidth(self, repeats: int) -> float:
        """Bytes per second, read and written ones together, of a copy within the device's memory."""
        source = torch.ones(CPU_CACHE_BYTES * (8 if self.is_gpu else 2) // 4, device=self.device)
        target = torch.empty_like(source)
        found = self.in_turns({"copy": lambda: target.copy_(source)}, repeats)
        return 2 * source.nbytes / (found["copy"]["median_ms"] / 1000)


def summary(times_ms: list[float]) -> dict[str, float]:
    """Median and shortest of several times."""
    return {"median_ms": statistics.median(times_ms), "best_ms": min(times_ms)}


def peak_bytes(function: Function, device: torch.device) -> int:
    """Most memory that a function holds at once beyond what was there before, its result included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = function()  # noqa: F841
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()  # noqa: F841
    held = peak = 0
    for change in _allocations(profiler):
        held += change
        peak = max(peak, held)
    return peak


def _allocations(profiler: profile) -> list[int]:
    """Bytes allocated, and negative ones given back, in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found = [event for event in events if event["name"] == "[memory]"]
    return [int(event["args"]["Bytes"]) for event in sorted(found, key=lambda event: float(event["ts"]))]


def nbytes(result: Any) -> int:
    """Bytes of all tensors in a result."""
    if isinstance(result, Tensor):
        return int(result.nbytes)
    if dataclasses.is_dataclass(result):
        return sum(nbytes(getattr(result, field.name)) for field in dataclasses.fields(result))
    return sum(nbytes(part) for part in result) if isinstance(result, (tuple, list)) else 0


def on_gpu(function: Function, clock: Clock, repeats: int) -> dict[str, float]:
    """What else there is to know about a function on a GPU.

    Returns:
        ``plain_ms``: median between two events when the GPU waits for the first launch. ``launch_ms``: median time of
        the host until the call returns. ``num_kernels``, ``kernels_ms``: kernels and copies alone, without gaps; 0
        where the profiler sees no GPU. ``host_waits``: how often the host waits for the GPU.
    """
    launches = []
    for _ in range(repeats):
        clock.finish()
        started = time.perf_counter()
        function()
        launches.append(1000 * (time.perf_counter() - started))
    return {
        "plain_ms": statistics.median(clock.time_ms(function, is_queued=False) for _ in range(repeats)),
        "launch_ms": statistics.median(launches),
        **_kernels(function, clock),
        "host_waits": _host_waits(function),
    }


def _kernels(function: Function, clock: Clock) -> dict[str, float]:
    clock.finish()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        clock.finish()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    times_us = [event.time_range.elapsed_us() for event in events if not event.is_user_annotation]
    return {"num_kernels": len(times_us), "kernels_ms": sum(times_us) / 1000}


def _host_waits(function: Function) -> int:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in caught)
