"""Sizes of published models against what their authors say, and resizing a trace."""

from __future__ import annotations

import dataclasses

import pytest

from traces.errors import InputError
from traces.model import ModelSpec
from traces.sizes import dimensions, model_sizes, resize, size_names

GRANULAR = ModelSpec(
    name="granular-64x8",
    layers=8,
    experts=64,
    top_k=8,
    hidden=320,
    intermediate=48,
    expert_params=46_080,
    dense_params=5_000_000,
    kv_bytes_per_token=2048,
)

#: All weights, as the published checkpoints hold them (the authors print them rounded).
TOTAL_PARAMS = {
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen1.5-moe": 14_315_784_192,
    "qwen3-30b": 30_532_122_624,
    "qwen3-235b": 235_093_634_560,
    "olmoe": 6_919_161_856,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v3": 671_026_404_352,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "switch-base-32": 1_978_514_688,
    "switch-base-64": 3_790_748_928,
    "switch-base-128": 7_415_217_408,
}

EXPERT_MB = {
    "mixtral-8x7b": 352,
    "gpt-oss-20b": 49.8,
    "gpt-oss-120b": 49.8,
    "deepseek-v2-lite": 17.3,
    "qwen1.5-moe": 17.3,
    "olmoe": 12.6,
    "qwen3-30b": 9.4,
    "switch-base-32": 9.4,
}


def total_params(model: ModelSpec) -> int:
    return model.dense_params + model.total_experts * model.expert_params


def test_every_model_has_a_known_total() -> None:
    assert size_names() == list(TOTAL_PARAMS)


@pytest.mark.parametrize("name", TOTAL_PARAMS)
def test_the_total_is_the_published_one(name: str) -> None:
    total = total_params(model_sizes(name))
    assert total == TOTAL_PARAMS[name]
    assert total == pytest.approx(dimensions(name).published_params, rel=0.015)


@pytest.mark.parametrize("name", EXPERT_MB)
def test_expert_bytes(name: str) -> None:
    assert model_sizes(name).expert_bytes / 1e6 == pytest.approx(EXPERT_MB[name], rel=5e-3)


def test_switch_has_the_share_of_experts_that_expertflow_prints() -> None:
    """Table of arXiv 2410.17954: 91.6, 95.6, 97.8 % of the weights are experts."""
    for experts, share in ((32, 0.916), (64, 0.956), (128, 0.978)):
        model = model_sizes(f"switch-base-{experts}")
        assert 1 - model.dense_params / total_params(model) == pytest.approx(share, abs=1e-3)


def test_latent_attention_is_counted_compressed() -> None:
    assert model_sizes("deepseek-v3").kv_bytes_per_token == 61 * (512 + 64) * 2
    assert model_sizes("deepseek-v2-lite").kv_bytes_per_token == 27 * (512 + 64) * 2
    assert model_sizes("mixtral-8x7b").kv_bytes_per_token == 32 * 2 * 8 * 128 * 2
    assert model_sizes("switch-base-32").kv_bytes_per_token == 12 * 2 * 12 * 64 * 2


@pytest.mark.parametrize("name", TOTAL_PARAMS)
def test_dimensions_make_sense(name: str) -> None:
    dims = dimensions(name)
    assert dims.source
    assert dims.attention in ("grouped", "latent", "encoder-decoder")
    assert (dims.attention == "latent") == bool(dims.kv_rank)
    assert bool(dims.dense_layers) == bool(dims.dense_intermediate)
    assert bool(dims.kv_heads) != bool(dims.kv_rank)


def test_totals_agree_with_transformers() -> None:
    """One of each way of counting, built without memory by the library itself."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cases = {
        "olmoe": ("Olmoe", {"intermediate_size": 1024}),
        "deepseek-v3": ("DeepseekV3", {}),
        "gpt-oss-120b": ("GptOss", {}),
    }
    for name, (family, options) in cases.items():
        config = getattr(transformers, f"{family}Config")(tie_word_embeddings=False, **options)
        with torch.device("meta"):
            built = getattr(transformers, f"{family}ForCausalLM")(config)
        assert sum(p.numel() for p in built.parameters()) == TOTAL_PARAMS[name], name


def test_resize_keeps_the_routing_and_takes_a_layer() -> None:
    mixtral = model_sizes("mixtral-8x7b")
    resized = resize(GRANULAR, mixtral)
    assert resized.name == "granular-64x8 routing with mixtral-8x7b sizes"
    assert (resized.layers, resized.experts, resized.top_k) == (8, 64, 8)
    assert resized.expert_bytes == mixtral.expert_bytes
    assert (resized.hidden, resized.intermediate) == (4096, 14336)
    assert resized.dense_params == round(mixtral.dense_params * 8 / 32)
    assert resized.kv_bytes_per_token == mixtral.kv_bytes_per_token * 8 // 32


def test_resize_to_its_own_sizes_changes_only_the_name() -> None:
    own = resize(GRANULAR, GRANULAR)
    assert dataclasses.replace(own, name=GRANULAR.name) == GRANULAR


def test_resize_takes_the_dtype() -> None:
    single = dataclasses.replace(GRANULAR, dtype="float32")
    assert resize(single, model_sizes("olmoe")).dtype == "bfloat16"
    assert resize(GRANULAR, single).param_bytes == 4


@pytest.mark.parametrize(
    ("name", "near"),
    [("mixtral", "mixtral-8x7b"), ("Qwen3-30B", "qwen3-30b"), ("gpt-oss", "gpt-oss-20b")],
)
def test_an_unknown_model_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"no model '{name}'; did you mean '{near}'"):
        model_sizes(name)


def test_a_far_name_gets_the_list() -> None:
    with pytest.raises(InputError, match=r"no model 'zzz' \(known: mixtral-8x7b, "):
        model_sizes("zzz")
