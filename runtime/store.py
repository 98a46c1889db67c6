"""The host store: every expert once in host memory, one block of pinned bytes per layer."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from runtime.errors import OffloadError
from runtime.layout import ExpertLayout, LowLayout
from runtime.quantise import quantise

#: One expert read from somewhere: its layer, its id, and its parts by name.
Loaded = tuple[int, int, Mapping[str, Tensor]]


def available_bytes() -> int:
    """Host memory that can still be had, in bytes."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


class PinnedBlock:
    """Page-aligned host memory, registered with CUDA if *pin*; freed by :meth:`close`.

    torch's own pinned allocator rounds sizes up to powers of two; registering does not.
    """

    def __init__(self, size_bytes: int, *, pin: bool, what: str) -> None:
        self.what = what
        try:
            self._memory = _large_pages(size_bytes)
        except (OSError, ValueError, OverflowError) as error:
            raise self._refusal(size_bytes, "host", str(error)) from None
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._let_go: Any = None
        if pin:
            self._pin(size_bytes)

    def _pin(self, size_bytes: int) -> None:
        free = available_bytes()
        if size_bytes > free:
            raise self._refusal(size_bytes, "pinned host", f"only {free / 2**30:.1f} GiB are free")
        code = int(_cudart().cudaHostRegister(self.bytes.data_ptr(), size_bytes, 0))
        if code:
            raise self._refusal(size_bytes, "pinned host", f"CUDA error {code}")
        # Memory that stays registered after it is freed would spoil what comes to lie there.
        address = self.bytes.data_ptr()
        self._let_go = weakref.finalize(self, _unregister, address, self._memory)

    def _refusal(self, size_bytes: int, kind: str, why: str) -> OffloadError:
        return OffloadError(
            f"{self.what}: {size_bytes / 2**30:.2f} GiB of {kind} memory refused ({why}; "
            f"{available_bytes() / 2**30:.1f} GiB free), expected room for it; use a smaller "
            "model, or pageable memory (pin=False, --pageable), which copies at a fraction of "
            "the speed"
        )

    def close(self) -> None:
        """Unpin and free; the block's tensors must not be used any more."""
        if self._let_go is not None:
            self._let_go()
        self.bytes = torch.empty(0, dtype=torch.uint8)


