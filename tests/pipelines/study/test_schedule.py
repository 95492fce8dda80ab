"""Parts that wait for each other, and their shared progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest

from pipelines.study.schedule import Part, SharedProgress, run_parts


def test_results_reach_the_parts_that_need_them() -> None:
    parts = [
        Part("a", (), 1, lambda _: 1),
        Part("b", ("a",), 1, lambda known: known["a"] + 1),
        Part("c", ("a", "b"), 1, lambda known: known["a"] + known["b"]),
    ]
    for workers in (1, 2, 5):
        assert run_parts(parts, workers) == {"a": 1, "b": 2, "c": 3}


def test_no_more_run_than_there_are_workers_and_as_many_as_can() -> None:
    lock, running, most = threading.Lock(), [0], [0]

    def work(_: Mapping[str, Any]) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1

    run_parts([Part(str(number), (), 1, work) for number in range(6)], 2)
    assert most[0] == 2


def test_wide_parts_have_the_room_that_they_need() -> None:
    lock, running, seen = threading.Lock(), set(), []

    def work(name: str) -> None:
        with lock:
            running.add(name)
            seen.append(set(running))
        time.sleep(0.02)
        with lock:
            running.discard(name)

    widths = {"a": 1, "wide": 2, "b": 1, "c": 1, "wider": 3}
    parts = [Part(name, (), 1, lambda _, name=name: work(name), width) for name, width in widths.items()]
    assert set(run_parts(parts, 2)) == set(widths)
    assert seen[0] == {"a"} and {"wide"} in seen and {"wider"} in seen
    assert all(sum(widths[name] for name in names) <= 2 for names in seen if names != {"wider"})


def test_after_an_error_nothing_begins_and_what_runs_is_finished() -> None:
    begun, finished = threading.Event(), []

    def fail(_: Mapping[str, Any]) -> None:
        begun.wait(5)
        raise ValueError("broken")

    def slow(_: Mapping[str, Any]) -> None:
        begun.set()
        time.sleep(0.1)
        finished.append("slow")

    parts = [
        Part("fail", (), 1, fail),
        Part("slow", (), 1, slow),
        Part("later", ("slow",), 1, lambda _: finished.append("later")),
    ]
    with pytest.raises(ValueError, match="broken"):
        run_parts(parts, 2)
    assert finished == ["slow"]


def test_progress_of_parts_adds_up_and_never_goes_back() -> None:
    seen: list[tuple[int, int, str]] = []
    progress = SharedProgress(lambda *told: seen.append(told), {"a": 100, "b": 50})
    first, second = progress.of("a", (0.0, 0.5)), progress.of("a", (0.5, 1.0))
    first(1, 2, "half of the first half")
    assert seen[-1] == (25, 150, "a: half of the first half")
    progress.of("b")(1, 5, "x")
    assert seen[-1][0] == 35
    second(1, 2, "y")
    first(1, 2, "late")
    assert seen[-1][0] == 85
    progress.finish("a")
    progress.finish("b")
    assert seen[-1][:2] == (150, 150)
