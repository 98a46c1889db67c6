"""What the host takes from a gate's answer to the first copy of what is missed, without a GPU.

PYTHONPATH=. python benchmarks/answering.py [--policy lru] [--cache 50%] [--trace FILE]

The host's half of decode steps in one graph: an answer lies in its memory, is made an event,
planned, and its first copy leaves. Copies go nowhere. Medians in microseconds for events by the
number of experts they miss, once with the processor's caches warm from the event before, and once
after other work has driven that out of them, as a neighbour on the same core does.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from policies.budget import Budget
from policies.session import Setup, TraceSession, no_garbage_collection
from runtime.bank import SlotBank
from runtime.dimensions import config_of
from runtime.engine import Engine
from runtime.families import find_gates
from runtime.handshake import LIMIT_S, Handshake
from runtime.hook import HostAnswer
from runtime.kernels.gate import POSTED
from runtime.lanes import HostLanes, Mark
from runtime.layout import ExpertLayout
from runtime.replay_model import random_experts
from runtime.skeleton import build_skeleton
from runtime.steps import LiveSteps
from runtime.store import HostStore
from runtime.whole_steps import answer, await_gate
from traces.errors import InputError
from traces.model import ModelSpec
from traces.sizes import dimensions

#: Steps before timing starts: the slots fill.
WARM_STEPS = 40

#: Bytes that are written between two events to empty the caches.
OTHER_WORK_BYTES = 64 * 2**20

CPU = torch.device("cpu")


class Nowhere(HostLanes):
    """Copies that land when they are issued and move nothing; notes when the first one left."""

    def __init__(self) -> None:
        super().__init__()
        self.landed = torch.zeros(1, dtype=torch.int32)
        self.left_s = 0.0
        self._issued = 0

    def count_landings(self) -> Tensor:
        return self.landed

    def copy_first(self, target: Tensor, source: Tensor) -> tuple[Mark, Mark]:
        self.left_s = time.perf_counter()
        return Mark(), Mark()

    def copy_all(
        self, pairs: Sequence[tuple[Tensor, Tensor]], begun: tuple[Mark, Mark] | None = None
    ) -> tuple[Mark, Mark]:
        begin, _ = begun or self.copy_first(*pairs[0])
        self._issued += 1
        self.landed.fill_(self._issued)
        return begin, Mark(0, self._issued)

    def passed(self, mark: Mark) -> bool:
        return True


class Answering:
    """An engine over a handshake with nobody, one event after the other."""

    def __init__(self, session: TraceSession, policy: str, budget: Budget) -> None:
        prepared = session.prepare(policy, budget)
        if not prepared.planner.policy.exact:
            raise InputError(f"--policy {policy}: changes the output, expected an exact policy")
        self._steps = prepared.steps
        spec: ModelSpec = session.model
        small = replace(
            dimensions("qwen3-30b"), layers=1, experts=spec.experts, top_k=spec.top_k,
            hidden=64, intermediate=32, heads=2, kv_heads=1, head_dim=32, vocabulary=64,
        )  # fmt: skip
        skeleton = build_skeleton(config_of("qwen3_moe", small), torch.float32)
        layout = ExpertLayout.of(find_gates(skeleton)[0].experts)
        store = HostStore(spec.layers, spec.experts, layout, pin=False)
        store.fill(random_experts(layout, spec.layers, spec.experts, CPU, 0))
        cache = prepared.planner.cache
        bank = SlotBank(layout, cache.full_slots, CPU)
        self.lanes = Nowhere()
        self._engine = Engine(prepared.planner, store, bank, self.lanes)
        self._shake = Handshake(spec.layers, spec.experts, cache.full_slots, self.lanes, LIMIT_S)
        self._shake.follow(self._engine)
        self._live = LiveSteps(spec)
        row = torch.zeros(1, spec.top_k, dtype=torch.int64)
        self._answers = [
            HostAnswer(row, None, spec.top_k, 0, pin=False) for _ in range(spec.layers)
        ]

    def events(self, most: int, between: Callable[[], None]) -> Iterator[tuple[int, float, float]]:
        """Misses of each timed event, and seconds to its first copy and to its end.

        *between* is called before each; an event that misses nothing has no first copy (nan).
        """
        decoding = (step for step in self._steps() if step.phase == "decode")
        for number, known in zip(range(most), decoding, strict=False):
            step = self._live.begin(np.zeros((1, 1), dtype=np.int64), None, number == 0)
            self._engine.start()
            self._engine.begin(step)
            for layer, host in enumerate(self._answers):
                chosen = known._experts[0, layer]  # type: ignore[index]
                host.buffers[0][0] = torch.from_numpy(chosen.astype(np.int64))
                between()
                timed = self._event(step, layer, host)
                if number >= WARM_STEPS:
                    yield timed
            self._engine.end()
            self._live.end(step)

    def _event(self, step: Any, layer: int, host: HostAnswer) -> tuple[int, float, float]:
        engine, shake, lanes = self._engine, self._shake, self.lanes
        lanes.left_s = float("nan")
        shake._words[POSTED] = shake.events + 1
        begun = time.perf_counter()
        await_gate(engine, shake)
        routing = self._live.route(step, layer, host.read(), engine.events)
        plan, _ = answer(engine, shake, routing, serves=False)
        return len(plan.missed), lanes.left_s - begun, time.perf_counter() - begun


def other_work() -> Callable[[], None]:
    """What drives the host's own out of the caches, and then lets a while pass."""
    memory = np.zeros(OTHER_WORK_BYTES // 8)

    def work() -> None:
        np.add(memory, 1.0, out=memory)
        time.sleep(2e-4)

    return work


def rows(session: TraceSession, policy: str, cache: str, most: int) -> Iterator[str]:
    """Lines of the table for one policy, warm and cold."""
    for name, between, steps in (("warm", lambda: None, most), ("cold", other_work(), most // 4)):
        by_misses: dict[int, list[tuple[float, float]]] = defaultdict(list)
        with no_garbage_collection():
            for missed, first_s, all_s in Answering(session, policy, Budget(cache=cache)).events(
                steps, between
            ):
                by_misses[missed].append((first_s, all_s))
        for missed, found in sorted(by_misses.items()):
            first_us, all_us = (
                1e6 * statistics.median(column) for column in zip(*found, strict=True)
            )
            first = f"{first_us:.1f}" if missed else "-"
            yield f"| {policy} | {name} | {missed} | {len(found)} | {first} | {all_us:.1f} |"


@click.command(help=(__doc__ or "").replace("\n\nPYTHONPATH", "\n\n\b\nPYTHONPATH"))
@click.option("--trace", default="traces/samples/granular-64x8.parquet", show_default=True)
@click.option("--policy", multiple=True, default=("lru", "lfru", "predictive"), show_default=True)
@click.option("--cache", default="50%", show_default=True)
@click.option("--steps", type=click.IntRange(min=WARM_STEPS + 4), default=800, show_default=True)
def cli(trace: str, policy: tuple[str, ...], cache: str, steps: int) -> None:
    session = TraceSession(Setup(trace, sizes="qwen3-30b", hardware="h100-captured"))
    click.echo("| policy | caches | missed | events | us to the first copy | to the end |")
    click.echo("|---|---|---|---|---|---|")
    for name in policy:
        for line in rows(session, name, cache, steps):
            click.echo(line)


def main() -> int:
    """Exit code 2 for bad input."""
    try:
        cli.main(standalone_mode=False)
    except (InputError, click.ClickException) as error:
        print(f"answering: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
