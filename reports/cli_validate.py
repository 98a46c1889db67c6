"""The command ``validate``: the same runs simulated and for real, compared and judged."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from reports.cli import ARRANGEMENT, check_outputs, command_line, progress, tell
from traces.errors import InputError

if TYPE_CHECKING:
    from policies.recording import Recording
    from policies.result import Result
    from reports.validation.cells import Cell
    from reports.validation.request import Done, Request
    from reports.validation.verdicts import Limits, Verdict

F = TypeVar("F", bound=Callable[..., Any])

#: Budgets of a validation in which none is given.
BUDGETS = ("25%", "50%")

SCHEMA = "simctl.validation/1"

#: Options that only a replay can follow, with the value that means "not given".
REPLAY_ONLY = {"sizes": None, "scheduler": "none"}

_OPTIONS = (
    click.option("--trace", metavar="FILE", help="Replay: the routing trace (parquet)."),
    click.option("--model", metavar="DIR", help="Live: the checkpoint that generates text."),
    click.option("--prompts", metavar="FILE", help="Live: JSON lines, each with a text."),
    click.option("--from-cells", metavar="FILE", help="Judge cells measured before; runs nothing."),
    click.option("--policy", "policies", multiple=True, help="A policy; repeat it."),
    click.option("--cache", multiple=True, help="A budget; repeat it. [default: 25% and 50%]"),
    click.option("--slots", type=int, multiple=True, help="A budget in experts; repeat it."),
    click.option("--gpu-memory", multiple=True, help="A budget in GPU memory; repeat it."),
    click.option("--batch", type=int, multiple=True, help="A batch size; repeat it. [default: 1]"),
    click.option("--sizes", help="Another model's layer sizes: a name of `simctl hardware`."),
    click.option(
        "--hardware",
        default="h200-pcie5",
        show_default=True,
        help="Hardware profile of this machine: a name or a TOML file.",
    ),
    click.option(
        "--device",
        type=click.Choice(["auto", "cuda", "cpu"]),
        default="auto",
        show_default=True,
        help="Where the real runs happen; auto takes CUDA if there is any.",
    ),
    click.option(
        "--compute",
        type=click.Choice(["graph", "fused", "reference"]),
        help="How the real runs compute. [default: on CUDA graph if the profile has [whole], "
        "else fused; on the CPU reference]",
    ),
    click.option("--sequences", type=int, help="Only the first N sequences (or prompts)."),
    click.option("--max-tokens", type=int, help="Only the first N decode tokens of each."),
    click.option("--forecaster", help="Forecaster of policies that take one."),
    *ARRANGEMENT,
    click.option("--max-mean-error", default="5%", show_default=True, help="Mean |error| of TPOT."),
    click.option("--max-error", default="10%", show_default=True, help="Worst |error| of TPOT."),
    click.option(
        "--attempts",
        type=click.IntRange(min=1),
        default=3,
        show_default=True,
        help="Replay a cell again while others slow its link or host, at most so often in all.",
    ),
    click.option("--judge-time", is_flag=True, help="Judge times measured on a CPU, too."),
    click.option("--json", "json_path", metavar="FILE|-", help="Write everything as JSON."),
    click.option("--cells", metavar="FILE", help="Merge the cells into this JSON list."),
    click.option("--report", metavar="DIR", help="Write an HTML report with figures."),
    click.option("--timeline", metavar="FILE", help="Write both worlds of one cell (Perfetto)."),
    click.option(
        "--timeline-cell", default=1, show_default=True, help="Which cell, counted as they run."
    ),
    click.option("--traces", metavar="DIR", help="Live: keep the recorded traces here."),
)


def _options(command: F) -> F:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass
class _Found:
    """What has come out so far."""

    done: list[Done] = field(default_factory=list)

    @property
    def cells(self) -> list[Cell]:
        return [done.cell for done in self.done]

    @property
    def results(self) -> list[Result]:
        return [result for done in self.done for result in done.results]

    @property
    def recordings(self) -> dict[str, Recording]:
        return {name: r for done in self.done for name, r in done.recordings.items()}


@click.command()
@_options
@click.pass_context
def validate(ctx: click.Context, /, **options: Any) -> None:
    """Run policies in the simulator and for real; compare decisions, counts, bytes and times."""
    from reports.validation.cells import read_cells

    limits = _limits(options)
    _check_source(options)
    _check_written(options)
    if options["from_cells"]:
        cells = read_cells(Path(options["from_cells"]))
        if not cells:
            raise InputError(f"{options['from_cells']}: holds no cell, expected at least one")
        ctx.exit(_finish(options, cells, limits, _Found()))
    request = _request(options)
    found = _Found()
    interrupted = False
    try:
        _collect(_runs(request), found, options["cells"])
    except KeyboardInterrupt:
        if not found.done:
            raise
        interrupted = True
    _refuse_bad_input(found.done)
    code = _finish(options, found.cells, limits, found)
    if interrupted:
        raise KeyboardInterrupt
    ctx.exit(code)


def _collect(runs: Iterator[Done], found: _Found, cells: str | None) -> None:
    """Take in the cells one by one; after each, all so far are safe in the file *cells*."""
    from reports.validation.cells import merge_into

    for done in runs:
        found.done.append(done)
        if cells and any(not cell.failed for cell in found.cells):
            merge_into(Path(cells), found.cells)
        if done.note:
            click.echo(done.note, err=True)


def _runs(request: Request) -> Iterator[Done]:
    from reports.validation.live import live
    from reports.validation.replay import replay

    run = replay if request.model is None else live
    return run(request, progress)


def _refuse_bad_input(done: Sequence[Done]) -> None:
    """Where every cell failed on one and the same thing that the user gave, it is bad input."""
    words = {item.cell.failed for item in done}
    if len(words) == 1 and all(item.bad_input for item in done):
        raise InputError(words.pop())


def _finish(options: dict[str, Any], cells: list[Cell], limits: Limits, found: _Found) -> int:
    """Judge, write what was asked for, print; returns the exit code."""
    from reports.validation.text import cells_table
    from reports.validation.verdicts import judge

    verdicts = judge(cells, limits, options["judge_time"])
    written = []
    if options["cells"]:
        from reports.validation.cells import merge_into

        merge_into(Path(options["cells"]), cells)
        written.append(f"cells: {options['cells']}")
    if options["timeline"]:
        written.append(_timeline(Path(options["timeline"]), found))
    if options["report"]:
        from reports.validation.page import write_validation

        page = write_validation(Path(options["report"]), cells, verdicts, command=command_line())
        written.append(f"report: {page}")
    text = cells_table(cells, verdicts)
    tell(options["json_path"], _json(cells, verdicts, found.results), text, written)
    return int(any(verdict.failed for verdict in verdicts))


def _timeline(path: Path, found: _Found) -> str:
    from reports.timeline import write_timelines

    recordings = found.recordings
    if not recordings:
        return "timeline: none written, the chosen cell was not recorded"
    write_timelines(path, recordings)
    return f"timeline: {path} (both worlds; open it in ui.perfetto.dev)"


def _json(cells: Sequence[Cell], verdicts: Sequence[Verdict], results: Sequence[Result]) -> str:
    """Cells, verdicts and both worlds' results as one object."""
    content = {
        "schema": SCHEMA,
        "passed": not any(verdict.failed for verdict in verdicts),
        "verdicts": [vars(verdict) for verdict in verdicts],
        "cells": [cell.to_dict() for cell in cells],
        "results": [result.to_dict() for result in results],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _check_source(options: dict[str, Any]) -> None:
    """Exactly one of the three things that cells can come from, with what belongs to it."""
    names = {"trace": "--trace", "model": "--model", "from_cells": "--from-cells"}
    given = [option for name, option in names.items() if options[name]]
    if len(given) != 1:
        found = f"{' and '.join(given)} given" if given else "none given"
        raise InputError(f"--trace, --model, --from-cells: {found}, expected exactly one")
    if bool(options["model"]) != bool(options["prompts"]):
        raise InputError("--model and --prompts: expected both or neither")
    if options["traces"] and not options["model"]:
        raise InputError("--traces: keeps what live runs record, expected --model with it")
    if options["timeline"] and options["from_cells"]:
        raise InputError("--timeline: cells hold none, expected --trace or --model with it")
    if options["model"]:
        for name, default in REPLAY_ONLY.items():
            if options[name] != default:
                raise InputError(f"--{name}: only for replays, expected --trace with it")


def _check_written(options: dict[str, Any]) -> None:
    """Refuse before long work what could not be written after it."""
    from reports.validation.cells import read_cells

    check_outputs(options["json_path"], options["timeline"], options["report"])
    check_outputs(options["cells"], None, options["traces"])
    if options["cells"] == "-":
        raise InputError("--cells -: expected a file")
    if options["cells"] and Path(options["cells"]).exists():
        read_cells(Path(options["cells"]))


def _limits(options: dict[str, Any]) -> Limits:
    from reports.validation.verdicts import Limits

    return Limits(
        mean_error=_share("--max-mean-error", options["max_mean_error"]),
        max_error=_share("--max-error", options["max_error"]),
    )


def _share(option: str, text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if not found:
        raise InputError(f"{option} {text}: expected a share such as 5%")
    return float(found[1]) / 100


def _request(options: dict[str, Any]) -> Request:
    """What is to be run, once everything that can be checked before it has been."""
    from policies.budget import Budget
    from policies.session import Setup
    from reports.validation.cut import Cut
    from reports.validation.request import Request

    if not options["policies"]:
        raise InputError("--policy: none given, expected at least one")
    budgets = [Budget(cache=c) for c in options["cache"]]
    budgets += [Budget(slots=s) for s in options["slots"]]
    budgets += [Budget(gpu_memory=m) for m in options["gpu_memory"]]
    names = ("hardware", "sizes", "forecaster", "scheduler", "pool", "train", "seed", "depth")
    device = _device(options["device"])
    request = Request(
        setup=Setup(trace=options["trace"] or "", **{name: options[name] for name in names}),
        policies=list(dict.fromkeys(options["policies"])),
        budgets=list(dict.fromkeys(budgets)) or [Budget(cache=text) for text in BUDGETS],
        batches=list(dict.fromkeys(options["batch"])) or [1],
        device=device,
        compute=_compute(options, device),
        cut=Cut(options["sequences"], options["max_tokens"]),
        timeline_cell=options["timeline_cell"] if options["timeline"] else None,
        model=_checkpoint(options["model"]),
        prompts=_prompts(options),
        keep=Path(options["traces"]) if options["traces"] else None,
        attempts=options["attempts"],
    )
    if not 1 <= options["timeline_cell"] <= len(request.runs):
        raise InputError(
            f"--timeline-cell {options['timeline_cell']}: expected 1 to {len(request.runs)}"
        )
    return request


def _device(asked: str) -> str:
    """The device of the real runs; says so in one line where there is none."""
    from runtime.cli import require_torch

    require_torch()
    torch = importlib.import_module("torch")
    there = bool(torch.cuda.is_available())
    if asked == "cuda" and not there:
        raise InputError("--device cuda: torch sees no CUDA device, expected one (or --device cpu)")
    return "cuda" if there and asked == "auto" else "cpu" if asked == "auto" else asked


def _compute(options: dict[str, Any], device: str) -> str:
    """How the real runs compute on *device*: as asked for, else the best that the profile knows."""
    from policies.hardware import load_profile
    from policies.session import check_compute

    profile, asked = load_profile(options["hardware"]), options["compute"]
    check_compute(asked, profile)
    if asked:
        return str(asked)
    whole = "graph" if profile.whole is not None else "fused"
    return whole if device == "cuda" else "reference"


def _checkpoint(model: str | None) -> Path | None:
    if model is None:
        return None
    if not (Path(model) / "config.json").is_file():
        raise InputError(f"--model {model}: has no config.json, expected a checkpoint's folder")
    return Path(model)


def _prompts(options: dict[str, Any]) -> list[str]:
    """The texts of the prompt file, as many as asked for."""
    if not options["prompts"]:
        return []
    from runtime.prompts import read_prompts

    texts = [prompt.text for prompt in read_prompts(Path(options["prompts"]))]
    return texts[: options["sequences"]]
