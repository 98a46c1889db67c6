"""What a user can get wrong while offloading ends in one line, and leaves nothing behind."""

from __future__ import annotations

import itertools
import json
import re

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402

import runtime.store  # noqa: E402
from policies.base import Service, Substitute  # noqa: E402
from policies.builtin.lru import LRU  # noqa: E402
from policies.ledger import LedgerError  # noqa: E402
from policies.planner import PolicyError  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.errors import OffloadError  # noqa: E402
from runtime.streaming import open_checkpoint  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402
from traces.errors import InputError  # noqa: E402

IDS = torch.tensor([[5, 9, 33, 12, 7]])
HOOKS = ("on_route", "serve", "on_load", "on_evict", "plan_step", "prefetch", "victims")


def offloaded(policy="lru", **options):
    return offload(tiny_model("mixtral"), policy, **{"slots": 3, "device": "cpu", **options})


def generate(model):
    return model.generate(IDS, max_new_tokens=4, do_sample=False, pad_token_id=0)


def one_line(error, *parts):
    """The message of *error*: one line in which all of *parts* occur."""
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert re.search(part, text), text
    return text


def assert_freed(model, error):
    engine = model.expert_cache.runner.engine
    assert not engine.store.size_bytes
    assert not engine.bank.size_bytes
    with pytest.raises(OffloadError) as again:
        model(IDS)
    one_line(again, f"^the offloaded model was freed after {error} in mid-step, expected an open")


def rogue(hook, answer=None, error=None):
    """A policy whose *hook* gives *answer*, or raises *error*, from its third call on."""

    class Rogue(LRU):
        name = "rogue"
        forecasts = False
        calls = 0

    def method(self, *arguments):
        self.calls += 1
        if self.calls < 3:
            return getattr(LRU, hook)(self, *arguments)
        if error is not None:
            raise error
        return answer() if callable(answer) else answer

    setattr(Rogue, hook, method)
    return Rogue()


@pytest.mark.parametrize("hook", HOOKS)
def test_a_policy_that_raises(hook):
    model = offloaded(rogue(hook, error=ValueError("boom\nand more")))
    with pytest.raises(PolicyError) as error:
        generate(model)
    one_line(
        error, "^'rogue' raised ValueError: boom", r"at event \d+ \(step \d+, layer \d+\)", __file__
    )
    assert_freed(model, "PolicyError")


def test_a_policy_that_raises_before_it_runs():
    class Late(LRU):
        name = "late"

        def reset(self, context):
            raise RuntimeError("not today")

    model = tiny_model("mixtral")
    with pytest.raises(PolicyError) as error:
        offload(model, Late(), slots=3, device="cpu")
    one_line(error, "^'late' raised RuntimeError: not today")
    # Nothing was taken from the model: it can be offloaded by another.
    generate(offload(model, "lru", slots=3, device="cpu"))


def test_a_forecaster_that_raises(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from policies import Forecaster\n"
        "class Broken(Forecaster):\n"
        "    name = 'broken'\n"
        "    def on_route(self, routing):\n"
        "        if routing.event == 4:\n"
        "            raise KeyError('lost')\n"
        "        return ()\n"
    )
    model = offloaded("predictive", forecaster=f"{file}:Broken")
    with pytest.raises(PolicyError) as error:
        generate(model)
    one_line(error, r"^'broken' raised KeyError: 'lost' at event 4 \(step 1, layer 1\)")
    assert_freed(model, "PolicyError")


NONSENSE = {
    "no victim at all": ("victims", (), LedgerError, "names no victim for layer"),
    "unknown victims": ("victims", (-5, 10**9, "x"), LedgerError, "names no victim"),
    "endless victims": (
        "victims", lambda: itertools.repeat(77), LedgerError, "endless victims that cannot go",
    ),
    "victims that are none": ("victims", None, PolicyError, "no use in victims"),
    "victims of no kind": ("victims", lambda: [[1]], PolicyError, "no use in victims"),
    "out of range": (
        "prefetch", (999,), LedgerError, "999 was to be placed, expected an expert that is not held"
    ),
    "below range": ("prefetch", (-1,), LedgerError, "-1 was to be placed"),
    "no number": ("prefetch", ("seven",), LedgerError, "asks for 'seven' ahead of time"),
    "a fraction": ("prefetch", (1.5,), LedgerError, "asks for 1.5 ahead of time"),
    "a step's nonsense": ("plan_step", (10**6,), LedgerError, "1000000 was to be placed"),
    "low without low slots": ("prefetch", (24 + 3,), LedgerError, "27 was to be placed"),
    "serves whom nobody missed": ("serve", {99: Service.CPU}, LedgerError, "serves expert 99"),
    "would skip": ("serve", "all", LedgerError, "would change the output"),
    "no service": ("serve", "odd", LedgerError, "serves an expert by 'quickly'"),
}  # fmt: skip


