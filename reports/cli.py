"""The commands ``run``, ``compare`` and ``report``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from policies.result import Result, read_results
from reports.files import write_file
from traces.errors import InputError

if TYPE_CHECKING:
    from policies.recording import Recording
    from policies.routing import Step
    from policies.session import TraceSession
    from sim.session import Session

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

#: Budgets of a miss-ratio curve, as shares of the experts, and the steps replayed for it.
CURVE_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 1.0)
CURVE_STEPS = 4000

#: Policies of a comparison in which none is named.
COMPARED = ("lru", "lfu", "lfru", "predictive", "belady")

#: How sequences, slots and copies are arranged: options of every command that runs policies.
ARRANGEMENT = (
    click.option(
        "--scheduler", default="none", show_default=True, help="Which sequences run together."
    ),
    click.option(
        "--pool",
        type=click.Choice(["global", "layer"]),
        default="global",
        show_default=True,
        help="One pool of slots, or an equal share for each layer.",
    ),
    click.option("--train", metavar="FILE", help="Training trace for what learns offline."),
    click.option("--depth", default=2, show_default=True, help="Copies issued ahead on the link."),
    click.option("--seed", default=0, show_default=True, help="Seed of all randomness."),
)

_SETUP = (
    click.option("--trace", required=True, metavar="FILE", help="Routing trace (parquet)."),
    click.option("--batch", default=1, show_default=True, help="Sequences that run together."),
    click.option(
        "--hardware",
        default="h200-pcie5",
        show_default=True,
        help="Hardware profile: a name of `simctl hardware` or a TOML file.",
    ),
    click.option("--sizes", help="Another model's layer sizes: a name of `simctl hardware`."),
    click.option(
        "--forecaster",
        help="Forecaster of policies that take one. Default: ahead if recorded, else markov.",
    ),
    click.option(
        "--compute",
        type=click.Choice(["graph", "fused"]),
        help="Decode steps: one graph each, or a chain. [default: graph if the profile knows it]",
    ),
    *ARRANGEMENT,
)


def _setup_options(command: F) -> F:
    for option in reversed(_SETUP):
        command = option(command)
    return command


@click.command()
@click.option(
    "--policy",
    required=True,
    help="Policy: name, name:key=value,key=value or path/to/file.py:Class.",
)
@_setup_options
@click.option("--cache", help="Budget as a share of all experts, such as 25%. [default: 50%]")
@click.option("--slots", type=int, help="Budget as a number of experts.")
@click.option("--gpu-memory", help="Budget as GPU memory, such as 24GiB, dense part included.")
@click.option("--json", "json_path", metavar="FILE|-", help="Write the result as JSON.")
@click.option("--timeline", metavar="FILE", help="Write a gzipped Chrome trace (Perfetto).")
@click.option("--report", metavar="DIR", help="Write an HTML report with figures.")
def run(
    policy: str,
    cache: str | None,
    slots: int | None,
    gpu_memory: str | None,
    json_path: str | None,
    timeline: str | None,
    report: str | None,
    **setup: Any,
) -> None:
    """Simulate one policy on a trace and say where its time goes."""
    from policies.budget import Budget
    from reports.summary import run_summary
    from sim.parallel import belady_beside

    session = _session(setup)
    check_outputs(json_path, timeline, report)
    budget = Budget(cache, slots, gpu_memory)
    with belady_beside(session, budget):
        result, recording = session.run(
            policy,
            budget,
            record=bool(report),
            spans=bool(timeline),
            watch=progress(session, policy),
        )
    written = []
    if timeline and recording is not None:
        from reports.timeline import write_timeline

        write_timeline(Path(timeline), recording, result)
        written.append(f"timeline: {timeline} (open it in ui.perfetto.dev)")
    if report:
        page = _report(session, report, [result], {0: recording} if recording else {})
        written.append(f"report: {page}")
    tell(json_path, result.to_json(), run_summary(result), written)


@click.command()
@click.option(
    "--policy",
    "policies",
    multiple=True,
    help=f"A policy to compare; repeat it. [default: {', '.join(COMPARED)}]",
)
@_setup_options
@click.option("--cache", multiple=True, help="A budget; repeat it. [default: 25% and 50%]")
@click.option("--slots", type=int, multiple=True, help="A budget in experts; repeat it.")
@click.option("--gpu-memory", multiple=True, help="A budget in GPU memory; repeat it.")
@click.option(
    "--jobs", type=click.IntRange(0), default=0, help="Runs at a time. [default: all cores if long]"
)
@click.option("--json", "json_path", metavar="FILE|-", help="Write all results as JSON.")
@click.option("--report", metavar="DIR", help="Write an HTML report with figures.")
def compare(
    policies: tuple[str, ...],
    cache: tuple[str, ...],
    slots: tuple[int, ...],
    gpu_memory: tuple[str, ...],
    jobs: int,
    json_path: str | None,
    report: str | None,
    **setup: Any,
) -> None:
    """Compare policies and budgets on one trace, with Belady and the bounds."""
    from policies.budget import Budget
    from reports.comparison import compare_table
    from sim.parallel import default_jobs, run_cells

    session = _session(setup)
    check_outputs(json_path, None, report)
    budgets = [Budget(cache=c) for c in cache] + [Budget(slots=s) for s in slots]
    budgets += [Budget(gpu_memory=m) for m in gpu_memory]
    names = list(policies) or list(COMPARED)
    names += [name for name in ("lru", "belady") if name not in names]
    budgets = budgets or [Budget(cache="25%"), Budget(cache="50%")]
    cells = [(name, budget) for budget in budgets for name in names]
    for name, budget in cells:
        session.check(name, budget)
    results: list[Result] = []
    recordings: dict[int, Recording] = {}
    runs = run_cells(session, cells, record=bool(report), jobs=jobs or default_jobs(session))
    for result, recording in _counted(runs, len(cells)):
        if recording is not None:
            recordings[len(results)] = recording
        results.append(result)
    written = [f"report: {_report(session, report, results, recordings)}"] if report else []
    data = json.dumps({"results": [r.to_dict() for r in results]}, indent=1, allow_nan=False)
    tell(json_path, data + "\n", compare_table(results), written)


@click.command()
@click.argument("results", nargs=-1, required=True, metavar="RESULT.json...")
@click.option("--out", default="report", show_default=True, metavar="DIR", help="Where to write.")
@click.option("--title", default="", help="Title of the page.")
def report(results: tuple[str, ...], out: str, title: str) -> None:
    """Turn results (of run --json or compare --json) into one HTML page with figures."""
    from reports.comparison import compare_table
    from reports.html import write_report

    found = [result for path in results for result in read_results(Path(path))]
    page = write_report(Path(out), found, title=title, command=command_line())
    click.echo(compare_table(found))
    click.echo(f"report: {page}")


def _session(setup: dict[str, Any]) -> Session:
    from policies.session import Setup
    from sim.session import Session

    return Session(Setup(**setup))


def progress(session: TraceSession, label: str) -> Callable[[Iterable[Step]], Iterable[Step]]:
    """A progress bar over tokens, on a terminal only."""

    def watch(steps: Iterable[Step]) -> Iterator[Step]:
        if not sys.stderr.isatty():
            yield from steps
            return
        with click.progressbar(length=session.stored.tokens, label=label, file=sys.stderr) as bar:
            done = 0
            for step in steps:
                yield step
                done += step.size
                if done >= 256:
                    bar.update(done)
                    done = 0
            bar.update(done)

    return watch


def _counted(runs: Iterator[T], total: int) -> Iterator[T]:
    """A progress bar over runs, on a terminal only."""
    if not sys.stderr.isatty():
        yield from runs
        return
    with click.progressbar(runs, length=total, label="runs", file=sys.stderr) as bar:
        yield from bar


def check_outputs(json_path: str | None, timeline: str | None, report: str | None) -> None:
    """Refuse before a long run what could not be written after it."""
    from reports.files import check_writable

    for path in (json_path, timeline):
        if path and path != "-":
            if Path(path).is_dir():
                raise InputError(f"{path}: is a folder, expected a file to write")
            if not Path(path).parent.exists():
                raise InputError(f"{path}: {Path(path).parent} does not exist, expected a folder")
            check_writable(Path(path).parent, path)
    if report:
        check_writable(Path(report), report)


def tell(json_path: str | None, data: str, text: str, written: list[str]) -> None:
    """Write *data* where it was asked for; say the rest, not into the JSON on standard output."""
    if json_path and json_path != "-":
        write_file(Path(json_path), lambda file: file.write(data.encode()))
    click.echo(data if json_path == "-" else text, nl=json_path != "-")
    for line in written:
        click.echo(line, err=json_path == "-")


def _report(
    session: Session,
    directory: str,
    results: list[Result],
    recordings: dict[int, Recording],
) -> Path:
    from reports.html import write_report

    curves = _curves(session, results)
    return write_report(Path(directory), results, recordings, curves, command=command_line())


def _curves(session: Session, results: list[Result]) -> dict[str, list[tuple[int, float]]]:
    """Miss-ratio curves of the policies that can be replayed without a clock."""
    total = session.model.total_experts
    least = session.model.top_k * (session.model.layers if session.setup.pool == "layer" else 1)
    sizes = sorted({max(least, round(share * total)) for share in CURVE_SHARES})
    names = ["lru", "belady"]
    for result in results:
        plain = "forecaster" not in result.policy and result.policy["exact"]
        if plain and not result.policy["parameters"] and result.policy["name"] not in names:
            names.append(result.policy["name"])
    from policies.registry import POLICIES

    known = POLICIES.classes()
    return {n: session.curve(n, sizes, CURVE_STEPS) for n in names if n in known}


def command_line() -> str:
    import shlex

    return shlex.join(["simctl", *sys.argv[1:]])
