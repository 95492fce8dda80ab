"""The pruning operators against formulas written down naively, and against what the memory allows.

One question of 60 tokens, 90 text tokens in all, about one volume, with the shapes of the public 3B model. What moves
is what the model moves to generate: hidden rows, rotary tables, keys and values of every layer up to the pruning one.
Of the visual tokens 39 % are kept, and once more 390 of any number.

Every result is first compared with the form in `naive_ops.py`: scores and gradients within the rounding of sums, moved
rows bit by bit. What disagrees is not timed, and the exit code is 1. Then both run in turns, from cold caches; a
floor is the bytes that have to move (`ops_case.py`) over the bandwidth of a copy in the same run.

    python benchmarks/bench_ops.py
    python benchmarks/bench_ops.py --device cpu --sizes 1000 --output /tmp/ops
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import naive_ops  # noqa: E402
import torch  # noqa: E402
from common import RESULTS, save_results  # noqa: E402
from ops_case import Case, Inputs, moved_bytes  # noqa: E402
from probes import Clock, nbytes, on_gpu, peak_bytes  # noqa: E402
from torch import Tensor  # noqa: E402

from photon.config import PhotonConfig, qwen2_5_vl_3b  # noqa: E402
from photon.device import choose_device  # noqa: E402
from photon.ops import backend as backends  # noqa: E402
from photon.ops.compaction.op import compact  # noqa: E402
from photon.ops.saliency.op import saliency  # noqa: E402
from photon.ops.selection.op import select_rows  # noqa: E402
from photon.ops.surrogate.op import pack  # noqa: E402

SIZES = (1000, 4394, 7000)
KEPT_SHARE, KEPT_COUNT = 0.39, 390
RULE = "taylor"
BANDWIDTH_REPEATS = 7
SHORTEST_STEP_MS = 0.06
"""Launches and the one look at the device: no step on a GPU is asked to be faster."""

Functions = dict[str, Callable[[], Any]]


def ours(inputs: Inputs, backend: str) -> Functions:
    """Every operation by the public operators."""
    i, hidden = inputs, (inputs.contexts[0], inputs.branches[0])
    context, branch, p = leaves = [x.clone().requires_grad_() for x in (*hidden, i.decision.p)]
    packed = pack(context, branch, p, i.selection, i.layout, rule=RULE, backend=backend)
    return {
        "saliency": lambda: saliency(i.q, i.k, i.keys, i.layout, backend=backend),
        "schedule": lambda: i.decide(i.u, backend),
        "selection": lambda: select_rows(i.decision.keep, i.layout, backend=backend),
        "compaction": lambda: compact(i.contexts, i.branches, i.selection.rows, backend=backend),
        "pack": lambda: pack(*hidden, i.decision.p, i.selection, i.layout, rule=RULE, backend=backend),
        "pack_backward": lambda: torch.autograd.grad(packed, leaves, i.grad, retain_graph=True),
        "step": lambda: i.step(backend),
    }


def naive(inputs: Inputs) -> Functions:
    """Those operations that have a naive form."""
    i, leaf = inputs, inputs.sources[0].clone().requires_grad_()
    packed = naive_ops.pack(leaf, i.stays)

    def backward() -> tuple[Tensor, Tensor]:
        (grad,) = torch.autograd.grad(packed, leaf, i.grad, retain_graph=True)
        p, keep = i.decision.p[0], i.decision.keep[0]
        return grad, naive_ops.probability_gradient(leaf[i.visual], i.grad, p, keep, i.places)

    return {
        "saliency": i.naive_scores,
        "compaction": lambda: naive_ops.compact(i.sources, i.stays),
        "pack": lambda: naive_ops.pack(i.sources[0], i.stays),
        "pack_backward": backward,
        "step": i.naive_step,
    }


def compare(name: str, found: Any, expected: Any, inputs: Inputs) -> dict[str, float]:
    """Compare an operation's result with the naive one, or with what it must be where there is none.

    Returns:
        For sums the largest errors against float64.

    Raises:
        AssertionError: when they differ by more than rounding.
    """
    i = inputs
    if name == "saliency":
        return _errors(found, expected, i.naive_scores(torch.float64), score_tolerance(i))
    if name == "schedule":
        _require(torch.equal(found.keep, found.rho > found.theta[:, None]), "not the tokens above the threshold stay")
        _require(int(found.keep.sum()) == i.case.num_kept, "another number of tokens stays")
    elif name == "selection":
        _require(torch.equal(found.rows, i.stays.nonzero().flatten()), "other rows stay")
        lengths = (len(found.rows),)
        _require(found.host_lengths == lengths and found.lengths.tolist() == [*lengths], "lengths differ")
    elif name == "pack_backward":
        # Not bit by bit: the naive form gives dropped rows zeros of either sign.
        _require(torch.equal(torch.cat(found[:2]), expected[0]), "gradients of rows differ")
        p, keep, x = i.decision.p[0].double(), i.decision.keep[0], i.sources[0][i.visual].double()
        exact = naive_ops.probability_gradient(x, i.grad.double(), p, keep, i.places)
        return _errors(found[2][0], expected[1], exact, gradient_tolerance(i))
    elif name == "pack":
        _require(same_bits([found], [expected]), "moved rows differ")
    else:
        _require(same_bits(found, expected), "moved rows differ")
    return {}


def _require(is_so: bool, fault: str) -> None:
    if not is_so:
        raise AssertionError(fault)


def _errors(found: Tensor, naive_one: Tensor, exact: Tensor, tolerance: float) -> dict[str, float]:
    errors = {"error": float((found - exact).abs().max()), "naive_error": float((naive_one - exact).abs().max())}
    _require(max(errors.values()) <= tolerance, f"{errors} exceed {tolerance:.2g}")
    return {**errors, "error_allowed": tolerance}


def same_bits(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether tensors have the same types, shapes and bits."""
    return len(found) == len(expected) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(found, expected, strict=True)
    )


