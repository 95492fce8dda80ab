"""The model as three graphs with dynamic axes, for export: scan, question, decode.

* scan: the shared context of one scan - vision tower, embedding, decoder layers up to the pruning layer.
* question: any number of questions about that scan - the rest of the network, pruning included, so that the
  number of rows after it depends on the data.
* decode: one answer token further.

Each is a module over plain tensors whose arithmetic is the model's own (the plain-PyTorch one of the pruning
operators); only the attention takes a mask instead of ranges of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from photon.config import PhotonConfig
from photon.decoding import Cache, decode_step_functional
from photon.errors import PhotonError
from photon.model.attention import BlockAttention
from photon.model.network import Photon
from photon.ops.saliency.reference import question_vector, scores
from photon.ops.schedule.reference import decide


def require_exportable(config: PhotonConfig) -> None:
    """Refuse what the graphs do not have: they choose tokens by the threshold network alone.

    Raises:
        PhotonError: ``EXPORT_UNSUPPORTED`` for another policy than "photon".
    """
    if config.pruning.policy != "photon":
        fact = f"its policy is {config.pruning.policy}, and the graphs prune by the threshold network alone."
        raise PhotonError("EXPORT_UNSUPPORTED", "config.json", fact, "Answer with the checkpoint itself.")


class ScanGraph(nn.Module):
    """Context of one scan to keys, values and hidden rows.

    Inputs: ``patches`` float [P, 14*14*14]; ``patch_rows_columns`` int64 [P, 2]; ``patch_slab``, ``patch_window`` int64
    [P], equal where patches attend to each other; ``context_ids`` int64 [C]; ``context_positions`` int64 [3, C];
    ``visual_rows`` int64 [N].

    Outputs: ``hidden`` [C, D]; ``keys``, ``values`` [layers before pruning, C, G, d].

    Raises as :func:`require_exportable` does.
    """

    def __init__(self, model: Photon) -> None:
        super().__init__()
        require_exportable(model.config)
        self.model = model

    def forward(
        self,
        patches: Tensor,
        patch_rows_columns: Tensor,
        patch_slab: Tensor,
        patch_window: Tensor,
        context_ids: Tensor,
        context_positions: Tensor,
        visual_rows: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        full = BlockAttention(_equal(patch_slab))
        windowed = BlockAttention(_equal(patch_window))
        encoded = model.visual.encode(patches, patch_rows_columns, full=full, windowed=windowed)
        tokens = model.visual.merger(encoded)
        x = model.model.embed_tokens(context_ids).index_copy(0, visual_rows, tokens)
        attend = BlockAttention(_causal(context_ids.shape[0])[None])
        table = model.model.rotary(context_positions)
        keys, values = [], []
        for layer in model.model.layers[: model.config.pruning.layer + 1]:
            x, state = layer(x, table, attend)
            keys.append(state.k)
            values.append(state.v)
        return x, torch.stack(keys), torch.stack(values)


class QuestionGraph(nn.Module):
    """Questions about one encoded scan to first-token logits, kept tokens and pruned caches.

    Inputs: ``hidden``, ``keys``, ``values`` of :class:`ScanGraph`; ``context_positions`` int64 [3, C];
    ``visual_rows`` int64 [N]; ``is_text`` bool [C]; ``branch_ids`` int64 [B, L], each question's tokens, filled up
    at the end; ``branch_valid`` bool [B, L] real tokens; ``question`` bool [B, L] question tokens;
    ``branch_positions`` int64 [B, L].

    Outputs: ``logits`` [B, vocabulary]; ``kept`` bool [B, N]; ``cache_keys``, ``cache_values`` [layers, B, K, G, d],
    K the most rows any branch keeps; ``cache_mask`` bool [B, K].

    Raises as :func:`require_exportable` does.
    """

    def __init__(self, model: Photon) -> None:
        super().__init__()
        require_exportable(model.config)
        self.model = model

    def forward(
        self,
        hidden: Tensor,
        keys: Tensor,
        values: Tensor,
        context_positions: Tensor,
        visual_rows: Tensor,
        is_text: Tensor,
        branch_ids: Tensor,
        branch_valid: Tensor,
        question: Tensor,
        branch_positions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        model, split = self.model, self.model.config.pruning.layer + 1
        num_branches, length = branch_ids.shape
        num_context = hidden.shape[0]
        past_k = keys[:, None].expand(-1, num_branches, -1, -1, -1)
        past_v = values[:, None].expand(-1, num_branches, -1, -1, -1)
        sees_context = branch_valid.new_ones(num_branches, length, num_context)
        sees_own = _causal(length)[None].expand(num_branches, -1, -1)
        mask = torch.cat([sees_context, sees_own], dim=2)
        x = model.model.embed_tokens(branch_ids.flatten())
        table = model.model.rotary(branch_positions.flatten().expand(3, -1))
        states = []
        for index, layer in enumerate(model.model.layers[:split]):
            x, state = layer(x, table, BlockAttention(mask, past_k[index], past_v[index]))
            states.append(state)

        shape = (num_branches, length)
        z = question_vector(states[-1].q.unflatten(0, shape), states[-1].k.unflatten(0, shape), question)
        u = scores(z, keys[-1].index_select(0, visual_rows))
        kept = self._decided(u)

        rows, cache_mask = self._kept_rows(kept, visual_rows, is_text, branch_valid)
        positions = torch.cat([context_positions, branch_positions.flatten().expand(3, -1)], dim=1)
        table = model.model.rotary(positions.index_select(1, rows.flatten()))
        x = torch.cat([hidden, x]).index_select(0, rows.flatten())
        attend = BlockAttention(_causal(rows.shape[1])[None] & cache_mask[:, None, :])
        cache_k = [torch.cat([keys[i], s.k]).index_select(0, rows.flatten()) for i, s in enumerate(states)]
        cache_v = [torch.cat([values[i], s.v]).index_select(0, rows.flatten()) for i, s in enumerate(states)]
        for layer in model.model.layers[split:]:
            x, state = layer(x, table, attend)
            cache_k.append(state.k)
            cache_v.append(state.v)
        last = cache_mask.sum(1) - 1 + torch.arange(num_branches) * rows.shape[1]
        blocks = (rows.shape[0], rows.shape[1])
        return (
            model.logits(x.index_select(0, last)),
            kept,
            torch.stack(cache_k).unflatten(1, blocks),
            torch.stack(cache_v).unflatten(1, blocks),
            cache_mask,
        )

    def _decided(self, u: Tensor) -> Tensor:
        predictor = self.model.model.predictor
        decision, _ = decide(
            u,
            torch.ones_like(u, dtype=torch.bool),
            predictor.weights,
            scale=predictor.config.threshold_scale,
            temperature=predictor.config.temperature,
            min_tokens=predictor.config.min_tokens,
        )
        return decision.keep

    @staticmethod
    def _kept_rows(kept: Tensor, visual_rows: Tensor, is_text: Tensor, branch_valid: Tensor) -> tuple[Tensor, Tensor]:
        """Rows each branch takes along, [B, K] into context rows followed by all branch rows, and which are real."""
        num_branches, length = branch_valid.shape
        num_context = is_text.shape[0]
        in_context = is_text[None].expand(num_branches, -1).index_copy(1, visual_rows, kept)
        taken = torch.cat([in_context, branch_valid], dim=1)
        lengths = taken.sum(1)
        most = int(lengths.max())
        torch._check(most >= 2)
        torch._check(most <= num_context + length)
        # Taken rows first, in order: their own place is the key, rows left behind come after all of them.
        place = torch.arange(num_context + length)[None].expand(num_branches, -1)
        key = torch.where(taken, place, place + num_context + length)
        order = torch.argsort(key, dim=1)[:, :most]
        branch_start = torch.arange(num_branches)[:, None] * length
        rows = torch.where(order < num_context, order, order + branch_start)
        return rows, torch.arange(most)[None] < lengths[:, None]


class DecodeGraph(nn.Module):
    """One answer token further.

    Inputs: ``ids`` int64 [B]; ``positions`` int64 [B]; ``cache_keys``, ``cache_values`` [layers, B, K, G, d];
    ``cache_mask`` bool [B, K]. Outputs: ``logits`` [B, vocabulary] and the caches with one more column.
    """

    def __init__(self, model: Photon) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, ids: Tensor, positions: Tensor, cache_keys: Tensor, cache_values: Tensor, cache_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, cache = decode_step_functional(self.model, ids, positions, Cache(cache_keys, cache_values, cache_mask))
        return logits, cache.k, cache.v, cache.mask


def _equal(ids: Tensor) -> Tensor:
    return (ids[:, None] == ids[None, :])[None]


def _causal(size: int) -> Tensor:
    order = torch.arange(size)
    return order[:, None] >= order[None, :]
