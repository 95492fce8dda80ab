"""What a training step costs pruned and with all tokens, by how many questions share a scan.

    python benchmarks/bench_training_cost.py out/study --data out/vqa-small

Models of a finished study make steps on its batches, 64 questions each, about 64, 32, 16 and 8 scans: forward and
backward pass of the last stage, one thread, each model and batch size in a process of its own. A scan with all tokens
is shared through every layer by its questions; of a pruned one each carries its own rows after the pruning layer. So
how many questions share a scan decides whether pruning saves time or costs it.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from common import write_results

from photon.checkpoint import read_model
from photon.training.step import compute_loss
from pipelines.dataset import BatchSource, read_split
from pipelines.study.memory import peak_memory, reset_peak
from pipelines.study.spec import StudySpec
from pipelines.text import TOKENIZER, Prompter

QUESTIONS = 64
SHARED_BY = (1, 2, 4, 8)
VARIANTS = ("photon", "all")


def main() -> None:
    """Measure all models and batches and write ``results/training_cost.json``, or one for the process above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=Path("out/study"), help="folder of photon study")
    parser.add_argument("--data", type=Path, default=Path("out/vqa-small"), help="its data folder")
    parser.add_argument("--seed", type=int, default=0, help="whose models")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SHARED_BY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        variant, shared_by = arguments.one
        found = measure(arguments.study, arguments.data, arguments.seed, arguments.steps, variant, int(shared_by))
        print(json.dumps(found))
        return
    if not (arguments.study / "study.json").exists():
        print(f"{arguments.study} holds no study; `photon study --output {arguments.study}` makes one.")
        return
    rows = []
    for shared_by in SHARED_BY:
        row = {}
        for variant in VARIANTS:
            command = [sys.executable, __file__, *sys.argv[1:], "--one", variant, str(shared_by)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row[variant] = json.loads(done.stdout.splitlines()[-1])
        ours, everything = (row[variant] for variant in VARIANTS)
        rows.append(
            {
                "questions_a_scan": shared_by,
                **row,
                "time_over_all": ours["step_seconds"] / everything["step_seconds"],
                "memory_over_all": ours["step_mib"] / everything["step_mib"],
            }
        )
    write_results("training_cost", {"questions_a_step": QUESTIONS, "seed": arguments.seed, "steps": rows})


def measure(study: Path, data: Path, seed: int, num_steps: int, variant: str, shared_by: int) -> dict[str, float]:
    """Median seconds of a step, and by how much the process grew above what model and encoded scans take."""
    torch.set_num_threads(1)
    folder = study / f"seed-{seed}" / variant / "train" / "checkpoint"
    model, prompter = read_model(folder), Prompter.read(folder / TOKENIZER)
    model.visual.requires_grad_(False)
    draw = dataclasses.replace(
        StudySpec.preset("small").pruned_draw,
        scans_per_step=QUESTIONS // shared_by,
        questions_per_scan=shared_by,
        max_shift=(0, 0, 0),
        robust_probability=0.0,
    )
    scans = read_split(data, "train")[:QUESTIONS]
    source = BatchSource(scans, prompter, model.config, draw, seed, model.visual)
    items = [source.batch(step, with_flips=False) for step in range(8)]
    ctypes.CDLL(None).malloc_trim(0)  # what encoding left free would hide what a step takes
    before = _resident_mib()
    reset_peak()
    _step(model, items[0])
    seconds, kept = [], []
    for number in range(num_steps):
        started = time.perf_counter()
        kept.append(_step(model, items[number % len(items)]))
        seconds.append(time.perf_counter() - started)
    return {
        "step_seconds": statistics.median(seconds),
        "step_mib": peak_memory()["peak_mib"] - before,
        "kept_fraction": statistics.fmean(kept),
    }


def _step(model: torch.nn.Module, item: object) -> float:
    model.zero_grad(set_to_none=True)
    result = compute_loss(model, item, "hard")  # type: ignore[arg-type]
    result.loss.backward()  # type: ignore[no-untyped-call]
    return result.kept_fraction


def _resident_mib() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the system does not say how much memory the process has")


if __name__ == "__main__":
    main()
