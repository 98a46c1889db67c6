"""The runtime on a GPU: the same bits, the same decisions, and no copy read too early."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from transformers import DynamicCache, StaticCache  # noqa: E402

from policies.budget import Budget  # noqa: E402
from policies.registry import POLICIES  # noqa: E402
from policies.session import Setup  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.families import FAMILIES, find_gates, model_spec  # noqa: E402
from sim.session import Session  # noqa: E402
from tests.contract.test_runtime_policies import EXPERTS, LAYERS, Worlds, tiny_trace  # noqa: E402
from tests.gpu.stress import CYCLES, SlowLanes, stress  # noqa: E402
from tests.helpers_stress import FAULTS, broken  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402
from traces.store import write_trace  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PADDED = torch.tensor([[0, 0, 5, 9, 33, 12], [40, 3, 7, 11, 60, 22], [0, 8, 8, 21, 2, 1]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
NEXT = torch.tensor([[4, 17, 30, 2, 9], [9, 9, 50, 61, 3], [1, 62, 13, 5, 5]])


def test_stress() -> None:
    """Random policies, routings and delays; captured graphs and kernel by kernel."""
    tally = stress(2000)
    assert tally.events >= 2000
    assert tally.served == {"low", "skip", "cpu", "substitute"}
    assert min(tally.waves, tally.late, tally.cancelled) > 20
    assert tally.replays > 500


@pytest.mark.parametrize("fault", FAULTS)
def test_stress_finds_a_broken_runtime(fault: str) -> None:
    with broken(fault, SlowLanes), pytest.raises(AssertionError, match=r"off by|computed from"):
        stress(2000, seed=1)


@torch.no_grad()
def logits_of(model, kind):
    """Logits of real tokens on the host: a left-padded batch, then decode steps over a cache."""
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=16)
    )
    mask = MASK.cuda()
    found = model(
        input_ids=PADDED.cuda(),
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
    ).logits
    all_logits = [found[mask.bool()].cpu()]
    room = torch.zeros(3, 16, dtype=mask.dtype, device="cuda")
    room[:, :6] = mask
    for step in range(NEXT.shape[1]):
        length = 6 + step + 1
        room[:, length - 1] = 1
        all_logits.append(
            model(
                input_ids=NEXT[:, step : step + 1].cuda(),
                # A static cache's mask has one shape for all steps.
                attention_mask=room.clone() if kind == "static" else room[:, :length].clone(),
                position_ids=room.sum(1, keepdim=True) - 1,
                past_key_values=cache,
            )
            .logits[:, -1]
            .cpu()
        )
    return all_logits


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_bits(family, kernel):
    plain = tiny_model(family, dtype=torch.bfloat16).cuda()
    plain.set_experts_implementation(kernel)
    expected = {kind: logits_of(plain, kind) for kind in ("dynamic", "static")}
    gates = find_gates(plain)
    for slots, policy in ((2, "lru"), (len(gates) * 4 - 1, "predictive"), (len(gates) * 8, "lfu")):
        model = offload(
            tiny_model(family, dtype=torch.bfloat16), policy, slots=slots, device="cuda",
            compute="reference", kernel=kernel,
        )  # fmt: skip
        delayed(model, slots)
        for kind, wanted in expected.items():
            for step, (ours, theirs) in enumerate(zip(logits_of(model, kind), wanted, strict=True)):
                assert torch.equal(ours, theirs), (slots, kind, step)
        model.expert_cache.close()


def delayed(model, seed):
    """Let every copy of *model* dawdle."""
    draw = random.Random(seed)
    model.expert_cache.runner.engine.lanes.delay_cycles = lambda: draw.choice(CYCLES)


@pytest.mark.parametrize(
    ("family", "graphs"),
    [(family, True) for family in FAMILIES] + [("mixtral", False), ("gpt_oss", False)],
)
def test_fused_with_late_copies(family, graphs):
    """Float32 leaves no room: a wrong expert, or a slot read too early, would stand out."""
    plain = tiny_model(family).cuda()
    plain.set_experts_implementation("batched_mm")
    expected = {kind: logits_of(plain, kind) for kind in ("static", "dynamic")}
    count = len(find_gates(plain)) * 8
    for slots, policy in ((2, "lru"), (count // 2 - 1, "predictive"), (count, "lfu")):
        model = offload(tiny_model(family), policy, slots=slots, device="cuda", graphs=graphs)
        delayed(model, slots)
        for _ in range(2):
            for kind, wanted in expected.items():
                for step, (ours, theirs) in enumerate(
                    zip(logits_of(model, kind), wanted, strict=True)
                ):
                    scale = 1 + float(theirs.abs().max())
                    assert float((ours - theirs).abs().max()) < 2e-3 * scale, (slots, kind, step)
        found = model.expert_cache.runner.graphs
        assert (found is not None) == graphs
        assert found is None or found.captured
        model.expert_cache.close()


#: Longer than 8 tokens, a sequence is scaled otherwise: in the midst of those decoded here.
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "short_mscale": 1.1,
    "long_mscale": 1.3,
    "original_max_position_embeddings": 8,
}


def test_what_follows_the_length_runs_uncaptured():
    """phimoe's scale changes in mid-sequence, which a captured pass would not notice."""
    plain = tiny_model("phimoe", rope_parameters=LONG_ROPE).cuda()
    plain.set_experts_implementation("batched_mm")
    with pytest.warns(RuntimeWarning, match=r"cannot be captured as CUDA graphs \(.*longrope"):
        model = offload(tiny_model("phimoe", rope_parameters=LONG_ROPE), slots=7, device="cuda")
    assert model.expert_cache.runner.graphs is None
    for kind in ("static", "dynamic"):
        for ours, theirs in zip(logits_of(model, kind), logits_of(plain, kind), strict=True):
            assert float((ours - theirs).abs().max()) < 2e-3 * (1 + float(theirs.abs().max()))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("slots", [5, 24])
