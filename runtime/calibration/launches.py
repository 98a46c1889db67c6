"""What launching one layer takes: operations counted, and the host's time for each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from runtime.calibration.bench import Bench
from runtime.calibration.fits import line
from runtime.calibration.shapes import (
    FEW_LAYERS,
    LONG_PROMPT,
    MORE_LAYERS,
    PROMPT,
    TYPICAL,
    Decoding,
    offloaded,
    tiny_model,
)
from runtime.families import find_gates


class Launches(NamedTuple):
    """Work of one layer of a model that is launched kernel by kernel, and what a launch takes."""

    kernel_launch_s: float
    step_s: float
    attention_kernels: int
    expert_kernels: int
    prompt_kernels: int


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that are kernels: views, and reading shapes, are none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += not _is_view(func)
        return func(*args, **(kwargs or {}))


def _is_view(func: Any) -> bool:
    """Whether *func* returns a view of what it is given, without writing to it."""
    results = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in results)


def _operations(model: Any, tokens: int, device: torch.device) -> int:
    """Kernels that a forward pass of *tokens* tokens asks for."""
    ids = torch.arange(tokens, device=device).view(1, tokens) % 64
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        counter = _Counter()
        with counter:
            model(input_ids=ids, use_cache=False)
    return counter.count


def measure_launches(bench: Bench) -> Launches:
    """The model's code without graphs, all experts resident, one layer more against one less.

    Time and operations both from models of two depths: what does not depend on the depth is
    the step's. Experts' operations are the runtime's own, for a prompt of a few tokens, whose
    kernels are those of decode steps, and for one of many.
    """
    seconds, operations = [], []
    for layers in (FEW_LAYERS, MORE_LAYERS):
        model = tiny_model(TYPICAL, layers, bench).to(bench.device)
        model.set_experts_implementation("batched_mm")
        decoding = Decoding(model, bench)
        seconds.append(decoding.step_s(10 if bench.quick else 40))
        operations.append(_operations(model, 1, bench.device))
        del model, decoding
    found = line((FEW_LAYERS, MORE_LAYERS), seconds)
    per_layer = (operations[1] - operations[0]) / (MORE_LAYERS - FEW_LAYERS)
    few, many = _expert_operations(bench)
    resident = _resident_expert_operations(bench)
    return Launches(
        found.beta / per_layer, max(found.alpha, 1e-6), round(per_layer - resident), few, many
    )


def _resident_expert_operations(bench: Bench) -> int:
    """Operations of transformers' own experts of one layer for one token."""
    model = tiny_model(TYPICAL, 1, bench).to(bench.device)
    model.set_experts_implementation("batched_mm")
    return _within_experts(model, 1, bench)


def _expert_operations(bench: Bench) -> list[int]:
    """Operations of the runtime's experts of one layer for two prompts, all of them held."""
    with offloaded(TYPICAL, 2, bench) as model:
        return [_within_experts(model, tokens, bench) for tokens in (PROMPT, LONG_PROMPT)]


def _within_experts(model: Any, tokens: int, bench: Bench) -> int:
    """Operations of the first experts module of *model*."""
    experts = find_gates(model)[0].experts
    counted: list[int] = []
    inside = experts.forward

    def forward(*inputs: Any, **options: Any) -> Any:
        counter = _Counter()
        with counter:
            result = inside(*inputs, **options)
        counted.append(counter.count)
        return result

    ids = torch.arange(tokens, device=bench.device).view(1, tokens) % 64
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        experts.forward = forward
        try:
            model(input_ids=ids, use_cache=False)
        finally:
            del experts.forward
    return max(counted[0], 1)
