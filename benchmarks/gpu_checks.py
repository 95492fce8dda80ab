"""Everything that needs a GPU, in one command: its tests, the pruning operators by themselves (as in `bench_ops.py`),
and the public 3B model with random weights in bfloat16.

Compared are three ways to treat one 140 x 280 x 280 volume: `vanilla` (patches two slices deep, 7000 tokens),
`all_tokens` (14 deep, 1000 tokens) and `photon` (the same, pruned to about the share that the published model keeps).
Results go to results/gpu.json after every part. A part that fails is recorded and the others still run; one that does
not fit into the memory is recorded as such and is no failure.

Exit code: 0 all parts well, 1 a part failed, 2 no GPU.

    python benchmarks/gpu_checks.py
    python benchmarks/gpu_checks.py --device cpu --size micro --output /tmp/gpu  # the same code in seconds
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import re
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import bench_ops  # noqa: E402
import torch  # noqa: E402
from common import RESULTS, measure, save_results, set_kept_share, typical_first  # noqa: E402
from ops_case import Case  # noqa: E402
from probes import Clock  # noqa: E402
from torch import Tensor  # noqa: E402

from photon.config import PhotonConfig, qwen2_5_vl_3b  # noqa: E402
from photon.device import choose_device  # noqa: E402
from photon.errors import PhotonError  # noqa: E402
from photon.generate import ask_batch, decode, last_rows  # noqa: E402
from photon.grid import patchify  # noqa: E402
from photon.model.network import Photon  # noqa: E402
from photon.model.packing import IGNORE_INDEX, Branch, Context, PackedBatch, pack_batch  # noqa: E402
from photon.ops.backend import Backend, resolve  # noqa: E402
from photon.testing import micro_config  # noqa: E402
from photon.training.stages import Stage  # noqa: E402
from photon.training.step import TrainingBatch, compute_loss  # noqa: E402

CONTENDERS = ("vanilla", "all_tokens", "photon")
KEEP = 0.39
"""Share of the visual tokens that the published model keeps."""
NUM_PREFIX, NUM_QUESTION, NUM_SUFFIX, NUM_ANSWER = 20, 60, 7, 8
"""Text tokens before the volume, of the question, between it and the answer, of the answer learned: 90 in a prompt,
with the two marks of the volume and the question's end."""
NUM_GENERATED = 32
QUESTIONS = (1, 8, 32)
TESTS_TIMEOUT_S = 300
OPERATOR_REPEATS = 4
"""How many times as often operators are timed: they take microseconds."""
MAX_DIFFERENCE = 0.3
"""Relative difference of logits above which shared and separate runs disagree. Rounding to bfloat16 makes a few
percent, a token that is kept in one of them alone somewhat more; unrelated logits differ by 1.4."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A model and a volume [Z, Y, X] for it; ``vanilla_depth`` is the depth of a vanilla patch in voxels.

    The operators are measured by themselves with volumes of ``num_tokens`` visual tokens.
    """

    config: PhotonConfig
    volume: tuple[int, int, int]
    vanilla_depth: int
    num_tokens: tuple[int, ...]

    def config_of(self, contender: str) -> PhotonConfig:
        """The configuration of one of CONTENDERS."""
        if contender != "vanilla":
            return self.config
        vision = dataclasses.replace(self.config.vision, temporal_patch_size=self.vanilla_depth)
        return dataclasses.replace(self.config, vision=vision)


def size_of(name: str) -> Size:
    """The public model, or one of a few ten thousand parameters."""
    if name == "full":
        return Size(config=qwen2_5_vl_3b(), volume=(140, 280, 280), vanilla_depth=2, num_tokens=bench_ops.SIZES)
    return Size(config=micro_config(), volume=(8, 16, 16), vanilla_depth=1, num_tokens=(64,))


