"""A profile as TOML text: plain tables, lists, texts and numbers, as ``tomllib`` reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def dumps(values: Mapping[str, Any], head: str = "") -> str:
    """*values* as TOML under the comment *head*; tables within tables, lists of tables."""
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    lines += [*_table(values, ())]
    return "\n".join(lines).strip() + "\n"


def _table(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """The lines of one table: its plain values first, or they would belong to another."""
    tables = {key: value for key, value in values.items() if _is_table(value)}
    for key, value in values.items():
        if key not in tables:
            yield f"{_key(key)} = {_value(value)}"
    for key, value in tables.items():
        inner = (*path, key)
        name = ".".join(map(_key, inner))
        for one in [value] if isinstance(value, Mapping) else value:
            plain = (
                not isinstance(value, Mapping) or not one or not all(map(_is_table, one.values()))
            )
            if plain:
                yield ""
                yield f"[{name}]" if isinstance(value, Mapping) else f"[[{name}]]"
            yield from _table(one, inner)


def _is_table(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(item, Mapping) for item in value)
    return isinstance(value, Mapping)


def _key(key: str) -> str:
    return key if _BARE_KEY.fullmatch(key) else _text(key)


def _text(text: str) -> str:
    # JSON leaves DEL as it is, TOML does not take it.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, int | float):
        return repr(value)
    raise TypeError(f"{value!r} cannot be written as TOML")
