"""Experts computed from their slots in plain torch: the CPU's path, and the rule for others."""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.kernels.banks import Banks
from runtime.kernels.gating import Gating
from runtime.kernels.routes import Call


def run_plain(banks: Banks, gating: Gating, call: Call) -> None:
    """Compute *call* slot by slot, in float32 throughout."""
    slots = call.slots()
    flat = slots.reshape(-1)
    rows = torch.zeros(flat.numel(), banks.output, device=flat.device)
    for slot in torch.unique(flat).tolist():
        if slot >= 0:
            pairs = (flat == slot).nonzero().squeeze(1)
            inputs = call.hidden[pairs // call.index.shape[1]].float()
            rows[pairs] = _expert(banks, gating, slot, inputs)
    call.write(rows, slots)


def _expert(banks: Banks, gating: Gating, slot: int, inputs: Tensor) -> Tensor:
    """The outputs float32 [n, H] of the expert in *slot* for *inputs* float32 [n, H]."""
    parts = {name: part.float() for name, part in banks.weights(slot).items()}
    first, transposed = banks.first, banks.layout.transposed
    inner = gating.apply(_linear(inputs, parts[first], parts.get(f"{first}_bias"), transposed))
    return _linear(inner, parts["down_proj"], parts.get("down_proj_bias"), transposed)


def _linear(inputs: Tensor, matrix: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """``inputs`` [n, in] times *matrix*, [in, out] if *transposed*, else [out, in]."""
    product = inputs @ (matrix if transposed else matrix.T)
    return product if bias is None else product + bias
