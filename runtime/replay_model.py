"""A model of real dimensions with random weights, its experts in host memory."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from math import prod

import torch

from runtime.dimensions import replay_model
from runtime.errors import OffloadError
from runtime.families import find_gates, model_spec
from runtime.layout import ExpertLayout
from runtime.load import fitting
from runtime.store import HostStore, Loaded, drop_experts
from traces.model import ModelSpec

#: Spread of the random expert weights: activations stay finite through all layers.
_SPREAD = 0.02


class ReplayModel:
    """Built once, run under many policies and budgets.

    *routing* gives layers, experts and top-k, *sizes* names the model whose dimensions one
    layer has; *spec* is what that must amount to.
    """

    def __init__(
        self, routing: ModelSpec, sizes: str | None, spec: ModelSpec, device: torch.device
    ) -> None:
        self.spec, self.device = spec, device
        with fitting(device):
            self.model = replay_model(routing, sizes, device)
        self.gates = find_gates(self.model)
        self.layout = ExpertLayout.of(self.gates[0].experts)
        self.store = HostStore(spec.layers, spec.experts, self.layout, pin=False)
        found = model_spec(self.model, spec.name)
        for name in ("layers", "experts", "top_k", "expert_params"):
            if getattr(found, name) != getattr(spec, name):
                raise OffloadError(
                    f"{spec.name}: the model that was built has {name} {getattr(found, name)}, "
                    f"expected {getattr(spec, name)}"
                )

    def fill(self, *, pin: bool, seed: int, advance: Callable[[int], None]) -> None:
        """Draw the experts' weights into the store, telling *advance* of each expert."""
        self.store.pin = pin and self.device.type == "cuda"
        drawn = random_experts(self.layout, self.spec.layers, self.spec.experts, self.device, seed)
        self.store.fill(drawn, advance)
        drop_experts(self.gates)

    def close(self) -> None:
        """Free model and store."""
        self.store.close()
        del self.model, self.gates
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def random_experts(
    layout: ExpertLayout, layers: int, experts: int, device: torch.device, seed: int
) -> Iterator[Loaded]:
    """Weights for every expert, drawn on *device*, where that is fast."""
    source = torch.Generator(device).manual_seed(seed)
    flat = torch.empty(layout.params, dtype=layout.dtype, device=device)
    parts = {p.name: flat[p.first : p.first + prod(p.shape)].view(p.shape) for p in layout.parts}
    for layer in range(layers):
        for id in range(experts):
            flat.normal_(std=_SPREAD, generator=source)
            yield layer, id, parts
