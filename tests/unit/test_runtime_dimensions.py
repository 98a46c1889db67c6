"""Replay models have the dimensions that the simulator counts with, and compute."""

from __future__ import annotations

import dataclasses

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime.dimensions import (  # noqa: E402
    config_of,
    fill_dense,
    fit_dimensions,
    replay_model,
)
from runtime.families import find_gates, model_spec  # noqa: E402
from runtime.skeleton import build_skeleton, dense_tensors, expert_names  # noqa: E402
from tests.helpers import SAMPLES  # noqa: E402
from traces.errors import InputError  # noqa: E402
from traces.sizes import Dimensions, model_sizes, resize, size_names  # noqa: E402
from traces.store import open_trace  # noqa: E402

SIZES = [name for name in size_names() if not name.startswith("switch")]
COARSE, GRANULAR = (open_trace(SAMPLES[name]).model for name in ("coarse-8x2", "granular-64x8"))
EQUAL = ("layers", "experts", "top_k", "hidden", "intermediate", "expert_params", "dtype")

SMALL = Dimensions(
    source="", published_params=0, layers=3, experts=8, top_k=2, hidden=64, intermediate=48,
    heads=4, head_dim=16, kv_heads=2, vocabulary=300,
)  # fmt: skip
LATENT = dataclasses.replace(
    SMALL, dense_layers=1, dense_intermediate=96, shared_intermediate=48, attention="latent",
    kv_heads=0, kv_rank=16, nope_dim=16, rope_dim=8,
)  # fmt: skip
BIASES = {"expert_bias": True, "router_bias": True, "qkv_bias": True, "output_bias": True}
BY_FAMILY = {
    "mixtral": SMALL,
    "qwen2_moe": dataclasses.replace(
        SMALL, shared_intermediate=32, shared_gate=True, qkv_bias=True
    ),
    "qwen3_moe": dataclasses.replace(SMALL, qk_norm="head"),
    "olmoe": dataclasses.replace(SMALL, kv_heads=4, qk_norm="full"),
    "deepseek_v2": LATENT,
    "deepseek_v3": dataclasses.replace(LATENT, query_rank=24),
    "gpt_oss": dataclasses.replace(SMALL, sinks=True, **BIASES),
}


def spec_of(name, spec):
    """What the model that would be built measures, without giving it memory."""
    model_type, dims = fit_dimensions(spec, name)
    return model_spec(build_skeleton(config_of(model_type, dims), torch.bfloat16), "built")


@pytest.mark.parametrize("name", SIZES)
def test_dimensions_are_those_of_resizing(name):
    own = model_sizes(name)
    for spec in (COARSE, GRANULAR, own):
        built, wanted = spec_of(name, spec), resize(spec, own)
        for field in EQUAL:
            assert getattr(built, field) == getattr(wanted, field), field
        assert built.dense_params == pytest.approx(wanted.dense_params, rel=1e-3)
        # A share of a dense layer cannot be built; its cache is missing or too much.
        exact = spec is own or "deepseek" not in name
        error = abs(built.kv_bytes_per_token / wanted.kv_bytes_per_token - 1)
        assert error == 0 if exact else 0 < error < 0.06


def test_a_published_model_is_built_as_published():
    for name in ("mixtral-8x7b", "deepseek-v3", "gpt-oss-120b"):
        own = model_sizes(name)
        assert spec_of(None, own) == dataclasses.replace(own, name="built")
        assert fit_dimensions(own, None) == fit_dimensions(own, name)


@pytest.mark.parametrize("spec", [COARSE, GRANULAR], ids=lambda spec: spec.name)
def test_without_sizes_the_traces_own_dimensions(spec):
    built = model_spec(replay_model(spec, None, "cpu"), spec.name)
    assert built.dense_params == pytest.approx(spec.dense_params, rel=1e-3)
    assert dataclasses.replace(built, dense_params=spec.dense_params) == spec


