"""Forced routing: the experts are asked for exactly what was set, whatever the family."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime.capture import CaptureSettings, make_recorder  # noqa: E402
from runtime.families import FAMILIES, find_gates  # noqa: E402
from runtime.forcing import ForcedRouting  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402
from traces.errors import InputError  # noqa: E402

IDS = torch.tensor([[5, 9, 33, 12, 7, 2], [3, 1, 4, 1, 5, 9]])


def watched(model, run):
    """What each experts module is given while *run* runs: [layer][pass] of (experts, weights)."""
    gates = find_gates(model)
    seen = [[] for _ in gates]
    hooks = [
        gate.experts.register_forward_pre_hook(
            lambda module, inputs, calls=calls: calls.append([v.clone() for v in inputs[1:3]])
        )
        for gate, calls in zip(gates, seen, strict=True)
    ]
    with torch.inference_mode():
        output = run()
    for hook in hooks:
        hook.remove()
    return seen, output


def random_routing(gates, tokens, seed=0):
    pick = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(gates), tokens, gates[0].num_experts, generator=pick)
    weights, experts = scores.topk(gates[0].top_k, dim=-1)
    return experts, weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_experts_receive_what_was_set(family, dtype):
    model = tiny_model(family, dtype=dtype)
    gates = find_gates(model)
    own, _ = watched(model, lambda: model(IDS))
    for given in (True, False):
        experts, weights = random_routing(gates, IDS.numel())
        with ForcedRouting(gates, "cpu") as forced:
            forced.set(experts, weights if given else None)
            seen, output = watched(model, lambda: model(IDS))
        assert output.logits.isfinite().all()
        expected = weights if given else torch.full_like(weights, 0.5)
        for layer, calls in enumerate(seen):
            ((got_experts, got_weights),) = calls
            assert torch.equal(got_experts, experts[layer])
            assert got_weights.dtype == own[layer][0][1].dtype
            assert got_experts.dtype == own[layer][0][0].dtype
            assert torch.equal(got_weights, expected[layer].to(got_weights.dtype))


def test_a_models_own_routing_forced_on_it_changes_nothing():
    model = tiny_model("deepseek_v3")
    own, before = watched(model, lambda: model(IDS))
    experts, weights = (torch.stack([calls[0][i] for calls in own]) for i in (0, 1))
    with ForcedRouting(find_gates(model), "cpu") as forced, torch.inference_mode():
        forced.set(experts, weights)
        assert torch.equal(model(IDS).logits, before.logits)


def test_setting_writes_in_place_for_each_number_of_tokens():
    """What a captured graph reads stays where it was."""
    model = tiny_model("olmoe")
    gates = find_gates(model)
    with ForcedRouting(gates, "cpu") as forced:
        places = []
        for seed, tokens in enumerate((12, 2, 12, 2)):
            experts, weights = random_routing(gates, tokens, seed)
            forced.set(experts, weights)
            seen, _ = watched(model, lambda n=tokens: model(IDS.flatten()[:n].view(2, -1)))
            assert all(torch.equal(seen[i][0][0], experts[i]) for i in range(len(gates)))
            output = gates[1].router(torch.zeros(tokens, 32))
            places.append([value.data_ptr() for value in gates[1].parts(output)[1:]])
        assert places[0] == places[2]
        assert places[1] == places[3]
        assert places[0] != places[1]


def test_the_recorder_notes_what_was_forced():
    model = tiny_model("granitemoe")
    gates = find_gates(model)
    experts, weights = random_routing(gates, IDS.numel())
    settings = CaptureSettings(ahead=0)
    with ForcedRouting(gates, "cpu") as forced, make_recorder(model, settings) as recorder:
        forced.set(experts, weights)
        with torch.inference_mode():
            model(IDS)
        rows, _ = recorder.take(torch.zeros(1))
        noted, _, _ = recorder.unpack(rows)
    assert torch.equal(torch.from_numpy(noted).long(), experts.transpose(0, 1))


def test_the_hooks_go_away():
    model = tiny_model("mixtral")
    gates = find_gates(model)
    with torch.inference_mode():
        before = model(IDS).logits
        with ForcedRouting(gates, "cpu") as forced:
            forced.set(*random_routing(gates, IDS.numel()))
            assert not torch.equal(model(IDS).logits, before)
        assert torch.equal(model(IDS).logits, before)
        with pytest.raises(RuntimeError, match="stop"), ForcedRouting(gates, "cpu"):
            raise RuntimeError("stop")
        assert torch.equal(model(IDS).logits, before)
    assert not any(gate.router._forward_hooks for gate in gates)


def test_misshapen_routing_is_refused():
    model = tiny_model("mixtral")
    gates = find_gates(model)
    experts, weights = random_routing(gates, 4)
    with ForcedRouting(gates, "cpu") as forced, torch.inference_mode():
        with pytest.raises(InputError, match="no routing was set"):
            model(IDS)
        for wrong in (experts[1:], experts[..., :1], experts[0]):
            with pytest.raises(InputError, match=r"expected \[3 layers, tokens, 2 experts\]"):
                forced.set(wrong)
        with pytest.raises(InputError, match=r"weights have shape .* expected \[3, 4, 2\]"):
            forced.set(experts, weights[:, 1:])
        forced.set(experts, weights)
        with pytest.raises(InputError, match="set for 4 tokens, expected 12"):
            model(IDS)
