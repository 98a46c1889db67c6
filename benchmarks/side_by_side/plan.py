"""What is measured: the model's shape, the systems by name, and the task of one worker."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any

from traces.errors import InputError

#: All weights resident, in float32: what the errors of the others are measured against.
REFERENCE = "reference"
#: Whose error is the yardstick: how the model decodes where nothing is offloaded.
YARDSTICK = "transformers:batched_mm"
#: The share of a system that has one slot for each expert a token activates.
FLOOR = "floor"


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Qwen3-MoE model and the spread of its random weights.

    The spreads are standard deviations; *gate_spread* is that of the logarithm of the length
    of an expert's row in its gate. They were chosen for routing like a trained model's on
    text: docs/side_by_side.md has the figures.
    """

    layers: int
    experts: int
    top_k: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    moe_intermediate: int
    vocab: int
    weight_std: float = 0.02
    gate_std: float = 0.05
    gate_spread: float = 0.2
    embed_std: float = 2.0

    @property
    def total(self) -> int:
        """Experts of all layers."""
        return self.layers * self.experts


#: Qwen3-30B-A3B as its configuration gives it, but for the number of layers and the vocabulary.
FULL = Shape(
    layers=12,
    experts=128,
    top_k=8,
    hidden=2048,
    heads=32,
    kv_heads=4,
    head_dim=128,
    moe_intermediate=768,
    vocab=32_000,
)
#: An eighth of the width, with spreads that keep a layer's share in the hidden state what it is
#: in ``FULL``: routes as it does, and runs on a CPU.
NARROW = replace(
    FULL,
    hidden=256,
    heads=8,
    kv_heads=2,
    head_dim=64,
    moe_intermediate=96,
    weight_std=0.02 * 8**0.5,
    gate_std=0.05 * 8**0.5,
)
#: For a dry run. The spread grows as the width shrinks, or the experts would not matter.
TINY = Shape(
    layers=3,
    experts=8,
    top_k=2,
    hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    moe_intermediate=16,
    vocab=64,
    weight_std=0.2,
    gate_std=0.5,
)

#: What each kind of system can be told after its colon.
CHOICES = {
    REFERENCE: ("",),
    "transformers": ("batched_mm", "grouped_mm", "eager", "graph"),
    "accelerate": ("",),
    "moe-policylang": ("lru", "lfu"),
    "ours": None,
}
#: Kinds that are given a share of the experts as slots.
SHARED = ("moe-policylang", "ours")

#: The default table, in this order: the most telling first, should the time run out.
SYSTEMS = (
    YARDSTICK,
    "ours:lru@50%",
    "ours:predictive@50%",
    "moe-policylang:lru@50%",
    "transformers:graph",
    "accelerate",
    "ours:lru@floor",
    "ours:lru@100%",
    "ours:lru@25%",
    "ours:predictive@25%",
)


@dataclass(frozen=True)
class System:
    """One row: a *kind* of offloading, its *choice* of kernel or policy, its *share* of slots.

    *share* is a fraction of all experts, None for a kind without slots, 0 for the floor.
    """

    name: str
    kind: str
    choice: str = ""
    share: float | None = None

    @classmethod
    def parse(cls, name: str) -> System:
        """Read ``kind[:choice][@share]``, say ``ours:lru@50%``; else an :class:`InputError`."""
        head, _, share = name.partition("@")
        kind, _, choice = head.partition(":")
        if kind not in CHOICES:
            raise InputError(f"system {name!r}: {kind!r} is none of {', '.join(CHOICES)}")
        known = CHOICES[kind]
        if known is not None and choice not in known:
            raise InputError(
                f"system {name!r}: {choice!r} found after {kind}, expected "
                + (", ".join(known) if any(known) else "nothing")
            )
        if not choice and known is None:
            raise InputError(f"system {name!r}: no policy found, expected say {kind}:lru@50%")
        return cls(name, kind, choice, _share(name, kind, share))

    def slots(self, shape: Shape) -> int | None:
        """Slots over all layers, None without a limit of its own."""
        if self.share is None:
            return None
        return max(round(self.share * shape.total), shape.top_k)


def _share(name: str, kind: str, text: str) -> float | None:
    """The share of slots in *text* as a fraction, 0 for the floor."""
    if kind not in SHARED:
        if text:
            raise InputError(f"system {name!r}: a share {text!r} found, {kind} has no slots")
        return None
    if text == FLOOR and kind == "ours":
        return 0.0
    number = re.fullmatch(r"(\d+(?:\.\d+)?)%", text)
    if number is None or not 0 < float(number[1]) <= 100:
        raise InputError(f"system {name!r}: share {text!r} found, expected say 50%")
    return float(number[1]) / 100


@dataclass(frozen=True)
class Task:
    """All that one worker is told. Token counts are per run, at batch 1."""

    system: str
    shape: Shape
    device: str
    dtype: str
    prompt_tokens: int
    decode_tokens: int
    warmup_tokens: int
    forced_tokens: int
    seed: int
    compute: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        """The task that :meth:`to_dict` wrote."""
        return cls(**{**values, "shape": Shape(**values["shape"])})
