"""Forecasts of a trained predictor, made before a run: a file beside the trace.

A compressed numpy archive. Its arrays, for T tokens, L layers, E experts:

- ``header``: JSON: version, model, trace, predictor, windows;
- ``sequences`` int32 [n], ``starts`` int64 [n + 1], ``first_positions`` int32 [n]: which rows
  belong to which sequence;
- ``tokens`` int32 [T]: the token ids that were read;
- ``experts`` int16 [T, L, m], ``scores`` uint8 [T, L, m]: the most likely experts of a token, best
  first, with 255 times their probability;
- ``reuse`` uint8 [T, W, L, E]: 255 times the probability that an expert is used in the next
  ``windows[w]`` tokens.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from traces.errors import InputError, first_line
from traces.model import ModelSpec
from traces.trace import FloatArray, IntArray, TokenSequence, Trace
from traces.writing import replacing

VERSION = 1

#: What stands for probability 1.
FULL = 255

_KINDS = {
    "sequences": ("i", 1),
    "starts": ("i", 1),
    "first_positions": ("i", 1),
    "tokens": ("i", 1),
    "experts": ("i", 3),
    "scores": ("u", 3),
    "reuse": ("u", 4),
}
_SHAPE = ("layers", "experts", "top_k")


def trace_fingerprint(model: ModelSpec, sequences: Iterable[TokenSequence]) -> str:
    """A hash of all that a forecast of *sequences* depends on: the model's shape, token ids.

    Not of the routing: what a predictor says does not depend on what the gates chose.
    """
    shape = {name: getattr(model, name) for name in ("name", *_SHAPE)}
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True).encode())
    for sequence in sequences:
        digest.update(np.array([sequence.id, sequence.prefill, len(sequence)], np.int64).tobytes())
        digest.update(np.ascontiguousarray(sequence.positions, np.int32).tobytes())
        tokens = sequence.tokens
        digest.update(b"" if tokens is None else np.ascontiguousarray(tokens, np.int32).tobytes())
    return digest.hexdigest()


def quantised(chances: FloatArray) -> IntArray:
    """Probabilities as uint8, 255 for 1."""
    rounded: IntArray = np.rint(np.asarray(chances, np.float32) * FULL).astype(np.uint8)
    return rounded


@dataclass(frozen=True)
class Sidecar:
    """A file of forecasts, all of it in memory; *arrays* are those of the module's description.

    *model* and *trace* are the header's tables, *windows* the spans of ``reuse`` in tokens.
    """

    path: Path
    model: Mapping[str, Any]
    trace: Mapping[str, Any]
    predictor: Mapping[str, Any]
    windows: tuple[int, ...]
    arrays: Mapping[str, Any]

    @cached_property
    def _spans(self) -> dict[int, tuple[int, int, int]]:
        """Of each sequence its first row, its rows and its first position."""
        starts = self.arrays["starts"].tolist()
        firsts = self.arrays["first_positions"].tolist()
        return {
            sequence: (starts[i], starts[i + 1] - starts[i], firsts[i])
            for i, sequence in enumerate(self.arrays["sequences"].tolist())
        }

    def rows(self, sequences: IntArray, positions: IntArray, tokens: IntArray) -> IntArray:
        """The rows of tokens given by sequence, position and id, each [T].

        A token that the file does not know, or knows by another id, is an :class:`InputError`:
        the forecasts are of another trace.
        """
        found = np.empty(len(tokens), np.int64)
        known = self.arrays["tokens"]
        wanted = zip(sequences.tolist(), positions.tolist(), tokens.tolist(), strict=True)
        for i, (sequence, position, token) in enumerate(wanted):
            start, count, first = self._spans.get(sequence, (0, 0, 0))
            row = start + position - first
            here = 0 <= position - first < count
            if not here or known[row] != token:
                what = f"token id {known[row]}" if here else "nothing"
                raise self._foreign(
                    f"holds {what} for sequence {sequence}, position {position}, expected the "
                    f"trace's token id {token}"
                )
            found[i] = row
        return found

    def check_model(self, model: Any) -> None:
        """Raise :class:`InputError` unless *model* (layers, experts, top_k) is the file's."""
        for field in _SHAPE:
            if self.model[field] != getattr(model, field):
                raise self._foreign(
                    f"{field} is {self.model[field]}, expected {getattr(model, field)}"
                )

    def check_trace(self, trace: Trace) -> None:
        """Raise :class:`InputError` unless the forecasts were made of *trace*, which is read."""
        self.check_model(trace.model)
        found = trace_fingerprint(trace.model, trace.sequences(("token",)))
        if found != self.trace["fingerprint"]:
            raise self._foreign(
                f"trace fingerprint {str(self.trace['fingerprint'])[:12]}, expected "
                f"{found[:12]} of {trace.name}"
            )

    def _foreign(self, what: str) -> InputError:
        return InputError(f"{self.path}: {what}: forecasts of another trace ({self.trace['name']})")


