"""Decode steps as one CUDA graph each: right, bounded, and the device free again afterwards."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from torch.nn import functional as F  # noqa: E402
from transformers import StaticCache  # noqa: E402

from policies.builtin.lru import LRU  # noqa: E402
from runtime import handshake, offload  # noqa: E402
from runtime.errors import OffloadError  # noqa: E402
from runtime.families import FAMILIES, find_gates  # noqa: E402
from runtime.kernels.rank import best_experts, top_values  # noqa: E402
from runtime.whole_steps import WholeStep  # noqa: E402
from tests.gpu.stress import stress  # noqa: E402
from tests.gpu.test_runtime import delayed, logits_of  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_stress() -> None:
    """Random policies, routings and delays of host, copies and kernels."""
    tally = stress(3000, seed=5, whole=True)
    assert tally.events >= 3000
    assert tally.served == {"low", "skip", "substitute"}
    assert min(tally.late, tally.cancelled) > 20
    assert tally.replays > 500


def steps_of(model) -> list[object]:
    """What the decode steps of *model* were captured as."""
    return list(model.expert_cache.runner.graphs.chains)


def written(family, dtype, policy, slots, compute) -> tuple[list[torch.Tensor], dict[str, object]]:
    """Logits of two texts, late copies notwithstanding, and what the run counted."""
    model = offload(
        tiny_model(family, dtype=dtype), policy, slots=slots, device="cuda", compute=compute
    )
    delayed(model, slots)
    logits = [*logits_of(model, "static"), *logits_of(model, "static")]
    if compute == "graph":
        assert all(isinstance(step, WholeStep) for step in steps_of(model))
    stats = model.expert_cache.stats()
    model.expert_cache.close()
    return logits, stats


def compare(family, dtype, policy, slots) -> None:
    chained, counted = written(family, dtype, policy, slots, "fused")
    whole, found = written(family, dtype, policy, slots, "graph")
    assert found["decisions_sha256"] == counted["decisions_sha256"]
    assert found["bytes"]["demand"] == counted["bytes"]["demand"]
    for ours, theirs in zip(whole, chained, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_chains_compute(family, dtype):
    """The same kernels on the same slots: not one bit differs, however late the copies are."""
    count = len(find_gates(tiny_model(family))) * 8
    for slots, policy in ((8, "lru"), (count // 2 + 1, "predictive"), (count, "lfu")):
        compare(family, dtype, policy, slots)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_gates_that_wait_for_their_own_plan(family):
    """``mixed`` says of held experts too where they are read, and asks for gate weights."""
    compare(family, torch.bfloat16, "mixed", len(find_gates(tiny_model(family))) * 8)


def decoding(policy="lru", slots=9):
    """A model in mid-sequence whose next step is one graph, and the arguments of that step."""
    model = offload(tiny_model("mixtral"), policy, slots=slots, device="cuda", compute="graph")
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = torch.tensor([[5, 9, 33, 12]], device="cuda")
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
        kwargs = {"input_ids": ids[:, :1], "past_key_values": cache}
        for at in range(4, 7):
            place = torch.tensor([[at]], device="cuda")
            model(**kwargs, position_ids=place)
    assert all(isinstance(step, WholeStep) for step in steps_of(model))
    return model, {**kwargs, "position_ids": torch.tensor([[7]], device="cuda")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [8, 60, 128, 160])
@pytest.mark.parametrize("bias", [False, True])
def test_the_best_experts_are_those_of_a_sort(experts, dtype, bias):
    draw = torch.Generator("cuda").manual_seed(experts)
    width = min(16, experts)
    for tokens, size in ((1, 2048), (3, 96), (32, 2880), (65, 512)):
        hidden = torch.randn(tokens, size, device="cuda", dtype=dtype, generator=draw)
        weight = torch.randn(experts, size, device="cuda", dtype=dtype, generator=draw)
        more = torch.randn(experts, device="cuda", dtype=dtype, generator=draw) if bias else None
        scores = F.linear(hidden.double(), weight.double(), None if more is None else more.double())
        best = best_experts(hidden, weight, more, width)
        assert all(len(set(row)) == width for row in best.tolist())
        # Sums in another order may change places where two scores are all but equal.
        found, sorted_ = scores.gather(1, best), scores.topk(width, dim=1).values
        near = 1e-4 if dtype == torch.float32 or tokens <= 64 else 0.05
        assert float((found - sorted_).abs().max()) < near * size**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("experts", "k"), [(8, 2), (8, 8), (60, 4), (128, 8), (256, 1)])
def test_quick_top_k_is_that_of_torch(experts, k, dtype):
    draw = torch.Generator("cuda").manual_seed(experts)
    for tokens in (1, 3, 64):
        rows = torch.randn(tokens, experts, device="cuda", generator=draw).to(dtype)
        rows[0, : experts // 2] = float("-inf")
        rows[-1, 3] = rows[-1, 5] = rows[-1].max() + 1
        expected = rows.topk(k, dim=1)
        values, best = top_values(rows, k)
        assert torch.equal(values, expected.values)
        assert torch.equal(rows.gather(1, best), values)
        assert all(len(set(row)) == k for row in best.tolist())
        # Of equals the first.
        assert best[-1, :2].tolist() == [3, 5][: min(k, 2)]


def test_what_is_no_number_is_the_largest():
    rows = torch.tensor([[1.0, float("nan"), float("inf"), -2.0, -float("nan")]], device="cuda")
    values, best = top_values(rows, 3)
    assert best.tolist() == [[1, 4, 2]]
    assert values.isnan().tolist() == [[True, True, False]]


def free_again() -> bool:
    """Whether the device does what it is given, soon."""
    begun = time.perf_counter()
    torch.ones(8, device="cuda").sum().item()
    torch.cuda.synchronize()
    return time.perf_counter() - begun < 1.0


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_what_a_policy_raises_ends_the_step(monkeypatch, error):
    model, kwargs = decoding()
    planner = model.expert_cache.runner.engine.planner

    def fail(routing):
        raise error

    monkeypatch.setattr(planner, "plan", fail)
    begun = time.perf_counter()
    with torch.no_grad(), pytest.raises(type(error)):
        model(**kwargs)
    assert free_again()
    assert time.perf_counter() - begun < 3.0
    with pytest.raises(OffloadError, match="was freed after"):
        model(**kwargs)


class Curious(LRU):
    """Looks at the step's tokens in the midst of a step."""

    name = "curious"

    def on_route(self, routing):
        super().on_route(routing)
        self.seen = [*getattr(self, "seen", []), routing.step.token_ids.tolist()]