def score_tolerance(inputs: Inputs) -> float:
    """What rounding may change in a score: a mean of products <q, k> / sqrt d whose weights sum to at most 1.

    A sum of n rounded terms is off by about sqrt(n) roundings of |q| |k|; n counts the numbers of the keys of a token,
    the heads and the question tokens.
    """
    c, q, keys = inputs.config, inputs.q, inputs.keys[inputs.visual]
    num_terms = c.num_key_value_heads * c.head_dim + c.num_attention_heads + q.shape[0]
    longest = float(q.double().norm(dim=-1).max() * keys.double().norm(dim=-1).max())
    return math.sqrt(num_terms) * torch.finfo(torch.float32).eps * longest / math.sqrt(c.head_dim)


def gradient_tolerance(inputs: Inputs) -> float:
    """What rounding may change in the gradient of a probability, 0.8 * 0.5 tanh(z) * share * slope.

    The share is at most 2 and the slope 1/4, so that is a fifth of the change in z, which is a product <x, g> over its
    spread. The product is off by about sqrt(D) roundings of sum |x g|, the spread by as many of its own.
    """
    x, grad = inputs.sources[0][inputs.visual].double(), inputs.grad.double()
    products = x * grad[inputs.places] * inputs.decision.keep[0][:, None]
    roundings = math.sqrt(x.shape[1]) * torch.finfo(torch.float32).eps
    return 0.2 * roundings * float(products.abs().sum(-1).max() / products.sum(-1).std(correction=0) + 1)


def measure_case(case: Case, clock: Clock, bandwidth: float, repeats: int) -> dict[str, Any]:
    """Compare, time and weigh every operation of a case; ``bandwidth`` of a copy is in bytes per second."""
    inputs = Inputs(case, clock.device)
    by_backend = {name: ours(inputs, name) for name in (("auto", "reference") if clock.is_gpu else ("auto",))}
    plainly = naive(inputs)
    operations = {}
    with torch.no_grad():
        for name, num_bytes in moved_bytes(case).items():
            contenders = {backend: functions[name] for backend, functions in by_backend.items()}
            found = _measure(name, contenders, plainly.get(name), inputs, clock, repeats)
            operations[name] = {"bytes": num_bytes, "floor_ms": 1000 * num_bytes / bandwidth, **found}
    implementation = backends.resolve("auto", clock.device)
    return {"case": case.name, "tokens": case.num_tokens, "kept": case.num_kept, "auto": implementation, **operations}


def _measure(
    name: str,
    contenders: Functions,
    naive_one: Callable[[], Any] | None,
    inputs: Inputs,
    clock: Clock,
    repeats: int,
) -> dict[str, Any]:
    expected = naive_one() if naive_one else None
    try:
        found = {backend: compare(name, run(), expected, inputs) for backend, run in contenders.items()}
    except AssertionError as error:
        return {"refused": str(error)}
    del expected
    if naive_one:
        contenders, found = {**contenders, "naive": naive_one}, {**found, "naive": {}}
    times = clock.in_turns(contenders, repeats)
    for contender, run in contenders.items():
        row: dict[str, Any] = {**times[contender], **found[contender]}
        row["peak_bytes"] = peak_bytes(run, clock.device)
        row["peak_over_output"] = row["peak_bytes"] / nbytes(run())
        if naive_one and contender != "naive":
            row["naive_over_this"] = times["naive"]["median_ms"] / row["median_ms"]
        if clock.is_gpu:
            row.update(on_gpu(run, clock, repeats))
        found[contender] = row
    return found