@pytest.mark.parametrize("case", NONSENSE)
def test_a_policy_that_names_nonsense(case):
    hook, answer, kind, message = NONSENSE[case]
    policy = rogue(hook, answer)
    if isinstance(answer, str):
        service = Service.SKIP if answer == "all" else "quickly"
        type(policy).serve = lambda self, routing, missed: dict.fromkeys(missed, service)
    model = offloaded(policy)
    with pytest.raises(kind) as error:
        generate(model)
    one_line(error, "'rogue'", r"event \d+", re.escape(message))
    assert_freed(model, kind.__name__)


@pytest.mark.parametrize(
    ("substitute", "message"),
    [(lambda held, e: (e + 8) % 24, "across layers"), (lambda held, e: e, "to hold a slot")],
)
def test_a_substitute_that_is_none(substitute, message):
    class Swaps(LRU):
        name = "swaps"
        exact = False

        def serve(self, routing, missed):
            return {e: Substitute(substitute(None, e)) for e in missed}

    model = offloaded(Swaps())
    with pytest.raises(LedgerError) as error:
        generate(model)
    one_line(error, "'swaps'", message)
    assert_freed(model, "LedgerError")


def test_evicting_the_pinned_is_passed_over():
    """What an event needs is never given up, whatever order a policy names."""

    class Insists(LRU):
        name = "insists"

        def on_route(self, routing):
            super().on_route(routing)
            self.now = list(routing.experts)

        def victims(self, incoming):
            return [*self.now, *super().victims(incoming)]

    plain = tiny_model("mixtral")
    plain.set_experts_implementation("grouped_mm")
    model = offloaded(Insists(), compute="reference", kernel="grouped_mm")
    assert generate(model).tolist() == generate(plain).tolist()


OPTIONS = {
    "slots below top_k": ({"slots": 1}, "--slots 1: is 1 slots, expected at least top_k = 2"),
    "more slots than experts": ({"slots": 25}, "expected at most the model's 24 experts"),
    "two budgets": ({"cache": "25%"}, "several given, expected one"),
    "no share": ({"slots": None, "cache": "lots"}, "--cache lots: expected a share"),
    "too little memory": ({"slots": None, "gpu_memory": "1KiB"}, "expected at least"),
    "unknown option": ({"slot": 3}, "unknown option 'slot', expected slots,"),
    "unknown compute": (
        {"compute": "fast"},
        "compute is 'fast', expected one of auto, graph, fused",
    ),
    "unknown kernel": ({"kernel": "mine"}, "kernel is 'mine', expected one of generate"),
    "no depth": ({"depth": 0}, "depth is 0, expected at least 1"),
    "no batch": ({"batch": 0}, "batch is 0, expected at least 1"),
    "no tokens": ({"max_tokens": -4}, "max_tokens is -4, expected at least 1"),
    "unknown hardware": ({"hardware": "abacus"}, "abacus"),
    "unknown pool": ({"pool": "both"}, "pool is 'both', expected one of global, layer"),
    "layer pool too small": (
        {"pool": "layer"},
        "pool layer: 3 slots are fewer than top_k = 2 for each of 3 layers, expected at least 6",
    ),
    "no such training file": ({"train": "none.parquet"}, "none.parquet"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case):
    options, message = OPTIONS[case]
    model = tiny_model("mixtral")
    with pytest.raises(InputError) as error:
        offload(model, "lru", **{"slots": 3, "device": "cpu", **options})
    one_line(error, re.escape(message))
    generate(offload(model, "lru", slots=3, device="cpu"))


POLICY = {
    "belady": (
        {}, "policy 'belady' needs the future, expected one that can run live"
    ),
    "static": ({}, "policy 'static' learns from a trace, expected train=FILE"),
    "lruu": ({}, "unknown policy 'lruu'"),
    "lru:depth=3": ({}, "depth"),
    "predictive": ({"forecaster": "oracle"}, "forecaster 'oracle' needs the future"),
    "predictive:horizon=2": ({"forecaster": "token"}, "learns from a trace, expected train=FILE"),
    "mixed:low_bits=3": ({}, "low_bits is 3, expected 4 or 8"),
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICY)
def test_policies_that_cannot_run(policy):
    options, message = POLICY[policy]
    model = tiny_model("mixtral")
    with pytest.raises(InputError) as error:
        offload(model, policy, **{"slots": 12, "device": "cpu", **options})
    one_line(error, re.escape(message))
    generate(offload(model, "lru", slots=3, device="cpu"))


def test_twice():
    model = offloaded()
    with pytest.raises(OffloadError, match=r"^MixtralForCausalLM: is offloaded already$"):
        offload(model, slots=3, device="cpu")
    generate(model)


def test_a_model_that_is_no_mixture():
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=64,
    )  # fmt: skip
    with pytest.raises(InputError, match="model type 'llama' is not supported"):
        offload(transformers.LlamaForCausalLM(config), slots=3, device="cpu")


