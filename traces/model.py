"""What a trace's model looks like: the numbers that decide bytes and operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from traces.errors import InputError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

#: Weights that share one float16 scale in a low-precision copy.
QUANT_GROUP = 64


@dataclass(frozen=True)
class ModelSpec:
    """Dimensions of a Mixture-of-Experts model.

    *layers* counts the MoE layers, *experts* those of one layer, *top_k* how many of them a
    token takes. *expert_params* are the weights of one expert, *dense_params* all weights
    that are not routed experts. *kv_bytes_per_token* is the key-value cache of one token
    over all layers. Raises :class:`InputError` when a field makes no sense.
    """

    name: str
    layers: int
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    expert_params: int
    dense_params: int
    kv_bytes_per_token: int
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "str":
                if not isinstance(value, str) or not value:
                    raise InputError(f"model spec: {field.name} is {value!r}, expected a name")
                continue
            least = 0 if field.name in ("dense_params", "kv_bytes_per_token") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(
                    f"model spec: {field.name} is {value!r}, expected a whole number >= {least}"
                )
        if self.top_k > self.experts:
            raise InputError(
                f"model spec: top_k is {self.top_k}, expected at most experts = {self.experts}"
            )
        if self.dtype not in DTYPE_BYTES:
            raise InputError(
                f"model spec: dtype is {self.dtype!r}, expected one of {', '.join(DTYPE_BYTES)}"
            )

    @property
    def total_experts(self) -> int:
        """Routed experts over all layers."""
        return self.layers * self.experts

    @property
    def param_bytes(self) -> int:
        """Bytes of one weight."""
        return DTYPE_BYTES[self.dtype]

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert at full precision."""
        return self.expert_params * self.param_bytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything that is not a routed expert."""
        return self.dense_params * self.param_bytes

    def expert_bytes_at(self, bits: int) -> int:
        """Bytes of one expert at *bits* per weight, with a float16 scale per group."""
        scales = -(-self.expert_params // QUANT_GROUP) * 2
        return -(-self.expert_params * bits // 8) + scales

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "model spec") -> ModelSpec:
        """Build from *values*; unknown or absent fields raise :class:`InputError`."""
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise InputError(f"{where}: unknown field {key!r}, expected {', '.join(known)}")
        needed = [n for n, f in known.items() if f.default is dataclasses.MISSING]
        absent = [name for name in needed if name not in values]
        if absent:
            raise InputError(f"{where}: field {absent[0]!r} is missing")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