def refused(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Operations that disagreed with the naive form, and why."""
    return [
        f"{result['case']}, {name}: {part['refused']}"
        for result in results
        for name, part in result.items()
        if isinstance(part, dict) and "refused" in part
    ]


def aims(result: Mapping[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """What was aimed at in a case, beside what came out."""
    found = []

    def add(aim: str, operation: str, key: str, *, at_least: float = -math.inf, at_most: float = math.inf) -> None:
        if "refused" not in result[operation]:
            value = result[operation]["auto"][key]
            wanted = at_least if at_most == math.inf else at_most
            is_met = at_least <= value <= at_most
            found.append({"case": result["case"], "aim": aim, "wanted": wanted, "found": value, "is_met": is_met})

    add("compaction: peak memory over output, at most", "compaction", "peak_over_output", at_most=2)
    if device.type == "cpu":
        add("scoring: times as fast as the naive form, at least", "saliency", "naive_over_this", at_least=10)
        add("compaction: times as fast as the naive form, at least", "compaction", "naive_over_this", at_least=50)
    elif result["tokens"] == max(SIZES):
        longest = max(5 * result["step"]["floor_ms"], SHORTEST_STEP_MS)
        add("step: ms, at most 5 floors or 0.06", "step", "median_ms", at_most=longest)
        longest = 2 * result["pack_backward"]["floor_ms"]
        add("surrogate backward: ms, at most 2 floors", "pack_backward", "median_ms", at_most=longest)
        add("step: times the host waits for the GPU, at most", "step", "host_waits", at_most=1)
    return found


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The results in columns."""
    head = "operation      by         median ms  best ms  floor ms  x floor  x faster  peak/output"
    lines = []
    for result in results:
        lines += ["", f"{result['case']} (auto: {result['auto']})", head]
        for name, part in result.items():
            if not isinstance(part, dict):
                continue
            for by in [key for key in ("naive", "reference", "auto") if key in part]:
                row, floor = part[by], part["floor_ms"]
                ratio = f"{row['naive_over_this']:8.1f}" if "naive_over_this" in row else 8 * " "
                lines.append(
                    f"{name:14} {by:9} {row['median_ms']:10.3f} {row['best_ms']:8.3f} {floor:9.4f} "
                    f"{row['median_ms'] / floor:8.1f}  {ratio} {row['peak_over_output']:12.2f}"
                )
    return "\n".join(lines)


def cases_of(config: PhotonConfig, sizes: Sequence[int], dtypes: Sequence[torch.dtype]) -> list[Case]:
    """The cases of some sizes: a share of the tokens stays, and where that differs a fixed number."""
    return [
        Case(config=config, num_tokens=size, num_kept=kept, dtype=dtype)
        for dtype in dtypes
        for size in sizes
        for kept in sorted({round(KEPT_SHARE * size), min(KEPT_COUNT, size - 1)}, reverse=True)
    ]


def triton_version() -> str | None:
    """Of the installed Triton."""
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def main(argv: Sequence[str] | None = None, config: PhotonConfig | None = None) -> int:
    """Measure and write ops.json; returns the exit code. ``config`` replaces the 3B model's shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="numbers of visual tokens")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of ops.json")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each; the median counts")
    arguments = parser.parse_args(argv)
    config, device = config or qwen2_5_vl_3b(), choose_device(arguments.device)
    clock = Clock(device)
    bandwidth = clock.copy_bandwidth(BANDWIDTH_REPEATS)
    print(f"{device}: a copy moves {bandwidth / 1e9:.1f} GB/s", flush=True)
    results, found = [], []
    dtypes = [torch.bfloat16] if clock.is_gpu else [torch.float32, torch.bfloat16]
    for case in cases_of(config, arguments.sizes, dtypes):
        results.append(measure_case(case, clock, bandwidth, arguments.repeats))
        found += aims(results[-1], device)
        print(table(results[-1:]), flush=True)
    content = {"bandwidth_bytes_per_s": bandwidth, "triton": triton_version(), "configuration": config.to_hf()}
    print(save_results("ops", {**content, "cases": results, "aims": found}, arguments.output))
    for aim in found:
        verdict = "met" if aim["is_met"] else "MISSED"
        print(f"{verdict:6} {aim['case']}, {aim['aim']} {aim['wanted']:.3g}: {aim['found']:.3g}")
    print(*refused(results), sep="\n")
    return 1 if refused(results) else 0


if __name__ == "__main__":
    sys.exit(main())
