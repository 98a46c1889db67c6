"""The command: run the systems, write the JSON, print or place the table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.side_by_side import launch
from benchmarks.side_by_side.plan import (
    FULL,
    NARROW,
    REFERENCE,
    SYSTEMS,
    TINY,
    YARDSTICK,
    System,
    Task,
)
from benchmarks.side_by_side.render import put_into, render
from traces.errors import InputError

_PACKAGES = ("torch", "transformers", "accelerate", "moe-policylang", "triton", "numpy")


def _listed(names: Sequence[str]) -> str:
    """*names* as argparse wants them in a help text, where % begins a value."""
    return ",".join(names).replace("%", "%%")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.side_by_side", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, metavar="FILE", help="write the result here, row by row")
    add("--render", type=Path, metavar="FILE", help="run nothing: make the table of this JSON")
    add("--into", type=Path, metavar="PAGE", help="put the table between the marks of this page")
    add("--systems", metavar="NAMES", help=f"separated by commas; default: {_listed(SYSTEMS)}")
    add("--also", metavar="NAMES", help="more than the default, say transformers:grouped_mm")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    smaller = parser.add_mutually_exclusive_group().add_argument
    smaller("--tiny", action="store_true", help="small dimensions in float32: a dry run")
    smaller("--narrow", action="store_true", help="an eighth of the width in float32: its routing")
    add("--layers", type=int, help=f"MoE layers (default {FULL.layers})")
    add("--compute", choices=("fused", "reference"), help="how ours computes")
    add("--prompt", type=int, default=32, help="tokens of the prompt")
    add("--decode", type=int, default=60, help="tokens decoded, one at a time")
    add("--slow-steps", type=int, default=3, help="tokens that accelerate decodes")
    add("--warmup", type=int, default=4, help="tokens decoded before, from another text")
    add("--timeout", type=float, default=120.0, help="seconds for one system")
    add("--limit", type=float, default=270.0, help="seconds for all: the rest are not begun")
    add("--seed", type=int, default=0)
    return parser


def _names(given: argparse.Namespace) -> list[str]:
    """The systems in the order they run: the reference, the yardstick if asked for, the rest."""
    names = given.systems.split(",") if given.systems else list(SYSTEMS)
    names += given.also.split(",") if given.also else []
    names = [name.strip() for name in names if name.strip()]
    names.sort(key=lambda name: name != YARDSTICK)
    return list(dict.fromkeys([REFERENCE, *names]))


def _tasks(given: argparse.Namespace) -> list[Task]:
    """One task for each system asked for; numbers out of range are an :class:`InputError`."""
    for option, least in (("prompt", 2), ("decode", 1), ("slow_steps", 1), ("warmup", 1)):
        value = getattr(given, option)
        if value < least:
            name = option.replace("_", "-")
            raise InputError(f"--{name}: {value} found, expected {least} or more")
    shape = TINY if given.tiny else NARROW if given.narrow else FULL
    if given.layers is not None:
        if given.layers < 1:
            raise InputError(f"--layers: {given.layers} found, expected 1 or more")
        shape = replace(shape, layers=given.layers)
    task = Task(
        system="",
        shape=shape,
        device=given.device,
        dtype="float32" if given.tiny or given.narrow else "bfloat16",
        prompt_tokens=given.prompt,
        decode_tokens=given.decode,
        warmup_tokens=given.warmup,
        forced_tokens=given.decode,
        seed=given.seed,
        compute=given.compute,
    )
    slow = {"decode_tokens": min(given.slow_steps, given.decode), "warmup_tokens": 1}
    return [
        replace(task, system=name, **(slow if System.parse(name).kind == "accelerate" else {}))
        for name in _names(given)
    ]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name as Linux knows it, else the architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _result(given: argparse.Namespace, task: Task, words: Sequence[str]) -> dict[str, Any]:
    """All of the JSON but the rows."""
    return {
        "schema": 1,
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python -m benchmarks.side_by_side", *words]),
        "machine": {
            "cpu": _processor(),
            "host_cores": os.cpu_count(),
            "system": platform.platform(),
        },
        "versions": {
            "Python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        "shape": task.to_dict()["shape"],
        "device": given.device,
        "dtype": task.dtype,
        "seed": given.seed,
        "prompt_tokens": given.prompt,
        "decode_tokens": given.decode,
        "warmup_tokens": given.warmup,
        "slow_steps": given.slow_steps,
        "systems": [],
    }


def _write(path: Path, data: dict[str, Any]) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    text = json.dumps(data, indent=1)
    text = re.sub(r"\[([-\d.e,\s]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def _run(given: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """Run every system; the JSON is written anew whenever one has ended."""
    tasks = _tasks(given)
    data = _result(given, tasks[0], words)

    def tell(rows: list[dict[str, Any]]) -> None:
        row = rows[-1]
        data["machine"].update(row.pop("machine", {}))
        data["systems"] = rows
        note = row.get("reason", f"set up in {row.get('setup_s', 0):.1f} s")
        took_s = row.get("wall_s", 0.0)
        print(f"{row['system']}: {row['status']}, {took_s:.1f} s, {note}", file=sys.stderr)
        if given.json is not None:
            _write(given.json, data)

    launch.run_all(tasks, given.timeout, given.limit, tell)
    return data


def _read(path: Path) -> dict[str, Any]:
    """A result that was written earlier."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    if data.get("schema") != 1 or "systems" not in data:
        raise InputError(f"{path}: no result of this command, expected schema 1 and systems")
    return data


def main(words: Sequence[str]) -> int:
    """Exit code: 0 no system failed or disagreed, 1 one did, 2 bad input, 130 interrupted."""
    given = _parser().parse_args(words)
    try:
        data = _read(given.render) if given.render else _run(given, words)
        table = render(data)
        if given.into is not None:
            put_into(given.into, table)
    except InputError as error:
        print(f"side_by_side: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("side_by_side: interrupted; --json has the rows that were done", file=sys.stderr)
        return 130
    if given.into is None:
        print(table)
    rows = data["systems"]
    wrong = [row for row in rows if row["status"] in ("failed", "timeout")]
    wrong += [row for row in rows if row.get("agreement", {}).get("agrees") is False]
    return 1 if wrong and not given.render else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
