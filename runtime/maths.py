"""Ways to compute experts from slots, and on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.engine import Engine
from runtime.families import Gate
from runtime.kernels import FusedExperts, ReferenceExperts, gating_of
from runtime.store import HostStore

#: Hidden states [T, H], experts [T, k], weights [T, k] and the layer's table [E].
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Call(Protocol):
    """One layer's experts under way: groups are computed as they land, then summed up."""

    def group(self) -> None:
        """Compute what the table shows."""
        ...

    def add(self, rows: Tensor) -> None:
        """Add *rows* [T, H] that were computed elsewhere."""
        ...

    def finish(self) -> Tensor:
        """The sums [T, H]."""
        ...


class Maths(Protocol):
    """A way to compute experts from slots."""

    def begin(
        self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor, table: Tensor
    ) -> Call:
        """Start a layer's experts; *table* int32 [E] says where each lies."""
        ...


class _FusedCall:
    def __init__(self, kernels: FusedExperts, inputs: Inputs) -> None:
        self._kernels, self._inputs = kernels, inputs
        self._out: Tensor | None = None

    def group(self) -> None:
        first = self._out is None
        if self._out is None:
            self._out = torch.empty(self._inputs[0].shape, device=self._inputs[0].device)
        hidden, index, weights, table = self._inputs
        self._kernels.run(hidden, index, weights, table, self._out, accumulate=not first)

    def add(self, rows: Tensor) -> None:
        self._out = rows.float() if self._out is None else self._out + rows

    def finish(self) -> Tensor:
        hidden = self._inputs[0]
        return torch.zeros_like(hidden) if self._out is None else self._out.to(hidden.dtype)


class Fused:
    """Our kernels: experts are read in place, sums are kept in float32."""

    def __init__(self, engine: Engine, gates: Sequence[Gate]) -> None:
        bank = engine.bank
        self.kernels = FusedExperts(
            bank.layout,
            bank.full,
            gating_of(gates[0].experts),
            top_k=gates[0].top_k,
            low_layout=bank.low_layout,
            low=bank.low,
        )

    def begin(
        self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor, table: Tensor
    ) -> Call:
        return _FusedCall(self.kernels, (hidden, index, weights, table))


class _ReferenceCall:
    def __init__(self, experts: ReferenceExperts, inputs: Inputs) -> None:
        self._experts = experts
        self._hidden, self._index, self._weights, self._table = inputs
        self._more: Tensor | None = None
        experts.begin(self._hidden, self._index, self._weights)

    def group(self) -> None:
        self._experts.add(self._table[self._index])

    def add(self, rows: Tensor) -> None:
        self._more = rows if self._more is None else self._more + rows

    def finish(self) -> Tensor:
        total = self._experts.finish()
        return total if self._more is None else total + self._more.to(total.dtype)


class Reference:
    """transformers' own kernels on the slots.

    *kernel* ``generate`` is what ``generate`` takes: batched_mm for one token per sequence on
    a GPU, else grouped_mm.
    """

    def __init__(self, engine: Engine, gates: Sequence[Gate], kernel: str = "generate") -> None:
        bank, device = engine.bank, engine.lanes.device
        decode = "batched_mm" if device.type == "cuda" else "grouped_mm"
        names = (decode, "grouped_mm") if kernel == "generate" else (kernel, kernel)
        #: Whether the step under way runs one token of each sequence; set by its driver.
        self.decoding = False
        self._decode, self._prefill = (
            [
                ReferenceExperts(
                    bank.layout,
                    bank.full,
                    gate.experts,
                    name,
                    low_layout=bank.low_layout,
                    low=bank.low,
                )
                for gate in gates
            ]
            for name in names
        )

    def begin(
        self, layer: int, hidden: Tensor, index: Tensor, weights: Tensor, table: Tensor
    ) -> Call:
        experts = (self._decode if self.decoding else self._prefill)[layer]
        return _ReferenceCall(experts, (hidden, index, weights, table))


class CpuExperts:
    """Experts computed by the CPU from the store, with all of its cores."""

    def __init__(self, store: HostStore, gates: Sequence[Gate]) -> None:
        self._store = store
        self._gating = gating_of(gates[0].experts)

    def rows(
        self, layer: int, experts: Sequence[int], hidden: Tensor, index: Tensor, weights: Tensor
    ) -> Tensor:
        """What *experts* of *layer* add to each token, float32 [T, H] on the inputs' device."""
        device = hidden.device
        hidden, index, weights = hidden.cpu(), index.cpu(), weights.cpu()
        total = torch.zeros(hidden.shape, dtype=torch.float32)
        for expert in experts:
            token, place = torch.where(index == expert - layer * self._store.experts)
            rows = self._expert(expert, hidden[token], self._gating.apply)
            weighted = rows.float() * weights[token, place].float().unsqueeze(1)
            total.index_add_(0, token, weighted)
        return total.to(device)

    def _expert(self, expert: int, hidden: Tensor, gate: Callable[[Tensor], Tensor]) -> Tensor:
        """One expert on *hidden* [n, H], at the store's precision."""
        parts, transposed = self._store.parts(expert), self._store.layout.transposed
        first = "gate_up_proj" if "gate_up_proj" in parts else "up_proj"

        def project(rows: Tensor, name: str) -> Tensor:
            weight = parts[name].T if transposed else parts[name]
            return F.linear(rows, weight, parts.get(f"{name}_bias"))

        return project(gate(project(hidden, first)), "down_proj")
