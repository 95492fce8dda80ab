"""The wired model: contexts once, branches against them, pruning after the layer the configuration names.

Row names: `Tc` context rows and `Tb` branch rows of a :class:`PackedBatch`; `R` rows after pruning, where every branch
has its own copy of the context rows it kept, followed by its own rows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from photon.config import PhotonConfig
from photon.errors import PhotonError
from photon.model.attended import Sight
from photon.model.attention import Attention, RaggedAttention, starts_of
from photon.model.contexts import visual_tokens
from photon.model.decoder import Decoder, KeyValue, QueryKeyValue, SelfAttention
from photon.model.layers import Rotary, maybe_checkpoint
from photon.model.packing import PackedBatch
from photon.model.pruning import (
    EncodedRows,
    Mode,
    blind_scores,
    decide,
    effective_mode,
    forced,
    kept_tokens,
    take_layers,
    take_rows,
)
from photon.model.vision import VisionTower
from photon.ops.backend import Backend
from photon.ops.selection.op import Selection, select_rows
from photon.scheduling import Schedule

INITIAL_SHARPNESS = 1.5
PATCH_EMBEDDING = "visual.vision_patch_embed.proj.weight"
LAST_THRESHOLD_BIAS = ".atp.predictor.mlp.2.bias"


@dataclass(frozen=True)
class Output:
    """Result of a forward pass.

    Attributes:
        hidden: [R, D] rows before the final norm. Without pruning (`mode="full"`) these are the branch rows.
        branch_rows: int64 [Tb] row of `hidden` that holds each branch token.
        schedule: the pruning decision, with keep flags that were forced upon it; None when there is no visual token.
        selection: rows after pruning; None when contexts stayed shared.
        layers: each layer's keys and values, all rows a branch sees, branch after branch; None unless asked.
        layer_lengths: rows of each branch in `layers`; None unless asked.
        context: the encoded contexts.
        pruning_layer: branch rows' output [Tb, D] and attention state at the pruning layer.
        attended: float32 [S, N] attention of the rows that look to each visual token, summed over the layers after the
            pruning layer, heads and rows, without gradient; None unless asked, and where there is no visual token.
    """

    hidden: Tensor
    branch_rows: Tensor
    schedule: Schedule | None
    selection: Selection | None
    layers: tuple[KeyValue, ...] | None
    layer_lengths: tuple[int, ...] | None
    context: EncodedRows
    pruning_layer: tuple[Tensor, QueryKeyValue]
    attended: Tensor | None = None


class Photon(nn.Module):
    """Vision tower, decoder and pruning layer. Parameter names are the public checkpoint's.

    Attributes:
        backend: implementation of the pruning operators, see :mod:`photon.ops.backend`.
    """

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__()
        self.backend: Backend = "auto"
        self.config = config
        self.visual = VisionTower(config.vision)
        self.model = Decoder(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def checkpoint_activations(self) -> bool:
        """Whether training computes a layer's inner values again in the backward pass instead of keeping them."""
        return self.visual.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, is_on: bool) -> None:
        self.visual.checkpoint_activations = is_on

    def initialise(self, seed: int, names: Collection[str] | None = None) -> Photon:
        """Fill every parameter, or those of ``names``, from ``seed``, for training from scratch.

        Matrices are normal with variance 1 / inputs, those that write to the residual stream smaller by
        sqrt(2 layers); biases are zero and norms one. Queries start close to their keys, so rows attend to rows
        that resemble them (mimetic initialisation, arXiv 2305.09828): without it a small decoder spends most
        of a short run averaging over all visual tokens. The patch embedding starts as local means.

        Numbers are drawn in the order of the parameters, and only for those that are filled.
        """
        generator = torch.Generator().manual_seed(seed)
        fresh = {name: p for name, p in self.named_parameters() if names is None or name in names}
        with torch.no_grad():
            for name, parameter in fresh.items():
                if name.endswith(LAST_THRESHOLD_BIAS):
                    parameter.fill_(self.config.pruning.threshold_bias_init)
                elif name.endswith("bias"):
                    parameter.zero_()
                elif parameter.ndim == 1:
                    parameter.fill_(1.0)
                else:
                    drawn = torch.randn(parameter.shape, generator=generator)
                    parameter.copy_(drawn * self._initial_std(name, parameter))
            for name, module in self.named_modules():
                if isinstance(module, SelfAttention) and f"{name}.q_proj.weight" in fresh:
                    _resemble_keys(module.q_proj.weight, module.k_proj.weight, self.config)
            if PATCH_EMBEDDING in fresh:
                self.visual.vision_patch_embed.initialise()
        return self

    def _initial_std(self, name: str, parameter: Tensor) -> float:
        if name.endswith("embed_tokens.weight"):
            return self.config.initializer_range
        std: float = parameter[0].numel() ** -0.5
        if name.endswith(("o_proj.weight", "attn.proj.weight", "down_proj.weight")):
            depth = self.config.vision.depth if name.startswith("visual.") else self.config.num_hidden_layers
            return std * (2 * depth) ** -0.5
        return std

    def forward(
        self,
        batch: PackedBatch,
        mode: Mode,
        *,
        flip: Tensor | None = None,
        whole: Tensor | None = None,
        detach: Tensor | None = None,
        keep: Tensor | None = None,
        with_layers: bool = False,
        looking: Tensor | None = None,
    ) -> Output:
        """Encode the contexts of a batch and run its branches.

        Args:
            batch: contexts and branches.
            mode: "full" keeps every token; "soft" scales visual rows by their keep probability; "hard" removes
                dropped rows, with surrogate gradients. A policy may know fewer of these, see
                :func:`photon.model.pruning.effective_mode`.
            flip: bool [B] branches whose keep mask is inverted (the flip objective), "hard" only.
            whole: bool [B] branches that keep every token all the same, "hard" only.
            detach: bool [B] branches whose loss must not reach the keep probabilities.
            keep: bool [B, N] visual tokens that go on whatever the policy says, "hard" only; see
                :func:`photon.model.pruning.forced`.
            with_layers: also return every layer's keys and values of the rows that stay, for generation.
            looking: bool [Tb] branch rows whose attention after the pruning layer is also returned, with scores that
                have a gradient.

        Raises:
            PhotonError: ``PROMPT_INVALID`` when the keep flags do not fit the batch, ``GENERATION_INVALID`` when there
                are some and the mode is not "hard".
        """
        is_full = keep is None and effective_mode(mode, self.config.pruning) == "full"
        state = self.encode_contexts(batch, self.config.num_hidden_layers if is_full else self.config.pruning.layer + 1)
        return self.run_branches(
            batch,
            state,
            mode,
            flip=flip,
            whole=whole,
            detach=detach,
            keep=keep,
            with_layers=with_layers,
            looking=looking,
        )

    def encode_contexts(self, batch: PackedBatch, num_layers: int) -> EncodedRows:
        """Vision tower, unless the batch is encoded, and the first ``num_layers`` decoder layers over the contexts."""
        x = self.model.embed_tokens(batch.context_ids)
        if batch.visual_rows.numel():
            tokens = batch.tokens
            if tokens is None:
                tokens = visual_tokens(self.visual, batch.patches, batch.grids, batch.present, batch.pooled)
            x = x.index_copy(0, batch.visual_rows, tokens.to(x.dtype))
        return self.run_contexts(x, batch, num_layers)

    def run_contexts(self, x: Tensor, batch: PackedBatch, num_layers: int, *, first: int = 0) -> EncodedRows:
        """Decoder layers from ``first`` to below ``num_layers`` over context rows [Tc, D]."""
        attend = RaggedAttention.build(batch.context_lengths, device=x.device, is_causal=True)
        table = self.model.rotary(batch.context_positions)
        layers, own_scores = [], None
        for number, layer in enumerate(self.model.layers[first:num_layers], first):
            x, state = self._run(layer, x, table, attend)
            layers.append(state.kept)
            if number == self.config.pruning.layer and self.config.pruning.policy == "fixed-blind":
                own_scores = blind_scores(state, batch.layout)
        return EncodedRows(x, table, tuple(layers), own_scores)

    def run_branches(
        self,
        batch: PackedBatch,
        context: EncodedRows,
        mode: Mode,
        *,
        flip: Tensor | None = None,
        whole: Tensor | None = None,
        detach: Tensor | None = None,
        keep: Tensor | None = None,
        with_layers: bool = False,
        looking: Tensor | None = None,
    ) -> Output:
        """Run the branches of a batch against contexts encoded as far as the pruning layer; see :meth:`forward`."""
        if keep is None:
            mode = effective_mode(mode, self.config.pruning)
        elif mode != "hard":
            fact = f"keep flags and the mode {mode} contradict each other."
            raise PhotonError("GENERATION_INVALID", "keep flags", fact, "Choose one of them.")
        attend = _attention_of_branches(batch)
        table = self.model.rotary(batch.branch_positions)
        x = self.model.embed_tokens(batch.branch_ids)
        own: list[KeyValue] = []
        split = self.config.pruning.layer + 1
        for layer, shared in zip(self.model.layers[:split], context.layers, strict=False):
            x, state = self._run(layer, x, table, _after(shared, attend))
            if with_layers:
                own.append(state.kept)
        at_pruning = (x, state)
        decision = decide(
            state,
            context.layers[split - 1],
            batch.layout,
            self.model.predictor,
            mode,
            blind=context.own_scores,
            with_gradient=looking is not None,
            backend=self.backend,
        )
        if keep is not None:
            decision = forced(decision, keep, batch.layout)
        if decision is None:
            looking = None  # there is nothing to look at

        if mode == "full":
            context = self._finished(context, batch)
            sight = None if looking is None else Sight.shared(looking, batch.layout, batch.context_ids.shape[0])
            attended = None
            for layer, shared in zip(self.model.layers[split:], context.layers[split:], strict=True):
                x, state = self._run(layer, x, table, _after(shared, attend))
                if sight is not None:
                    found = sight.attention(state.q, torch.cat([shared.k, state.k]))
                    attended = found if attended is None else attended + found
                if with_layers:
                    own.append(state.kept)
            rows = torch.arange(x.shape[0], device=x.device)
            if not with_layers:
                return Output(x, rows, decision, None, None, None, context, at_pruning, attended)
            going_on = None if decision is None else decision.valid
            everything = select_rows(going_on, batch.layout, backend=self.backend)
            layers = take_layers(context.layers, own, everything.rows, backend=self.backend)
            return Output(x, rows, decision, None, layers, everything.host_lengths, context, at_pruning, attended)

        going_on = None if decision is None else kept_tokens(decision, mode, flip, whole)
        selection = select_rows(going_on, batch.layout, backend=self.backend)
        pruned = take_rows(
            context if with_layers else replace(context, layers=()),
            EncodedRows(x, table, tuple(own)),
            selection,
            batch.layout,
            p=_probabilities(decision, detach),
            mode=mode,
            rule=self.config.pruning.sgp_rule,
            backend=self.backend,
        )
        sight = None if looking is None else Sight.pruned(looking, batch.layout, selection)
        x, late, attended = self._run_pruned(pruned, selection.host_lengths, with_layers=with_layers, sight=sight)
        if not with_layers:
            return Output(x, selection.branch_rows, decision, selection, None, None, context, at_pruning, attended)
        layers, lengths = (*pruned.layers, *late), selection.host_lengths
        return Output(x, selection.branch_rows, decision, selection, layers, lengths, context, at_pruning, attended)

    def _run_pruned(
        self, pruned: EncodedRows, lengths: Sequence[int], *, with_layers: bool, sight: Sight | None
    ) -> tuple[Tensor, list[KeyValue], Tensor | None]:
        x = pruned.hidden
        attend = RaggedAttention.build(lengths, device=x.device, is_causal=True)
        states, attended = [], None
        for layer in self.model.layers[self.config.pruning.layer + 1 :]:
            x, state = self._run(layer, x, pruned.table, attend)
            if with_layers:
                states.append(state.kept)
            if sight is not None:
                found = sight.attention(state.q, state.k)
                attended = found if attended is None else attended + found
        return x, states, attended

    def _finished(self, context: EncodedRows, batch: PackedBatch) -> EncodedRows:
        """Contexts through the last layer, where they were encoded to the pruning layer only."""
        num_done, num_layers = len(context.layers), self.config.num_hidden_layers
        if num_done == num_layers:
            return context
        rest = self.run_contexts(context.hidden, batch, num_layers, first=num_done)
        return replace(rest, layers=(*context.layers, *rest.layers), own_scores=context.own_scores)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and vocabulary projection of rows [R, D]; call it on the rows that need it only."""
        normed = self.model.norm(hidden)
        weight = self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight
        return F.linear(normed, weight)

    def _run(self, layer: nn.Module, x: Tensor, table: Rotary, attend: Attention) -> tuple[Tensor, QueryKeyValue]:
        result: tuple[Tensor, QueryKeyValue] = maybe_checkpoint(
            layer, x, table, attend, is_on=self.checkpoint_activations
        )
        return result


def _resemble_keys(q: Tensor, k: Tensor, config: PhotonConfig) -> None:
    """Mix each query head's matrix with its key head's and sharpen both, in place."""
    grouped = (config.num_key_value_heads, -1, config.head_dim, config.hidden_size)
    heads = q.view(grouped)
    shared = k.view(grouped)
    heads.copy_(INITIAL_SHARPNESS * (0.8 * shared + 0.6 * heads))
    k.mul_(INITIAL_SHARPNESS)


def _after(shared: KeyValue, attend: RaggedAttention) -> Attention:
    """Attention of branch rows over context rows and their own."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, torch.cat([shared.k, k]), torch.cat([shared.v, v]))

    return attention


def _attention_of_branches(batch: PackedBatch) -> RaggedAttention:
    """Branch rows see the rows of their context, then their own, which come after all context rows."""
    starts, num_context_rows = starts_of(batch.context_lengths), batch.context_ids.shape[0]
    return RaggedAttention.build(
        batch.branch_lengths,
        k_starts=[start + num_context_rows for start in starts_of(batch.branch_lengths)],
        shared_starts=[starts[context] for context in batch.branch_context],
        shared_lengths=[batch.context_lengths[context] for context in batch.branch_context],
        device=batch.branch_ids.device,
        is_causal=True,
    )


def _probabilities(decision: Schedule | None, detach: Tensor | None) -> Tensor | None:
    """Keep probabilities [S, N]; the loss does not reach those of the branches in ``detach``."""
    if decision is None or detach is None:
        return None if decision is None else decision.p
    return torch.where(detach[decision.branch][:, None], decision.p.detach(), decision.p)