def _large_pages(size_bytes: int) -> mmap.mmap:
    """Memory in pages of 2 MiB where the system has them: registered fast, and copied steadily.

    A copy engine that looks up every page of 4 KiB is slowed down by whoever else does.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, size_bytes)
    memory = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A child process must not make the pages that are registered the copied ones.
    for advice in (mmap.MADV_HUGEPAGE, mmap.MADV_DONTFORK):
        with contextlib.suppress(OSError):  # a kernel without the feature
            memory.madvise(advice)
    return memory


def _unregister(address: int, memory: mmap.mmap) -> None:
    """Let CUDA forget *memory*, which lies at *address* and lives until then."""
    _cudart().cudaHostUnregister(address)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class HostStore:
    """All experts of a model, packed, each in one contiguous block.

    *full* uint8 [stride_bytes] views lie at the expert's number; *low* ones hold the
    low-precision copies, once :meth:`add_low` has made them.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        layout: ExpertLayout,
        *,
        pin: bool = True,
    ) -> None:
        self.layers, self.experts = layers, experts
        self.layout = layout
        self.low_layout: LowLayout | None = None
        self.pin = pin
        #: Whether :meth:`close` leaves all as it is: the experts are another model's next.
        self.kept = False
        self._blocks: list[PinnedBlock] = []
        self._low_blocks: list[PinnedBlock] = []
        self.full: list[Tensor] = []
        self.low: list[Tensor] = []
        self._views: list[Mapping[str, Tensor]] = []

    def __len__(self) -> int:
        return self.layers * self.experts

    @property
    def size_bytes(self) -> int:
        """Bytes of host memory taken."""
        return sum(block.bytes.numel() for block in (*self._blocks, *self._low_blocks))

    def open_layer(self, layer: int) -> None:
        """Allocate the blocks of *layer*; layers are opened in order, as they are filled."""
        if layer * self.experts != len(self.full):
            raise ValueError(f"layer {layer} opened with {len(self.full)} experts stored")
        block = self._block(layer, self.layout.stride_bytes, "experts", self._blocks)
        self.full += block.unbind(0)
        self._views.append(self.layout.views(block))

    def _block(self, layer: int, stride_bytes: int, what: str, blocks: list[PinnedBlock]) -> Tensor:
        what = f"{what} of layer {layer}"
        block = PinnedBlock(self.experts * stride_bytes, pin=self.pin, what=what)
        blocks.append(block)
        return block.bytes.view(self.experts, stride_bytes)

    def parts(self, expert: int) -> dict[str, Tensor]:
        """The parts of *expert* as views of the store."""
        layer, id = divmod(expert, self.experts)
        return {name: view[id] for name, view in self._views[layer].items()}

    def put(self, loaded: Loaded) -> None:
        """Take in one expert, opening its layer first if need be."""
        layer, id, parts = loaded
        if layer * self.experts >= len(self.full):
            self.open_layer(layer)
        expert = layer * self.experts + id
        mine = self.parts(expert)
        for name, view in mine.items():
            view.copy_(parts[name])

    def add_low(self, low: LowLayout, device: torch.device) -> None:
        """Make low-precision copies of all experts, worked out on *device*; kept from then on.

        Copies at another precision give way. The device holds a piece of one expert at a time,
        and nothing afterwards. What fails or is interrupted leaves no copies.
        """
        if self.low_layout == low:
            return
        self._drop_low()
        try:
            for layer in range(self.layers):
                self._add_low_layer(layer, low, device)
        except BaseException:
            self._drop_low()
            raise
        finally:
            if device.type == "cuda":
                torch.cuda.empty_cache()
        self.low_layout = low

    def _add_low_layer(self, layer: int, low: LowLayout, device: torch.device) -> None:
        size = self.layout.size_bytes
        what = "low-precision experts"
        self.low += self._block(layer, low.stride_bytes, what, self._low_blocks).unbind(0)
        for expert in range(layer * self.experts, (layer + 1) * self.experts):
            flat = self.full[expert][:size].view(self.layout.dtype)
            quantise(flat, low, device=device, out=self.low[expert][: low.size_bytes])

    def _drop_low(self) -> None:
        """Free the low-precision copies; nobody may be using them."""
        self.low_layout = None
        self.low.clear()
        for block in self._low_blocks:
            block.close()
        self._low_blocks.clear()

    def fill(
        self, source: Iterable[Loaded], advance: Callable[[int], None] = lambda experts: None
    ) -> None:
        """Take in every expert of *source*; closed again if that fails."""
        try:
            for loaded in source:
                self.put(loaded)
                advance(1)
            if len(self.full) != len(self):
                raise OffloadError(
                    f"{len(self.full)} experts were loaded, expected {len(self)}: "
                    f"{self.layers} layers of {self.experts}"
                )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free all blocks, unless they are kept."""
        if self.kept:
            return
        self._drop_low()
        # Emptied, not replaced: the link holds on to these lists.
        for views in (self.full, self._views):
            views.clear()
        for block in self._blocks:
            block.close()
        self._blocks.clear()


class KeptStore:
    """The experts of one checkpoint, kept in host memory from model to model.

    *store* is None until :meth:`take`. Freed at the end of its ``with`` statement.
    """

    def __init__(self) -> None:
        self.store: HostStore | None = None

    def take(self, store: HostStore) -> None:
        """Keep *store*, which a model has filled, also when that model is closed."""
        store.kept = True
        self.store = store

    def __enter__(self) -> KeptStore:
        return self

    def __exit__(self, *error: object) -> None:
        if self.store is not None:
            self.store.kept = False
            self.store.close()
        self.store = None


def check_finite(parts: Mapping[str, Tensor], where: str) -> None:
    """Refuse NaN and infinite weights: they would spread over every output."""
    for name, values in parts.items():
        if not bool(torch.isfinite(values).all()):
            raise OffloadError(f"{where}: {name} holds NaN or infinite weights, expected numbers")


def experts_of(gates: Iterable[Any], *, check: bool = True) -> Iterable[Loaded]:
    """The experts of a model in memory, freeing each layer's own weights behind it."""
    for layer, gate in enumerate(gates):
        module = gate.experts
        whole = {name: getattr(module, name).detach() for name in _stacked(module)}
        for id in range(int(module.num_experts)):
            parts = {name: values[id] for name, values in whole.items()}
            if check:
                check_finite(parts, f"layer {layer} expert {id}")
            yield layer, id, parts
        whole.clear()
        drop_experts([gate])


def drop_experts(gates: Iterable[Any]) -> None:
    """Leave the experts to the store alone: what lies on ``meta`` could not even be moved."""
    for gate in gates:
        for name in _stacked(gate.experts):
            delattr(gate.experts, name)


def _stacked(module: Any) -> list[str]:
    """Names of the parameters of *module* that hold all of its experts."""
    return [name for name, p in module.named_parameters(recurse=False) if p.dim() > 1]