def test_nan_weights():
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = float("nan")
    with pytest.raises(OffloadError) as error:
        offload(model, slots=3, device="cpu")
    one_line(error, "^layer 1 expert 3: down_proj holds NaN or infinite weights, expected numbers$")


def saved(folder, change):
    """A checkpoint in *folder* whose tensors *change* has seen."""
    tiny_model("mixtral").save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


def expert_key(tensors):
    return next(key for key in sorted(tensors) if "experts" in key)


def test_nan_in_a_checkpoint(tmp_path):
    def spoil(tensors):
        tensors[expert_key(tensors)].view(-1)[3] = float("inf")

    with pytest.raises(InputError) as error:
        offload(open_checkpoint(saved(tmp_path, spoil)), slots=3, device="cpu")
    one_line(error, str(tmp_path), "NaN or infinite")


def test_a_checkpoint_of_another_shape(tmp_path):
    def shrink(tensors):
        key = expert_key(tensors)
        tensors[key] = tensors[key][..., :-1].contiguous()

    with pytest.raises(InputError) as error:
        offload(open_checkpoint(saved(tmp_path, shrink)), slots=3, device="cpu")
    one_line(error, str(tmp_path), "shape", "expected")


def test_a_checkpoint_without_an_expert(tmp_path):
    def lose(tensors):
        del tensors[expert_key(tensors)]

    with pytest.raises(InputError) as error:
        offload(open_checkpoint(saved(tmp_path, lose)), slots=3, device="cpu")
    one_line(error, str(tmp_path), "expected")


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_checkpoint(tmp_path, keep):
    folder = saved(tmp_path, lambda tensors: None)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InputError) as error:
        offload(open_checkpoint(folder), slots=3, device="cpu")
    one_line(error, str(tmp_path))


def test_a_checkpoint_that_shrinks_while_it_is_read(tmp_path):
    """The dense part was read in time; the experts are gone when they are wanted."""
    checkpoint = open_checkpoint(saved(tmp_path, lambda tensors: None))
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 3])
    before = list(tmp_path.iterdir())
    with pytest.raises(InputError) as error:
        offload(checkpoint, slots=3, device="cpu")
    one_line(error, str(tmp_path))
    assert list(tmp_path.iterdir()) == before


def test_a_configuration_of_another_model(tmp_path):
    folder = saved(tmp_path, lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["num_local_experts"] = 16
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError) as error:
        offload(open_checkpoint(folder), slots=3, device="cpu")
    one_line(error, str(tmp_path))


def test_no_room_for_the_slots(monkeypatch):
    """That is known before a single expert is read: the model is as it was."""

    def refuse(*shape, **options):
        raise torch.OutOfMemoryError("out of memory: tried to allocate")

    model = tiny_model("mixtral")
    with monkeypatch.context() as patch:
        patch.setattr("runtime.bank.torch.zeros", refuse)
        with pytest.raises(OffloadError) as error:
            offload(model, slots=3, device="cpu")
    one_line(error, "^3 slots of", "out of memory, expected room for them; give fewer slots$")
    generate(offload(model, slots=2, device="cpu"))


def test_no_room_for_the_rest_of_the_model(monkeypatch):
    """Slots and store are given back."""
    taken = []
    fill = runtime.store.HostStore.fill

    def noted(self, source):
        taken.append(self)
        fill(self, source)

    def refuse(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(runtime.store.HostStore, "fill", noted)
    model = tiny_model("mixtral")
    monkeypatch.setattr(model, "to", refuse)
    with pytest.raises(OffloadError) as error:
        offload(model, slots=3, device="cpu")
    one_line(error, "out of memory on cpu for what is not experts", "beside 3 slots", "fewer slots")
    assert [store.size_bytes for store in taken] == [0]


def test_no_room_for_the_experts(monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(runtime.store.mmap, "mmap", refuse)
    with pytest.raises(OffloadError) as error:
        offloaded()
    one_line(
        error, "^experts of layer 0: ", r"GiB of host memory refused \(.*Cannot allocate",
        "expected room for it; use a smaller model",
    )  # fmt: skip