def test_heads_come_near_to_the_cache_where_they_cannot_meet_it():
    odd = dataclasses.replace(COARSE, kv_bytes_per_token=8 * 2 * 2 * 300)
    assert spec_of(None, odd).kv_bytes_per_token == 8 * 2 * 2 * 320
    wide = dataclasses.replace(
        COARSE, hidden=2048, expert_params=3 * 2048 * 384, dense_params=10**8,
        kv_bytes_per_token=8 * 2 * 2 * 1024,
    )  # fmt: skip
    model_type, dims = fit_dimensions(wide, None)
    assert (model_type, dims.head_dim, dims.kv_heads, dims.heads) == ("mixtral", 128, 8, 16)
    unknown = dataclasses.replace(COARSE, kv_bytes_per_token=0, dense_params=0)
    assert fit_dimensions(unknown, None)[1].vocabulary == 256


def test_biased_experts_are_those_of_gpt_oss():
    biased = dataclasses.replace(COARSE, expert_params=COARSE.expert_params + 2 * 384 + 320)
    assert fit_dimensions(biased, None)[0] == "gpt_oss"
    assert spec_of(None, biased).expert_params == biased.expert_params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BY_FAMILY)
def test_a_filled_model_computes_through_all_layers(family, dtype):
    model = build_skeleton(config_of(family, BY_FAMILY[family]), dtype)
    gates = find_gates(model)
    fill_dense(model, torch.device("cpu"), seed=3)
    experts = expert_names(model, gates)
    assert {name for name, value in model.named_parameters() if value.is_meta} == set(experts)
    assert not any(value.is_meta for value in model.buffers())
    assert sum(p.numel() for n, p in model.named_parameters() if n not in experts) == (
        BY_FAMILY[family].dense_params()
    )
    pick = torch.Generator().manual_seed(0)
    for gate in gates:
        for name, empty in list(gate.experts.named_parameters()):
            value = torch.empty_like(empty, device="cpu").normal_(std=0.1, generator=pick)
            setattr(gate.experts, name, torch.nn.Parameter(value))
    ids = torch.tensor([[5, 9, 299, 12, 7], [1, 2, 3, 4, 250]])
    with torch.inference_mode():
        output = model(ids, output_hidden_states=True)
    assert output.logits.isfinite().all()
    assert output.logits.float().std() > 0.1
    for hidden in output.hidden_states:
        assert 0.01 < hidden.float().std() < 10
    tokens = output.hidden_states[-1].float().flatten(0, 1)
    assert torch.cdist(tokens, tokens).fill_diagonal_(1).min() > 0.1
    rotary = model.base_model.rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    assert rotary[0] > rotary[-1] > 0


def values(model):
    return {n: v for n, v in dense_tensors(model, find_gates(model)) if not v.is_meta}


def test_the_seed_decides_the_weights():
    first, again, other = (
        values(replay_model(COARSE, None, "cpu", seed=seed)) for seed in (1, 1, 2)
    )
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    name = "model.layers.3.self_attn.q_proj.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first[name.replace("3", "4", 1)])


def test_one_layer_of_a_published_model_on_the_cpu():
    spec = dataclasses.replace(GRANULAR, layers=1)
    model = replay_model(spec, "olmoe", "cpu")
    built, wanted = model_spec(model, "x"), resize(spec, model_sizes("olmoe"))
    assert built.expert_bytes == wanted.expert_bytes
    held = sum(p.nbytes for p in model.parameters() if not p.is_meta)
    assert held == pytest.approx(wanted.dense_bytes, rel=1e-3)
    assert model.dtype == torch.bfloat16
    assert not model.training


@pytest.mark.parametrize("name", ["switch-base-32", "switch-base-128"])
def test_a_family_that_is_not_supported_is_refused(name):
    with pytest.raises(InputError, match=f"sizes {name}: its family cannot be replayed"):
        replay_model(COARSE, name, "cpu")


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(InputError, match="no model 'mixtral'; did you mean 'mixtral-8x7b'"):
        replay_model(COARSE, "mixtral", "cpu")


def test_experts_of_another_make_are_refused():
    flat = dataclasses.replace(COARSE, expert_params=2 * 320 * 384)
    with pytest.raises(InputError, match=r"has 245760 weights, expected 368640 .* give --sizes"):
        replay_model(flat, None, "cpu")
