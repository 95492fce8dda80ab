"""The language decoder: Qwen2.5's layers over packed rows, rotary positions over depth, height and width."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from photon.config import PhotonConfig
from photon.device import column
from photon.model.attention import Attention
from photon.model.layers import GatedMLP, RMSNorm, Rotary, rotary_table, rotate
from photon.scheduling import ThresholdPredictor


class KeyValue(NamedTuple):
    """What a layer keeps of its rows for later ones: rotated k [T, G, d], v [T, G, d]."""

    k: Tensor
    v: Tensor


class QueryKeyValue(NamedTuple):
    """What one layer attended with: rotated q [T, H, d], rotated k [T, G, d], v [T, G, d]."""

    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def kept(self) -> KeyValue:
        """Without the queries, which are most of the bytes and are never looked at again."""
        return KeyValue(self.k, self.v)


class SelfAttention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, width)
        self.v_proj = nn.Linear(config.hidden_size, width)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, table: Rotary, attend: Attention) -> tuple[Tensor, QueryKeyValue]:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        state = QueryKeyValue(rotate(q, table), rotate(k, table), v)
        return self.o_proj(attend(*state).flatten(-2)), state


class DecoderLayer(nn.Module):
    """Pre-norm layer; returns its output rows and what it attended with."""

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: Tensor, table: Rotary, attend: Attention) -> tuple[Tensor, QueryKeyValue]:
        attended, state = self.self_attn(self.input_layernorm(x), table, attend)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), state


class AdaptivePruning(nn.Module):
    """Parameters of the pruning layer under the public checkpoint's names; `pos_proj` is unused there and here."""

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__()
        self.predictor = ThresholdPredictor(config.hidden_size, config.pruning)
        self.pos_proj = nn.Linear(1, config.hidden_size, bias=False)


class Decoder(nn.Module):
    """Token embedding, layers and final norm."""

    def __init__(self, config: PhotonConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.layers[config.pruning.layer].atp = AdaptivePruning(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    @property
    def predictor(self) -> ThresholdPredictor:
        """The threshold network of the pruning layer."""
        pruning = self.layers[self.config.pruning.layer].atp
        assert isinstance(pruning, AdaptivePruning)
        return pruning.predictor

    def rotary(self, positions: Tensor) -> Rotary:
        """Rotary table for positions [3, T]: each frequency pair turns with the axis its section names."""
        half = self.config.head_dim // 2
        exponent = torch.arange(half, dtype=torch.float32, device=positions.device) / half
        frequency = 1.0 / self.config.rope_theta**exponent
        sections = enumerate(self.config.mrope_section)
        axis = column([axis for axis, pairs in sections for _ in range(pairs)], positions.device)
        return rotary_table(positions.float().T[:, axis] * frequency)
