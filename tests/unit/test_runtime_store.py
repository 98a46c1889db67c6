"""The host store: one block per layer, pinned or refused, and everything given back."""

from __future__ import annotations

import gc
import weakref

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

import runtime.store  # noqa: E402
from runtime.errors import OffloadError  # noqa: E402
from runtime.families import find_gates  # noqa: E402
from runtime.layout import ExpertLayout, LowLayout  # noqa: E402
from runtime.quantise import quantise  # noqa: E402
from runtime.store import (  # noqa: E402
    HostStore,
    KeptStore,
    PinnedBlock,
    available_bytes,
    experts_of,
)
from tests.helpers_kernels import LAYOUTS, experts_module  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402
from traces.errors import InputError  # noqa: E402

CPU = torch.device("cpu")


class Cuda:
    """CUDA's registering of host memory: counts, and refuses after *most* blocks."""

    def __init__(self, most):
        self.most, self.registered = most, []
        self.freed = []

    def cudaHostRegister(self, address, size_bytes, flags):
        if len(self.registered) >= self.most:
            return 2
        self.registered.append((address, size_bytes))
        return 0

    def cudaHostUnregister(self, address):
        self.freed.append(address)
        return 0


@pytest.fixture
def cuda(monkeypatch):
    made = Cuda(99)
    monkeypatch.setattr(runtime.store, "_cudart", lambda: made)
    return made


def loaded(module, layers=2):
    """Every expert of *module*, as each of *layers* has it, layer by layer doubled."""
    names = [part.name for part in ExpertLayout.of(module).parts]
    for layer in range(layers):
        for id in range(module.num_experts):
            yield layer, id, {n: getattr(module, n).detach()[id] * 2**layer for n in names}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_part_lies_where_the_layout_says(kind, dtype):
    module = experts_module(kind, dtype)
    layout = ExpertLayout.of(module)
    store = HostStore(2, module.num_experts, layout, pin=False)
    seen = []
    store.fill(loaded(module), seen.append)
    assert len(seen) == len(store) == len(store.full) == 16
    assert store.size_bytes == 16 * layout.stride_bytes
    for layer, id, parts in loaded(module):
        expert = layer * 8 + id
        mine = store.parts(expert)
        for name, value in parts.items():
            assert torch.equal(mine[name], value)
            part = layout.part(name)
            flat = store.full[expert][: layout.size_bytes].view(dtype)
            assert torch.equal(flat[part.first :][: value.numel()].view(part.shape), value)


def test_low_copies_are_made_once():
    module = experts_module("concatenated", torch.float32)
    layout = ExpertLayout.of(module)
    store = HostStore(2, 8, layout, pin=False)
    store.fill(loaded(module))
    low = LowLayout(layout, 4)
    store.add_low(low, CPU)
    first = list(store.low)
    store.add_low(LowLayout(layout, 4), CPU)
    assert [a is b for a, b in zip(first, store.low, strict=True)] == [True] * 16
    assert store.size_bytes == 16 * (layout.stride_bytes + low.stride_bytes)
    for expert in (0, 7, 15):
        flat = store.full[expert][: layout.size_bytes].view(torch.float32)
        assert torch.equal(store.low[expert][: low.size_bytes], quantise(flat, low))


def test_low_copies_of_another_precision_take_their_place():
    module = experts_module("concatenated", torch.float32)
    layout = ExpertLayout.of(module)
    store = HostStore(2, 8, layout, pin=False)
    store.fill(loaded(module))
    link = store.low
    for bits in (4, 8):
        low = LowLayout(layout, bits)
        store.add_low(low, CPU)
        assert store.size_bytes == 16 * (layout.stride_bytes + low.stride_bytes)
        flat = store.full[9][: layout.size_bytes].view(torch.float32)
        assert torch.equal(link[9][: low.size_bytes], quantise(flat, low))
    store.close()
    assert store.size_bytes == 0


def test_low_copies_that_fail_leave_none(cuda):
    """The second layer's weights are no numbers."""
    module = experts_module("concatenated", torch.float32)
    layout = ExpertLayout.of(module)
    store = HostStore(2, 8, layout, pin=True)
    store.fill(loaded(module))
    store.parts(9)["down_proj"].fill_(float("nan"))
    with pytest.raises(InputError, match="not finite"):
        store.add_low(LowLayout(layout, 4), CPU)
    assert store.low == []
    assert store.size_bytes == 16 * layout.stride_bytes
    assert len(cuda.freed) == 2
    store.parts(9)["down_proj"].fill_(1.0)
    store.add_low(LowLayout(layout, 4), CPU)
    assert len(store.low) == 16
    store.close()


