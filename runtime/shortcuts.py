"""Shorter ways through attention, taken while a decode step is compiled.

A token's projections to queries, keys and values read one input: as one matrix product they take
one kernel, and keep the memory as busy as a large matrix does. And query heads that share a
head of keys and values are so many rows of queries to it, for which nothing need be copied:
transformers does the same where nothing is compiled (``pack_gqa``). Sums are added in another
order; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: What attention modules call their projections of one input.
PROJECTIONS = ("q_proj", "k_proj", "v_proj")

#: transformers' attention by torch's own kernels, and what it may be asked for beside.
SDPA = "sdpa"
_STRANGE = ("softcap", "position_bias", "cache")


class Shortcuts:
    """The ways through *model*, whose weights are where they will be used.

    From now on the projections of an attention module are views of one matrix.
    """

    def __init__(self, model: nn.Module) -> None:
        found = map(_projections, model.modules())
        self._joined = [Joined(projections) for projections in found if projections]

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, passes of one token take them; each projection of a module must be asked once."""
        with ExitStack() as stack:
            for joined in self._joined:
                stack.enter_context(joined.asked_together())
            stack.enter_context(_packed())
            yield


class Joined:
    """Projections of one input as one matrix product."""

    def __init__(self, projections: Sequence[nn.Linear]) -> None:
        self._modules = projections
        self._sizes = [module.out_features for module in projections]
        self._weight = _share([module.weight for module in projections])
        biases = [module.bias for module in projections if module.bias is not None]
        self._bias = _share(biases) if biases else None
        #: What the projections of the present input are, for those not yet asked.
        self._made: list[Tensor | None] = [None] * len(projections)
        # The same functions every time: compiled code is kept by them.
        self._forwards = [self._forward(number) for number in range(len(projections))]

    @contextmanager
    def asked_together(self) -> Iterator[None]:
        """Inside, whichever is asked first works out all of them."""
        for module, forward in zip(self._modules, self._forwards, strict=True):
            module.forward = forward  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            for module in self._modules:
                del module.forward
            self._made = [None] * len(self._modules)

    def _forward(self, number: int) -> Callable[[Tensor], Tensor]:
        def forward(hidden: Tensor) -> Tensor:
            if self._made[number] is None:
                whole: Any = F.linear(hidden, self._weight, self._bias)
                self._made = list(whole.split(self._sizes, -1))
            made, self._made[number] = self._made[number], None
            assert made is not None
            return made

        return forward


def _projections(module: nn.Module) -> list[nn.Linear]:
    """Those of an attention *module*, if they are alike; else none."""
    found = [getattr(module, name, None) for name in PROJECTIONS]
    plain = [part for part in found if type(part) is nn.Linear and not part._forward_hooks]
    if len(plain) < len(found):
        return []
    first = plain[0]
    alike = all(
        part.weight.dtype == first.weight.dtype
        and part.in_features == first.in_features
        and (part.bias is None) == (first.bias is None)
        for part in plain
    )
    return plain if alike else []


def _share(parameters: Sequence[Tensor]) -> Tensor:
    """The rows of all *parameters* in one tensor, of which each is a view from now on."""
    whole = torch.cat([parameter.data for parameter in parameters])
    first = 0
    for parameter in parameters:
        parameter.data = whole[first : first + len(parameter)]
        first += len(parameter)
    return whole


@contextmanager
def _packed() -> Iterator[None]:
    """Inside, :func:`_attention` stands where transformers has its own for torch's kernels."""
    functions: Any = ALL_ATTENTION_FUNCTIONS
    ours = functions[SDPA] is sdpa_attention_forward
    if ours:
        functions[SDPA] = _attention
    try:
        yield
    finally:
        if ours:
            # What lies beneath is transformers' own again.
            del functions[SDPA]


def _attention(  # noqa: PLR0913
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention [B, 1, heads, D] of one token's *query* [B, heads, 1, D] to *key* and *value*
    [B, shared heads, S, D]; what is not of that kind is left to transformers.
    """
    batch, heads, tokens, size = query.shape
    shared = key.shape[1]
    one_mask = attention_mask is None or attention_mask.shape[1] == 1
    strange = [name for name in _STRANGE if more.get(name) is not None]
    if tokens > 1 or heads == shared or not one_mask or strange:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return found
    packed = query.reshape(batch, shared, heads // shared, size)
    out = F.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(batch, 1, heads, value.shape[3]), None
