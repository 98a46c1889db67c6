"""Import JSON lines: one object per (token, layer), under the field names in use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from traces.errors import InputError
from traces.importers.base import Imported, readable
from traces.importers.rows import Row, RowCollector
from traces.importers.spec import SpecOptions

#: Our word -> the names that recorders give the field.
NAMES = {
    "sequence": ("sequence", "request_id", "seq_id", "sequence_id", "req_id"),
    "position": ("position", "token_pos", "token_idx", "token_index", "pos"),
    "layer": ("layer", "layer_idx", "layer_id"),
    "experts": ("experts", "expert_ids", "selected_ids", "selected_experts", "topk_ids"),
    "weights": ("weights", "gate_weights", "topk_weights", "expert_weights"),
    "phase": ("phase",),
    "token": ("token", "token_id"),
}


def import_jsonl(path: Path, options: SpecOptions) -> Imported:
    """Read one JSON object per (token, layer), in any order.

    Fields, under any name of :data:`NAMES`: ``layer`` and ``experts`` are required;
    ``sequence`` (any id, else all is one sequence), ``position`` (else a new token begins where
    the layer does not grow), ``weights``, ``phase`` (else decode) and ``token`` may be there.
    """
    rows = RowCollector(path)
    for line, item in json_lines(path):
        rows.add(line, _row(rows, line, item))
    return rows.finish(options, f"{path.name}: routing log, JSON lines")


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line of *path* that is not empty."""
    try:
        with readable(path).open(encoding="utf-8") as file:
            for line, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    item = json.loads(text)
                except ValueError as error:
                    raise InputError(f"{path}: line {line}: not JSON: {error}") from None
                if not isinstance(item, dict):
                    raise InputError(f"{path}: line {line}: {text.strip():.40}, expected an object")
                yield line, item
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from None


def _row(rows: RowCollector, line: int, item: dict[str, Any]) -> Row:
    values: dict[str, Any] = {}
    for word, names in NAMES.items():
        values[word] = next((item[name] for name in names if item.get(name) is not None), None)
    for word in ("layer", "experts"):
        if values[word] is None:
            expected = " or ".join(NAMES[word])
            raise rows.error(line, f"{word} is missing, expected a field {expected}")
    for word in ("layer", "position", "token"):
        if values[word] is not None and not _whole(values[word]):
            raise rows.error(line, f"{word} {values[word]!r}, expected a whole number")
    if not isinstance(values["sequence"], str | int | None):
        raise rows.error(line, f"sequence {values['sequence']!r}, expected a name or number")
    for word, fits, kind in (("experts", _whole, "whole numbers"), ("weights", _number, "numbers")):
        found = values[word]
        if found is not None and not (isinstance(found, list) and all(map(fits, found))):
            raise rows.error(line, f"{word} {found!r:.40}, expected a list of {kind}")
    return Row(**values)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
