"""Sizes of published models, and a trace's routing played with another model's sizes.

The dimensions lie in ``sizes.toml``; weights are counted from them here, so that every total
can be checked against what the authors publish.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from traces.errors import InputError
from traces.model import DTYPE_BYTES, ModelSpec
from traces.names import did_you_mean

SIZES = Path(__file__).with_name("sizes.toml")

#: Rows of T5's table of relative positions, one weight per head in each.
T5_POSITION_BUCKETS = 32


@dataclass(frozen=True)
class Dimensions:
    """One model of ``sizes.toml``: what its configuration file says, in weights and layers."""

    source: str
    published_params: float
    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    vocabulary: int
    kv_heads: int = 0
    dense_layers: int = 0
    dense_intermediate: int = 0
    shared_intermediate: int = 0
    attention: str = "grouped"
    query_rank: int = 0
    kv_rank: int = 0
    nope_dim: int = 0
    rope_dim: int = 0
    qk_norm: str = ""
    qkv_bias: bool = False
    output_bias: bool = False
    expert_bias: bool = False
    router_bias: bool = False
    shared_gate: bool = False
    sinks: bool = False
    gated: bool = True
    tied: bool = False

    @property
    def all_layers(self) -> int:
        """Layers with and without routed experts."""
        return self.layers + self.dense_layers

    def expert_params(self) -> int:
        """Weights of one routed expert."""
        matrices = 3 if self.gated else 2
        biases = (matrices - 1) * self.intermediate + self.hidden if self.expert_bias else 0
        return matrices * self.hidden * self.intermediate + biases

    def dense_params(self) -> int:
        """Weights that are not routed experts: attention, norms, router, embeddings and head."""
        if self.attention == "encoder-decoder":
            return self._encoder_decoder_params()
        attention = self._latent_params() if self.kv_rank else self._grouped_params()
        every_layer = attention + 2 * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return (
            self.all_layers * every_layer
            + self.layers * (self._router_params() + self._shared_params())
            + self.dense_layers * 3 * self.hidden * self.dense_intermediate
            + embeddings
            + self.hidden
        )

    def kv_bytes_per_token(self, param_bytes: int) -> int:
        """Cached keys and values of one token over all layers.

        Latent attention is counted compressed: one latent vector and the rotary key per layer.
        An encoder-decoder is counted by its decoder's self-attention. Windows that bound the
        cache of some layers (gpt-oss) are not counted.
        """
        if self.kv_rank:
            return self.all_layers * (self.kv_rank + self.rope_dim) * param_bytes
        layers = self.all_layers
        if self.attention == "encoder-decoder":
            layers //= 2
        return layers * 2 * self.kv_heads * self.head_dim * param_bytes

    def _router_params(self) -> int:
        return self.hidden * self.experts + (self.experts if self.router_bias else 0)

    def _shared_params(self) -> int:
        gate = self.hidden if self.shared_gate else 0
        return 3 * self.hidden * self.shared_intermediate + gate

    def _grouped_params(self) -> int:
        """Attention of one layer with grouped queries."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = 2 * self.hidden * query + 2 * self.hidden * key
        biases = (query + 2 * key if self.qkv_bias else 0) + (
            self.hidden if self.output_bias else 0
        )
        norms = {"": 0, "head": 2 * self.head_dim, "full": query + key}[self.qk_norm]
        return weights + biases + norms + (self.heads if self.sinks else 0)

    def _latent_params(self) -> int:
        """Multi-head latent attention of one layer, with its two inner norms."""
        queries = self.heads * (self.nope_dim + self.rope_dim)
        if self.query_rank:
            query = self.query_rank * (self.hidden + 1 + queries)
        else:
            query = self.hidden * queries
        values = self.heads * self.head_dim
        down = self.hidden * (self.kv_rank + self.rope_dim) + self.kv_rank
        up = self.kv_rank * (self.heads * self.nope_dim + values)
        return query + down + up + values * self.hidden

    def _encoder_decoder_params(self) -> int:
        """T5: half of the layers encode, half decode and also attend to the encoder."""
        side = self.all_layers // 2
        attention = 4 * self.hidden * self.heads * self.head_dim
        norms = side * (2 + 3) * self.hidden + 2 * self.hidden
        positions = 2 * T5_POSITION_BUCKETS * self.heads
        return (
            side * (1 + 2) * attention
            + norms
            + positions
            + self.dense_layers * 2 * self.hidden * self.dense_intermediate
            + self.layers * self._router_params()
            + self.vocabulary * self.hidden * (1 if self.tied else 2)
        )


def size_names() -> list[str]:
    """The models whose sizes are known, in the order of the table."""
    return list(_table())


def dimensions(name: str) -> Dimensions:
    """The published dimensions of model *name*.

    Raises :class:`InputError` with the nearest name when there is no such model.
    """
    table = _table()
    if name not in table:
        hint = did_you_mean(name, table)
        raise InputError(f"sizes: no model {name!r}{hint} (known: {', '.join(table)})")
    return table[name]


def model_sizes(name: str) -> ModelSpec:
    """The published sizes of model *name*; raises :class:`InputError` for an unknown one."""
    dims = dimensions(name)
    dtype = "bfloat16"
    return ModelSpec(
        name=name,
        layers=dims.layers,
        experts=dims.experts,
        top_k=dims.top_k,
        hidden=dims.hidden,
        intermediate=dims.intermediate,
        expert_params=dims.expert_params(),
        dense_params=dims.dense_params(),
        kv_bytes_per_token=dims.kv_bytes_per_token(DTYPE_BYTES[dtype]),
        dtype=dtype,
    )


def resize(trace_model: ModelSpec, sizes: ModelSpec) -> ModelSpec:
    """Routing of *trace_model* with the sizes of one layer of *sizes*.

    Layers, experts and top-k stay the trace's. What belongs to a whole model in *sizes*, its
    dense weights (embeddings and head among them) and its key-value cache, is shared out
    evenly over its MoE layers and taken once per layer of the trace.
    """
    return replace(
        sizes,
        name=f"{trace_model.name} routing with {sizes.name} sizes",
        layers=trace_model.layers,
        experts=trace_model.experts,
        top_k=trace_model.top_k,
        dense_params=_per_layer(sizes.dense_params, sizes, trace_model),
        kv_bytes_per_token=_per_layer(sizes.kv_bytes_per_token, sizes, trace_model),
    )


def _per_layer(whole: int, sizes: ModelSpec, trace_model: ModelSpec) -> int:
    return round(whole * trace_model.layers / sizes.layers)


@functools.cache
def _table() -> dict[str, Dimensions]:
    raw: dict[str, dict[str, Any]] = tomllib.loads(SIZES.read_text(encoding="utf-8"))
    return {name: Dimensions(**values) for name, values in raw.items()}
