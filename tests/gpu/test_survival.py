"""Whatever goes wrong on a GPU ends in one line, and the GPU's memory is free again."""

from __future__ import annotations

import contextlib
import gc

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402

import runtime.store  # noqa: E402
from policies.builtin.lru import LRU  # noqa: E402
from policies.planner import PolicyError  # noqa: E402
from runtime import offload  # noqa: E402
from runtime.errors import OffloadError  # noqa: E402
from runtime.streaming import open_checkpoint  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402
from traces.errors import InputError  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IDS = torch.tensor([[5, 9, 33, 12, 7]])
#: An expert takes 12 MiB.
LARGE = {"hidden_size": 256, "intermediate_size": 4096}


def allocated():
    """GPU bytes in use once everything that can be has been given back."""
    for _ in range(3):  # finalizers leave more to collect
        gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


@pytest.fixture(autouse=True)
def all_is_given_back():
    """After the test, without its model, the GPU holds what it held before."""
    warm = offload(tiny_model("mixtral"), slots=5, device="cuda")
    generate(warm)
    del warm
    before = allocated()
    yield
    assert allocated() <= before


def generate(model, tokens=5, **options):
    return model.generate(
        IDS.cuda(), max_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
    )


def one_line(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


@contextlib.contextmanager
def room_for(size_bytes):
    """Let torch take *size_bytes* more of the GPU's memory, and no more."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_more_slots_than_there_is_room_for():
    model = tiny_model("mixtral", **LARGE)
    # Matrix products want some 64 MiB to work in.
    with room_for(250 * 2**20):
        with pytest.raises(OffloadError) as error:
            offload(model, slots=24, device="cuda")
        one_line(error, "24 slots of 12.0 MiB need 0.28 GiB on cuda", "give fewer slots")
        model = offload(model, slots=4, device="cuda")
        generate(model)
    del model


def test_no_room_for_the_rest_of_the_model():
    model = tiny_model("mixtral", **LARGE, vocab_size=100_000)
    with room_for(100 * 2**20):
        with pytest.raises(OffloadError) as error:
            offload(model, slots=4, device="cuda")
        one_line(error, "out of memory on cuda", "beside 4 slots", "give fewer slots")
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_no_room_in_a_forward_pass():
    model = offload(tiny_model("mixtral", **LARGE), slots=4, device="cuda")
    many = torch.randint(1, 64, (512, 60), device="cuda")
    with room_for(2**20), pytest.raises(OffloadError) as error:
        model(input_ids=many)
    one_line(error, "out of GPU memory during a forward pass", "give fewer slots")
    slots = model.expert_cache.runner.engine.bank.size_bytes
    assert slots == 0
    with pytest.raises(OffloadError, match="ran out of GPU memory and was freed"):
        model(input_ids=IDS.cuda())


class Registrar:
    """CUDA's registering of host memory, which refuses after *most* blocks."""

    def __init__(self, most):
        self._real = torch.cuda.cudart()
        self.most, self.registered, self.freed = most, 0, 0

    def cudaHostRegister(self, *arguments):
        if self.registered == self.most:
            return 2
        self.registered += 1
        return self._real.cudaHostRegister(*arguments)

    def cudaHostUnregister(self, *arguments):
        self.freed += 1
        return self._real.cudaHostUnregister(*arguments)


@pytest.mark.parametrize("most", [0, 2])
def test_pinned_memory_refused(monkeypatch, most):
    registrar = Registrar(most)
    monkeypatch.setattr(runtime.store, "_cudart", lambda: registrar)
    with pytest.raises(OffloadError) as error:
        offload(tiny_model("mixtral"), slots=5, device="cuda")
    one_line(error, f"experts of layer {most}: ", "GiB of pinned host memory refused (CUDA error 2",
             "pin=False")  # fmt: skip
    assert registrar.freed == registrar.registered == most


def test_more_pinned_memory_than_there_is(monkeypatch):
    monkeypatch.setattr(runtime.store, "available_bytes", lambda: 1000)
    with pytest.raises(OffloadError) as error:
        offload(tiny_model("mixtral"), slots=5, device="cuda")
    one_line(error, "of pinned host memory refused (only 0.0 GiB are free")


def test_everything_registered_is_let_go(monkeypatch):
    registrar = Registrar(-1)
    monkeypatch.setattr(runtime.store, "_cudart", lambda: registrar)
    model = offload(tiny_model("mixtral"), slots=5, device="cuda")
    generate(model)
    assert (registrar.registered, registrar.freed) == (3, 0)
    model.expert_cache.close()
    model.expert_cache.close()
    assert registrar.freed == 3


def test_pageable_memory(monkeypatch):
    registrar = Registrar(0)
    pinned = generate(offload(tiny_model("mixtral"), slots=5, device="cuda")).tolist()
    monkeypatch.setattr(runtime.store, "_cudart", lambda: registrar)
    model = offload(tiny_model("mixtral"), slots=5, device="cuda", pin=False)
    assert generate(model).tolist() == pinned
    assert registrar.registered == 0


class Rogue(LRU):
    """Raises *error* at the 20th event, and keeps it with the frames it went through."""

    name = "rogue"

    def __init__(self, error):
        self.error = error

    def on_route(self, routing):
        super().on_route(routing)
        if routing.event == 20:
            raise self.error


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_a_policy_that_raises(graphs):
    model = offload(tiny_model("mixtral"), Rogue(ValueError("boom")), slots=5, device="cuda",
                    graphs=graphs)  # fmt: skip
    with pytest.raises(PolicyError) as error:
        generate(model, tokens=12)
    one_line(error, "'rogue' raised ValueError: boom at event 20")
    with pytest.raises(OffloadError, match="was freed after PolicyError in mid-step"):
        generate(model)
    engine = model.expert_cache.runner.engine
    assert engine.bank.size_bytes == engine.store.size_bytes == 0


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "eager"])
def test_interrupted(graphs):
    model = offload(tiny_model("mixtral"), Rogue(KeyboardInterrupt()), slots=5, device="cuda",
                    graphs=graphs)  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokens=12)
    with pytest.raises(OffloadError, match="was freed after KeyboardInterrupt in mid-step"):
        generate(model)


def test_closing_frees_the_slots_while_the_model_lives():
    before = allocated()
    model = offload(tiny_model("mixtral", **LARGE), slots=10, device="cuda")
    generate(model)
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    assert allocated() - before > 10 * 12 * 2**20
    model.expert_cache.close()
    # Buffers and the key-value cache that transformers keeps are small.
    assert dense <= allocated() - before < dense + 2**21


def test_after_a_run_the_model_goes_with_everything():
    model = offload(tiny_model("gpt_oss"), "predictive", slots=9, device="cuda")
    generate(model, tokens=10)
    del model


def test_a_checkpoint_with_nan(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    last = sorted(key for key in tensors if "experts" in key)[-1]
    tensors[last].view(-1)[0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(InputError) as error:
        offload(open_checkpoint(tmp_path), slots=5, device="cuda")
    one_line(error, str(tmp_path), "NaN or infinite")


def test_a_checkpoint_that_shrinks_while_it_is_read(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 3])
    with pytest.raises(InputError) as error:
        offload(checkpoint, slots=5, device="cuda")
    one_line(error, str(tmp_path))
