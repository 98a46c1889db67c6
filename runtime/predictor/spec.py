"""What a predictor is made for, and how large it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from traces.errors import InputError
from traces.model import ModelSpec

#: Fields in which a predictor and the model whose routing it forecasts must agree.
MODEL_FIELDS = ("layers", "experts", "top_k")


@dataclass(frozen=True)
class PredictorSpec:
    """The model that is forecast (*model* to *vocabulary*) and the sizes of the predictor.

    *d_ff* is the width inside a feed-forward part, *d_kv* of one attention head, *blocks* the
    depth of encoder and of decoder. *buckets* and *distance* are T5's relative positions. *tail*
    tokens of the prompt are read by the decoder, too, before the decoded ones: cross-attention
    has no positions, and the first decoded tokens follow from the prompt's last. *windows* are
    the spans, in tokens, over which reuse is forecast, rising.
    """

    model: str
    layers: int
    experts: int
    top_k: int
    vocabulary: int
    d_model: int = 32
    d_ff: int = 2048
    heads: int = 8
    d_kv: int = 16
    blocks: int = 6
    buckets: int = 32
    distance: int = 128
    tail: int = 16
    windows: tuple[int, ...] = (1, 2, 4, 8)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type != "int":
                continue
            least = {"tail": 0, "buckets": 4}.get(field.name, 1)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"predictor: {field.name} is {value!r}, expected {least} or more")
        rising = list(self.windows) == sorted(set(self.windows))
        if not self.windows or not rising or self.windows[0] < 1:
            raise InputError(
                f"predictor: windows are {self.windows}, expected rising numbers of tokens"
            )

    @property
    def paths(self) -> int:
        """Scores of one token's path: layers times experts."""
        return self.layers * self.experts

    @property
    def inner(self) -> int:
        """Width of all heads of an attention together."""
        return self.heads * self.d_kv

    @property
    def start(self) -> int:
        """The id that every prompt begins with, so that none is empty."""
        return self.vocabulary

    def check_model(self, model: ModelSpec, where: str) -> None:
        """Raise :class:`InputError` where *model*, of the trace *where*, is of another shape."""
        for field in MODEL_FIELDS:
            found, expected = getattr(model, field), getattr(self, field)
            if found != expected:
                raise InputError(
                    f"{where}: model {model.name} has {field} = {found}, expected {expected}: "
                    f"the predictor was trained for {self.model}"
                )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return {**dataclasses.asdict(self), "windows": list(self.windows)}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> PredictorSpec:
        """Build from *values*; unknown, absent or wrong fields raise :class:`InputError`."""
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or sorted(values) != sorted(names):
            found = ", ".join(values) if isinstance(values, Mapping) else repr(values)
            raise InputError(f"{where}: spec has {found:.80}, expected {', '.join(names)}")
        windows = values["windows"]
        whole = isinstance(windows, list) and all(isinstance(w, int) for w in windows)
        if not whole or not isinstance(values["model"], str):
            raise InputError(f"{where}: spec has windows {windows!r:.60}, expected whole numbers")
        try:
            return cls(**{**values, "windows": tuple(windows)})
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