def test_a_kept_store_outlives_the_models_that_use_it():
    module = experts_module("concatenated", torch.float32)
    store = HostStore(1, 8, ExpertLayout.of(module), pin=False)
    store.fill(loaded(module, layers=1))
    with KeptStore() as kept:
        assert kept.store is None
        kept.take(store)
        store.close()
        assert kept.store is store
        assert len(store.full) == 8
    assert store.size_bytes == 0
    assert kept.store is None


def test_too_few_experts_are_refused_and_freed():
    module = experts_module("concatenated", torch.float32)
    store = HostStore(3, 8, ExpertLayout.of(module), pin=False)
    with pytest.raises(OffloadError, match=r"^16 experts were loaded, expected 24: 3 layers of 8$"):
        store.fill(loaded(module))
    assert store.size_bytes == 0


def test_a_source_that_fails_or_is_interrupted_leaves_nothing(cuda):
    module = experts_module("concatenated", torch.float32)

    def source(error):
        yield from loaded(module, layers=1)
        raise error

    for error in (OSError("gone"), KeyboardInterrupt()):
        store = HostStore(2, 8, ExpertLayout.of(module), pin=True)
        with pytest.raises(type(error)):
            store.fill(source(error))
        assert store.size_bytes == 0
    assert cuda.freed == [address for address, _ in cuda.registered]


def test_layers_come_in_order():
    module = experts_module("concatenated", torch.float32)
    store = HostStore(2, 8, ExpertLayout.of(module), pin=False)
    with pytest.raises(ValueError, match="layer 1 opened with 0 experts stored"):
        store.open_layer(1)


def test_blocks_are_registered_whole_and_let_go_once(cuda):
    module = experts_module("concatenated", torch.float32)
    layout = ExpertLayout.of(module)
    store = HostStore(2, 8, layout, pin=True)
    store.fill(loaded(module))
    assert [size for _, size in cuda.registered] == [8 * layout.stride_bytes] * 2
    assert [a for a, _ in cuda.registered] == [store.full[n].data_ptr() for n in (0, 8)]
    assert all(address % 4096 == 0 for address, _ in cuda.registered)
    store.close()
    store.close()
    assert cuda.freed == [address for address, _ in cuda.registered]
    assert store.size_bytes == 0


def test_closing_gives_memory_back_to_those_that_still_hold_the_lists():
    module = experts_module("concatenated", torch.float32)
    store = HostStore(1, 8, ExpertLayout.of(module), pin=False)
    store.fill(loaded(module, layers=1))
    held, memory = store.full, weakref.ref(store._blocks[0]._memory)
    store.close()
    gc.collect()
    assert memory() is None
    assert held == []


@pytest.mark.parametrize("most", [0, 1])
def test_pinning_refused(monkeypatch, most):
    cuda = Cuda(most)
    monkeypatch.setattr(runtime.store, "_cudart", lambda: cuda)
    module = experts_module("concatenated", torch.float32)
    store = HostStore(2, 8, ExpertLayout.of(module), pin=True)
    with pytest.raises(OffloadError) as error:
        store.fill(loaded(module))
    text = str(error.value)
    assert text.startswith(f"experts of layer {most}: 0.00 GiB of pinned host memory refused (CUDA")
    assert "error 2; " in text
    assert "pin=False" in text
    assert "\n" not in text
    assert store.size_bytes == 0
    assert len(cuda.freed) == most


def test_more_than_the_machine_has(cuda, monkeypatch):
    assert 2**20 < available_bytes() < 2**50
    with pytest.raises(OffloadError, match=r"^x: .* GiB of host memory refused"):
        PinnedBlock(2**62, pin=False, what="x")
    monkeypatch.setattr(runtime.store, "available_bytes", lambda: 2**30)
    # A refusal of the machine's own would come later, or never: when pages are touched.
    with pytest.raises(OffloadError, match=r"refused \(only 1\.0 GiB are free; 1\.0 GiB free\)"):
        PinnedBlock(2**30 + 1, pin=True, what="x")
    assert cuda.registered == []


def test_available_memory_without_proc(monkeypatch):
    def gone(*arguments, **options):
        raise OSError("no such file")

    monkeypatch.setattr("builtins.open", gone)
    assert available_bytes() > 2**20


def test_a_model_in_memory_is_taken_layer_by_layer():
    """While a layer is read, those before have no weights of their own any more."""
    model = tiny_model("mixtral")
    gates = find_gates(model)
    expected = [gate.experts.down_proj.detach().clone() for gate in gates]
    left = []
    for layer, id, parts in experts_of(gates):
        assert torch.equal(parts["down_proj"], expected[layer][id])
        left.append(sum(hasattr(gate.experts, "down_proj") for gate in gates))
    assert left == [3] * 8 + [2] * 8 + [1] * 8
    assert not any(hasattr(gate.experts, "down_proj") for gate in gates)