def test_a_policy_may_ask_for_token_ids_while_a_step_runs():
    policy = Curious()
    model, kwargs = decoding(policy)
    with torch.no_grad():
        model(**kwargs)
    assert policy.seen[-1] == [5]
    model.expert_cache.close()


@pytest.fixture
def impatient(monkeypatch):
    """Kernels that wait for a third of a second at most."""
    monkeypatch.setattr(handshake, "LIMIT_S", 0.3)


def test_a_host_that_does_not_answer_is_not_waited_for_for_ever(impatient):
    model, _ = decoding()
    graphs = model.expert_cache.runner.graphs
    [step] = graphs.chains
    [graph] = step.segments()
    begun = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    # The first gate that waits gives up, and those behind it do not wait at all.
    assert 0.2 < time.perf_counter() - begun < 2.0
    with pytest.raises(OffloadError, match=r"event \d+ of the captured decode steps"):
        graphs.handshake.check()
    model.expert_cache.close()
    assert free_again()


def test_a_copy_that_does_not_land_is_not_waited_for_for_ever(impatient, monkeypatch):
    """The device gives the event up; so does the host, which says which."""
    model, kwargs = decoding(slots=4)
    copier = model.expert_cache.runner.engine.copier
    issued = copier.on_issue
    # As if the copy were never to come.
    monkeypatch.setattr(copier, "on_issue", lambda moves, mark: issued(moves, _Never(mark.ticket)))

    def steps():
        for _ in range(8):
            kwargs["input_ids"] = kwargs["input_ids"] + 7
            model(**kwargs)

    begun = time.perf_counter()
    with torch.no_grad(), pytest.raises(OffloadError, match=r"event \d+ of the captured"):
        steps()
    assert time.perf_counter() - begun < 5.0
    assert free_again()


class _Never:
    """A mark whose copy has a number that no copy will have."""

    def __init__(self, ticket: int) -> None:
        self.ticket = ticket + 1_000_000
