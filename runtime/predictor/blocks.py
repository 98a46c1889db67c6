"""The parts of a T5 stack (Raffel et al., arXiv 1910.10683), in the shapes of a predictor.

As in T5: RMS norms before each part, no biases, attention without scaling, relative positions in
self-attention alone, one table of them for all blocks of a stack, ReLU in the feed-forward part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from runtime.predictor.spec import PredictorSpec

#: Added to the score of a key that must not be seen: finite, so that no row becomes NaN.
MASKED = -1e9

#: Keys and values of one attention, each [B, heads, S, d_kv].
KeysValues = tuple[Tensor, Tensor]

#: Called with a block's number and its new keys and values; gives back all that it may attend to.
Remember = Callable[[int, KeysValues], KeysValues]


def bucket(distance: Tensor, buckets: int, furthest: int, *, both_ways: bool) -> Tensor:
    """T5's bucket of each relative position key - query.

    Half of the buckets are exact, the rest grow logarithmically up to *furthest*. With
    *both_ways* later keys have buckets of their own, else all later keys share bucket 0.
    """
    offset = torch.zeros_like(distance)
    if both_ways:
        buckets //= 2
        offset = (distance > 0).to(distance.dtype) * buckets
        away = distance.abs()
    else:
        away = (-distance).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(away.clamp(min=1).float() / exact) / math.log(furthest / exact)
    far = (exact + (ratio * (buckets - exact)).to(distance.dtype)).clamp(max=buckets - 1)
    return offset + torch.where(away < exact, away, far)


class RelativeBias(nn.Module):
    """A learned addition to attention scores for each head and bucket of relative position."""

    def __init__(self, spec: PredictorSpec, causal: bool) -> None:
        super().__init__()
        self.spec, self.causal = spec, causal
        self.table = nn.Embedding(spec.buckets, spec.heads)
        nn.init.normal_(self.table.weight, std=spec.d_model**-0.5)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The bias [..., heads, Q, K] of positions *queries* [..., Q] towards *keys* [K].

        Causal: later keys are masked.
        """
        distance = keys - queries[..., None]
        spec = self.spec
        found = bucket(distance, spec.buckets, spec.distance, both_ways=not self.causal)
        bias: Tensor = self.table(found).movedim(-1, -3)
        if self.causal:
            bias = bias.masked_fill((distance > 0).unsqueeze(-3), MASKED)
        return bias


class Attention(nn.Module):
    """Attention of *heads* heads, *d_kv* wide each; scores are not scaled, T5 initialises so."""

    def __init__(self, spec: PredictorSpec, dropout: float) -> None:
        super().__init__()
        self.heads = spec.heads
        self.q = nn.Linear(spec.d_model, spec.inner, bias=False)
        self.k = nn.Linear(spec.d_model, spec.inner, bias=False)
        self.v = nn.Linear(spec.d_model, spec.inner, bias=False)
        self.o = nn.Linear(spec.inner, spec.d_model, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.q.weight, std=(spec.d_model * spec.d_kv) ** -0.5)
        nn.init.normal_(self.k.weight, std=spec.d_model**-0.5)
        nn.init.normal_(self.v.weight, std=spec.d_model**-0.5)
        nn.init.normal_(self.o.weight, std=spec.inner**-0.5)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1).transpose(1, 2)

    def keys_values(self, x: Tensor) -> KeysValues:
        """Keys and values of *x* [B, S, d_model]."""
        return self._split(self.k(x)), self._split(self.v(x))

    def forward(self, x: Tensor, known: KeysValues, bias: Tensor) -> Tensor:
        """What *x* [B, Q, d_model] gathers from *known*; *bias* broadcasts to [B, heads, Q, K]."""
        keys, values = known
        scores = self._split(self.q(x)) @ keys.transpose(-1, -2) + bias
        weights = self.dropout(torch.softmax(scores, dim=-1))
        gathered: Tensor = self.o((weights @ values).transpose(1, 2).flatten(2))
        return gathered


class FeedForward(nn.Module):
    """d_model to d_ff and back, with a ReLU between."""

    def __init__(self, spec: PredictorSpec, dropout: float) -> None:
        super().__init__()
        self.wi = nn.Linear(spec.d_model, spec.d_ff, bias=False)
        self.wo = nn.Linear(spec.d_ff, spec.d_model, bias=False)
        self.dropout = nn.Dropout(dropout)
        nn.init.normal_(self.wi.weight, std=spec.d_model**-0.5)
        nn.init.normal_(self.wo.weight, std=spec.d_ff**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Of *x* [..., d_model], as many again."""
        made: Tensor = self.wo(self.dropout(torch.relu(self.wi(x))))
        return made


class Block(nn.Module):
    """Self-attention, in a decoder cross-attention, and a feed-forward part."""

    def __init__(self, spec: PredictorSpec, dropout: float, *, cross: bool) -> None:
        super().__init__()
        self.self_norm = nn.RMSNorm(spec.d_model, eps=1e-6)
        self.self_attention = Attention(spec, dropout)
        self.cross_norm = nn.RMSNorm(spec.d_model, eps=1e-6) if cross else None
        self.cross_attention = Attention(spec, dropout) if cross else None
        self.forward_norm = nn.RMSNorm(spec.d_model, eps=1e-6)
        self.feed_forward = FeedForward(spec, dropout)
        self.dropout = nn.Dropout(dropout)


class Stack(nn.Module):
    """An encoder, or with *causal* a decoder, over states that are embedded already."""

    def __init__(self, spec: PredictorSpec, dropout: float, *, causal: bool) -> None:
        super().__init__()
        self.positions = RelativeBias(spec, causal)
        self.blocks = nn.ModuleList(Block(spec, dropout, cross=causal) for _ in range(spec.blocks))
        self.norm = nn.RMSNorm(spec.d_model, eps=1e-6)
        self.dropout = nn.Dropout(dropout)

    def memory(self, states: Tensor) -> list[KeysValues]:
        """What each block's cross-attention attends to, of the encoder's *states* [B, S, d]."""
        return [block.cross_attention.keys_values(states) for block in self.blocks]  # type: ignore[operator, union-attr]

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        memory: Sequence[KeysValues] = (),
        memory_bias: Tensor | None = None,
        remember: Remember = lambda number, fresh: fresh,
    ) -> Tensor:
        """The states [B, S, d_model] of embeddings *x*; a decoder attends to *memory* as well."""
        x = self.dropout(x)
        for number, block in enumerate(self.blocks):
            normed = block.self_norm(x)  # type: ignore[operator]
            known = remember(number, block.self_attention.keys_values(normed))  # type: ignore[operator, union-attr]
            x = x + self.dropout(block.self_attention(normed, known, bias))  # type: ignore[operator]
            if memory:
                normed = block.cross_norm(x)  # type: ignore[operator]
                gathered = block.cross_attention(normed, memory[number], memory_bias)  # type: ignore[operator]
                x = x + self.dropout(gathered)
            x = x + self.dropout(block.feed_forward(block.forward_norm(x)))  # type: ignore[operator]
        made: Tensor = self.dropout(self.norm(x))
        return made
