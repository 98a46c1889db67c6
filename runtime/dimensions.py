"""Models of given dimensions with random weights, on which a trace's routing is replayed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from runtime.families import find_gates
from runtime.skeleton import build_skeleton, dense_tensors, fill_buffers, put_tensor
from traces.errors import InputError
from traces.model import ModelSpec
from traces.sizes import Dimensions, dimensions, model_sizes, resize, size_names

#: Family of each model of ``sizes.toml``, by the beginning of its name.
_FAMILY_OF = {
    "mixtral-": "mixtral",
    "qwen1.5-moe": "qwen2_moe",
    "qwen2-": "qwen2_moe",
    "qwen3-": "qwen3_moe",
    "olmoe": "olmoe",
    "deepseek-v2": "deepseek_v2",
    "deepseek-v3": "deepseek_v3",
    "gpt-oss-": "gpt_oss",
}

#: Fewer rows than this make no sensible embedding.
MIN_VOCABULARY = 256
#: Long enough for every trace; costs nothing but a number.
_POSITIONS = 131_072


def replay_model(
    spec: ModelSpec,
    sizes_name: str | None,
    device: torch.device | str,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Any:
    """A model with the routing shape of *spec* and one layer's dimensions of *sizes_name*.

    Without *sizes_name* the dimensions are those of the published model that *spec* names,
    else what *spec* itself says. The dense part lies on *device* with random weights, the
    same for the same *seed* and kind of device; the experts' weights are on ``meta``. Token
    ids go up to ``model.config.vocab_size``, which is fitted to the dense weights and need
    not be the published one.
    """
    model_type, dims = fit_dimensions(spec, sizes_name)
    model = build_skeleton(config_of(model_type, dims), dtype)
    fill_dense(model, torch.device(device), seed)
    return model


def fit_dimensions(spec: ModelSpec, sizes_name: str | None) -> tuple[str, Dimensions]:
    """Model type and dimensions for *spec* with one layer of *sizes_name*.

    Published dense weights that a shorter model has too few layers for, or too many, are made
    up for by the vocabulary, so that the sum is that of :func:`traces.sizes.resize`.
    """
    if sizes_name is None and spec.name in size_names():
        sizes_name = spec.name
    if sizes_name is None:
        model_type, dims = _plain(spec)
        wanted = spec.dense_params
    else:
        model_type, dims = _family(sizes_name), dimensions(sizes_name)
        wanted = resize(spec, model_sizes(sizes_name)).dense_params
    shaped = dataclasses.replace(
        dims,
        layers=spec.layers,
        experts=spec.experts,
        top_k=spec.top_k,
        dense_layers=round(dims.dense_layers * spec.layers / dims.layers),
    )
    return model_type, _with_vocabulary(shaped, wanted)


def _family(name: str) -> str:
    """The model type of the published model *name*."""
    dimensions(name)
    for beginning, model_type in _FAMILY_OF.items():
        if name.startswith(beginning):
            return model_type
    raise InputError(
        f"sizes {name}: its family cannot be replayed, expected a model whose name begins with "
        + ", ".join(_FAMILY_OF)
    )


def _with_vocabulary(dims: Dimensions, dense_params: int) -> Dimensions:
    """*dims* with the vocabulary that brings its dense weights nearest to *dense_params*."""
    rest = dataclasses.replace(dims, vocabulary=0).dense_params()
    row = dims.hidden * (1 if dims.tied else 2)
    rows = max(MIN_VOCABULARY, round((dense_params - rest) / row))
    return dataclasses.replace(dims, vocabulary=rows)


def _plain(spec: ModelSpec) -> tuple[str, Dimensions]:
    """Dimensions for a model that is known by its *spec* alone."""
    head_dim, kv_heads = _heads(spec)
    plain = Dimensions(
        source=spec.name,
        published_params=0,
        layers=spec.layers,
        experts=spec.experts,
        top_k=spec.top_k,
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        heads=kv_heads * max(1, round(spec.hidden / (head_dim * kv_heads))),
        head_dim=head_dim,
        kv_heads=kv_heads,
        vocabulary=0,
    )
    biased = dataclasses.replace(
        plain, expert_bias=True, router_bias=True, qkv_bias=True, output_bias=True, sinks=True
    )
    for model_type, dims in (("mixtral", plain), ("gpt_oss", biased)):
        if dims.expert_params() == spec.expert_params:
            return model_type, dims
    raise InputError(
        f"{spec.name}: an expert of hidden {spec.hidden} and intermediate {spec.intermediate} "
        f"has {spec.expert_params} weights, expected {plain.expert_params()} (three matrices) "
        f"or {biased.expert_params()} (with biases); give --sizes"
    )


def _heads(spec: ModelSpec) -> tuple[int, int]:
    """Head dimension (64 or 128) and key-value heads whose cache comes nearest to *spec*'s."""
    cached = spec.kv_bytes_per_token / (2 * spec.layers * spec.param_bytes)
    sizes = (64, 128) if spec.hidden < 1024 else (128, 64)
    found = [(size, max(1, round(cached / size))) for size in sizes]
    return min(found, key=lambda pair: abs(pair[0] * pair[1] - cached))


