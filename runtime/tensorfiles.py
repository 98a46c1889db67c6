"""Tensors read one at a time from safetensors files, without mapping them into memory.

A mapped file counts as the process's memory once it has been touched, so that a checkpoint
read through a map takes twice its bytes. The format: a 64-bit length, so many bytes of JSON
that give each tensor's dtype, shape and place, then the tensors.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from traces.errors import InputError

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LENGTH_BYTES = 8
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its *file*, dtype, shape and first byte."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    first_byte: int


def _problem(file: Path, found: str) -> InputError:
    return InputError(f"{file}: {found}, expected a complete safetensors file")


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header of *file*, the byte where tensors begin, and the file's bytes."""
    size_bytes = os.path.getsize(file)
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        begin = _LENGTH_BYTES + length
        if size_bytes < _LENGTH_BYTES or begin > size_bytes:
            raise _problem(file, f"{size_bytes} bytes that end within the header")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            raise _problem(file, "a header that is not JSON") from None
    if not isinstance(header, dict):
        raise _problem(file, "a header that is not a table")
    header.pop("__metadata__", None)
    return header, begin, size_bytes


def _entry(file: Path, key: str, fields: Any, begin: int) -> tuple[Entry, int]:
    """The place of tensor *key*, and the byte of the file where it ends."""
    try:
        dtype, shape = _DTYPES[fields["dtype"]], tuple(int(n) for n in fields["shape"])
        first, end = (int(n) for n in fields["data_offsets"])
    except (KeyError, TypeError, ValueError):
        raise _problem(file, f"tensor {key} described as {str(fields)[:80]}") from None
    if first < 0 or end - first != prod(shape) * dtype.itemsize:
        raise _problem(file, f"tensor {key} of shape {shape} in {end - first} bytes")
    return Entry(file, dtype, shape, begin + first), begin + end


def read_entries(file: Path) -> dict[str, Entry]:
    """Every tensor of *file*; a truncated or broken file is an :class:`InputError`."""
    header, begin, size_bytes = _header(file)
    entries, last = {}, begin
    for key, fields in header.items():
        entries[key], end = _entry(file, key, fields, begin)
        last = max(last, end)
    if last != size_bytes:
        raise _problem(file, f"{size_bytes} bytes where its header describes {last}")
    return entries


def _indexed(folder: Path) -> list[Path]:
    """The files that the folder's index names."""
    index = folder / INDEX
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{index}: not understood ({type(error).__name__})") from None
    return [folder / str(name) for name in names]


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of the checkpoint in *folder*; none or some is an error."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise InputError(f"{folder}: no {SINGLE} and no {INDEX} found, expected one of them")
    files = _indexed(folder)
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: not found, expected because {INDEX} names it")
    return files


class TensorFiles:
    """The tensors of several files together, by key."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.entries: dict[str, Entry] = {}
        for file in files:
            self.entries.update(read_entries(file))
        self._open: tuple[Path, FileIO] | None = None

    def read(self, key: str, row: int | None = None) -> Tensor:
        """Tensor *key*, or its slice [*row*] along the first dimension, in new memory."""
        entry = self.entries[key]
        shape = entry.shape if row is None else entry.shape[1:]
        size_bytes = prod(shape) * entry.dtype.itemsize
        data = torch.empty(size_bytes, dtype=torch.uint8)
        room = data.numpy().data
        stream = self._stream(entry.file)
        stream.seek(entry.first_byte + (row or 0) * size_bytes)
        # The system reads at most 2 GiB at once.
        while room:
            got = stream.readinto(room)
            if not got:
                raise _problem(entry.file, f"an end within tensor {key}")
            room = room[got:]
        return data.view(entry.dtype).view(shape)

    def _stream(self, file: Path) -> FileIO:
        """*file* opened for reading; the last one is kept open."""
        if self._open is None or self._open[0] != file:
            self.close()
            # Unbuffered: every read is one large one.
            self._open = (file, FileIO(file))
        return self._open[1]

    def close(self) -> None:
        """Close the file that was kept open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None
