"""Import the routed-experts arrays that serving engines return.

SGLang and vLLM can return, per request, an int32 array [tokens, layers, k]: as it is
(``.npy``), or as base64 text of its little-endian bytes, alone or within JSON.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.errors import InputError
from traces.importers.base import Imported, checked, readable
from traces.importers.jsonl import json_lines
from traces.importers.spec import Found, SpecOptions, resolve
from traces.model import ModelSpec
from traces.trace import TokenSequence

Routed = npt.NDArray[np.int64]

EXPERTS_KEYS = ("routed_experts",)
PROMPT_KEYS = ("prompt_tokens", "prompt_len", "prompt_length", "num_prompt_tokens")


def import_npy(path: Path, options: SpecOptions) -> Imported:
    """Read one array [tokens, layers, k] as one sequence, all decode."""
    try:
        with readable(path).open("rb") as file:
            array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable npy file: {error}") from None
    if not isinstance(array, np.ndarray) or array.ndim != 3 or not array.size:
        shape = getattr(array, "shape", "an archive")
        raise InputError(f"{path}: array has shape {shape}, expected [tokens, layers, k]")
    if array.dtype.kind not in "iu":
        raise InputError(f"{path}: array is {array.dtype}, expected integers")
    model = resolve(options, Found(path, array.shape[1], array.shape[2]))
    return _imported(path, model, iter([_sequence(0, array.astype(np.int64), 0)]))


def import_base64(path: Path, options: SpecOptions) -> Imported:
    """Read base64 text of one array as one sequence; layers and top-k must be said."""
    model = resolve(options, Found(path))
    try:
        text = readable(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as base64 text: {error}") from None
    return _imported(path, model, iter([_sequence(0, _decoded(text, model, str(path)), 0)]))


def import_responses(path: Path, options: SpecOptions) -> Imported:
    """Read responses with a ``routed_experts`` field, one sequence each.

    The file is a JSON object, a JSON list or JSON lines; the field may lie deep in an item and
    hold base64 text or nested lists. A prompt length beside it gives the prefill tokens.
    """
    items = list(_items(path))
    if not items:
        raise InputError(f"{path}: holds no responses, expected at least one")
    found = Found(path)
    where, first = items[0]
    value = _routed(first, where)
    if isinstance(value, list):
        shape = _listed(value, where).shape
        found = Found(path, shape[1], shape[2])
    model = resolve(options, found)
    return _imported(path, model, _responses(items, model), len(items))


def has_routed_experts(item: Any) -> bool:
    """Whether *item*, a value read from JSON, has a ``routed_experts`` field in it."""
    return _search(item, EXPERTS_KEYS) is not None


def _responses(
    items: list[tuple[str, dict[str, Any]]], model: ModelSpec
) -> Iterator[TokenSequence]:
    for index, (where, item) in enumerate(items):
        value = _routed(item, where)
        array = _listed(value, where) if isinstance(value, list) else _decoded(value, model, where)
        if array.shape[1:] != (model.layers, model.top_k):
            raise InputError(
                f"{where}: routed_experts has shape {array.shape}, "
                f"expected [tokens, {model.layers}, {model.top_k}]"
            )
        prompt = _search(item, PROMPT_KEYS)
        if prompt is not None and (not isinstance(prompt, int) or prompt < 0):
            raise InputError(f"{where}: prompt length {prompt!r}, expected a whole number")
        yield _sequence(index, array, min(prompt or 0, len(array)))


def _imported(
    path: Path, model: ModelSpec, sequences: Iterator[TokenSequence], count: int = 1
) -> Imported:
    source = f"{path.name}: routed experts returned by a serving engine"
    return Imported(model, checked(path, model, sequences), source, count=count)


def _sequence(index: int, array: Routed, prefill: int) -> TokenSequence:
    return TokenSequence(index, array, np.arange(len(array)), prefill)


def _items(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each response with the place to name in an error."""
    if path.suffix == ".jsonl":
        for line, item in json_lines(path):
            yield f"{path}: line {line}", item
        return
    try:
        whole = json.loads(readable(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise InputError(f"{path}: not JSON: {error}") from None
        for line, item in json_lines(path):
            yield f"{path}: line {line}", item
        return
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from None
    for index, item in enumerate(whole if isinstance(whole, list) else [whole]):
        if not isinstance(item, dict):
            raise InputError(f"{path}: item {index}: {item!r:.40}, expected an object")
        yield f"{path}: item {index}", item


def _routed(item: dict[str, Any], where: str) -> Any:
    value = _search(item, EXPERTS_KEYS)
    if not isinstance(value, str | list) or not value:
        found = "is missing" if value is None else f"is {value!r:.40}"
        raise InputError(f"{where}: routed_experts {found}, expected base64 text or lists")
    return value


def _search(item: Any, keys: tuple[str, ...]) -> Any:
    """The first value under one of *keys*, outermost first."""
    level = [item]
    while level:
        deeper: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                for key in keys:
                    if value.get(key) is not None:
                        return value[key]
                deeper.extend(value.values())
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                deeper.extend(value)
        level = deeper
    return None


def _listed(value: list[Any], where: str) -> Routed:
    try:
        array = np.array(value)
    except ValueError:
        array = np.zeros(0)
    if array.ndim != 3 or array.dtype.kind != "i":
        raise InputError(f"{where}: routed_experts is ragged, expected [tokens, layers, k] ids")
    return array.astype(np.int64)


def _decoded(text: str, model: ModelSpec, where: str) -> Routed:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise InputError(f"{where}: routed experts are not base64: {error}") from None
    token = 4 * model.layers * model.top_k
    if not data or len(data) % token:
        raise InputError(
            f"{where}: {len(data)} bytes of routed experts, expected a multiple of {token} = "
            f"4 bytes x {model.layers} layers x top-{model.top_k}"
        )
    return np.frombuffer(data, "<i4").reshape(-1, model.layers, model.top_k).astype(np.int64)
