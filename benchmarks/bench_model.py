"""What the 14-deep patch saves, what pruning saves, and what sharing the scan saves: one run, the same weights.

Contenders: `vanilla` (patches two slices deep), `all_tokens` (14 deep, unpruned), `photon` (14 deep, pruned to the
share of tokens that --keep names). The shapes are the public 3B model's at an eighth of the width and a third of
the depth, with its own 140 x 280 x 280 volume: 7000 tokens for vanilla, 1000 for the others.
`gpu_checks.py` measures the full shapes on a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from common import set_kept_share, typical_first, write_results

from photon.config import PhotonConfig, PruningConfig, VisionConfig
from photon.generate import generate, last_rows
from photon.grid import patchify
from photon.model.network import PATCH_EMBEDDING, Photon
from photon.model.packing import IGNORE_INDEX, Branch, Context, PackedBatch, pack_batch
from photon.training.stages import Stage
from photon.training.step import TrainingBatch, compute_loss

CONTENDERS = ("vanilla", "all_tokens", "photon")
PHASES = ("prefill", "generation", "training")
VOLUME = (140, 280, 280)
NUM_QUESTION, NUM_ANSWER, NUM_GENERATED = 30, 8, 16
QUESTIONS = (1, 8, 32)
VOCABULARY, START, END, VIDEO, EOS = 4096, 1, 2, 3, 4


def scaled_down(patch_depth: int) -> PhotonConfig:
    """The 3B configuration's proportions: width / 8, depth / 3, pruning after a quarter of the layers."""
    return PhotonConfig(
        hidden_size=256,
        intermediate_size=1376,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        mrope_section=(4, 6, 6),
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=VIDEO,
        eos_token_id=EOS,
        vision=VisionConfig(
            depth=11,
            hidden_size=160,
            intermediate_size=428,
            num_heads=4,
            out_hidden_size=256,
            temporal_patch_size=patch_depth,
            fullatt_block_indexes=(2, 5, 8, 10),
        ),
        pruning=PruningConfig(layer=2),
    )


class Contender:
    """One way to treat the same scan and questions, with the same weights wherever shapes agree."""

    def __init__(self, name: str, keep: float) -> None:
        """``keep`` is the share of the visual tokens that `photon` keeps, over all questions."""
        self.name = name
        self.keep_all = name != "photon"
        self.stage: Stage = "warm-up" if self.keep_all else "hard"
        self.model = Photon(scaled_down(14)).initialise(0).eval()
        if name == "vanilla":
            weights = self.model.state_dict()
            del weights[PATCH_EMBEDDING]
            self.model = Photon(scaled_down(2)).initialise(0).eval()
            self.model.load_state_dict(weights, strict=False)
        generator = torch.Generator().manual_seed(0)
        patches, grid = patchify(torch.rand(VOLUME, generator=generator), self.model.config.vision)
        num_tokens = patches.shape[0] // 4
        self.context = Context(torch.tensor([5, START, *[VIDEO] * num_tokens, END]), patches, (grid,))
        words = torch.randint(6, VOCABULARY, (max(QUESTIONS), NUM_QUESTION + NUM_ANSWER), generator=generator)
        self.questions = list(words[:, :NUM_QUESTION])
        self.answers = list(words[:, NUM_QUESTION:])
        with torch.no_grad():
            self.model.model.embed_tokens.weight[EOS] = 0.0  # never the likeliest: every answer has the same length
        self.kept_shares = [1.0] * len(self.questions)
        if not self.keep_all:
            self._prune_to(keep)

    def _prune_to(self, keep: float) -> None:
        shares = set_kept_share(self.model, self.batch(range(len(self.questions))), keep)
        order = typical_first(shares, keep)
        self.questions = [self.questions[number] for number in order]
        self.kept_shares = [shares[number] for number in order]

    def batch(self, numbers: range) -> PackedBatch:
        """Questions about the scan, up to where their answers begin."""
        return pack_batch([self.context], [self.branch(n, has_answer=False) for n in numbers], self.model.config)

    def branch(self, number: int, *, has_answer: bool) -> Branch:
        """A question, and in training its answer."""
        asked = torch.cat([self.questions[number], torch.tensor([EOS, 5])])
        if not has_answer:
            return Branch(0, asked)
        answer = self.answers[number]
        return Branch(0, torch.cat([asked, answer]), torch.cat([torch.full_like(asked, IGNORE_INDEX), answer]))

    def ask(self, numbers: range, num_tokens: int) -> list[tuple[int, ...]]:
        """Answer questions together, from the scan on."""
        said, _ = generate(self.model, self.batch(numbers), keep_all=self.keep_all, max_new_tokens=num_tokens)
        return [answer.ids for answer in said]

    def encode(self, numbers: range) -> Tensor:
        """Rows that predict the first answer token of questions about one scan, the scan shared all the way."""
        batch = self.batch(numbers)
        with torch.no_grad():
            output = self.model(batch, "full" if self.keep_all else "hard")
            return self.model.logits(output.hidden[last_rows(batch, output)])

    def train(self) -> None:
        """Forward and backward of one question and answer."""
        batch = pack_batch([self.context], [self.branch(0, has_answer=True)], self.model.config)
        none = torch.zeros(1, dtype=torch.bool)
        result = compute_loss(self.model, TrainingBatch(batch, none, none), self.stage)
        result.loss.backward()
        self.model.zero_grad(set_to_none=True)

    def run(self, phase: str) -> None:
        """One of PHASES."""
        if phase == "training":
            self.train()
        else:
            self.ask(range(1), 1 if phase == "prefill" else NUM_GENERATED + 1)


