"""The compiled decode step: the same numbers, compiled once per shape, its experts called as ever.

Mostly with the backend ``eager``: what the compiler traces is run as it was traced.
"""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from transformers import StaticCache  # noqa: E402

import runtime.runner  # noqa: E402
from runtime import compiled, expert_op, graphs, offload  # noqa: E402
from runtime.cache_twin import COUNTER, twin_of, undone  # noqa: E402
from runtime.compiled import CompiledForward, compiled_forward  # noqa: E402
from runtime.families import FAMILIES  # noqa: E402
from runtime.forcing import ForcedRouting  # noqa: E402
from runtime.kv_rows import GatheredLayer, KvRows, PlacedLayer, make_gathered  # noqa: E402
from runtime.masks import with_masks  # noqa: E402
from runtime.window import make_capturable  # noqa: E402
from tests.tiny_models import DENSE_LAYERS, tiny_model  # noqa: E402

IDS = torch.tensor([[5, 9, 33, 12, 7], [3, 8, 2, 40, 11]])
STEPS, ROOM = 20, 32
#: Families that have windows get one that is full before the steps are over.
WINDOWS = {"gpt_oss": 12, "mixtral": 12}
#: Layers that it takes to see all kinds of a family's; to trace one takes half a second.
LAYERS = {family: 1 + dense for family, dense in DENSE_LAYERS.items()} | {"gpt_oss": 2}


@pytest.fixture(autouse=True, scope="module")
def untraced() -> Any:
    """Without the compiler's own log, which a test's handlers would have it write."""
    log = logging.getLogger("torch.__trace")
    log.disabled = True
    yield
    log.disabled = False
    torch._dynamo.reset()


def offloaded(family: str, **options: Any) -> Any:
    window = {"sliding_window": WINDOWS[family]} if family in WINDOWS else {}
    return offload(
        tiny_model(family, **{"layers": LAYERS.get(family, 1), **window, **options}),
        slots=6,
        device="cpu",
    )


@pytest.fixture(scope="module")
def made() -> Any:
    """A model of a family and its forward, made once."""
    found: dict[str, Any] = {}

    def make(family: str) -> Any:
        if family not in found:
            model = offloaded(family)
            found[family] = model, forward_of(model)
        return found[family]

    return make


def forward_of(model: Any, backend: str = "eager") -> CompiledForward:
    runner = model.expert_cache.runner
    return compiled_forward(model, runner.hook, runner.plain_forward, backend)


def prefilled(model: Any, ids: Any = IDS) -> tuple[StaticCache, Any]:
    cache = StaticCache(config=model.config, max_cache_len=ROOM)
    with torch.no_grad():
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return cache, logits[:, -1:].argmax(-1)


@torch.no_grad()
def run_step(model: Any, forward: Any, cache: Any, ids: Any, **more: Any) -> Any:
    """One decode step through *forward*, as the runner runs it."""
    make_capturable(cache)
    kwargs = {"input_ids": ids, "past_key_values": cache, "use_cache": True, **more}
    kwargs = with_masks(model.config, model.dtype, kwargs)
    runner = model.expert_cache.runner
    runner.engine.start()
    runner._begin({"input_ids": ids}, False)
    output = forward(**kwargs)
    runner._end(0.0)
    return output


def decoded(model: Any, forward: Any, steps: int = STEPS) -> Any:
    """Logits of greedy *steps* [steps, B, V]."""
    cache, ids = prefilled(model)
    found = []
    for _ in range(steps):
        output = run_step(model, forward, cache, ids)
        assert output.past_key_values is cache
        found.append(output.logits[:, -1])
        ids = found[-1].argmax(-1, keepdim=True)
    return torch.stack(found)


def check(model: Any, forward: CompiledForward, steps: int = STEPS) -> None:
    plain = decoded(model, model.expert_cache.runner.plain_forward, steps)
    ours = decoded(model, forward, steps)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.argmax(-1), plain.argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_tokens_in_one_graph(family: str, made: Any) -> None:
    """``fullgraph`` refuses breaks; every step after the first must find its code."""
    model, forward = made(family)
    check(model, forward)
    assert len(forward._ready) == (2 if family in WINDOWS else 1)


