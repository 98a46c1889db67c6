"""Strict reading of TOML tables into frozen dataclasses: every key known, none missing."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from traces.errors import InputError

T = TypeVar("T")

_SCALARS: dict[type, tuple[tuple[type[int | float | str], ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a text"),
}


def build(cls: type[T], values: Any, where: str, prefix: str = "") -> T:
    """An instance of dataclass *cls* from *values*, tables within tables.

    Numbers must be finite and above 0, or at least the field's ``metadata["least"]``. Raises
    :class:`InputError` with *where* (the file) and the dotted key.
    """
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: {prefix or 'file'} is {values!r}, expected a table")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise InputError(
                f"{where}: unknown key '{_join(prefix, key)}', expected {', '.join(fields)}"
            )
    hints = typing.get_type_hints(cls)
    made: dict[str, Any] = {}
    for name, spec in fields.items():
        if name in values:
            least = spec.metadata.get("least")
            made[name] = _value(hints[name], values[name], where, _join(prefix, name), least)
        elif not _has_default(spec):
            raise InputError(f"{where}: key '{_join(prefix, name)}' is missing")
    try:
        return cls(**made)
    except InputError as error:
        raise InputError(f"{where}: {prefix}: {error}") from None


def leaves(thing: Any, names: Iterable[str] | None = None, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all plain fields of dataclass *thing*, or of its fields *names* only.

    An optional field that is not given, or given as its default, is left out. A table of
    numbers by free names is one leaf.
    """
    for field in dataclasses.fields(thing):
        if names is not None and field.name not in names:
            continue
        value, path = getattr(thing, field.name), _join(prefix, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, prefix=path)
        elif not (_has_default(field) and value == _default(field)):
            yield path


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return (
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
    )


def _default(field: dataclasses.Field[Any]) -> Any:
    """What *field* holds when nothing is given; it must have a default."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _value(hint: Any, value: Any, where: str, key: str, least: float | None) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return _value(inner[0], value, where, key, least)
    if dataclasses.is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, where, key)
    if origin is tuple:
        if not isinstance(value, list):
            raise InputError(f"{where}: {key} is {value!r}, expected a list")
        return tuple(
            _value(inner[0], item, where, f"{key}[{i}]", least) for i, item in enumerate(value)
        )
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: {key} is {value!r}, expected a table")
        return {
            name: _value(inner[1], item, where, _join(key, name), least)
            for name, item in value.items()
        }
    return _scalar(hint, value, f"{where}: {key}", least)


def _scalar(kind: type, value: Any, what: str, least: float | None) -> Any:
    accepted, wanted = _SCALARS[kind]
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise InputError(f"{what} is {value!r}, expected {wanted}")
    if isinstance(value, str):
        if not value:
            raise InputError(f"{what} is empty, expected a text")
        return value
    number = float(value)
    bound = "above 0" if least is None else f"of at least {least:g}"
    if not math.isfinite(number) or (number <= 0 if least is None else number < least):
        raise InputError(f"{what} is {value!r}, expected {wanted} {bound}")
    return kind(value)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
