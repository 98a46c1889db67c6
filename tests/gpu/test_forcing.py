"""Forced routing on a GPU: it waits for nothing, and a captured graph follows what is set."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime.families import FAMILIES, find_gates  # noqa: E402
from runtime.forcing import ForcedRouting  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS = 6


def random_routing(gates, seed):
    pick = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(gates), TOKENS, gates[0].num_experts, generator=pick)
    weights, experts = scores.topk(gates[0].top_k, dim=-1)
    return experts.cuda(), weights.cuda()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("family", FAMILIES)
def test_setting_and_answering_wait_for_nothing(family):
    gates = find_gates(tiny_model(family).cuda())
    hidden = torch.randn(TOKENS, 32, device="cuda")
    experts, weights = random_routing(gates, 0)
    with ForcedRouting(gates, "cuda") as forced, torch.inference_mode():
        # The first call may set up libraries.
        forced.set(experts, weights)
        gates[0].router(hidden)
        try:
            torch.cuda.set_sync_debug_mode("error")
            forced.set(experts, weights)
            answers = [gate.parts(gate.router(hidden)) for gate in gates]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for layer, (_, got_weights, got_experts) in enumerate(answers):
            assert torch.equal(got_experts, experts[layer])
            assert torch.equal(got_weights, weights[layer].to(got_weights.dtype))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "granitemoe"])
def test_a_captured_graph_follows_what_is_set(family):
    gates = find_gates(tiny_model(family).cuda())
    hidden = torch.randn(TOKENS, 32, device="cuda")
    with ForcedRouting(gates, "cuda") as forced, torch.inference_mode():
        forced.set(*random_routing(gates, 0))
        gates[0].router(hidden)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _, weights, experts = gates[0].parts(gates[0].router(hidden))
            # Copies, so that what is looked at was made by the graph itself.
            weights, experts = weights * 2, experts + 1
        for seed in (1, 2):
            set_experts, set_weights = random_routing(gates, seed)
            forced.set(set_experts, set_weights)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(experts, set_experts[0] + 1)
            assert torch.equal(weights, set_weights[0].to(weights.dtype) * 2)
