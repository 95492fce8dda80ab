"""Parts of a job that wait for each other, run side by side, and share one display of progress."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

OnProgress = Callable[[int, int, str], None]
Span = tuple[float, float]
WHOLE: Span = (0.0, 1.0)


@dataclass(frozen=True)
class Part:
    """One part of a job.

    Attributes:
        name: unique in the job.
        needs: names of the parts whose results it is given.
        num_units: how long it takes, in units that all parts share.
        run: does it, given the results of all finished parts by name.
        width: how many workers' room it takes up, as one that computes with more threads than the others.
    """

    name: str
    needs: tuple[str, ...]
    num_units: int
    run: Callable[[Mapping[str, Any]], Any]
    width: int = 1


def run_parts(parts: Sequence[Part], workers: int) -> dict[str, Any]:
    """The results of all parts by name, up to ``workers`` of them at a time, earlier ones first.

    A part that is wider than the room left is waited for by all later ones; one wider than ``workers`` runs alone.
    After an error no further part is begun; those that run are finished, and then it is raised.

    Args:
        parts: in an order in which each comes after those that it needs.
    """
    results: dict[str, Any] = {}
    waiting = list(parts)
    running: dict[Future[Any], Part] = {}
    with ThreadPoolExecutor(max_workers=workers) as pool:
        while waiting or running:
            for part in [part for part in waiting if all(name in results for name in part.needs)]:
                if running and sum(other.width for other in running.values()) + part.width > workers:
                    break
                waiting.remove(part)
                running[pool.submit(part.run, dict(results))] = part
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                results[running.pop(future).name] = future.result()
    return results


class SharedProgress:
    """Progress of parts that run at the same time, as one number of units done."""

    def __init__(self, on_progress: OnProgress | None, units: Mapping[str, int]) -> None:
        """``units`` of every part, by name."""
        self._on_progress, self._units = on_progress, units
        self._done = dict.fromkeys(units, 0.0)
        self._lock = threading.Lock()

    def of(self, name: str, span: Span = WHOLE) -> OnProgress:
        """The callback of one piece of a part, which takes it from the first share of ``span`` to the second."""
        start, end = span

        def on_progress(done: int, total: int, label: str = "") -> None:
            self._note(name, start + (end - start) * done / max(total, 1), label)

        return on_progress

    def finish(self, name: str) -> None:
        """A part is over, or was over before."""
        self._note(name, 1.0, "done")

    def _note(self, name: str, share: float, label: str) -> None:
        with self._lock:
            self._done[name] = max(self._done.get(name, 0.0), share)
            if self._on_progress:
                total = sum(self._units.values())
                done = sum(self._done[part] * units for part, units in self._units.items())
                self._on_progress(round(done), total, f"{name}: {label}")
