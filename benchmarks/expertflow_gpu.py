"""What ExpertFlow wins and costs on a GPU, beside what the simulator says: one JSON.

PYTHONPATH=. python benchmarks/expertflow_gpu.py --json docs/expertflow/gpu.json \\
    --hardware PROFILE.toml --model MODELS/coarse-8x2 --model MODELS/granular-64x8

Parts (--only a,b,c,d), about four minutes together:

a  speed: replays with real sizes, ``lru``, ``predictive`` with the forecasts of the predictors
   that ship, and loading on demand (as many slots as one token takes in one layer)
b  memory: the peak at the smallest budget that decodes and at a quarter, against all resident
c  predictor: its share of a decode step beside checkpoints and beside real dimensions
d  scheduler: dividing tokens, moving keys and values, and what both win, at batch 16

A cell that fails says why (``failed``) and the others go on; after --limit seconds none is begun
(``skipped``). The file is written anew after every cell; parts that --only leaves out stay as
they were in it, if the same machine, software and profile measured them. --tiny is a dry run on
small models.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import expertflow_live, expertflow_replays
from benchmarks.expertflow_replays import Machine, Replays
from benchmarks.expertflow_rows import Clock, Row
from policies.hardware import load_profile
from reports.validation.request import failure_words
from reports.validation.surroundings import surroundings
from runtime.load import pick_device
from traces.errors import InputError
from traces.writing import replacing

PARTS = {"a": "speed", "b": "memory", "c": "predictor", "d": "scheduler"}

PARTS_BY_NAME = {name: letter for letter, name in PARTS.items()}

#: What the parts of one file have in common.
SAME = ("schema", "machine", "versions", "hardware", "tiny")

#: The parts that replay, by letter, in the order in which they run for one model.
REPLAYED = {
    "a": expertflow_replays.speed,
    "b": expertflow_replays.memory,
    "d": expertflow_replays.scheduling,
}

#: What a row is printed by.
SHOWN = (
    "sizes", "model", "policy", "told", "cache", "batch", "scheduler", "tokens_per_s_gpu",
    "tokens_per_s_sim", "over_lru_gpu", "over_lru_sim", "over_demand_gpu", "over_demand_sim",
    "saved_gpu", "saved_sim", "predictor_share", "division_ms_gpu", "over_none_gpu",
    "over_none_sim", "decisions_equal", "failed", "skipped",
)  # fmt: skip


def rows(parts: str, folders: Sequence[Path], machine: Machine, clock: Clock) -> Iterator[Any]:
    """Letter and row of every cell of *parts*; live models first, they take least."""
    if "c" in parts:
        for model in expertflow_live.generating(folders, machine):
            yield from _guarded("c", {"model": model.name}, lambda m=model: _live(m, clock))
    with TemporaryDirectory(prefix="expertflow-") as name:
        for sizes, sample in expertflow_replays.SOURCES:
            if set(parts) & set(REPLAYED):
                yield from _replayed(parts, (sizes, sample), machine, Path(name), clock)


def _live(model: expertflow_live.Generating, clock: Clock) -> Iterator[Row]:
    yield from expertflow_live.predicting(model, clock)


def _replayed(
    parts: str, source: tuple[str, str], machine: Machine, folder: Path, clock: Clock
) -> Iterator[Any]:
    """The parts of one model, whose experts they share."""
    chosen = [letter for letter in REPLAYED if letter in parts]
    try:
        runs = Replays(*source, machine, folder)
    except InputError as error:
        yield from ((letter, {"sizes": source[0], "failed": str(error)}) for letter in chosen)
        return
    with closing(runs):
        for letter in chosen:
            name = {"sizes": source[0]}
            yield from _guarded(letter, name, lambda n=letter: REPLAYED[n](runs, clock))


def _guarded(letter: str, about: Row, work: Callable[[], Iterator[Row]]) -> Iterator[Any]:
    """The rows of *work*; what it raises between two cells is a row as well."""
    try:
        for row in work():
            yield letter, row
    except Exception as error:  # one part must not take the others with it
        yield letter, about | {"failed": failure_words(error)}


def shown(row: Row) -> str:
    """*row* in one line."""
    words = []
    for name in SHOWN:
        value = row.get(name)
        if value not in (None, ""):
            words.append(f"{name}={value:.3f}" if isinstance(value, float) else f"{name}={value}")
    return " ".join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE")
    add("--hardware", default="h200-pcie5", help="profile to simulate by [%(default)s]")
    add("--model", action="append", default=[], metavar="FOLDER[=PREDICTOR]", help="for part c")
    add("--only", default=",".join(PARTS), metavar="PARTS", help="[%(default)s]")
    add("--limit", type=float, default=240.0, metavar="SECONDS", help="[%(default)s]")
    add("--attempts", type=int, default=2, help="of a disturbed cell [%(default)s]")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--tiny", action="store_true", help="a dry run: small models, few tokens")
    return parser


def _chosen(text: str) -> str:
    """The letters in *text*; another one is an :class:`InputError`."""
    letters = [letter.strip() for letter in text.split(",") if letter.strip()]
    for letter in letters:
        if letter not in PARTS:
            raise InputError(f"--only {text}: no part {letter!r}, expected of {','.join(PARTS)}")
    return "".join(letters)


def _kept(path: Path | None, head: dict[str, Any], parts: str) -> dict[str, Any]:
    """What the file at *path* holds beside *parts*; measured as *head* says, or InputError."""
    if path is None or not path.exists():
        return {}
    try:
        before = json.loads(path.read_text())
        kept = {n: rows for n, rows in before["parts"].items() if PARTS_BY_NAME[n] not in parts}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise InputError(f"--json {path}: not written by this program, expected another") from None
    for name in SAME if kept else ():
        if before.get(name) != head[name]:
            raise InputError(
                f"--json {path}: {', '.join(kept)} measured with {name} {before.get(name)}, "
                f"expected {head[name]}; name another file"
            )
    return kept


def _write(path: Path, data: dict[str, Any]) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def main(words: Sequence[str] | None = None) -> int:
    """Exit code: 0 every cell ran, 1 one failed or was not begun, 2 bad input."""
    given = _parser().parse_args(words)
    clock = Clock(given.limit)
    try:
        parts = _chosen(given.only)
        profile, device = load_profile(given.hardware), pick_device(given.device)
        head: dict[str, Any] = {
            "schema": 1,
            **surroundings("gpu" if device.type == "cuda" else device.type),
            "hardware": {"name": profile.name, "kind": profile.kind},
            "tiny": given.tiny,
        }
        kept = _kept(given.json, head, parts)
    except InputError as error:
        print(f"expertflow_gpu: {error}", file=sys.stderr)
        return 2
    machine = Machine(device.type, given.hardware, given.attempts, given.tiny)
    data = head | {"parts": kept | {PARTS[letter]: [] for letter in parts}}
    for letter, row in rows(parts, given.model, machine, clock):
        data["parts"][PARTS[letter]].append(row)
        data["seconds"] = round(clock.spent_s, 1)
        print(f"{PARTS[letter]:<10}{shown(row)}", flush=True)
        if given.json is not None:
            _write(given.json, data)
    found = [row for letter in parts for row in data["parts"][PARTS[letter]]]
    return int(any("failed" in row or "skipped" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
