"""What every importer returns, and the check it passes through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from traces.block import Checker, block_of
from traces.errors import InputError
from traces.model import ModelSpec
from traces.trace import TokenSequence


@dataclass(frozen=True)
class Imported:
    """A recording read from elsewhere, ready for :func:`traces.store.write_trace`.

    *sequences* may be a stream and is read once. *count* is their number where it is known.
    """

    model: ModelSpec
    sequences: Iterable[TokenSequence]
    source: str
    license: str = "unknown"
    extra: dict[str, Any] = field(default_factory=dict)
    count: int | None = None


def checked(
    path: Path, model: ModelSpec, sequences: Iterable[TokenSequence]
) -> Iterator[TokenSequence]:
    """Pass *sequences* on; a broken rule is told of the input file *path*."""
    checker = Checker(str(path), model)
    for sequence in sequences:
        checker.check(block_of(sequence))
        yield sequence


def readable(path: Path) -> Path:
    """*path*, once it is known to be a file."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file")
    if not path.exists():
        raise InputError(f"{path}: no such file, expected a recording")
    return path