def test_what_is_compiled_for_the_device_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through functionalisation and its removal of what is double or unused."""
    model = offloaded("qwen2_moe", layers=2)
    asked: list[int] = []
    own = model.expert_cache.runner.hook.experts
    monkeypatch.setattr(
        model.expert_cache.runner.hook,
        "experts",
        lambda layer, *inputs: (asked.append(layer), own(layer, *inputs))[1],
    )
    forward = forward_of(model, "aot_eager")
    check(model, forward, steps=3)
    # The prefills, the plain steps, ours, and two passes to compile.
    assert asked == [0, 1] * (2 + 3 + 3 + 2)


def test_compiled_code_writes_no_lengths() -> None:
    """One kernel adds to those of all layers afterwards; keys and values are written in place."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.graph)
        return graph.forward

    model = offloaded("olmoe", layers=1)
    backend: Any = aot_autograd(fw_compiler=keep, keep_inference_input_mutations=True)
    check(model, forward_of(model, backend), steps=2)
    copies = [node for node in graphs[0].nodes if node.target is torch.ops.aten.copy_.default]
    assert [copy.args[0].meta["val"].dim() for copy in copies] == [4, 4]
    cache, ids = prefilled(model)
    run_step(model, forward_of(model), cache, ids)
    assert [int(layer.cumulative_length) for layer in cache.layers] == [IDS.shape[1] + 1]


def test_lengths_are_those_of_the_plain_pass() -> None:
    """Before a window is full and after, lengths go as they do."""
    model = offloaded("gpt_oss", layers=2)
    found = []
    for ours in (False, True):
        runner = model.expert_cache.runner
        forward = forward_of(model) if ours else runner.plain_forward
        cache, ids = prefilled(model)
        for _ in range(9):
            run_step(model, forward, cache, ids)
            found.append([int(layer.cumulative_length) for layer in cache.layers])
    assert found[:9] == found[9:]
    assert {len(set(lengths)) for lengths in found} == {1, 2}


def test_events_are_those_of_the_plain_pass() -> None:
    stats = []
    for ours in (False, True):
        model = offloaded("qwen2_moe", layers=2)
        decoded(model, forward_of(model) if ours else model.expert_cache.runner.plain_forward, 6)
        stats.append(model.expert_cache.stats())
    assert stats[0] == stats[1]


