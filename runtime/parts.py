"""The finished pieces of a capture that is still running, kept on disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from traces.errors import InputError
from traces.trace import TokenSequence

_COLUMNS = ("experts", "positions", "tokens", "weights")


def parts_folder(out: Path) -> Path:
    """Where the pieces of the trace file *out* lie until it is complete."""
    return out.with_name(out.name + ".part")


def discard(out: Path) -> None:
    """Remove *out* and what an interrupted capture left of it, if anything."""
    out.unlink(missing_ok=True)
    shutil.rmtree(parts_folder(out), ignore_errors=True)


def _arrays(sequence: TokenSequence) -> Iterator[tuple[str, Any]]:
    yield "id", np.int64(sequence.id)
    yield "prefill", np.int64(sequence.prefill)
    for name in _COLUMNS:
        yield name, getattr(sequence, name)
    for distance, ranks in enumerate(sequence.ahead, start=1):
        yield f"ahead_{distance}", ranks


def _sequence(arrays: Any, index: int) -> TokenSequence:
    prefix = f"{index}/"
    found = {k.removeprefix(prefix): arrays[k] for k in arrays.files if k.startswith(prefix)}
    distances = sorted(name for name in found if name.startswith("ahead_"))
    return TokenSequence(
        id=int(found["id"]),
        prefill=int(found["prefill"]),
        ahead=tuple(found[name] for name in distances),
        **{name: found[name] for name in _COLUMNS},
    )


@dataclass(frozen=True)
class Parts:
    """A *folder* with one file for each finished batch.

    *date* is the day the capture began: a resumed one keeps it, so that its bytes do not
    depend on when it was resumed.
    """

    folder: Path
    date: str

    @classmethod
    def open(cls, out: Path, fingerprint: str, today: str) -> Parts:
        """The pieces of *out*, which must come from a capture with the same *fingerprint*."""
        if out.exists():
            raise InputError(f"{out}: exists, expected a new file; --restart replaces it")
        folder = parts_folder(out)
        head = folder / "capture.json"
        if not head.exists():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"{folder}: {error.strerror}, expected a writable place") from None
            cls._write(head, json.dumps({"fingerprint": fingerprint, "date": today}).encode())
        return cls(folder, cls._check(head, fingerprint))

    @staticmethod
    def _check(head: Path, fingerprint: str) -> str:
        """The day noted in *head*."""
        try:
            facts = json.loads(head.read_text())
            found, date = facts["fingerprint"], facts["date"]
        except (ValueError, KeyError, TypeError):
            found, date = None, ""
        if found != fingerprint:
            raise InputError(
                f"{head.parent}: left by a capture of another model, other prompts or settings, "
                "expected the same ones; --restart drops it"
            )
        return str(date)

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        """All of *path* or nothing of it, whenever the process is killed."""
        unfinished = path.with_name(path.name + ".tmp")
        unfinished.write_bytes(data)
        os.replace(unfinished, path)

    def _path(self, number: int) -> Path:
        return self.folder / f"batch-{number:06d}.npz"

    def has(self, number: int) -> bool:
        """Whether batch *number* is finished."""
        return self._path(number).exists()

    def save(self, number: int, sequences: Iterable[TokenSequence]) -> None:
        """Keep the finished batch *number*."""
        arrays = {
            f"{index}/{name}": values
            for index, sequence in enumerate(sequences)
            for name, values in _arrays(sequence)
        }
        unfinished = self.folder / "unfinished.npz"
        np.savez(unfinished, **arrays)
        os.replace(unfinished, self._path(number))

    def sequences(self) -> Iterator[TokenSequence]:
        """Every finished sequence in order, one batch in memory at a time."""
        for path in sorted(self.folder.glob("batch-*.npz")):
            with np.load(path) as arrays:
                count = sum(name.endswith("/id") for name in arrays.files)
                for index in range(count):
                    yield _sequence(arrays, index)

    def remove(self) -> None:
        """Forget the pieces: the trace file is complete."""
        shutil.rmtree(self.folder)
