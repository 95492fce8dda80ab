"""`kill -9` at any moment, also in the middle of a save: the run ends as if it had never been stopped."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from photon.checkpoint import WEIGHTS

WORKER = Path(__file__).with_name("kill_worker.py")


class Worker:
    """Starts a run again and again; the processes are real ones."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def train(self, order: str) -> int:
        """Exit code of one start."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextmanager
def worker(data: Path, output: Path) -> Iterator[Worker]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(WORKER.parents[2])}
    command = [sys.executable, str(WORKER), str(data), str(output)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:  # type: ignore[call-overload]
        yield Worker(process)
        assert process.stdin is not None
        process.stdin.close()


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "elapsed_s"} for line in lines]


def num_done(folder: Path) -> int:
    path = folder / "state" / "progress.json"
    return json.loads(path.read_text())["num_steps_done"] if path.is_file() else 0


def test_killed_at_any_moment_a_run_ends_as_an_unbroken_one(smoke_data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with worker(smoke_data, whole) as unbroken:
        assert unbroken.train("never") == 0
    chance, exits, left, steps = random.Random(4), [], 0, []
    with worker(smoke_data, killed) as broken:
        orders = [f"call {chance.randint(2, 28)}" for _ in range(7)]
        orders += [f"after {chance.uniform(0.05, 0.5):.3f}" for _ in range(3)]
        chance.shuffle(orders)
        for order in orders:
            exits.append(broken.train(order))
            left += bool(list(killed.glob(".state.*.tmp"))) or (killed / "state.old").exists()
            steps.append(num_done(killed))
        assert broken.train("never") == 0
    assert exits.count(-9) >= 6, "the run was over before it could be killed"
    assert left >= 2, "no kill has hit a save"
    assert len(set(steps)) >= 3, "no kill has come while the run was under way"
    assert rows(killed) == rows(whole)
    for name in ("checkpoint", "blind", "state", "blind_state"):
        assert (killed / name / WEIGHTS).read_bytes() == (whole / name / WEIGHTS).read_bytes(), name
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())