def test_code_serves_every_cache_of_its_shapes(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = made("mixtral")
    first = decoded(model, forward, 4)
    monkeypatch.setattr(torch, "compile", None)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(decoded(model, forward, 4), first)


def test_strides_of_inputs_do_not_matter(made: Any) -> None:
    model, forward = made("qwen3_moe")
    known = len(forward._ready)
    for positions in (torch.full((2, 1), 5), torch.tensor([[5, 6, 7]]).expand(2, 3)[:, :1]):
        cache, ids = prefilled(model)
        run_step(model, forward, cache, ids, position_ids=positions)
    assert len(forward._ready) == known + 1


def test_preparing_leaves_everything_as_it_was() -> None:
    """A window that is full included: it has moved on by a token, and back."""
    model = offloaded("gpt_oss", sliding_window=4)
    cache, ids = prefilled(model)
    run_step(model, model.expert_cache.runner.plain_forward, cache, ids)
    kwargs = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    kwargs = with_masks(model.config, model.dtype, kwargs)
    length = len(IDS[0]) + 1

    def state() -> list[Any]:
        kept = [getattr(layer, part) for layer in cache.layers for part in ("keys", "values")]
        numbers = [
            (int(layer.cumulative_length), vars(layer).get(COUNTER)) for layer in cache.layers
        ]
        return [numbers, *(values[:, :, :length].clone() for values in kept)]

    before, events = state(), model.expert_cache.stats()
    with torch.no_grad():
        assert forward_of(model).prepare(kwargs)
    after = state()
    assert after[0] == before[0]
    assert all(torch.equal(a, b) for a, b in zip(after[1:], before[1:], strict=True))
    assert model.expert_cache.stats() == events


@pytest.mark.parametrize("kind", [GatheredLayer, PlacedLayer])
def test_rows_of_sequences_that_decode_in_groups(kind: type[GatheredLayer]) -> None:
    """All layers' keys and values lie in one tensor there, of which each sees a part."""
    model = offloaded("mixtral", layers=2)
    rows, at = torch.tensor([1, 0]), torch.tensor([5, 5])
    found = []
    for ours in (False, True):
        cache, ids = prefilled(model)
        kept = KvRows(cache, 2)
        kept.take(cache, [1, 0], [5, 5])
        kept.seat(cache, 0, 2)
        make_gathered(cache, rows, at, kind)
        forward = forward_of(model) if ours else model.expert_cache.runner.plain_forward
        room = cache.layers[0].max_cache_len
        mask = (torch.arange(room) <= 5).expand(2, 1, 1, room)
        positions = at.view(2, 1)
        output = run_step(model, forward, cache, ids, attention_mask=mask, position_ids=positions)
        found.append((output.logits, kept.views(0, 2)))
        assert {int(layer.cumulative_length) for layer in cache.layers} == {IDS.shape[1]}
        assert not ours or forward._ready
    torch.testing.assert_close(found[0][0], found[1][0])
    for plain, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(plain, other)


def test_forced_routing_is_compiled_in_and_read_anew() -> None:
    model = offloaded("qwen2_moe")
    hook = model.expert_cache.runner.hook
    forward, seen = forward_of(model), []
    own = hook.experts
    hook.experts = lambda layer, h, index, w: (
        seen.append(index.tolist()),
        own(layer, h, index, w),
    )[1]
    with ForcedRouting(hook.gates, "cpu") as forced:
        for chosen in ([1, 2], [6, 3]):
            cache, ids = None, None
            forced.set(torch.tensor(chosen).expand(1, IDS.numel(), 2))
            cache, ids = prefilled(model)
            forced.set(torch.tensor(chosen).expand(1, 2, 2))
            seen.clear()
            run_step(model, forward, cache, ids)
            assert seen[-1] == [chosen, chosen]
    cache, ids = prefilled(model)
    run_step(model, forward, cache, ids)
    assert len(forward._ready) == 2


def test_what_does_not_suit_runs_as_it_is() -> None:
    model = offloaded("mixtral")
    ran = []
    forward = CompiledForward(
        model, model.expert_cache.runner.hook, lambda **kwargs: ran.append(1), "eager"
    )
    cache, ids = prefilled(model)
    with torch.no_grad():
        forward(input_ids=IDS, past_key_values=cache)
        forward(input_ids=ids, past_key_values=None)
        # The positions and masks of a window would be asked of Python numbers.
        forward(input_ids=ids, past_key_values=cache)
        forward(input_ids=ids, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    forward(input_ids=ids, past_key_values=cache, position_ids=ids)
    assert (len(ran), forward._ready) == (5, {})


def test_no_more_shapes_than_can_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "MOST_COMPILED", 1)
    model = offloaded("olmoe")
    forward = forward_of(model)
    for size in (1, 2):
        cache, ids = prefilled(model, IDS[:size])
        assert run_step(model, forward, cache, ids).logits.shape[0] == size
    assert len(forward._ready) == 1


def test_nothing_is_compiled_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_is_capturing", lambda: True)
    model = offloaded("olmoe")
    forward = forward_of(model)
    cache, ids = prefilled(model)
    run_step(model, forward, cache, ids)
    assert not forward._ready


def test_what_cannot_be_compiled_is_said_once() -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise NotImplementedError("no compiler here")

    model = offloaded("qwen3_moe")
    forward = forward_of(model, broken)  # type: ignore[arg-type]
    cache, ids = prefilled(model)
    with pytest.warns(RuntimeWarning, match=r"cannot be compiled \(.*no compiler here") as warned:
        run_step(model, forward, cache, ids)
    assert len(warned) == 1
    check(model, forward, steps=3)


def test_it_is_ready_before_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ``offload(compiled=True)``, and where the shapes are known beforehand."""
    given: list[Any] = []
    monkeypatch.setattr(
        runtime.runner, "decode_graphs", lambda hook, forward, whole: given.append(forward)
    )
    for wanted in (False, True):
        offload(tiny_model("olmoe", layers=1), slots=6, device="cpu", compiled=wanted)
    assert [isinstance(forward, CompiledForward) for forward in given] == [False, True]

    class Chain:
        def __init__(self, hook: Any, forward: Any, kwargs: Any, stream: Any) -> None:
            assert len(forward._ready) == 1
            assert hook.capturing is None

        def replay_blind(self) -> None:
            """As of a captured step."""

    monkeypatch.setattr(graphs, "Chain", Chain)
    monkeypatch.setattr(graphs, "_capture_stream", lambda device: None)
    model = offloaded("olmoe")
    room = graphs.DecodeGraphs(model.expert_cache.runner.hook, forward_of(model))
    cache, ids = prefilled(model)
    with torch.no_grad():
        room.warm({"input_ids": ids, "past_key_values": cache, "use_cache": True})
    assert room.captured == 1


def test_a_model_is_freed_with_its_code() -> None:
    model = offloaded("qwen2_moe")
    runner = model.expert_cache.runner
    forward = forward_of(model)
    cache, ids = prefilled(model)
    run_step(model, forward, cache, ids)
    gone, used = weakref.ref(model), weakref.ref(cache)
    del cache, ids
    assert used() is None
    del model, runner
    gc.collect()
    assert gone() is None
    assert forward._ready


class Hook:
    """Stands where a model's hook does."""

    def experts(self, layer: int, hidden: Any, index: Any, weights: Any) -> Any:
        assert all(value.is_contiguous() for value in (hidden, index, weights))
        return torch.zeros(hidden.numel() + 1)[1:].view(hidden.shape) + layer


def test_the_operator_by_itself() -> None:
    hook = Hook()
    key = expert_op.key_for(hook)
    hidden, index = torch.zeros(3, 4).t(), torch.zeros(2, 4, dtype=torch.int64).t()
    out = expert_op.experts(hidden, index, index.float(), 3, key)
    assert (out == 3).all()
    assert out.is_contiguous()
    inputs = (torch.zeros(4, 3), index, index.float(), 3, key)
    torch.library.opcheck(torch.ops.expertflow.experts.default, inputs)
    del hook
    with pytest.raises(RuntimeError, match=f"key {key}: it was freed"):
        expert_op.experts(hidden, index, index.float(), 3, key)
    again = Hook()
    assert expert_op.key_for(again) == key


def test_a_twin_shares_memory_and_no_numbers() -> None:
    model = offloaded("mixtral")
    cache, _ = prefilled(model)
    with undone(cache):
        twin = twin_of(cache)
        for mine, theirs in zip(twin.layers, cache.layers, strict=True):
            assert mine.keys.data_ptr() == theirs.keys.data_ptr()
            assert getattr(mine, COUNTER) == 0
            assert getattr(theirs, COUNTER) == IDS.shape[1]


def test_a_folder_named_by_the_user_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    import os

    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv(name, "mine")
    compiled._use_own_folder()
    assert os.environ[name] == "mine"
    monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled._use_own_folder()
    assert os.environ[name] == str(tmp_path / "expertflow" / "inductor")


def test_code_that_holds_no_longer_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function mode of a caller's is part of what code is compiled for."""

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    model = offloaded("mixtral", layers=2)
    forward = forward_of(model)
    cache, ids = prefilled(model)
    run_step(model, forward, cache, ids)
    first = list(forward._ready.values())
    with Mode():
        run_step(model, forward, cache, ids)
    second = list(forward._ready.values())
    assert len(first) == len(second) == 1
    assert first != second
    # In the midst of a capture nothing can be compiled.
    monkeypatch.setattr(compiled, "_is_capturing", lambda: True)
    with pytest.warns(RuntimeWarning, match="compiled for has changed"):
        ours = run_step(model, forward, cache, ids).logits
    other, ids = prefilled(model)
    plain = model.expert_cache.runner.plain_forward
    for _ in range(2):
        run_step(model, plain, other, ids)
    assert torch.equal(ours, run_step(model, plain, other, ids).logits)


def test_code_is_made_anew_before_a_capture_needs_it() -> None:
    model = offloaded("qwen2_moe", layers=2)
    forward = forward_of(model)
    cache, ids = prefilled(model)
    kwargs = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    with torch.no_grad():
        assert forward.prepare(kwargs)
        [first] = forward._ready.values()
        assert forward.prepare(kwargs)
        assert list(forward._ready.values()) == [first]
        with torch.device("cpu"):
            assert forward.prepare(kwargs)
    assert list(forward._ready.values()) != [first]
