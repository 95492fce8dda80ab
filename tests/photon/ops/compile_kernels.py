"""Compile every kernel for real GPUs, on any machine: what the interpreter lets pass may still not compile.

Run as a script without TRITON_INTERPRET. Prints a JSON line for each kernel and target: name, target, registers per
thread, bytes spilled to local memory, bytes of shared memory. Shapes are those of the 3B model in bfloat16.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from photon.ops.compaction import kernels as compaction
from photon.ops.saliency import kernels as saliency
from photon.ops.schedule import kernels as schedule
from photon.ops.selection import kernels as selection
from photon.ops.surrogate import kernels as surrogate

TARGETS = (80, 90)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel and how it is launched.

    Attributes:
        kernel: the jitted function.
        types: types of its arguments in order, as Triton writes them; an int is a constant, as a stride of 1 becomes.
        constants: its constexpr arguments.
        options: num_warps and other options of the launch.
        label: tells cases of one kernel apart.
    """

    kernel: Any
    types: tuple[str | int, ...]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    label: str = ""

    def source(self) -> ASTSource:
        """What Triton compiles; pointers are aligned, as PyTorch's are."""
        names = [name for name in self.kernel.arg_names if name not in self.constants]
        assert len(names) == len(self.types), f"{self.kernel.__name__} takes {names}"
        types = dict(zip(names, self.types, strict=True))
        constants = {**self.constants, **{name: kind for name, kind in types.items() if isinstance(kind, int)}}
        order = self.kernel.arg_names
        signature = {name: "constexpr" if name in constants else str(types[name]) for name in order}
        aligned = {(order.index(n),): [["tt.divisibility", 16]] for n, kind in signature.items() if kind[0] == "*"}
        return ASTSource(self.kernel, signature, {(order.index(n),): value for n, value in constants.items()}, aligned)


HEADS = {"HEAD_DIM": 128, "BLOCK_DIM": 128}
ROWS = ("i32", "i32", 1)
"""Strides of [rows, heads, d]."""


def saliency_cases() -> list[Case]:
    """The three kernels of saliency in both ways of multiplying."""
    cases = []
    for rows, is_widened in (("*bf16", False), ("*fp32", True)):
        cases.append(
            Case(
                kernel=saliency.centrality_kernel,
                types=(rows, rows, "*fp32", "*i64", "*i64", *ROWS, *ROWS, "i32"),
                constants={"SHARE": 8, "BLOCK": saliency.BLOCK_QUESTION, "IS_WIDENED": is_widened, **HEADS},
                label=rows,
            )
        )
    question = {"NUM_HEADS": 16, "BLOCK_HEADS": 16, "BLOCK": saliency.BLOCK_QUESTION, **HEADS}
    score = {"NUM_KEY_HEADS": 2, "SHARE": 8, "BLOCK_SHARE": 8, "BLOCK": saliency.BLOCK_COLUMNS, **HEADS}
    cases += [
        Case(
            kernel=saliency.question_kernel,
            types=("*bf16", "*fp32", "*fp32", "*i64", "*i64", *ROWS, "i32", "fp32"),
            constants=question,
        ),
        Case(
            kernel=saliency.score_kernel,
            types=("*fp32", "*bf16", "*fp32", "*i64", "*i64", "*i64", *ROWS, "i32"),
            constants=score,
        ),
    ]
    return cases


def schedule_cases() -> list[Case]:
    """The schedule of a row in each size class."""
    inputs, outputs = ("*fp32", "*i64", *("*bf16",) * 4), (*("*fp32",) * 4, "*i1", "*fp32")
    return [
        Case(
            kernel=schedule.schedule_kernel,
            types=(*inputs, *outputs, *("i32",) * 4, "fp32", "fp32"),
            constants={"BLOCK": columns, "BLOCK_HIDDEN": 256},
            options={"num_warps": schedule.num_warps(columns), "enable_fp_fusion": False},
            label=str(columns),
        )
        for columns in (1024, 8192, 32768)
    ]


def selection_cases() -> list[Case]:
    """One question about 7000 tokens, and 64 questions about 1000."""
    tables = ("*u8", *("*i64",) * 13)
    return [
        Case(
            kernel=selection.select_kernel,
            types=(*tables, *("i32",) * 5),
            constants={"BRANCHES": branches, "CHUNK": selection.CHUNK, "PAIRS": pairs, "COLUMNS": columns},
            options={"num_warps": 8},
            label=f"{branches} questions",
        )
        for branches, pairs, columns in (
            (1, 1, 4096),
            (64, 4, 1024),
        )
    ]


def compaction_cases() -> list[Case]:
    """Rows moved by vectors, and by single bytes where nothing is aligned."""
    return [
        Case(
            kernel=compaction.compact_kernel,
            types=("*i64", "*i64", "i32", "i32"),
            constants={
                "ROWS": compaction.ROWS,
                "NUM_WORDS": compaction.PIECE_BYTES // word,
                "WORD": compaction.WORDS[word],
                "WORD_BYTES": word,
                "ALIGNMENT": alignment,
            },
            options={"num_warps": 4},
            label=f"words of {word}",
        )
        for word, alignment in ((8, 16), (1, 1))
    ]


def surrogate_cases() -> list[Case]:
    """Both launches of the backward, and the first without probabilities."""
    table = ("*fp32", "*fp32", "*fp32", "*i64", "*fp32", "i32", "i32")
    rows = ("*bf16", "*bf16", *("*i64",) * 9, "*bf16", "*bf16", "*fp32", "*fp32", *("i32",) * 5)
    constants = {"EXACT": tl.float32, "TILE": surrogate.TILE, "BLOCK": 2048}
    return [
        *(
            Case(
                kernel=surrogate.rows_kernel,
                types=rows,
                constants={"WITH_P": with_p, **constants},
                options={"num_warps": 4},
                label="with p" if with_p else "rows alone",
            )
            for with_p in (True, False)
        ),
        Case(
            kernel=surrogate.probability_kernel,
            types=table,
            constants={"IS_PAPER": True, "BLOCK": surrogate.COLUMNS},
            options={"num_warps": 16, "enable_fp_fusion": False},
        ),
    ]


def cases() -> list[Case]:
    """Every kernel of the operators."""
    return [*saliency_cases(), *schedule_cases(), *selection_cases(), *compaction_cases(), *surrogate_cases()]


def kernels() -> set[str]:
    """Names of all functions that are launched."""
    modules = (saliency, schedule, selection, compaction, surrogate)
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def usage(cubin: bytes) -> dict[str, int]:
    """Registers, spilled bytes and shared memory of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([str(CUOBJDUMP), "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", run.stdout))
    return {"registers": int(found["REG"]), "spilled_bytes": int(found["STACK"]) + int(found["LOCAL"])}


def main() -> None:
    missing = kernels() - {case.kernel.__name__ for case in cases()}
    assert not missing, f"no case for {missing}"
    for case in cases():
        for capability in TARGETS:
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(case.source(), target=target, options={"enable_fp_fusion": True, **case.options})
            line = {"kernel": case.kernel.__name__, "case": case.label, "sm": capability}
            line |= usage(compiled.asm["cubin"]) | {"shared_bytes": compiled.metadata.shared}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
