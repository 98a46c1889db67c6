"""The life of an offloaded model: what it counts, what it records, and how it ends."""

from __future__ import annotations

import gc
import itertools
import weakref

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.budget import Budget  # noqa: E402
from policies.builtin.lru import LRU  # noqa: E402
from policies.planner import PolicyError  # noqa: E402
from policies.session import Setup  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.errors import OffloadError  # noqa: E402
from runtime.families import find_gates, model_spec  # noqa: E402
from sim.session import Session  # noqa: E402
from tests.helpers import landing_in_groups  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402
from traces.store import open_trace, write_trace  # noqa: E402

ONE = torch.tensor([[5, 9, 33, 12, 7]])
PADDED = torch.tensor([[0, 0, 5, 9, 33], [40, 3, 7, 11, 60], [0, 8, 8, 21, 2]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])


def offloaded(policy="lru", family="mixtral", **options):
    return offload(tiny_model(family), policy, **{"slots": 7, "device": "cpu", **options})


def generate(model, ids=ONE, tokens=6, **options):
    return model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options)


def freed(model):
    """Whether nothing of the experts is left."""
    engine = model.expert_cache.runner.engine
    return not (engine.store.size_bytes or engine.bank.size_bytes or engine.table.slots.numel())


@pytest.mark.parametrize("policy", ["lru", "lfu", "static:staging=3", "predictive", "mixed"])
def test_counts_add_up(policy, tmp_path):
    train = tmp_path / "train.parquet"
    source = offloaded(record=True)
    generate(source)
    spec = model_spec(tiny_model("mixtral"), "tiny")
    write_trace(train, spec, source.expert_cache.trace(), source="here", license="none")
    model = offloaded(policy, train=str(train))
    generate(model)
    generate(model, PADDED, attention_mask=MASK)
    stats = model.expert_cache.stats()
    assert stats["held"] + stats["missed"] == stats["accesses"]
    assert stats["hit"] + stats["late"] == stats["held"]
    assert min(stats[n] for n in ("hit", "late", "missed")) >= 0
    assert stats["held_ratio"] == stats["held"] / stats["accesses"]
    assert stats["hit_ratio"] == stats["hit"] / stats["accesses"]
    assert stats["steps"] == 2 * 6
    assert stats["tokens"] == (5 + 5) + (3 + 5 + 4 + 3 * 5)
    assert stats["bytes"]["demand"] > 0
    exact = policy != "mixed"
    size = spec.expert_bytes
    if exact:
        assert 0 < stats["belady_missed"] <= stats["accesses"]
        assert stats["bytes"]["demand"] == stats["missed"] * size
        moved = stats["moves"]["prefetch"] - stats["moves"]["cancelled"]
        waiting = len(model.expert_cache.runner.engine.copier)
        assert stats["bytes"]["prefetch"] == (moved - waiting) * size
    assert stats["memory"]["slots_bytes"] == model.expert_cache.runner.engine.bank.size_bytes


