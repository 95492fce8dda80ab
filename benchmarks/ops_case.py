"""What `bench_ops.py` measures with: a question about a volume at the pruning layer, and the bytes that have to move.

Letters: N visual tokens, K of them kept, M rows before and R after pruning.
"""

from __future__ import annotations

import dataclasses

import naive_ops
import torch
from torch import Tensor

from photon.config import PhotonConfig
from photon.ops.compaction.op import compact
from photon.ops.layout import Layout
from photon.ops.saliency.op import saliency
from photon.ops.schedule.op import schedule
from photon.ops.schedule.reference import DESCRIPTOR_SIZE, Decision, ThresholdWeights
from photon.ops.selection.op import select_rows

NUM_BEFORE, NUM_QUESTION, NUM_OWN = 21, 60, 68
"""Text rows before the volume; question tokens; rows of the question and what follows it."""
NUM_TEXT = NUM_BEFORE + 1 + NUM_OWN
"""One row more ends the volume."""
CLEAR_GAP = 2e-5
"""Least distance of the two scaled scores around the threshold; sums in another order differ by a tenth of it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A number of visual tokens, how many of them stay, and the type of rows and keys."""

    config: PhotonConfig
    num_tokens: int
    num_kept: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """For tables and results."""
        return f"{self.num_tokens} tokens, {self.num_kept} kept, {str(self.dtype).removeprefix('torch.')}"

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of all that moves: hidden row, cosines and sines (float32), keys and values."""
        c = self.config
        cached = 2 * (c.pruning.layer + 1) * c.num_key_value_heads * c.head_dim
        return (c.hidden_size + cached) * self.dtype.itemsize + 2 * c.head_dim * torch.float32.itemsize


def moved_bytes(case: Case) -> dict[str, int]:
    """Bytes that each operation has to read or write, everything once.

    With Q question tokens, 90 text rows (M = N + 90, R = K + 90), 68 of them the branch's own, H query and G key heads
    of width d, hidden rows of D numbers, e bytes a number, W threshold weights:

    - saliency: keys N G d e, question Q (H + G) d e, scores 4 N
    - schedule: scores 4 N; scores, scaled ones and probabilities 12 N, decisions N; weights 4 W
    - selection: decisions N, slots 8 (M - 68); rows and slots 16 R, positions 8 M, own rows 8 * 68
    - compaction: the list 8 R, and R rows of all that moves, twice
    - pack: the list 8 R, and R hidden rows D e, twice
    - pack_backward: gradient R D e, kept visual rows K D e, gradients of all rows M D e; positions 8 M; probabilities
      and their gradient 8 N
    - step: the first four together
    """
    c, n, size = case.config, case.num_tokens, case.dtype.itemsize
    before, after, hidden = n + NUM_TEXT, case.num_kept + NUM_TEXT, c.hidden_size * size
    heads = c.num_attention_heads + c.num_key_value_heads
    inner = c.hidden_size // 8
    found = {
        "saliency": (n * c.num_key_value_heads + NUM_QUESTION * heads) * c.head_dim * size + 4 * n,
        "schedule": 17 * n + 4 * (inner * (DESCRIPTOR_SIZE + 2) + 1),
        "selection": n + 8 * (before - NUM_OWN) + 16 * after + 8 * before + 8 * NUM_OWN,
        "compaction": 8 * after + 2 * after * case.row_bytes,
        "pack": 8 * after + 2 * after * hidden,
        "pack_backward": (after + case.num_kept + before) * hidden + 8 * before + 8 * n,
    }
    found["step"] = sum(found[name] for name in ("saliency", "schedule", "selection", "compaction"))
    return found


class Inputs:
    """Random inputs of a case. Context rows come first, then the branch's own: for the naive form, one sequence.

    Attributes:
        contexts, branches: hidden rows, cosines, sines, then keys and values of each layer; sources: both together.
        q, k, keys: queries and keys of the branch, keys of the context. layout: where things lie.
        u, decision, selection: by the operators' reference; the threshold keeps exactly the wanted number of tokens.
        visual: rows of the visual tokens. stays: bool [M] rows kept. places: [N] packed row of each kept token.
        grad: [R, D] gradient of the packed rows.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.config, self.device = case, case.config, device
        self._generator = torch.Generator(device=device).manual_seed(0)
        c, n = self.config, case.num_tokens
        table, cached = ((1, c.head_dim), torch.float32), ((c.num_key_value_heads, c.head_dim), case.dtype)
        kinds = [((c.hidden_size,), case.dtype), table, table, *[cached] * (2 * (c.pruning.layer + 1))]
        self.contexts = [self._rows(NUM_BEFORE + n + 1, *kind) for kind in kinds]
        self.branches = [self._rows(NUM_OWN, *kind) for kind in kinds]
        self.sources = [torch.cat(pair) for pair in zip(self.contexts, self.branches, strict=True)]
        self.k, self.keys = self.branches[-2], self.contexts[-2]
        volumes = [[(NUM_BEFORE, n)]]
        self.layout = Layout.build([NUM_BEFORE + n + 1], volumes, [NUM_OWN], [NUM_QUESTION], [0]).to(device)
        self.visual = slice(NUM_BEFORE, NUM_BEFORE + n)

        self._draw_question()
        self.decision = self.decide(self.u, "reference")
        self.selection = select_rows(self.decision.keep, self.layout, backend="reference")
        self.stays = self.rows_that_stay(self.decision.keep[0])
        self.places = (self.stays.cumsum(0) - 1)[self.visual]
        self.grad = self._rows(case.num_kept + NUM_TEXT, *kinds[0])

    def _rows(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(count, *shape, generator=self._generator, device=self.device).to(dtype)

    def _draw_question(self) -> None:
        """Draw queries and weights; again while a score lies so close to the threshold that rounding may cross it."""
        shape, gap = (self.config.num_attention_heads, self.config.head_dim), 0.0
        while gap < CLEAR_GAP:
            self.q = self._rows(NUM_OWN, shape, self.case.dtype)
            self.u = saliency(self.q, self.k, self.keys, self.layout, backend="reference")
            self.weights = self._random_weights()
            gap = self._keep(self.case.num_kept)

    def _random_weights(self) -> ThresholdWeights:
        inner = self.config.hidden_size // 8
        hidden = self._rows(inner, (DESCRIPTOR_SIZE,), torch.float32) / DESCRIPTOR_SIZE**0.5
        last = self._rows(1, (inner,), torch.float32) / inner**0.5
        return ThresholdWeights(hidden, hidden.new_zeros(inner), last, last.new_zeros(1))

    def _keep(self, count: int) -> float:
        """Set the last bias so that the threshold is in the middle of the two scores around it; their distance."""
        found = self.decide(self.u, "reference")
        around = found.rho[0].double().sort(descending=True).values[count - 1 : count + 1]
        thetas = torch.stack([found.theta[0].double(), around.mean()])
        bias = torch.logit(thetas / self.config.pruning.threshold_scale).diff().float()
        self.weights = self.weights._replace(last_bias=bias)
        return float(around[0] - around[1])

    def decide(self, u: Tensor, backend: str) -> Decision:
        """The schedule operator with the model's settings."""
        settings = self.config.pruning
        return schedule(
            u,
            self.layout.pair_lengths,
            self.weights,
            scale=settings.threshold_scale,
            temperature=settings.temperature,
            min_tokens=settings.min_tokens,
            backend=backend,
        )

    def rows_that_stay(self, keep: Tensor) -> Tensor:
        """bool [M], from the decisions [N] about visual tokens; text always stays."""
        return torch.cat([keep.new_ones(NUM_BEFORE), keep, keep.new_ones(1 + NUM_OWN)])

    def step(self, backend: str) -> list[Tensor]:
        """The pruning step, from the scores to the moved rows."""
        u = saliency(self.q, self.k, self.keys, self.layout, backend=backend)
        selection = select_rows(self.decide(u, backend).keep, self.layout, backend=backend)
        return compact(self.contexts, self.branches, selection.rows, backend=backend)

    def naive_scores(self, dtype: torch.dtype | None = None) -> Tensor:
        """Scores [1, N], computed from inputs of another type if that is named."""
        question = slice(0, NUM_QUESTION)
        inputs = (self.q[question], self.k[question], self.keys[self.visual])
        return naive_ops.scores(*(x.to(dtype) for x in inputs))[None]

    def naive_step(self) -> list[Tensor]:
        """The pruning step, naively but for the schedule."""
        keep = self.decide(self.naive_scores(), "reference").keep[0]
        return naive_ops.compact(self.sources, self.rows_that_stay(keep))