@torch.no_grad()
def random_model(config: PhotonConfig, device: torch.device) -> Photon:
    """A model in bfloat16 filled where it lies: matrices of variance 1 / inputs, norms one, biases zero.

    Every parameter has a seed of its own, from its name: contenders have the same weights wherever shapes agree.

    The end of turn gets a zero embedding. It is then never the likeliest token, and every answer has its full length.
    """
    with torch.device("meta"):
        model = Photon(config).to(torch.bfloat16)
    model = model.to_empty(device=device)
    generator = torch.Generator(device=device)
    for name, parameter in model.named_parameters():
        generator.manual_seed(zlib.crc32(name.encode()))
        if name.endswith("embed_tokens.weight"):
            parameter.normal_(0.0, config.initializer_range, generator=generator)
            parameter[config.eos_token_id] = 0.0
        elif parameter.ndim > 1:
            parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model.eval()


class Contender:
    """One way to treat the volume and the questions; the model is built when it is first needed."""

    def __init__(self, name: str, size: Size, device: torch.device, repeats: int) -> None:
        self.name, self.device, self.repeats = name, device, repeats
        self.config = size.config_of(name)
        self.keep_all = name != "photon"
        self.stage: Stage = "warm-up" if self.keep_all else "hard"
        generator = torch.Generator().manual_seed(0)
        patches, grid = patchify(torch.rand(size.volume, generator=generator), self.config.vision)
        self.num_tokens = patches.shape[0] // self.config.vision.spatial_merge_size**2
        special = (self.config.vision_start_token_id, self.config.vision_end_token_id, self.config.video_token_id)
        self.words = functools.partial(
            torch.randint, min(*special, self.config.eos_token_id), generator=generator, dtype=torch.long
        )
        start, end, video = special
        marked = torch.tensor([start, *[video] * self.num_tokens, end])
        self.context = Context(torch.cat([self.words((NUM_PREFIX,)), marked]), patches, (grid,))
        self.questions = [self._question() for _ in range(max(QUESTIONS))]
        self.answer = self.words((NUM_ANSWER,))

    def _question(self) -> Tensor:
        end = torch.tensor([self.config.eos_token_id])
        return torch.cat([self.words((NUM_QUESTION,)), end, self.words((NUM_SUFFIX,))])

    @functools.cached_property
    def model(self) -> Photon:
        """The model, with the threshold set so that the share KEEP stays; typical questions come first."""
        model = random_model(self.config, self.device)
        if not self.keep_all:
            shares = set_kept_share(model, self.batch(range(len(self.questions))), KEEP)
            self.questions = [self.questions[number] for number in typical_first(shares, KEEP)]
        return model

    def batch(self, numbers: range) -> PackedBatch:
        """Questions up to where their answers begin, on the device."""
        branches = [Branch(0, self.questions[number]) for number in numbers]
        return pack_batch([self.context], branches, self.config).to(self.device)

    def training_batch(self) -> TrainingBatch:
        """One question with its answer."""
        asked = self.questions[0]
        labels = torch.cat([torch.full_like(asked, IGNORE_INDEX), self.answer])
        packed = pack_batch([self.context], [Branch(0, torch.cat([asked, self.answer]), labels)], self.config)
        none = torch.zeros(1, dtype=torch.bool)
        return TrainingBatch(packed, none, none).to(self.device)

    @torch.no_grad()
    def first_logits(self, batch: PackedBatch) -> Tensor:
        """Logits [B, vocabulary] of the first answer tokens; without pruning the scan is shared through all layers."""
        output = self.model(batch, "full" if self.keep_all else "hard")
        return self.model.logits(output.hidden[last_rows(batch, output)])

    def build(self) -> dict[str, Any]:
        """Build the model and move a first batch."""
        started = time.perf_counter()
        parameters = list(self.model.parameters())
        finish(self.device)
        return {
            "build_s": time.perf_counter() - started,
            "parameters": sum(p.numel() for p in parameters),
            "weights_gib": sum(p.numel() * p.element_size() for p in parameters) / 2**30,
            "dtype": str(parameters[0].dtype),
            "visual_tokens": self.num_tokens,
            "text_tokens": NUM_PREFIX + 2 + self.questions[0].numel(),
            "kept_share": self.kept_share(len(self.questions)),
            "kept_share_of_one_question": self.kept_share(1),
            "pack_and_move": measure(lambda: self.batch(range(1)), self.repeats, self.device),
        }

    @torch.no_grad()
    def kept_share(self, num_questions: int) -> float:
        """Visual tokens that stay, over the first questions."""
        if self.keep_all:
            return 1.0
        decision = self.model(self.batch(range(num_questions)), "hard").schedule
        assert decision is not None
        return float(decision.keep[decision.valid].float().mean())

    def prefill(self) -> dict[str, Any]:
        """From the patches of one volume to the first token of one answer."""
        batch = self.batch(range(1))
        prompted = ask_batch(self.model, batch, keep_all=self.keep_all)
        require_finite("first logits", prompted.logits)
        rows = int(prompted.cache.mask.sum())
        return {"cached_rows": rows, **measure(lambda: self._prompt(batch), self.repeats, self.device)}

    def _prompt(self, batch: PackedBatch) -> Any:
        return ask_batch(self.model, batch, keep_all=self.keep_all, room=NUM_GENERATED)

    def generation(self) -> dict[str, Any]:
        """Greedy answers of full length over the pruned or whole cache, for one question and for the most at once."""
        result: dict[str, Any] = {}
        for count in (1, max(QUESTIONS)):
            prompted = self._prompt(self.batch(range(count)))
            run = functools.partial(decode, self.model, prompted, max_new_tokens=NUM_GENERATED)
            answers = run()
            lengths = {len(answer.ids) for answer in answers}
            if lengths != {NUM_GENERATED}:
                raise AssertionError(f"answers have {lengths} tokens, not {NUM_GENERATED}")
            times = measure(run, self.repeats, self.device)
            # The first token comes from the prefill.
            rate = 1000 * count * (NUM_GENERATED - 1) / times["median_ms"]
            result[f"questions_{count}"] = {"tokens_per_s": rate, **times}
        return result

    def training(self, *, is_checkpointed: bool) -> dict[str, Any]:
        """Forward and backward of one question and answer."""
        self.model.checkpoint_activations = is_checkpointed
        item = self.training_batch()
        try:
            result = compute_loss(self.model, item, self.stage)
            require_finite("loss", result.loss)
            result.loss.backward()
            missing = [name for name, p in self.model.named_parameters() if p.grad is None]
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    require_finite(f"gradient of {name}", parameter.grad)
            unexpected = [name for name in missing if ".atp." not in name]
            if unexpected:
                raise AssertionError(f"no gradient reaches {unexpected}")
            loss, kept = float(result.loss.detach()), result.kept_fraction
            # Let go of the graph and the gradients before the memory is measured.
            del result
            times = measure(lambda: self._train(item), self.repeats, self.device)
        finally:
            self.model.zero_grad(set_to_none=True)
            self.model.checkpoint_activations = False
        return {"loss": loss, "kept_fraction": kept, "parameters_without_gradient": missing, **times}

    def _train(self, item: TrainingBatch) -> None:
        self.model.zero_grad(set_to_none=True)
        compute_loss(self.model, item, self.stage).loss.backward()

    def sharing(self, count: int) -> dict[str, Any]:
        """First tokens of questions about one volume: together, and each with an encoding of its own."""
        together, alone = self.batch(range(count)), [self.batch(range(n, n + 1)) for n in range(count)]
        shared = self.first_logits(together).float()
        separate = torch.cat([self.first_logits(batch) for batch in alone]).float()
        require_finite("logits of shared questions", shared)
        difference = float((shared - separate).norm() / separate.norm())
        if difference > MAX_DIFFERENCE:
            raise AssertionError(f"logits of shared and separate questions differ by {difference:.2g} of their size")
        times = {
            "shared": measure(lambda: self.first_logits(together), self.repeats, self.device),
            "separate": measure(lambda: [self.first_logits(b) for b in alone], min(self.repeats, 3), self.device),
        }
        ratio = times["shared"]["median_ms"] / times["separate"]["median_ms"]
        same = float((shared.argmax(-1) == separate.argmax(-1)).float().mean())
        return {**times, "shared_over_separate": ratio, "relative_difference": difference, "same_first_token": same}

    def pruning_saves(self) -> dict[str, Any]:
        """The prefill of one question with all tokens, and pruned to the share KEEP; moves the threshold."""
        batch = self.batch(range(1))
        shares = set_kept_share(self.model, batch, KEEP)
        runs = {
            name: functools.partial(ask_batch, self.model, batch, keep_all=name == "whole", room=NUM_GENERATED)
            for name in ("whole", "pruned")
        }
        times = Clock(self.device).in_turns(runs, self.repeats)
        saved_ms = times["whole"]["median_ms"] - times["pruned"]["median_ms"]
        return {**times, "kept_share": shares[0], "saved_ms": saved_ms}

    def backends(self) -> dict[str, Any]:
        """Prefill and training with the operators' kernels, where there is a GPU for them, and in plain PyTorch."""
        batch, item = self.batch(range(1)), self.training_batch()

        def with_backend(backend: Backend, run: Callable[[], object]) -> None:
            self.model.backend = backend
            run()

        found: dict[str, Any] = {"auto": resolve("auto", self.device)}
        try:
            for phase, run in {"prefill": lambda: self._prompt(batch), "training": lambda: self._train(item)}.items():
                runs = {name: functools.partial(with_backend, name, run) for name in ("auto", "reference")}
                times = Clock(self.device).in_turns(runs, self.repeats)
                ratio = times["auto"]["median_ms"] / times["reference"]["median_ms"]
                found[phase] = {**times, "auto_over_reference": ratio}
        finally:
            self.model.backend = "auto"
            self.model.zero_grad(set_to_none=True)
        return found


