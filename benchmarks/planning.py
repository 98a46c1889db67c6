"""What policy and planner take on this host for each event, before and after its launch.

PYTHONPATH=. python benchmarks/planning.py
PYTHONPATH=. python benchmarks/planning.py --sizes qwen3-30b --batch 1 --policy mixed

From a gate's answer to the launch of its experts the GPU idles: that stretch is split into events
that hold all of their demand and those that miss some. What is decided behind the launch, the
prefetches, is split into events that fetch nothing and those that fetch something. Medians in
microseconds of the processor's time, beside the shares of events that miss and that fetch; means
say what a step takes. A policy may be given with a forecaster behind a slash.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from policies.budget import Budget
from policies.routing import Routing
from policies.session import Setup, TraceSession, no_garbage_collection
from traces.errors import InputError

TRACE = "traces/samples/granular-64x8.parquet"
POLICIES = "lru,lfru,predictive,predictive/markov,predictive/oracle,mixed,mixed/markov"

#: Steps before timing starts: the slots fill.
WARM_STEPS = 40

HEAD = (
    "| sizes | batch | cache | policy | held | missed (share) | mean "
    "| fetch none | fetch some (share) | mean |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


class Event(NamedTuple):
    """One event: what it missed and fetched, and the seconds of planning both."""

    missed: int
    fetched: int
    plan_s: float
    prefetch_s: float


def timed(session: TraceSession, policy: str, cache: str, most: int) -> list[Event]:
    """The decode events of the first *most* steps but :data:`WARM_STEPS`."""
    planner, _, steps = session.prepare(policy, Budget(cache=cache))
    known = [step for step, _ in zip(steps(), range(most), strict=False)]
    found: list[Event] = []
    now, event = time.thread_time, 0
    with no_garbage_collection():
        for step in known:
            planner.begin(step)
            for layer, experts in enumerate(step.demand):
                routing = Routing(step, layer, experts, event)
                event += 1
                answered = now()
                plan = planner.plan(routing)
                planned = now()
                moves = planner.prefetch()
                fetched = now()
                if step.phase == "decode" and step.number >= WARM_STEPS:
                    seconds = planned - answered, fetched - planned
                    found.append(Event(len(plan.missed), len(moves), *seconds))
    return found


def row(events: Sequence[Event]) -> str:
    """The figures of one run."""
    held = [event.plan_s for event in events if not event.missed]
    missed = [event.plan_s for event in events if event.missed]
    none = [event.prefetch_s for event in events if not event.fetched]
    some = [event.prefetch_s for event in events if event.fetched]
    means = (
        statistics.mean(seconds) * 1e6
        for seconds in zip(*((e.plan_s, e.prefetch_s) for e in events), strict=True)
    )
    plan, prefetch = (f"{mean:.1f}" for mean in means)
    total = len(events)
    parts = (_median(held), _median(missed, total), plan, _median(none), _median(some, total))
    return " | ".join((*parts, prefetch))


def _median(seconds: Sequence[float], total: int = 0) -> str:
    if not seconds:
        return "-"
    share = f" ({len(seconds) / total:.0%})" if total else ""
    return f"{statistics.median(seconds) * 1e6:.1f}{share}"


def table(options: argparse.Namespace) -> Iterator[str]:
    """A line for each setting."""
    yield HEAD
    for sizes in options.sizes.split(","):
        for batch in map(int, options.batch.split(",")):
            for named in options.policy.split(","):
                policy, _, forecaster = named.partition("/")
                session = TraceSession(
                    Setup(options.trace, batch=batch, sizes=sizes, forecaster=forecaster or None)
                )
                for cache in options.cache.split(","):
                    found = row(timed(session, policy, cache, options.steps))
                    yield f"| {sizes} | {batch} | {cache} | {named} | {found} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Time every setting and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", default=TRACE, help="[default: %(default)s]")
    parser.add_argument("--sizes", default="qwen3-30b,olmoe", help="[default: %(default)s]")
    parser.add_argument("--batch", default="1,8", help="[default: %(default)s]")
    parser.add_argument("--cache", default="25%,50%", help="[default: %(default)s]")
    parser.add_argument("--policy", default=POLICIES, help="[default: %(default)s]")
    parser.add_argument("--steps", type=int, default=500, help="[default: %(default)s]")
    options = parser.parse_args(arguments)
    try:
        for line in table(options):
            print(line, flush=True)
    except (InputError, ValueError) as error:
        print(f"planning: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
