"""Where the time of a decode step goes: its kernels, and what misses cost beyond their copies.

PYTHONPATH=. python benchmarks/step_profile.py [--layers 4] [--share 100%] [--policy lru]

On a machine with an NVIDIA GPU, with the random checkpoint of `benchmarks/freetoken` (text-like
routing) in fewer layers, decode steps as one CUDA graph each, compiled. For every share of the
slots: kernels by name under torch's profiler; and for events by the number of experts they missed,
medians of the microseconds from the gate's answer until the host had settled the event before,
until it had planned this one, and until the last copy had landed, by the device's own clock.
Profiled steps are not timed: the profiler slows the host down.
"""

from __future__ import annotations

import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.freetoken.checkpoint import make
from benchmarks.freetoken.ours import Forced, offloaded
from benchmarks.freetoken.plan import CHECKPOINT, TEXT, Cell, Task, share_of, slots_of
from benchmarks.side_by_side.plan import FULL
from runtime.fullspeed import at_full_speed
from runtime.store import KeptStore
from traces.errors import InputError

#: Steps that fill the slots, those whose events are told of, and those that are profiled.
WARM, TOLD, PROFILED = 80, 70, 3

PROMPT = 32

#: Characters of a kernel's name that are told.
NAME = 72


class Kernel(NamedTuple):
    """One launch: its name, and microseconds on the GPU."""

    name: str
    us: float


class Event(NamedTuple):
    """What one event missed; microseconds from the answer until settled, planned and landed."""

    missed: int
    settled_us: float
    planned_us: float
    landed_us: float


def kernel_rows(kernels: Iterable[Kernel], steps: int, layers: int) -> list[str]:
    """Lines of a table of *kernels* of so many *steps*: what each name takes of a step, falling."""
    by_name: defaultdict[str, list[float]] = defaultdict(list)
    for kernel in kernels:
        by_name[kernel.name].append(kernel.us)
    lines = ["| launches a layer | us each | us a step | kernel |", "|---|---|---|---|"]
    for name, all_us in sorted(by_name.items(), key=lambda item: -sum(item[1])):
        count = len(all_us) / (steps * layers)
        short = name if len(name) <= NAME else name[: NAME - 3] + "..."
        lines.append(
            f"| {count:.3g} | {median(all_us):.1f} | {sum(all_us) / steps:.1f} | `{short}` |"
        )
    return lines


def event_rows(events: Sequence[Event]) -> list[str]:
    """Lines of a table of *events* by what they missed."""
    by_missed: defaultdict[int, list[Event]] = defaultdict(list)
    for event in events:
        by_missed[event.missed].append(event)
    lines = ["| missed | events | settled | planned | landed |", "|---|---|---|---|---|"]
    for missed, some in sorted(by_missed.items()):
        told = (median(event[field] for event in some) for field in (1, 2, 3))
        lines.append(f"| {missed} | {len(some)} | " + " | ".join(f"{us:.1f}" for us in told) + " |")
    return lines


def stamped(stamps: Sequence[Sequence[int]], missed: Sequence[int]) -> list[Event]:
    """The events of a step from what the device stamped at each gate, in nanoseconds."""
    return [
        Event(count, *((moment - answered) / 1e3 for moment in moments))
        for count, (answered, *moments) in zip(missed, stamps, strict=True)
    ]


def told_events(model: Any, forced: Forced) -> list[Event]:
    """The events of :data:`TOLD` steps, the slots being full."""
    runner = model.expert_cache.runner
    missed: list[int] = []
    for number in range(WARM):
        forced.decode(number)
    shake = runner.graphs.handshake
    runner.engine.on_event = lambda routing, plan, late: missed.append(len(plan.missed))
    found: list[Event] = []
    for number in range(WARM, WARM + TOLD):
        missed.clear()
        forced.decode(number)
        found += stamped(shake.stamps.tolist(), missed)
    runner.engine.on_event = None
    return found


def profiled(forced: Forced) -> list[Kernel]:
    """What the device ran in :data:`PROFILED` further steps."""
    first = WARM + TOLD
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for number in range(first, first + PROFILED):
            forced.decode(number)
    device = torch.autograd.DeviceType.CUDA
    return [
        Kernel(event.name, event.time_range.elapsed_us())
        for event in seen.events()
        if event.device_type == device
    ]


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--layers", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--share", multiple=True, default=("100%", "25%"), show_default=True)
@click.option("--policy", default="lru", show_default=True, help="An exact policy.")
@click.option("--hardware", default="h100-captured", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where the checkpoint stays.")
def main(
    layers: int, share: tuple[str, ...], policy: str, hardware: str, folder: Path | None
) -> None:
    """Print kernels and events of decode steps, for each share of the slots."""
    if not torch.cuda.is_available():
        raise click.ClickException("torch sees no CUDA device, expected one")
    shape = replace(FULL, layers=layers)
    try:
        slots = [slots_of(share_of(text), shape, theirs=False) for text in share]
    except InputError as error:
        raise click.UsageError(str(error)) from None
    with tempfile.TemporaryDirectory() as made, KeptStore() as kept, torch.no_grad():
        place = str((folder or Path(made)).resolve())
        task = Task(CHECKPOINT, place, shape, "cuda", PROMPT, 0, hardware, TEXT)
        make(task)
        for text, count in zip(share, slots, strict=True):
            cell = Cell(count, 1, WARM + TOLD + PROFILED, policy)
            device = torch.device("cuda")
            with offloaded(task, cell, kept) as model, at_full_speed(device) as cores:
                model.expert_cache.runner.cores = cores
                forced = Forced(model, task, cell)
                forced.pass_over(0, PROMPT)
                events, kernels = told_events(model, forced), profiled(forced)
            print(f"\n{text} of the experts in slots, {policy}: events\n")
            print("\n".join(event_rows(events)))
            print(f"\n{text} of the experts in slots, {policy}: kernels\n")
            print("\n".join(kernel_rows(kernels, PROFILED, layers)))


if __name__ == "__main__":
    sys.exit(main())