def require_finite(name: str, values: Tensor) -> None:
    """Raise AssertionError when a number is not finite."""
    if not bool(torch.isfinite(values).all()):
        raise AssertionError(f"{name}: {int((~torch.isfinite(values)).sum())} of {values.numel()} are not finite")


def finish(device: torch.device) -> None:
    """Wait for what the device still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give memory back that nothing holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_tests(path: str, device: torch.device, marks: str, *more: str) -> dict[str, Any]:
    """Run pytest on ``path``; raise AssertionError with the end of its output when a test fails or none ran."""
    # Only the tests' own folder is asked for settings: those of the others import packages that may be missing here.
    options = ["-q", "-m", marks, "--confcutdir", str(ROOT / "tests" / "photon"), "-p", "no:cacheprovider", *more]
    command = [sys.executable, "-m", "pytest", *options, path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_TIMEOUT_S, check=False)
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    is_well = done.returncode == 0 and (counts.get("passed", 0) > 0 or device.type == "cpu")
    if not is_well:
        raise AssertionError(f"pytest ended with {done.returncode}, {counts}:\n{(done.stdout + done.stderr)[-6000:]}")
    return counts


class Checks:
    """The parts done so far, written after each."""

    def __init__(self, output: Path, content: dict[str, Any], device: torch.device) -> None:
        self.output, self.content, self.device = output, content, device
        self.parts: dict[str, dict[str, Any]] = {}

    @property
    def failed(self) -> list[str]:
        """Names of the parts that failed."""
        return [name for name, part in self.parts.items() if part["status"] == "failed"]

    def run(self, name: str, function: Callable[[], dict[str, Any]]) -> None:
        """Run a part and note what it found, or its error."""
        started = time.perf_counter()
        try:
            part = {"status": "ok", **function()}
            finish(self.device)
        except torch.OutOfMemoryError as error:
            part = {"status": "out of memory", "error": str(error)}
        except Exception as error:
            part = {"status": "failed", "error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc(-4)}
        part["elapsed_s"] = time.perf_counter() - started
        self.parts[name] = part
        self.write()
        print(f"{part['status']:6} {name} ({part['elapsed_s']:.1f} s) {part.get('error', '')}", flush=True)

    def write(self) -> Path:
        """Write the results file."""
        content = {**self.content, "parts": self.parts, "failed": self.failed, "ratios": ratios(self.parts)}
        return save_results("gpu", content, self.output)


def ratios(parts: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How many times as long, and as much memory, each step of the comparison takes, of the parts that went well."""
    found = {}
    for phase in ("prefill", "training", "training_checkpointed"):
        for a, b in (("vanilla", "all_tokens"), ("all_tokens", "photon"), ("vanilla", "photon")):
            first, second = parts.get(f"{a} {phase}", {}), parts.get(f"{b} {phase}", {})
            for key in ("median_ms", "peak_gib"):
                if key in first and key in second:
                    found[f"{phase} {a} over {b}, {key}"] = first[key] / second[key]
    for contender in CONTENDERS:
        built, saved = parts.get(f"{contender} build", {}), parts.get(f"{contender} pruning_saves", {})
        for name, part in parts.items():
            if "saved_ms" in saved and "step" in part and part["tokens"] == built.get("visual_tokens"):
                found[f"{name}, step over the prefill saved"] = part["step"]["auto"]["median_ms"] / saved["saved_ms"]
    return found