def _grouped(dims: Dimensions) -> dict[str, Any]:
    """What families without latent attention share."""
    return {"head_dim": dims.head_dim, "num_key_value_heads": dims.kv_heads}


def _mixtral(dims: Dimensions) -> dict[str, Any]:
    return _grouped(dims) | {
        "num_local_experts": dims.experts,
        "intermediate_size": dims.intermediate,
    }


def _olmoe(dims: Dimensions) -> dict[str, Any]:
    return _grouped(dims) | {"num_experts": dims.experts, "intermediate_size": dims.intermediate}


def _qwen(dims: Dimensions) -> dict[str, Any]:
    return _grouped(dims) | {
        "num_experts": dims.experts,
        "moe_intermediate_size": dims.intermediate,
        "shared_expert_intermediate_size": dims.shared_intermediate,
        "norm_topk_prob": True,
    }


def _deepseek(dims: Dimensions) -> dict[str, Any]:
    """One group of experts: a trace's experts need not be divisible into the published ones."""
    return {
        "n_routed_experts": dims.experts,
        "moe_intermediate_size": dims.intermediate,
        "intermediate_size": dims.dense_intermediate,
        "n_shared_experts": dims.shared_intermediate // dims.intermediate,
        "first_k_dense_replace": dims.dense_layers,
        "num_key_value_heads": dims.heads,
        "q_lora_rank": dims.query_rank or None,
        "kv_lora_rank": dims.kv_rank,
        "qk_nope_head_dim": dims.nope_dim,
        "qk_rope_head_dim": dims.rope_dim,
        "v_head_dim": dims.head_dim,
        "n_group": 1,
        "topk_group": 1,
    }


_OPTIONS: dict[str, Callable[[Dimensions], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen,
    "qwen3_moe": _qwen,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
    "gpt_oss": _mixtral,
}


def config_of(model_type: str, dims: Dimensions) -> Any:
    """The configuration of *model_type* with dimensions *dims*; it never stops by itself."""
    return AutoConfig.for_model(
        model_type,
        hidden_size=dims.hidden,
        num_hidden_layers=dims.all_layers,
        num_attention_heads=dims.heads,
        num_experts_per_tok=dims.top_k,
        vocab_size=dims.vocabulary,
        tie_word_embeddings=dims.tied,
        max_position_embeddings=_POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **_OPTIONS[model_type](dims),
    )


def fill_dense(model: Any, device: torch.device, seed: int) -> None:
    """Create the dense part of *model* on *device* with random weights, drawn by *seed*.

    A matrix keeps the size of what it is given (variance 1 over its inputs); norms are one,
    biases nought.
    """
    source = torch.Generator(device).manual_seed(seed)
    stored = model.state_dict()
    for name, empty in list(dense_tensors(model, find_gates(model))):
        if name in stored:
            put_tensor(model, name, _random(name, empty, device, source))
    fill_buffers(model, device)
    model.tie_weights()


def _random(name: str, empty: Tensor, device: torch.device, source: torch.Generator) -> Tensor:
    value = torch.empty_like(empty, device=device, requires_grad=False)
    if value.ndim > 1:
        return value.normal_(std=value.shape[-1] ** -0.5, generator=source)
    if name.endswith("sinks"):
        return value.normal_(generator=source)
    return value.zero_() if name.endswith("bias") else value.fill_(1)
