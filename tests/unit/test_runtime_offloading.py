"""An offloaded model gives what the model gave: bit by bit, whatever the budget."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from transformers import DynamicCache, StaticCache  # noqa: E402
from transformers.integrations import moe  # noqa: E402

from runtime import offload  # noqa: E402
from runtime.families import FAMILIES, find_gates  # noqa: E402
from runtime.streaming import open_checkpoint  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402

KERNELS = ("grouped_mm", "batched_mm")
PADDED = torch.tensor([[0, 0, 5, 9, 33, 12], [40, 3, 7, 11, 60, 22], [0, 8, 8, 21, 2, 1]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
NEXT = torch.tensor([[4, 17, 30], [9, 9, 50], [1, 62, 13]])


def caches(model):
    return {
        "dynamic": DynamicCache(config=model.config),
        "static": StaticCache(config=model.config, max_cache_len=16),
    }


@torch.no_grad()
def logits_of(model, kind):
    """Logits of real tokens: a left-padded batch, then three decode steps over a cache."""
    cache = caches(model)[kind]
    mask = MASK
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(
        input_ids=PADDED, attention_mask=mask, position_ids=positions, past_key_values=cache
    ).logits
    all_logits = [found[mask.bool()]]
    for step in range(NEXT.shape[1]):
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], dim=1)
        all_logits.append(
            model(
                input_ids=NEXT[:, step : step + 1],
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
            ).logits[:, -1]
        )
    return all_logits


@torch.no_grad()
def text_of(model, **options):
    return model.generate(
        PADDED, attention_mask=MASK, max_new_tokens=5, do_sample=False, pad_token_id=0, **options
    ).tolist()


def budgets(model):
    gates = find_gates(model)
    total = len(gates) * gates[0].num_experts
    return gates[0].top_k, total // 2 - 1, total


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(family, kernel):
    plain = tiny_model(family)
    plain.set_experts_implementation(kernel)
    expected = {kind: logits_of(plain, kind) for kind in ("dynamic", "static")}
    text = text_of(plain)
    policies = ("lru", "lfu", "predictive")
    for slots, policy in zip(budgets(plain), policies, strict=True):
        model = offload(
            tiny_model(family), policy, slots=slots, device="cpu", compute="reference",
            kernel=kernel,
        )  # fmt: skip
        for kind, wanted in expected.items():
            for step, (ours, theirs) in enumerate(zip(logits_of(model, kind), wanted, strict=True)):
                assert torch.equal(ours, theirs), (slots, kind, step)
        assert text_of(model) == text
        stats = model.expert_cache.stats()
        assert stats["missed"] > 0
        model.expert_cache.close()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_the_same_bits_in_bfloat16(family):
    plain = tiny_model(family, dtype=torch.bfloat16)
    plain.set_experts_implementation("grouped_mm")
    expected = logits_of(plain, "dynamic")
    model = offload(tiny_model(family, dtype=torch.bfloat16), slots=5, device="cpu",
                    compute="reference", kernel="grouped_mm")  # fmt: skip
    for ours, theirs in zip(logits_of(model, "dynamic"), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_other_ways_to_generate():
    """A static cache, beams and no cache at all are transformers' own: they run as ever."""
    plain = tiny_model("qwen2_moe")
    plain.set_experts_implementation("grouped_mm")
    model = offload(tiny_model("qwen2_moe"), slots=6, device="cpu", compute="reference",
                    kernel="grouped_mm")  # fmt: skip
    for options in ({"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}):
        assert text_of(model, **options) == text_of(plain, **options), options


@torch.no_grad()
def recorded(model):
    """Inputs and output of every call of the experts, as (layer, inputs, output)."""
    hook, calls = model.expert_cache.runner.hook, []
    own = hook.experts

    def record(layer, hidden, index, weights):
        out = own(layer, hidden, index, weights)
        calls.append((layer, (hidden, index, weights), out))
        return out

    hook.experts = record
    logits_of(model, "dynamic")
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_is_no_further_from_the_truth(family, dtype):
    plain = tiny_model(family, dtype=dtype)
    modules = [gate.experts for gate in find_gates(plain)]
    exact = [copy.deepcopy(module).double() for module in modules]
    model = offload(tiny_model(family, dtype=dtype), slots=5, device="cpu", compute="fused")
    ours = theirs = 0.0
    with torch.no_grad():
        for layer, (hidden, index, weights), out in recorded(model):
            real = slice(None) if hidden.shape[0] != MASK.numel() else MASK.flatten().bool()
            double = hidden.double(), index, weights.double()
            truth = moe.batched_mm_experts_forward(exact[layer], *double)[real]
            other = moe.batched_mm_experts_forward(modules[layer], hidden, index, weights)[real]
            assert out.dtype == hidden.dtype
            ours += float((out[real] - truth).square().sum())
            theirs += float((other - truth).square().sum())
    # In float32 both are rounding errors of sums whose order is the processor's library's choice.
    assert 0 < ours <= theirs * (2.0 if dtype == torch.float32 else 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_checkpoint_is_the_model_in_memory(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    options = {"slots": 7, "device": "cpu", "compute": "reference", "kernel": "grouped_mm"}
    streamed = offload(open_checkpoint(tmp_path), **options)
    memory = offload(tiny_model(family), **options)
    for ours, theirs in zip(
        logits_of(streamed, "static"), logits_of(memory, "static"), strict=True
    ):
        assert torch.equal(ours, theirs)
    ours, theirs = (model.expert_cache.stats() for model in (streamed, memory))
    assert ours["decisions_sha256"] == theirs["decisions_sha256"]


def test_inexact_serving_changes_the_output_and_is_finite():
    """``mixed`` runs at low precision: near to the model's own logits, and not the same."""
    plain = tiny_model("mixtral", layers=4)
    exact = logits_of(plain, "dynamic")
    model = offload(tiny_model("mixtral", layers=4), "mixed:low_bits=8,t1=0.3,t2=1.0", slots=8,
                    device="cpu", compute="fused")  # fmt: skip
    found = logits_of(model, "dynamic")
    assert model.expert_cache.runner.engine.planner.quality["low"] > 0
    for ours, theirs in zip(found, exact, strict=True):
        assert torch.isfinite(ours).all()
        assert not torch.equal(ours, theirs)
        assert float((ours - theirs).abs().max()) < 0.2 * float(theirs.abs().max())
