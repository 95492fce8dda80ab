"""One rank of tests/photon/test_parallel.py: runs the scenarios that it is given and writes what it finds.

Started as `python parallel_worker.py FOLDER SCENARIO...` with torchrun's variables set. Scenarios run one after
another, as starting a process takes longer than training the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from photon.checkpoint import save_tensors
from photon.errors import PhotonError
from photon.model.packing import Branch, Context
from photon.testing import micro_config, micro_model, random_branch, random_context, training_batch
from photon.training import loop
from photon.training.launch import join
from photon.training.loop import StepReport, Trainer
from photon.training.optimiser import OptimiserConfig, build_optimiser
from photon.training.parallel import Kind, Ranks
from photon.training.stages import StageSchedule
from photon.training.step import TrainingBatch
from photon.training.working import write_note

CONFIG = micro_config(pruning={"min_tokens": 2})
SCHEDULE = StageSchedule(alignment=1, warm_up=2, soft=2, hard=4, flip_after=1)
RATES = OptimiserConfig(learning_rate=2e-3, vision_learning_rate=1e-3, alignment_learning_rate=5e-3)
NUM_QUESTIONS = (4, 1, 2, 3)


class Stop(Exception):
    """Stands for a kill."""


def build_steady(model: Any, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW that does not make whole steps of the rounding of gradients that are truly 0."""
    optimiser = build_optimiser(model, config)
    for group in optimiser.param_groups:
        group["eps"] = 1e-3
    return optimiser


def pack(step: int, places: Sequence[int], with_flips: bool = False, with_scans: bool = True) -> TrainingBatch:
    """Some of a step's four scans, of different sizes; the second is spoilt in every third step."""
    contexts: list[Context] = []
    branches: list[Branch] = []
    owners = []
    for number, place in enumerate(places):
        grids = [(1 + place % 2, 4, 4)] if with_scans else []
        contexts.append(random_context(CONFIG, grids, seed=10 * step + place))
        for n in range(NUM_QUESTIONS[place]):
            seed = 100 * step + 10 * place + n
            branches.append(
                random_branch(CONFIG, number, num_question=2 + n, num_answer=1 + (n + place) % 3, seed=seed)
            )
            owners.append((place, n))
    perturbed = [i for i, (place, _) in enumerate(owners) if place == 1 and step % 3 == 0]
    flipped = [i for i, owner in enumerate(owners) if owner == (3, 0) and with_flips]
    item = training_batch(contexts, branches, CONFIG, perturbed=perturbed, flipped=flipped)
    return dataclasses.replace(item, names=tuple(f"scan-{place}" for place in places))


@mock.patch.object(loop, "build_optimiser", build_steady)
def run(
    ranks: Ranks, save_to: Path | None = None, *, dealt: str = "even", stop: int = 99
) -> tuple[Trainer, list[float]]:
    """Train the micro model; every rank takes its micro-batches of a step."""
    # Without scans there is nothing to align.
    schedule = dataclasses.replace(SCHEDULE, alignment=0) if dealt == "text" else SCHEDULE
    trainer = Trainer(micro_model(CONFIG), schedule, RATES, run_digest="run", ranks=ranks)
    if save_to is not None:
        trainer.restore(save_to)
    losses: list[float] = []

    def batch_at(step: int, with_flips: bool) -> list[TrainingBatch]:
        if dealt == "one has nothing":
            return [pack(step, range(4), with_flips)] if ranks.rank == 0 else []
        numbers, count = ranks.dealt(2 if dealt == "accumulated" else 1)
        return [pack(step, range(4)[n::count], with_flips, dealt != "text") for n in numbers if n < 4]

    def on_step(report: StepReport) -> None:
        if report.step == stop:
            raise Stop
        losses.append(float(report.result.loss))

    with contextlib.suppress(Stop):
        trainer.run(batch_at, on_step=on_step, save_to=save_to, save_every=2)
    return trainer, losses


def write(folder: Path, name: str, trainer: Trainer, losses: list[float]) -> None:
    weights = trainer.whole_weights()
    if trainer.ranks.is_main:
        save_tensors(weights, folder / f"{name}.safetensors")
    (folder / f"{name}.{trainer.ranks.rank}.json").write_text(json.dumps(losses))


def scenario(name: str, ranks: Ranks, folder: Path) -> None:
    """Do what a test asks for, by name: ``<kind> <what>``."""
    what = name.partition(" ")[2]
    if what == "left":
        run(ranks, folder / name, stop=5)
    elif what == "resumed":
        run(ranks, folder / name, stop=5)
        write(folder, name, *run(ranks, folder / name))
    elif what in ("even", "one has nothing", "accumulated", "text"):
        write(folder, name, *run(ranks, dealt=what))
    else:
        fail(what, ranks, folder)


def fail(what: str, ranks: Ranks, folder: Path) -> None:
    """Let rank 1 alone fail in its third step, in one way or another."""
    trainer = Trainer(micro_model(CONFIG), SCHEDULE, RATES, run_digest="run", ranks=ranks)

    def batch_at(step: int, with_flips: bool) -> list[TrainingBatch]:
        item = pack(step, range(4)[ranks.rank :: 2], with_flips)
        write_note(folder / "working", ranks.rank, step, item.names)
        if ranks.rank == 1 and step == 2:
            if what == "cannot read":
                raise PhotonError("VOLUME_CORRUPT", "scan-3", "it has rotted.", "Preprocess it again.")
            if what == "cannot compute":
                item.batch.branch_ids.fill_(10**6)
            if what == "diverges":
                item.batch.patches.fill_(torch.nan)
            if what == "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
        return [item]

    trainer.run(batch_at, on_step=lambda report: None, save_to=folder / "state", save_every=1)


@contextlib.contextmanager
def caught(path: Path) -> Iterator[None]:
    try:
        yield
    except PhotonError as error:
        path.write_text(json.dumps(dict(error.as_row())))


def main(folder: Path, names: Sequence[str]) -> None:
    torch.set_num_threads(1)
    first_port = int(os.environ["MASTER_PORT"])
    for number, name in enumerate(names):
        os.environ["MASTER_PORT"] = str(first_port + number)
        kind: Kind = "fsdp" if name.startswith("fsdp") else "ddp"
        place = folder / name if " fails " in f" {name} " else folder
        place.mkdir(exist_ok=True)
        with (
            caught(folder / f"{name}.{os.environ['RANK']}.error"),
            join(kind, torch.device("cpu"), place / "working") as ranks,
        ):
            scenario(name.replace(" fails", ""), ranks, place)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
