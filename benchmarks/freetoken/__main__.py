"""The command: make the checkpoint, run both systems, write the list; or render it."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks.freetoken import launch, rows
from benchmarks.freetoken.plan import (
    CHECKPOINT,
    FUSED,
    OFFLOAD,
    OURS,
    POLICIES_TRIED,
    ROUTINGS,
    TINY,
    Cell,
    Task,
    our_cells,
    parse_policy,
    routed,
    share_of,
    slots_of,
    their_cells,
)
from benchmarks.side_by_side.plan import FULL
from traces.errors import InputError

_FILE = click.Path(path_type=Path)


@dataclass(frozen=True)
class Request:
    """The options of one run."""

    out: Path
    routing: tuple[str, ...]
    batch: tuple[int, ...]
    share: tuple[str, ...]
    policy: tuple[str, ...]
    tokens: int
    prompt: int
    layers: int | None
    seed: int
    folder: Path | None
    only: str | None
    device: str
    tiny: bool
    hardware: str
    logs: Path
    limit: float

    def tasks(self, routing: str, folder: str) -> list[Task]:
        """The checkpoint's task, then those that measure; every mistake is told here."""
        shape = routed(TINY if self.tiny else FULL, routing)
        shape = replace(shape, layers=self.layers) if self.layers else shape
        for policy in self.policy:
            parse_policy(policy)
        told = (self.device, self.prompt, self.seed, self.hardware, routing)
        task = Task(CHECKPOINT, folder, shape, *told)
        shares = sorted({share_of(text) for text in self.share}, reverse=True)
        theirs = self.only != OURS
        if theirs:
            self._check_theirs()
        slots = [slots_of(share, shape, theirs=theirs) for share in shares]
        batches, found = sorted(set(self.batch)), [task]
        if theirs:
            found += self._theirs(task, slots, batches)
        if self.only != OFFLOAD:
            cells = our_cells(slots, batches, self.tokens, self.policy, shape.total)
            found.append(replace(task, system=OURS, cells=cells))
        return found

    def _check_theirs(self) -> None:
        """That FreeToken could run, before anything is made for it."""
        if self.device != "cuda":
            raise InputError("--device cpu: FreeToken runs on CUDA alone, expected --only ours")
        if importlib.util.find_spec("freetoken") is None:
            raise InputError(
                "FreeToken is not installed, expected it (docs/performance.md says how) or "
                "--only ours"
            )

    def _theirs(self, task: Task, slots: list[int], batches: list[int]) -> list[Task]:
        """FreeToken over its pools; where all experts fit, its other backend too."""
        cells = their_cells(slots, batches, self.tokens)
        found = [replace(task, system=OFFLOAD, cells=cells)]
        whole = tuple(cell for cell in cells if cell.slots == task.shape.total)
        return [*found, replace(task, system=FUSED, cells=whole)] if whole else found


def run(request: Request) -> int:
    """Measure one kind of routing after the other; 1 if a cell failed."""
    end = time.monotonic() + request.limit
    temporary = tempfile.TemporaryDirectory if request.folder is None else nullcontext
    failed = False
    for routing in dict.fromkeys(request.routing):
        # A checkpoint that is not kept makes room for the next.
        with temporary() as made:
            folder = Path(made) if made else request.folder
            assert folder is not None
            failed |= _run_one(request, routing, folder / routing, end)
    return int(failed)


def _run_one(request: Request, routing: str, folder: Path, end: float) -> bool:
    """Measure on one checkpoint, writing the list after every process; whether a cell failed."""
    first, *tasks = request.tasks(routing, str(folder.resolve()))
    found = rows.read(request.out) if request.out.is_file() else []
    logs, begun = request.logs / routing, time.monotonic()
    launch.make_checkpoint(first, logs, max(end - begun, 0.0))
    _tell(f"{routing} routing, {first.system}: {time.monotonic() - begun:.0f} s, {folder}")
    failed = False
    for task in tasks:
        for cell, result, facts in launch.run_all(task, logs, end):
            _tell(rows.add(found, task, cell, result, facts))
            _tell(_said(task, cell, result))
            failed |= "failed" in result
            rows.write(request.out, found)
    return failed


def _tell(text: str) -> None:
    if text:
        click.echo(text, err=True)