def write_sidecar(path: Path, header: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write *arrays* with *header* (model, trace, predictor, windows); whole or not at all."""
    text = json.dumps({"version": VERSION, **header}, sort_keys=True)
    with replacing(path) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, header=np.array(text), **arrays)


def read_sidecar(path: str | Path) -> Sidecar:
    """The file *path*; one that is absent, broken or of another kind is an :class:`InputError`."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected forecasts (simctl predictor forecast)")
    if path.suffix == ".safetensors":
        raise InputError(
            f"{path}: not a file of forecasts but a predictor's, expected what it forecasts of "
            "this trace (simctl predictor forecast)"
        )
    try:
        # Opened here: numpy leaves a file open that it does not understand.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
            text = str(data["header"])
            arrays = {name: data[name] for name in _KINDS}
    except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path}: not a file of forecasts: {_why(error)}, expected one that "
            "simctl predictor forecast wrote"
        ) from None
    header = _header(path, text)
    _check(path, header, arrays)
    return Sidecar(
        path,
        header["model"],
        header["trace"],
        header["predictor"],
        tuple(header["windows"]),
        arrays,
    )


def _why(error: Exception) -> str:
    """What numpy says in one line, without its advice to trust the file."""
    words = first_line(error)
    return "no numpy archive" if "allow_pickle" in words else words


def _header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("version") != VERSION:
        found = header.get("version") if isinstance(header, dict) else text[:40]
        raise InputError(f"{path}: header has version {found!r}, expected {VERSION}")
    wanted = {
        "model": ("name", *_SHAPE),
        "trace": ("name", "fingerprint"),
        "predictor": ("fingerprint",),
    }
    for table, keys in wanted.items():
        values = header.get(table)
        absent = [key for key in keys if not isinstance(values, dict) or key not in values]
        if absent:
            raise InputError(f"{path}: header has no {table}.{absent[0]}, expected one")
    windows = header.get("windows")
    if not isinstance(windows, list) or not all(type(w) is int and w > 0 for w in windows):
        raise InputError(f"{path}: header has windows {windows!r:.40}, expected numbers of tokens")
    if len(set(windows)) < len(windows):
        raise InputError(f"{path}: header has windows {windows!r:.40}, expected each once")
    return header


def _check(path: Path, header: dict[str, Any], arrays: dict[str, Any]) -> None:
    """Hold the arrays against each other and against the header."""
    tokens, layers = len(arrays["tokens"]), header["model"]["layers"]
    width = arrays["experts"].shape[-1]
    shapes = {
        "first_positions": (len(arrays["sequences"]),),
        "starts": (len(arrays["sequences"]) + 1,),
        "experts": (tokens, layers, width),
        "scores": (tokens, layers, width),
        "reuse": (tokens, len(header["windows"]), layers, header["model"]["experts"]),
    }
    for name, (kind, dimensions) in _KINDS.items():
        found = arrays[name]
        expected = shapes.get(name, found.shape)
        if found.dtype.kind != kind or found.ndim != dimensions or found.shape != expected:
            raise InputError(
                f"{path}: {name} is {found.dtype} {found.shape}, expected {expected} as the "
                "header says"
            )
    starts = arrays["starts"]
    if starts[0] != 0 or starts[-1] != tokens or (np.diff(starts) < 0).any():
        raise InputError(f"{path}: starts end at {starts[-1]}, expected {tokens} tokens in order")
    experts = arrays["experts"]
    if experts.size and (experts.min() < 0 or experts.max() >= header["model"]["experts"]):
        raise InputError(
            f"{path}: names expert {experts.max()}, expected below {header['model']['experts']}"
        )