def flops_of(function: Callable[[], object]) -> int:
    """Floating-point operations: matrix products and attention (a causal triangle counts half)."""

    def attention(query: Any, key: Any, value: Any, dropout: float = 0.0, is_causal: bool = False, **_: Any) -> int:
        batch, heads, rows, width = query
        return batch * heads * rows * key[-2] * width * 4 // (2 if is_causal else 1)

    def backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, **kwargs: Any) -> int:
        return attention(query, key, value, 0.0, bool(rest[3])) * 5 // 2

    aten = torch.ops.aten
    custom: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }
    with FlopCounterMode(display=False, custom_mapping=custom) as counter:
        function()
    return int(counter.get_total_flops())


def best_of_each(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Shortest time of each in seconds, taken in turns so that a slow moment hits all of them.

    Every function has run before (the arithmetic was counted, the results compared), so there is nothing to warm up.
    """
    times = {name: float("inf") for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name] = min(times[name], time.perf_counter() - started)
    return times


def peak_megabytes(name: str, phase: str, keep: float) -> float:
    """Memory that a phase needs on top of model and scan, measured in a process of its own."""
    command = [sys.executable, __file__, "--one", name, phase, str(keep)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_peak(name: str, phase: str, keep: float) -> float:
    """Growth of this process's peak memory in MB."""
    contender = Contender(name, keep)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory kept for reuse would hide what the phase asks for (glibc)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (Linux)
    before = _resident_kb("VmHWM")
    contender.run(phase)
    return (_resident_kb("VmHWM") - before) / 1024


def _resident_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def questions_on_one_scan(contender: Contender, repeats: int) -> list[dict[str, float]]:
    """K questions together against K separate runs: the first token of every answer, then answers of some length."""

    def apart(count: int) -> Tensor:
        return torch.cat([contender.encode(range(number, number + 1)) for number in range(count)])

    def answer_apart(count: int) -> list[tuple[int, ...]]:
        return [ids for number in range(count) for ids in contender.ask(range(number, number + 1), NUM_GENERATED)]

    rows = []
    for count in QUESTIONS:
        together, separate = contender.encode(range(count)), apart(count)
        difference = float((together - separate).abs().max() / separate.abs().max())
        assert difference < 1e-4, f"{count} questions: logits differ by {difference}"
        assert contender.ask(range(count), NUM_GENERATED) == answer_apart(count), f"{count} questions: other answers"
        times = best_of_each(
            {
                "shared": functools.partial(contender.encode, range(count)),
                "separate": functools.partial(apart, count),
                "shared answers": functools.partial(contender.ask, range(count), NUM_GENERATED),
                "separate answers": functools.partial(answer_apart, count),
            },
            repeats if count < max(QUESTIONS) else 1,  # long enough to be steady
        )
        flops = {"shared": flops_of(functools.partial(contender.encode, range(count))), "one": 0}
        flops["one"] = flops_of(functools.partial(contender.encode, range(1)))
        rows.append(
            {
                "questions": count,
                "first_token_time_shared_over_separate": times["shared"] / times["separate"],
                "first_token_flops_shared_over_separate": flops["shared"] / (count * flops["one"]),
                "answer_time_shared_over_separate": times["shared answers"] / times["separate answers"],
                "relative_logit_difference": difference,
            }
        )
        print(contender.name, json.dumps(rows[-1]))
    return rows


def compare(contenders: Mapping[str, Contender], phase: str, keep: float, repeats: int) -> dict[str, Any]:
    """Time, arithmetic and peak memory of a phase, as ratios between contenders."""
    runs = {name: functools.partial(contender.run, phase) for name, contender in contenders.items()}
    flops = {name: flops_of(run) for name, run in runs.items()}
    seconds = best_of_each(runs, repeats)
    memory = {name: peak_megabytes(name, phase, keep) for name in runs}
    ratios = {
        f"{a}_over_{b}": {"time": seconds[a] / seconds[b], "flops": flops[a] / flops[b], "peak": memory[a] / memory[b]}
        for a, b in (("vanilla", "all_tokens"), ("all_tokens", "photon"), ("vanilla", "photon"))
    }
    print(phase, json.dumps(ratios))
    return ratios


def main() -> None:
    """Compare and write results/model.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, default=0.39, help="share of the visual tokens that stay (paper: 0.39)")
    parser.add_argument("--repeats", type=int, default=2, help="timed runs of each; the shortest counts")
    parser.add_argument("--one", nargs=3, metavar=("NAME", "PHASE", "KEEP"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(measure_peak(arguments.one[0], arguments.one[1], float(arguments.one[2])))
        return
    contenders = {name: Contender(name, arguments.keep) for name in CONTENDERS}
    phases = {phase: compare(contenders, phase, arguments.keep, arguments.repeats) for phase in PHASES}
    sharing = {n: questions_on_one_scan(contenders[n], arguments.repeats) for n in ("all_tokens", "photon")}
    pruned = phases["training"]["all_tokens_over_photon"]
    write_results(
        "model",
        {
            "configuration": dataclasses.asdict(contenders["photon"].model.config),
            "visual_tokens": {name: int((c.context.input_ids == VIDEO).sum()) for name, c in contenders.items()},
            "kept_share": statistics.mean(contenders["photon"].kept_shares),
            "kept_share_of_one_question": contenders["photon"].kept_shares[0],
            "ratios": phases,
            "questions_on_one_scan": sharing,
            "training_speedup_over_arithmetic": pruned["time"] / pruned["flops"],
        },
    )


if __name__ == "__main__":
    main()