def _said(task: Task, cell: Cell, result: dict[str, Any]) -> str:
    """One line about a cell."""
    name = f"{task.system} {cell.policy}".strip()
    head = f"{name}, {task.routing} routing, {cell.slots} slots, batch {cell.batch}: "
    if "failed" in result:
        return head + result["failed"]
    missed = result.get("missed_per_token")
    return head + f"{result['ms']:.3f} ms" + ("" if missed is None else f", {missed:.1f} missed")


def render(out: Path, page: Path, cells: Path | None) -> int:
    """The figure beside *out*, and the tables in *page*."""
    from benchmarks.freetoken import figure
    from benchmarks.freetoken.render import fill

    found = rows.read(out)
    picture = out.with_suffix(".png")
    figure.draw(picture, found)
    shown = os.path.relpath(picture.resolve(), page.resolve().parent)
    fill(page, found, Path(shown).as_posix(), cells)
    return 0


_OPTIONS = (
    click.option("--out", type=_FILE, default="docs/performance/graph.json", show_default=True,
                 help="The list; rows that are not measured now stay."),
    click.option("--routing", type=click.Choice(ROUTINGS), multiple=True, default=ROUTINGS,
                 show_default=True, help="Weights and tokens as initialised and drawn evenly, or "
                 "such that routing is as on text; repeat it."),
    click.option("--batch", type=click.IntRange(min=1), multiple=True, default=(1, 8),
                 show_default=True, help="Sequences that decode together; repeat it."),
    click.option("--share", multiple=True, default=("100%", "50%", "25%"), show_default=True,
                 help="Slots as a share of all experts; repeat it."),
    click.option("--policy", multiple=True, default=POLICIES_TRIED, show_default=True,
                 help="An exact policy of ours, with +FORECASTER if need be; repeat it."),
    click.option("--tokens", type=click.IntRange(min=4), default=512, show_default=True,
                 help="Tokens decoded by all sequences of a batch, in 128 steps or more."),
    click.option("--prompt", type=click.IntRange(min=2), default=32, show_default=True,
                 help="Tokens of each prompt."),
    click.option("--layers", type=click.IntRange(min=1), help="MoE layers.  [default: 12]"),
    click.option("--seed", type=int, default=0, show_default=True),
    click.option("--folder", type=_FILE, help="Keep each routing's checkpoint in a folder of its "
                 "name here, and use it again."),
    click.option("--only", type=click.Choice([OURS, OFFLOAD]), help="Measure one of them."),
    click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda",
                 show_default=True, help="FreeToken runs on CUDA alone."),
    click.option("--tiny", is_flag=True, help="Small dimensions: a dry run."),
    click.option("--hardware", default="h100-captured", show_default=True,
                 help="Hardware profile for our policies: a name or a TOML file. One of captured "
                 "steps: what a layer takes otherwise is several times too long."),
    click.option("--logs", type=_FILE, default="out/freetoken", show_default=True,
                 help="Folder for all that the processes print."),
    click.option("--limit", type=click.FloatRange(min=1), default=3600.0, show_default=True,
                 help="Seconds after which nothing is begun, and what runs is stopped."),
)  # fmt: skip


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@_options
@click.option("--render", "rendering", is_flag=True, help="Measure nothing: table and figure.")
@click.option(
    "--page", type=_FILE, default="docs/performance.md", show_default=True, help="For --render."
)
@click.option("--cells", type=_FILE, help="For --render: what `simctl validate --cells` wrote.")
def cli(rendering: bool, page: Path, cells: Path | None, **options: Any) -> int:
    """Our runtime beside FreeToken 0.1.2: same checkpoint, slots and forced tokens."""
    if rendering:
        return render(options["out"], page, cells)
    if cells is not None:
        raise InputError("--cells: only for --render")
    return run(Request(**options))


def main(words: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a cell failed, 2 bad input in one line, 130 interrupted."""
    try:
        prog = "python -m benchmarks.freetoken"
        return int(cli.main(words, prog_name=prog, standalone_mode=False) or 0)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        click.echo(f"freetoken: {error.format_message()}", err=True)
    except InputError as error:
        click.echo(f"freetoken: {error}", err=True)
    except (click.Abort, KeyboardInterrupt):
        click.echo("freetoken: interrupted; --out has what was measured", err=True)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
