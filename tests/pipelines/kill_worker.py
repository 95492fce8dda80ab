"""A process that trains the smoke data and is killed, for tests/pipelines/test_train_kill.py.

Started as `python kill_worker.py DATA OUTPUT`, it imports everything once and then forks a child for every line of its
standard input: `never`, `after SECONDS` or `call NUMBER`. The child trains and kills itself with SIGKILL after that
time, or at that call of the system within its saves (a file forced to the disk, a folder renamed, an old folder
removed). The parent answers every line with the child's exit code, -9 when it was killed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from photon.training.pretrain import NamingConfig
from photon.training.stages import StageSchedule
from pipelines.train import train
from pipelines.train_spec import TrainSpec

SMOKE = TrainSpec.preset("smoke")
SPEC = dataclasses.replace(
    SMOKE,
    schedule=StageSchedule(alignment=1, warm_up=2, soft=1, hard=3, flip_after=1),
    draw=dataclasses.replace(SMOKE.draw, scans_per_step=2, questions_per_scan=2),
    pruned_draw=dataclasses.replace(SMOKE.pruned_draw, scans_per_step=2, questions_per_scan=2, robust_probability=0.4),
    blind_steps=3,
    naming=NamingConfig(num_steps=2),
    naming_scans_per_step=2,
    accumulate=2,
    validate_every=3,
    save_every=1,
)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def counted(function: Callable[..., Any], number: int, calls: list[int]) -> Callable[..., Any]:
    """The function, in whose place the process dies when it is the call of this number."""

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            die()
        return function(*arguments, **options)

    return call


def run(data: Path, output: Path, order: str) -> None:
    what, _, number = order.partition(" ")
    if what == "after":
        threading.Thread(target=lambda: (time.sleep(float(number)), die()), daemon=True).start()
    if what == "call":
        calls: list[int] = []
        for owner, name in ((os, "fsync"), (os, "rename"), (Path, "rename"), (shutil, "rmtree")):
            setattr(owner, name, counted(getattr(owner, name), int(number), calls))
    train(SPEC, data, output, data_version="v1")


def main(data: Path, output: Path) -> None:
    torch.set_num_threads(1)
    for order in sys.stdin:
        child = os.fork()
        if child == 0:
            run(data, output, order.strip())
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        sys.stdout.write(f"{code}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
