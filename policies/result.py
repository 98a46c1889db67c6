"""The result of one run: one JSON object, the same from both worlds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traces.errors import InputError

SCHEMA = "simctl.result/1"

#: Parts of the breakdown: where the GPU's time went, adding up to the total.
CAUSES = ("attention", "experts", "host", "stall_demand", "stall_late", "idle")

#: What each part of a result must hold: numbers, but for those in :data:`WORDS`.
PARTS = {
    "policy": ("name", "label", "parameters"),
    "model": ("name", "layers", "experts", "top_k"),
    "hardware": ("name", "kind"),
    "moves": ("demand", "prefetch", "cancelled", "wasted"),
    "bytes": ("demand", "prefetch", "wasted"),
    "prefetch": ("used", "late", "accuracy", "coverage", "timeliness"),
    "time": ("total_s", "prefill_s", "decode_s", "tokens_per_s", "tpot_s"),
    "time.tpot_s": ("mean", "p50", "p90", "p99"),
    "breakdown_s": CAUSES,
    "link": ("busy_s", "utilisation"),
    "memory": ("experts_bytes", "slots_bytes", "dense_bytes", "kv_bytes", "saving"),
    "bounds": ("compute_s", "transfer_s", "belady_missed"),
}
WORDS = {"name": str, "label": str, "kind": str, "parameters": Mapping, "tpot_s": Mapping}


@dataclass(frozen=True)
class Result:
    """What one run did and how long it took; ``docs/metrics.md`` defines every field.

    Seconds end in ``_s``, bytes in ``_bytes`` (or stand under a key that does).
    """

    trace: str
    policy: dict[str, Any]
    model: dict[str, Any]
    hardware: dict[str, Any]
    world: str
    slots: int
    pool: str
    batch: int
    seed: int
    steps: int
    tokens: int
    accesses: int
    held: int
    missed: int
    hit: int
    late: int
    hit_ratio: float
    held_ratio: float
    moves: dict[str, int]
    bytes: dict[str, int]
    prefetch: dict[str, float]
    time: dict[str, Any]
    breakdown_s: dict[str, float]
    link: dict[str, float]
    memory: dict[str, float]
    bounds: dict[str, float]
    decisions_sha256: str
    quality: dict[str, float] | None = None
    schedule: dict[str, float] | None = None
    scheduler: str = "none"
    depth: int = 2
    train: str = ""
    schema: str = SCHEMA

    @property
    def label(self) -> str:
        """The policy and its budget in a few words."""
        return f"{self.policy['label']} @ {self.slots} slots"

    @property
    def limit_s(self) -> float:
        """Seconds that no exact run on the GPU alone can beat."""
        return max(self.bounds["compute_s"], self.bounds["transfer_s"])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the schema first."""
        values = dataclasses.asdict(self)
        for part in ("quality", "schedule"):
            if values[part] is None:
                del values[part]
        return {"schema": values.pop("schema"), **values}

    def to_json(self) -> str:
        """The object as text: the same run gives the same bytes."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "result") -> Result:
        """Read what :meth:`to_dict` wrote; anything else raises :class:`InputError`."""
        if not isinstance(values, Mapping) or values.get("schema") != SCHEMA:
            found = values.get("schema") if isinstance(values, Mapping) else type(values).__name__
            raise InputError(f"{where}: schema is {found!r}, expected {SCHEMA!r}")
        needed = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        absent = sorted(needed - values.keys())
        if absent:
            raise InputError(f"{where}: field {absent[0]!r} is missing, expected {SCHEMA}")
        for field in dataclasses.fields(cls):
            kind = _KINDS.get(str(field.type), Mapping)
            if field.name in needed and not _is(values[field.name], kind):
                raise InputError(f"{where}: {_found(field.name, values[field.name], kind)}")
        _check_parts(values, where)
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})


_KINDS: dict[str, type[Any]] = {"str": str, "int": int, "float": float}

_NAMES: dict[type[Any], str] = {str: "text", int: "a whole number", float: "a number"}


def _is(value: object, kind: type[Any]) -> bool:
    kinds = (int, float) if kind is float else kind
    return isinstance(value, kinds) and not isinstance(value, bool)


def _found(name: str, value: object, kind: type[Any]) -> str:
    return f"{name} is {value!r:.60}, expected {_NAMES.get(kind, 'an object')}"


def _check_parts(values: Mapping[str, Any], where: str) -> None:
    for part, names in PARTS.items():
        inside: Any = values
        for step in part.split("."):
            inside = inside[step]
        for name in names:
            if name not in inside:
                raise InputError(f"{where}: field '{part}.{name}' is missing, expected {SCHEMA}")
            kind = WORDS.get(name, float)
            if not _is(inside[name], kind):
                raise InputError(f"{where}: {_found(f'{part}.{name}', inside[name], kind)}")


def read_json(path: Path, what: str) -> Any:
    """What the JSON file *path* holds; one that cannot be read is no *what*, an input error."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected {what} in JSON") from None
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error}), expected {what}") from None


def read_results(path: Path) -> list[Result]:
    """The results of a JSON file that holds one or a list of them."""
    data = read_json(path, "a result")
    if isinstance(data, dict) and "results" in data:
        data = data["results"]
    items = data if isinstance(data, list) else [data]
    if not items:
        raise InputError(f"{path}: holds no result")
    return [Result.from_dict(item, f"{path}: result {i}") for i, item in enumerate(items)]