def operators(case: Case, clock: Clock, bandwidth: float, repeats: int) -> dict[str, Any]:
    """The pruning operators by themselves; raises AssertionError when one gives another result than the naive form."""
    result = bench_ops.measure_case(case, clock, bandwidth, repeats)
    if refused := bench_ops.refused([result]):
        raise AssertionError("; ".join(refused))
    return {**result, "floor_bandwidth_bytes_per_s": bandwidth, "aims": bench_ops.aims(result, clock.device)}


def check_operators(checks: Checks, size: Size, repeats: int) -> None:
    """A part for each number of tokens."""
    clock = Clock(checks.device)
    bandwidth = clock.copy_bandwidth(repeats)
    for case in bench_ops.cases_of(size.config, size.num_tokens, [torch.bfloat16]):
        checks.run(f"ops {case.name}", functools.partial(operators, case, clock, bandwidth, repeats))


def check_contender(checks: Checks, contender: Contender) -> None:
    """All parts of one contender, the model gone afterwards."""
    name = contender.name
    checks.run(f"{name} build", contender.build)
    checks.run(f"{name} prefill", contender.prefill)
    checks.run(f"{name} generation", contender.generation)
    for count in QUESTIONS:
        checks.run(f"{name} sharing {count}", functools.partial(contender.sharing, count))
        release(contender.device)
    checks.run(f"{name} training", functools.partial(contender.training, is_checkpointed=False))
    release(contender.device)
    checks.run(f"{name} training_checkpointed", functools.partial(contender.training, is_checkpointed=True))
    release(contender.device)
    if contender.keep_all:
        checks.run(f"{name} pruning_saves", contender.pruning_saves)
    else:
        checks.run(f"{name} backends", contender.backends)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "micro"), default="full")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each; the median counts")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of gpu.json")
    parser.add_argument("--tests", default="tests/photon", help="tests to run first; empty for none")
    parser.add_argument("--all-tests", action="store_true", help="at the end also the tests that need no GPU")
    arguments = parser.parse_args(argv)
    try:
        device = choose_device(arguments.device)
    except PhotonError as error:
        print(f"No GPU to check: {error.fact} {error.remedy}")
        return 2
    size = size_of(arguments.size)
    content = {"size": arguments.size, "repeats": arguments.repeats, "configuration": size.config.to_hf(), "keep": KEEP}
    checks = Checks(arguments.output, content, device)
    if arguments.tests:
        checks.run("gpu tests", lambda: run_tests(arguments.tests, device, "gpu"))
    check_operators(checks, size, OPERATOR_REPEATS * arguments.repeats)
    release(device)
    for name in CONTENDERS:
        check_contender(checks, Contender(name, size, device, arguments.repeats))
        release(device)
    if arguments.all_tests:
        # Compares with one release of a library whose others have other names.
        ignored = f"--ignore={ROOT / 'tests' / 'photon' / 'test_transformers.py'}"
        checks.run("other tests", lambda: run_tests(arguments.tests, device, "not gpu", ignored))
    print(checks.write())
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