def test_a_replayed_step_waits_for_no_copy_to_the_host(slots):
    """The host follows the gates' answers through pinned memory; nothing else is read."""
    model = offload(tiny_model("mixtral"), slots=slots, device="cuda")
    cache = StaticCache(config=model.config, max_cache_len=16)
    prompt = PADDED[1:2].cuda()
    graphs = model.expert_cache.runner.graphs
    with torch.no_grad():
        model(input_ids=prompt, past_key_values=cache)
        for step in range(6):
            ids = NEXT[1:2, step % 5 : step % 5 + 1].cuda()
            at = torch.tensor([[prompt.shape[1] + step]], device="cuda")
            captured = graphs.captured
            torch.cuda.set_sync_debug_mode("error" if captured else "default")
            try:
                model(input_ids=ids, position_ids=at, past_key_values=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert captured == graphs.captured == 1


def test_graphs_are_used_by_generate():
    model = offload(tiny_model("mixtral"), slots=9, device="cuda")
    model.generate(PADDED.cuda(), attention_mask=MASK.cuda(), max_new_tokens=6, do_sample=False)
    assert model.expert_cache.runner.graphs.captured


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_trace(tmp_path_factory.mktemp("runtime") / "tiny.parquet")


@pytest.fixture(scope="module")
def worlds(trace: str) -> Iterator[dict[str, Worlds]]:
    made = {
        pool: Worlds(Setup(trace, batch=batch, pool=pool, train=trace), "cuda")
        for batch, pool in ((1, "global"), (3, "layer"))
    }
    yield made
    for both in made.values():
        both.real.close()


@pytest.mark.parametrize("pool", ["global", "layer"])
@pytest.mark.parametrize("policy", sorted(POLICIES.classes()))
def test_the_same_decisions(worlds: dict[str, Worlds], policy: str, pool: str) -> None:
    for slots in (2, 7) if pool == "global" else (6, LAYERS * EXPERTS):
        found, _ = worlds[pool].compare(policy, slots)
        assert found.world == "gpu"


@pytest.mark.parametrize("policy", ["lru", "predictive"])
def test_a_live_run_decides_like_the_simulator(policy: str, tmp_path: Path) -> None:
    model = offload(tiny_model("mixtral"), policy, slots=9, device="cuda", record=True, batch=3)
    for tokens in (6, 4):
        model.generate(
            PADDED.cuda(), attention_mask=MASK.cuda(), max_new_tokens=tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
    stats = model.expert_cache.stats()
    assert stats["held"] + stats["missed"] == stats["accesses"]
    assert stats["hit"] + stats["late"] == stats["held"]
    path = tmp_path / "kept.parquet"
    spec = model_spec(tiny_model("mixtral"), "tiny")
    kept = model.expert_cache.trace()
    assert [s.prefill for s in kept] == [4, 6, 5] * 2
    write_trace(path, spec, kept, source="here", license="none")
    session = Session(Setup(str(path), batch=3))
    result, _ = session.run(policy, Budget(slots=9))
    assert result.decisions_sha256 == stats["decisions_sha256"]
    assert (result.held, result.missed) == (stats["held"], stats["missed"])
    assert session.belady_missed(9) == stats["belady_missed"]


def test_changes_of_the_table_that_are_many():
    """More than the driver takes in one call, and as many; later ones win."""
    from runtime.bank import ABSENT, ExpertTable
    from runtime.driver import MOST_WRITES
    from runtime.lanes import lanes_for

    table = ExpertTable(40, 300, lanes_for(torch.device("cuda")))
    draw = random.Random(1)
    expected = torch.full((12_000,), ABSENT, dtype=torch.int32)
    for size in (1, 3, MOST_WRITES - 1, MOST_WRITES, MOST_WRITES + 1, 500, 12_000, 3):
        for expert in draw.sample(range(12_000), size):
            expected[expert] = draw.randint(-1, 99)
            table.set(expert, int(expected[expert]))
        table.flush()
    assert torch.equal(table.slots.cpu().view(-1), expected)


@pytest.mark.parametrize("count", [1, 2, 40])
def test_copies_handed_over_together_share_their_marks(count):
    """The mark behind them is that of all, whatever the driver takes them as."""
    from runtime.lanes import lanes_for

    lanes = lanes_for(torch.device("cuda"), timed=True)
    sources = [torch.full((2**18 + n,), n + 1.0).pin_memory() for n in range(count)]
    targets = [torch.zeros(len(source), device="cuda") for source in sources]
    # The lane that copies does not wait for the zeros by itself.
    torch.cuda.synchronize()
    begin, end = lanes.copy_all(list(zip(targets, sources, strict=True)))
    lanes.compute_after(end)
    found = [target.clone() for target in targets]
    lanes.finish()
    for target, source in zip(found, sources, strict=True):
        assert torch.equal(target.cpu(), source)
    assert lanes.passed(end)
    assert lanes.read(begin) < lanes.read(end)
