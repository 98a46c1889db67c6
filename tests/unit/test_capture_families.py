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
from tests.tiny_models import DENSE_LAYERS, tiny_model  # noqa: E402
from traces.errors import InputError  # noqa: E402

PROMPTS = [[5, 9, 33, 12, 7], [40, 3], [11, 60, 22, 8, 2, 17, 29]]


def tiny(family, **changes):
    """A random model of *family* in float32, always the same one."""
    return tiny_model(family, seed=1, layers=4, **changes)


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
                _, _, chosen = gate.parts(gate.router(hidden))
            np.testing.assert_array_equal(np.sort(ahead[:, layer, :2]), chosen.sort(dim=1).values)


def test_ranking_has_no_expert_twice_and_extends_the_choice(model):
    gate = find_gates(model)[-1]
    hidden = torch.randn(50, 32, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        full = gate.rank(hidden, 8)
        output = gate.router(hidden)
        logits, _, chosen = gate.parts(output)
        scores = gate.scores(gate.router, logits)
    assert torch.equal(full.sort(dim=1).values, torch.arange(8).expand(50, 8))
    # The family's own scores choose exactly what the gate chooses.
    assert torch.equal(scores.topk(2, dim=1).indices.sort(dim=1).values, chosen.sort(dim=1).values)
    assert torch.equal(full[:, :2], gate.falling(output)[0])
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


def test_a_gate_knows_its_modules_and_its_shape(model):
    gates = find_gates(model)
    assert len(gates) == 4 - DENSE_LAYERS.get(model.config.model_type, 0)
    for gate in gates:
        assert (gate.top_k, gate.num_experts, gate.hidden) == (2, 8, 32)
        assert gate.decoder in list(model.base_model.layers)
        assert gate.block in list(gate.decoder.children())
        assert {gate.router, gate.experts} <= set(gate.block.children())


def test_a_routers_answer_is_taken_apart_and_replaced(model):
    gate = find_gates(model)[0]
    with torch.inference_mode():
        output = gate.router(torch.zeros(3, 32))
    logits, weights, experts = gate.parts(output)
    assert (logits.shape, weights.shape, experts.shape) == ((3, 8), (3, 2), (3, 2))
    assert experts.dtype == torch.int64
    other = gate.replaced(output, weights + 1, experts * 0)
    assert [a.shape for a in other] == [a.shape for a in output]
    again = gate.parts(other)
    assert torch.equal(again[0], logits)
    assert torch.equal(again[1], weights + 1)
    assert not again[2].any()


def test_both_orders_of_a_routers_answer_are_understood():
    """transformers 5.17 returns granite's experts first and its logits last."""
    gate = find_gates(tiny("granitemoe"))[0]
    values = torch.zeros(3, 8), torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    assert all(a is b for a, b in zip(gate.parts(values), values, strict=True))
    assert all(a is b for a, b in zip(gate.parts(values[::-1]), values, strict=True))
    assert gate.replaced(values[::-1], values[1], values[2])[2] is values[0]


def test_experts_without_an_exchangeable_forward_are_refused():
    model = tiny("mixtral")
    del find_gates(model)[1].experts.is_transposed
    with pytest.raises(InputError, match="MixtralForCausalLM: MixtralExperts has no exchangeable"):
        find_gates(model)


def test_a_sparse_mixer_of_another_width_is_refused():
    with pytest.raises(InputError, match="PhimoeForCausalLM: 3 experts per token, expected 2"):
        tiny("phimoe", num_experts_per_tok=3)


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
