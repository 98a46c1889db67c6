"""What an expert does between its two matrices, read off the transformers module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from traces.errors import InputError

#: Activations that every kernel knows, by the name the kernels use.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

#: gpt-oss: ``(up + 1) * gate * sigmoid(alpha * gate)``, both clamped.
CLAMPED = "clamped_swiglu"


@dataclass(frozen=True)
class Gating:
    """How the first projection [.., width] becomes the input [.., I] of the second.

    Without a gate (*gated* false) *activation* is applied to it, and width is I. With one,
    width is 2 I: ``activation(gate) * up``, or the :data:`CLAMPED` form with its *alpha* and
    *limit*. *interleaved* alternates gate and up instead of putting all gates first.
    """

    activation: str
    gated: bool = True
    interleaved: bool = False
    alpha: float = 0.0
    limit: float = 0.0

    def apply(self, projected: Tensor) -> Tensor:
        """The activations [.., I] of *projected* [.., width], in its dtype."""
        if not self.gated:
            return ACTIVATIONS[self.activation](projected)
        if self.interleaved:
            gate, up = projected[..., ::2], projected[..., 1::2]
        else:
            gate, up = projected.chunk(2, dim=-1)
        if self.activation != CLAMPED:
            return ACTIVATIONS[self.activation](gate) * up
        gate = gate.clamp(max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        # In transformers' order: it matters where every step is rounded.
        return (up + 1) * (gate * torch.sigmoid(gate * self.alpha))


def gating_of(experts: Any) -> Gating:
    """The gating of the transformers module *experts*, whose weights may be on ``meta``.

    The module's own functions are asked, on a few numbers, not its names: one that computes
    nothing known here is an :class:`InputError` with its class and activation.
    """
    known: list[Gating] = []
    interleaved = not experts.is_concatenated
    if not experts.has_gate:
        known += [Gating(name, gated=False) for name in ACTIVATIONS]
        ask = experts.act_fn
    else:
        known += [Gating(name, interleaved=interleaved) for name in ACTIVATIONS]
        if hasattr(experts, "alpha") and hasattr(experts, "limit"):
            alpha, limit = float(experts.alpha), float(experts.limit)
            known.append(Gating(CLAMPED, True, interleaved, alpha, limit))
        ask = experts._apply_gate
    probe = _probe(experts.has_gate, interleaved)
    with torch.no_grad():
        answer = ask(probe.clone())
        for gating in known:
            ours = gating.apply(probe)
            if ours.shape == answer.shape and torch.allclose(ours, answer, atol=1e-5, rtol=1e-5):
                return _without_norm(experts, gating)
    raise InputError(
        f"{type(experts).__name__}: activation {_activation(experts)} is not supported, "
        f"expected one of {', '.join([*ACTIVATIONS, CLAMPED])}"
    )


def _without_norm(experts: Any, gating: Gating) -> Gating:
    """*gating*, unless the module normalises each expert's output, which no kernel here does."""
    if getattr(experts, "has_post_expert_norm", False):
        raise InputError(
            f"{type(experts).__name__}: normalises each expert's output, expected no such norm"
        )
    return gating


def _probe(gated: bool, interleaved: bool) -> Tensor:
    """A row [1, width] of numbers beyond any usual clamp, gate and up independent."""
    gate = torch.linspace(-12, 12, 193)
    if not gated:
        return gate[None]
    up = gate.roll(50) + 0.3
    return (torch.stack([gate, up], dim=1) if interleaved else torch.cat([gate, up])).view(1, -1)


def _activation(experts: Any) -> str:
    """A name for the activation of *experts*, for a message."""
    return type(experts.act_fn).__name__ if hasattr(experts, "act_fn") else "_apply_gate"
