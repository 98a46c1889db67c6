"""Every supported family, as a tiny random model: what is recorded is what was computed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime.capture import CaptureSettings, make_recorder, run_batch  # noqa: E402
from runtime.families import FAMILIES, find_gates, model_spec  # noqa: E402
from runtime.sampling import Sampling  # noqa: E402
from traces.errors import InputError  # noqa: E402

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Large enough that the random gates disagree and the outputs vary.
    "initializer_range": 0.3,
}
LATENT = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
    "num_key_value_heads": 4,
}
EXPERTS = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 24},
    "qwen3_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 24,
        "intermediate_size": 40,
        "head_dim": 16,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "olmoe": {"num_experts": 8, "intermediate_size": 24, "norm_topk_prob": False},
    "deepseek_v2": {**LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT,
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 24, "head_dim": 16},
}
DENSE_LAYERS = {"qwen3_moe": 1, "deepseek_v2": 1, "deepseek_v3": 1}
PROMPTS = [[5, 9, 33, 12, 7], [40, 3], [11, 60, 22, 8, 2, 17, 29]]


def tiny(family, **changes):
    """A random model of *family* in float32, always the same one."""
    options = {**COMMON, **EXPERTS[family], **changes}
    config = transformers.AutoConfig.for_model(family, **options)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for gate in find_gates(model):
        if hasattr(gate.router, "e_score_correction_bias"):
            gate.router.e_score_correction_bias.normal_(std=0.3)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny(request.param)


def record(model, prompts=PROMPTS, first=0, **settings):
    chosen = CaptureSettings(**{"max_new_tokens": 6, "ahead_width": 5, **settings})
    with torch.inference_mode(), make_recorder(model, chosen) as recorder:
        return run_batch(model, recorder, prompts, first, chosen)


class Watch:
    """What the experts modules are given, noted apart from the recorder: [layer][pass]."""

    def __init__(self, model):
        self.seen = [[] for _ in find_gates(model)]
        self.hooks = [
            gate.experts.register_forward_pre_hook(self.note(calls))
            for gate, calls in zip(find_gates(model), self.seen, strict=True)
        ]

    def note(self, calls):
        return lambda module, inputs: calls.append([value.clone() for value in inputs])

    def __enter__(self):
        return self.seen

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def test_weights_and_experts_are_those_the_experts_receive(model):
    with Watch(model) as seen:
        (sequence,) = record(model, PROMPTS[:1])
    assert sequence.weights.dtype == np.float16
    for layer, calls in enumerate(seen):
        _, experts, weights = (torch.cat(column) for column in zip(*calls, strict=True))
        order = weights.argsort(dim=1, descending=True, stable=True)
        np.testing.assert_array_equal(sequence.experts[:, layer], experts.gather(1, order))
        expected = weights.gather(1, order).to(torch.float16)
        np.testing.assert_array_equal(sequence.weights[:, layer], expected)


def test_ahead_is_the_later_gate_asked_with_this_gates_input(model):
    with Watch(model) as seen:
        (sequence,) = record(model, PROMPTS[:1])
    gates = find_gates(model)
    assert len(sequence.ahead) == min(3, len(gates) - 1)
    for distance, ahead in enumerate(sequence.ahead, start=1):
        assert ahead.shape == (len(sequence), len(gates), 5)
        assert (ahead[:, -distance:] == -1).all()
        for layer, gate in enumerate(gates[distance:]):
            hidden = torch.cat([call[0] for call in seen[layer]])
            with torch.inference_mode():
                _, _, chosen = gate.router(hidden)
            np.testing.assert_array_equal(np.sort(ahead[:, layer, :2]), chosen.sort(dim=1).values)


def test_ranking_has_no_expert_twice_and_extends_the_choice(model):
    gate = find_gates(model)[-1]
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        full = gate.rank(hidden, 8)
        logits, weights, chosen = gate.router(hidden)
        scores = gate.scores(gate.router, logits)
    assert torch.equal(full.sort(dim=1).values, torch.arange(8).expand(50, 8))
    # The family's own scores choose exactly what the gate chooses.
    assert torch.equal(scores.topk(2, dim=1).indices.sort(dim=1).values, chosen.sort(dim=1).values)
    assert torch.equal(full[:, :2], gate.falling((logits, weights, chosen))[0])
    rest = scores.gather(1, full[:, 2:])
    assert (rest.diff(dim=1) <= 0).all()
    with torch.inference_mode():
        assert torch.equal(gate.rank(hidden, 1), full[:, :1])
        assert torch.equal(gate.rank(hidden, 4), full[:, :4])


def test_greedy_tokens_are_those_of_generate(model):
    for prompt in PROMPTS:
        (sequence,) = record(model, [prompt], max_new_tokens=9)
        expected = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=9,
            do_sample=False,
        )[0]
        # The last token is sampled but never run.
        assert sequence.tokens.tolist() == expected[:-1].tolist()
        assert sequence.prefill == len(prompt)
        assert sequence.positions.tolist() == list(range(len(sequence)))


def test_generation_stops_at_the_end_token(model):
    (full,) = record(model, PROMPTS[:1], max_new_tokens=9)
    end = int(full.tokens[7])
    first = full.tokens[5:].tolist().index(end) + 5
    model.generation_config.eos_token_id = [63, end]
    try:
        short, other = record(model, PROMPTS[:2], max_new_tokens=9)
    finally:
        model.generation_config.eos_token_id = None
    assert short.tokens.tolist() == full.tokens[:first].tolist()
    assert end not in other.tokens[2:]


def test_a_batch_gives_what_its_sequences_give_alone(model):
    together = record(model)
    for prompt, sequence in zip(PROMPTS, together, strict=True):
        (alone,) = record(model, [prompt])
        assert sequence.tokens.tolist() == alone.tokens.tolist()
        np.testing.assert_array_equal(sequence.experts, alone.experts)
        np.testing.assert_allclose(sequence.weights, alone.weights, rtol=2e-3)
    assert [sequence.id for sequence in together] == [0, 1, 2]


def test_hooks_change_nothing_and_go_away(model):
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        before = model(ids).logits
        with make_recorder(model, CaptureSettings()):
            during = model(ids).logits
    assert torch.equal(before, during)
    with pytest.raises(RuntimeError, match="stop"), make_recorder(model, CaptureSettings()):
        raise RuntimeError("stop")
    assert not any(gate.router._forward_hooks for gate in find_gates(model))


def test_spec_is_read_from_the_modules(model):
    family = model.config.model_type
    spec = model_spec(model, "tiny")
    assert (spec.experts, spec.top_k, spec.hidden, spec.intermediate) == (8, 2, 32, 24)
    assert spec.layers == 4 - DENSE_LAYERS.get(family, 0)
    biases = 2 * 24 + 32 if family == "gpt_oss" else 0
    assert spec.expert_params == 3 * 32 * 24 + biases
    total = sum(parameter.numel() for parameter in model.parameters())
    assert spec.dense_params + spec.total_experts * spec.expert_params == total
    assert spec.dtype == "float32"


def test_cache_bytes_are_those_of_the_real_cache(model):
    with torch.inference_mode():
        cache = model(torch.tensor([PROMPTS[0]]), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert model_spec(model, "tiny").kv_bytes_per_token == held / len(PROMPTS[0])


def test_tied_embeddings_count_once():
    loose, tied = (tiny("mixtral", tie_word_embeddings=tie) for tie in (False, True))
    saved = model_spec(loose, "a").dense_params - model_spec(tied, "a").dense_params
    assert saved == 64 * 32


def test_prefill_alone():
    sequences = record(tiny("mixtral"), max_new_tokens=0)
    assert [len(s) for s in sequences] == [s.prefill for s in sequences] == [5, 2, 7]


def test_ahead_can_be_left_out():
    (sequence,) = record(tiny("mixtral"), PROMPTS[:1], ahead=0)
    assert sequence.ahead == ()


def test_a_family_that_was_never_tested_is_refused_by_name():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(InputError, match=r"LlamaForCausalLM: .*'llama'.*mixtral.*gpt_oss"):
        find_gates(model)


def test_a_model_without_moe_layers_is_refused():
    with pytest.raises(InputError, match="Qwen3MoeForCausalLM: no MoE layer"):
        tiny("qwen3_moe", mlp_only_layers=[0, 1, 2, 3])


@pytest.mark.parametrize("width", [0, 9])
def test_a_width_beyond_the_experts_is_refused(width):
    with pytest.raises(InputError, match=f"ahead-width is {width}, expected 1 to 8"):
        make_recorder(tiny("mixtral"), CaptureSettings(ahead_width=width))


def test_a_bypassed_gate_is_noticed():
    model = tiny("mixtral")
    with make_recorder(model, CaptureSettings()) as recorder:
        find_gates(model)[0].router(torch.zeros(1, 32))
        with pytest.raises(InputError, match="1 of 4 gates ran"):
            recorder.take(torch.zeros(1))


def test_a_sequence_draws_the_same_tokens_in_any_company():
    sampling = Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=7)
    model = tiny("olmoe")
    together = record(model, sampling=sampling)
    for i, sequence in enumerate(together):
        (alone,) = record(model, PROMPTS[i : i + 1], first=i, sampling=sampling)
        assert sequence.tokens.tolist() == alone.tokens.tolist()


def test_another_seed_or_place_draws_other_tokens():
    sampling = Sampling(temperature=1.0, seed=7)
    model = tiny("olmoe")
    (alone,) = record(model, PROMPTS[:1], sampling=sampling)
    (later,) = record(model, PROMPTS[:1], first=1, sampling=sampling)
    assert later.tokens.tolist() != alone.tokens.tolist()
    (other,) = record(model, PROMPTS[:1], sampling=dataclasses.replace(sampling, seed=8))
    assert other.tokens.tolist() != alone.tokens.tolist()
