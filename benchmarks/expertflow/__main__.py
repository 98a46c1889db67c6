"""The command: run the parts, keep their rows, draw the figures, fill the page, check the speed.

    python -m benchmarks.expertflow OUT --forecasts FOLDER [--gpt-oss TRACE] [--only PARTS]
    python -m benchmarks.expertflow OUT --render [--page docs/expertflow.md]

``docs/expertflow/run.sh`` gives it all that it needs. Leaves with 1 where ``predictive`` is
slower than ``lru`` by more than it may be.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.expertflow import page, parts, slowest
from policies.result import read_json
from traces.errors import InputError
from traces.writing import replacing

ROOT = Path(__file__).resolve().parents[2]

_PACKAGES = ("numpy", "simpy", "torch")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.expertflow", description=__doc__)
    add = parser.add_argument
    add("out", type=Path, help="folder of the JSON and the figures")
    add("--forecasts", type=Path, help="folder with NAME.npz, a predictor's for each sample trace")
    add("--gpt-oss", type=Path, metavar="TRACE", help="a trace of gpt-oss for its gap")
    add("--taught", action="append", default=[], metavar="SAMPLE=TRACE",
        help="counts the token table on this trace instead of the sample's other half")  # fmt: skip
    add("--only", help="parts separated by commas: " + ", ".join(parts.PARTS))
    add("--render", action="store_true", help="run nothing: figures and page from what OUT holds")
    add("--page", type=Path, help="put the tables between the marks of this page")
    return parser


def _chosen(options: argparse.Namespace) -> list[str]:
    """The parts that are run."""
    if options.render:
        return []
    if options.only is None:
        return [p for p in parts.PARTS if p != "gaps-gpt-oss" or options.gpt_oss]
    names: list[str] = options.only.split(",")
    for name in names:
        if name not in parts.PARTS:
            raise InputError(f"--only {name!r}, expected any of {', '.join(parts.PARTS)}")
    return names


def _inputs(options: argparse.Namespace, work: Path) -> parts.Inputs:
    taught = []
    for text in options.taught:
        name, equals, path = text.partition("=")
        if not equals or name not in parts.SAMPLES:
            known = " or ".join(parts.SAMPLES)
            raise InputError(f"--taught {text!r}, expected SAMPLE=TRACE with {known}")
        taught.append((name, Path(path)))
    if options.forecasts is None:
        raise InputError("no --forecasts, expected a folder with NAME.npz for each sample trace")
    return parts.Inputs(ROOT, options.forecasts, work, options.gpt_oss, tuple(taught))


def machine() -> str:
    """The processor that this runs on, in a few words."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} cores"


def about(seconds: float) -> dict[str, Any]:
    """When, where and with what a part was run."""
    versions = {name: metadata.version(name) for name in _PACKAGES}
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions},
        "seconds": round(seconds),
    }


def run(out: Path, name: str, inputs: parts.Inputs) -> None:
    """One part, and a note of when and where."""
    begun = time.perf_counter()
    print(f"{name} ...", flush=True)
    rows = list(parts.PARTS[name](inputs))
    parts.write_rows(out / f"{name}.json", rows)
    seconds = time.perf_counter() - begun
    notes = out / "about.json"
    known = read_json(notes, "notes of runs") if notes.is_file() else {}
    with replacing(notes) as unfinished:
        text = json.dumps({**known, name: about(seconds)}, indent=1)
        unfinished.write_text(text + "\n", encoding="utf-8")
    print(f"{name}: {len(rows)} rows, {seconds:.0f} s", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, draw, fill in, check."""
    options = _parser().parse_args(arguments)
    out: Path = options.out
    try:
        chosen = _chosen(options)
        if chosen:
            with tempfile.TemporaryDirectory() as work:
                inputs = _inputs(options, Path(work))
                out.mkdir(parents=True, exist_ok=True)
                for name in chosen:
                    run(out, name, inputs)
        sections = page.sections(out)
        if options.page:
            page.put_into(options.page, sections)
        else:
            print("\n\n".join(sections.values()))
        page.draw(out)
        checked = slowest.pairs(out)
    except (InputError, OSError) as error:
        print(f"expertflow: {error}", file=sys.stderr)
        return 2
    print(slowest.sentence(checked))
    return int(bool(slowest.slower(checked)))


if __name__ == "__main__":
    sys.exit(main())