def test_before_the_first_step():
    stats = offloaded().expert_cache.stats()
    assert stats["accesses"] == stats["missed"] == stats["belady_missed"] == stats["steps"] == 0
    assert stats["held_ratio"] == stats["hit_ratio"] == 0.0


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize(("policy", "slots"), [("lru", 2), ("lfu", 7), ("predictive", 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_simulator_takes_the_decisions_of_a_live_run(family, policy, slots, batch, tmp_path):
    """The routing that was kept, replayed in the other world."""
    model = offload(tiny_model(family), policy, slots=slots, device="cpu", record=True, batch=batch)
    if batch == 1:
        generate(model)
        generate(model, ONE + 1, tokens=4)
    else:
        generate(model, PADDED, attention_mask=MASK)
        generate(model, PADDED[:, 2:].flip(0), tokens=3)
    stats = model.expert_cache.stats()
    path = tmp_path / "kept.parquet"
    spec = model_spec(tiny_model(family), "tiny")
    write_trace(path, spec, model.expert_cache.trace(), source="here", license="none")
    session = Session(Setup(str(path), batch=batch))
    result, _ = session.run(policy, Budget(slots=slots))
    assert result.decisions_sha256 == stats["decisions_sha256"]
    for name in ("steps", "tokens", "accesses", "held", "missed"):
        assert getattr(result, name) == stats[name], name
    assert result.bytes["demand"] == stats["bytes"]["demand"]
    assert result.moves["demand"] == stats["moves"]["demand"]
    assert result.moves["prefetch"] == stats["moves"]["prefetch"]
    assert session.belady_missed(slots) == stats["belady_missed"]


def test_what_is_recorded(tmp_path):
    """Sequences as they ran: positions, tokens, falling weights, and guesses of later gates."""
    model = offloaded("predictive", record=True)
    out = generate(model, PADDED, attention_mask=MASK, tokens=4)
    kept = model.expert_cache.trace()
    assert [s.id for s in kept] == [0, 1, 2]
    assert [s.prefill for s in kept] == [3, 5, 4]
    for row, sequence in enumerate(kept):
        real = out[row][5 - sequence.prefill :]
        assert sequence.tokens.tolist() == real[:-1].tolist()
        assert sequence.positions.tolist() == list(range(sequence.prefill + 3))
        assert bool((np.diff(sequence.weights, axis=2) <= 0).all())
        assert len(sequence.ahead) == 2
    path = tmp_path / "kept.parquet"
    write_trace(path, model_spec(tiny_model("mixtral"), "t"), kept, source="x", license="y")
    assert open_trace(path).has_weights
    assert offloaded().expert_cache.trace() == []


def test_close_frees_everything_once():
    model = offloaded()
    generate(model)
    assert not freed(model)
    before = model.expert_cache.stats()["accesses"]
    for _ in range(3):
        model.expert_cache.close()
        assert freed(model)
    assert model.expert_cache.stats()["accesses"] == before
    with pytest.raises(
        OffloadError, match=r"^the offloaded model was closed, expected an open one$"
    ):
        model(ONE)


def test_the_model_goes_with_its_store():
    model = offloaded()
    generate(model)
    engine = model.expert_cache.runner.engine
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert engine.store.size_bytes == engine.bank.size_bytes == 0


class Interrupts(LRU):
    """Ctrl-C while the policy thinks."""

    name = "interrupts"

    def on_route(self, routing):
        super().on_route(routing)
        if routing.event == 8:
            raise KeyboardInterrupt


def test_interrupted_in_mid_step():
    model = offloaded(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        generate(model)
    assert freed(model)
    with pytest.raises(OffloadError, match=r"was freed after KeyboardInterrupt in mid-step"):
        generate(model)


class KeepsItsError(LRU):
    """Holds on to the error that it raises, and so to the traceback and every frame of it."""

    name = "keeps-its-error"

    def __init__(self, kind):
        self.error = kind("boom")

    def on_route(self, routing):
        super().on_route(routing)
        if routing.event == 8:
            raise self.error


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_failed_model_goes_whatever_its_policy_keeps(kind):
    model = offloaded(KeepsItsError(kind))
    with pytest.raises((PolicyError, KeyboardInterrupt), match="boom"):
        generate(model)
    handle = model.expert_cache
    gone = [weakref.ref(model), weakref.ref(handle.runner), *map(weakref.ref, model.parameters())]
    del model, handle
    gc.collect()
    assert [each() for each in gone] == [None] * len(gone)


def test_the_end_of_a_model_is_awaited_without_its_runner():
    """What waits outlives the model: it must lead to nothing but what is to be freed."""
    model = offloaded()
    engine = model.expert_cache.runner.engine
    found = [engine.bank, engine.table, engine.store, engine.lanes]
    gone = weakref.ref(model.expert_cache.runner)
    del model.expert_cache, model.forward, engine
    for gate in find_gates(model):
        gate.experts._expertflow = None
    gc.collect()
    assert gone() is None
    store = found[2]
    assert store.size_bytes > 0
    del model
    gc.collect()
    assert store.size_bytes == 0


class Stops:
    """A streamer during whose third piece the user presses Ctrl-C."""

    def __init__(self):
        self.left = 3

    def put(self, value):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt

    def end(self):
        raise AssertionError("never reached")


def test_interrupted_between_steps():
    """Nothing is half done there: the model goes on, and closing it frees all."""
    model, other = offloaded(), offloaded()
    with pytest.raises(KeyboardInterrupt):
        generate(model, streamer=Stops())
    assert generate(model).tolist() == generate(other).tolist()
    model.expert_cache.close()
    assert freed(model)


def test_an_error_of_the_model_itself_frees():
    model = offloaded()
    broken = find_gates(model)[1].router
    broken.register_forward_hook(lambda *call: (_ for _ in ()).throw(ZeroDivisionError("no")))
    with pytest.raises(ZeroDivisionError):
        model(ONE)
    assert freed(model)
    with pytest.raises(OffloadError, match="was freed after ZeroDivisionError in mid-step"):
        model(ONE)


def test_out_of_memory_in_a_pass_says_so(monkeypatch):
    model = offloaded()

    def full(*call):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(model.expert_cache.runner.hook, "experts", full)
    with pytest.raises(OffloadError) as found:
        model(ONE)
    assert "\n" not in str(found.value)
    assert "Tried to allocate 2.00 GiB" in str(found.value)
    assert "give fewer slots" in str(found.value)
    assert freed(model)
    with pytest.raises(OffloadError, match="ran out of GPU memory and was freed"):
        model(ONE)


def test_two_models_side_by_side():
    one, two = offloaded(), offloaded(family="gpt_oss")
    expected = [generate(offloaded()).tolist(), generate(offloaded(family="gpt_oss")).tolist()]
    assert [generate(one).tolist(), generate(two).tolist()] == expected
    one.expert_cache.close()
    assert generate(two).tolist() == expected[1]


def test_embeddings_cannot_be_fed():
    model = offloaded()
    with pytest.raises(OffloadError, match="no input_ids given"):
        model(inputs_embeds=torch.zeros(1, 3, 32))
    model(ONE)


def test_what_is_given_by_position_counts():
    plain = tiny_model("mixtral")
    plain.set_experts_implementation("grouped_mm")
    model = offloaded(compute="reference", kernel="grouped_mm")
    with torch.no_grad():
        ours, theirs = model(PADDED, MASK).logits, plain(PADDED, MASK).logits
    assert torch.equal(ours[MASK.bool()], theirs[MASK.bool()])


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("slots", [2, 3, 7])
@pytest.mark.parametrize("together", [1, 2, 3, 100])
def test_no_bit_depends_on_the_groups_in_which_experts_land(kernel, slots, together):
    """Nor on waves: the reference sums up once, when all groups have been computed."""
    plain = tiny_model("mixtral")
    plain.set_experts_implementation(kernel)
    model = offload(
        tiny_model("mixtral"), slots=slots, device="cpu", compute="reference", kernel=kernel
    )
    size = together * model.expert_cache.runner.engine.bank.layout.size_bytes
    with torch.no_grad(), landing_in_groups(size, 2 * size):
        for ids in (ONE, ONE.flip(1), ONE):
            assert torch.equal(model(ids).logits, plain(ids).logits)
    assert model.expert_cache.stats()["missed"] > 0


def test_a_static_cache_that_is_used_again():
    """transformers keeps it from one call of generate to the next, and empties it."""
    model = offloaded(record=True)
    for _ in range(2):
        generate(model, PADDED, attention_mask=MASK, tokens=3, cache_implementation="static")
    kept = model.expert_cache.trace()
    assert [(s.id, len(s), s.prefill) for s in kept] == [
        (0, 5, 3), (1, 7, 5), (2, 6, 4), (3, 5, 3), (4, 7, 5), (5, 6, 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "attention"), [("mixtral", "sdpa"), ("mixtral", "eager"), ("gpt_oss", "eager")]
)
def test_padding_demands_nothing_with_a_static_cache(family, attention):
    """Its masks come prepared: as booleans, as numbers, or one for each kind of layer."""
    model = offload(
        tiny_model(family, attn_implementation=attention), slots=9, device="cpu", record=True
    )
    generate(model, PADDED, attention_mask=MASK, tokens=3, cache_implementation="static")
    assert [(len(s), s.prefill) for s in model.expert_cache.trace()] == [(5, 3), (7, 5), (6, 4)]


def test_closing_gives_the_memory_back_while_the_model_lives():
    model = offloaded()
    generate(model)
    store = model.expert_cache.runner.engine.store
    memory = [weakref.ref(block._memory) for block in store._blocks]
    assert len(memory) == 3
    model.expert_cache.close()
    gc.collect()
    assert [block() for block in memory] == [None] * 3
    assert model is not None


def test_a_cache_is_not_kept_alive():
    model = offloaded()
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ONE, past_key_values=cache)
    gone = weakref.ref(cache)
    del cache
    gc.collect()
    assert gone() is None


def test_sequences_of_a_chat():
    """A cache that is kept goes on with its sequences; a longer prompt is no new one."""
    model = offloaded(record=True)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        for ids in (ONE, ONE[:, :1], ONE[:, :3], ONE[:, :1]):
            model(input_ids=ids, past_key_values=cache)
        model(input_ids=ONE, past_key_values=transformers.DynamicCache(config=model.config))
    kept = model.expert_cache.trace()
    assert [(s.id, len(s), s.prefill) for s in kept] == [(0, 10, 5), (1, 5, 5)]
    assert kept[0].positions.tolist() == list(range(10))
    assert list(itertools.chain.from_iterable(s.tokens.tolist() for s in kept)) == [
        5, 9, 33, 12, 7, 5, 5, 9, 33, 5, 5, 9, 33, 12, 7,
    ]  # fmt: skip
