"""Decode steps as one graph each, a second time: host and GPU as processes of their own.

They know of each other by events alone: what a gate answered, what has been planned, what is
settled.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import simpy

from policies.hardware import FIGURES, HardwareProfile, Whole, load_profile
from policies.moves import Move
from policies.planner import Plan
from policies.routing import Routing, Step
from policies.whole_steps import runs_whole
from runtime.calibration.toml import dumps
from tests.helpers_world import Flow, Machine, Transfer, captured

WHOLE = Whole(
    handshake_s=3.7e-6,
    answer_s=2.3e-6,
    notice_s=1.9e-6,
    publish_s=1.3e-6,
    follow_s=7e-7,
    launch_s=2.9e-5,
    layer_floor_s={"any": 1.1e-5},
)


def whole(profile: HardwareProfile, **figures: float) -> HardwareProfile:
    """*profile* with decode steps as one graph each, some *figures* of :data:`WHOLE` changed."""
    return replace(captured(profile), whole=replace(WHOLE, **figures))


def write_profile(path: Path, profile: HardwareProfile) -> Path:
    """*profile* as a TOML file at *path*, its figures assumed."""
    given = (*FIGURES, "title")
    values = {name: part for name, part in profile.to_dict().items() if name in given and part}
    values["kind"] = "datasheet"
    present = [name for name in FIGURES if name in values]
    values["sources"] = dict.fromkeys(present, "assumed: for a test")
    path.write_text(dumps(values), encoding="utf-8")
    assert load_profile(path).whole == profile.whole
    return path


@dataclass
class Signals:
    """What host and GPU tell each other about one event."""

    answer: simpy.Event
    planned: simpy.Event
    settled: simpy.Event


class WholeMachine(Machine):
    """A machine that takes such steps in one launch; policies that serve by loading alone."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        #: The last transfer of every copy that has a slot.
        self.table: dict[int, Transfer] = {}

    def decode(self, step: Step, routings: Sequence[Routing], begun: Sequence[Move]) -> Flow:
        if self.costs.whole is None or not runs_whole(self.planner, step.size):
            yield from super().decode(step, routings, begun)
            return
        if begun:
            yield self.env.timeout(self.costs.whole.publish_s)
        self.keep(begun)
        yield self.env.timeout(self.costs.whole.launch_s)
        event = self.env.event
        signals = [Signals(event(), event(), event()) for _ in routings]
        gpu = self.env.process(self.gpu(step, routings, signals))
        for routing, signal in zip(routings, signals, strict=True):
            yield self.env.timeout(self.costs.whole.follow_s)
            yield signal.answer
            yield from self.follow(routing, signal)
        yield gpu

    def keep(self, moves: Sequence[Move]) -> None:
        """The table of a chain of graphs, which is not told now, has an entry for each expert."""
        self.untold = min(self.untold + self.entries(moves), self.planner.context.total)

    def follow(self, routing: Routing, signal: Signals) -> Flow:
        """The host's part of one event."""
        whole = self.costs.whole
        plan: Plan = self.planner.plan(routing)
        assert plan.whole
        alone = all(transfer.issued for transfer in self.on_the_way.values())
        self.late_ones(routing, plan)
        others = sum(map(len, plan.waves)) - 1 if alone and plan.waves else 0
        yield self.env.timeout(self.thinking(routing, plan) - self.move_s * others)
        yield self.env.timeout(self.costs.late_issue_s * self.wanted)
        for wave in plan.waves:
            transfers = yield from self.submit(wave[:1], urgent=True)
            yield self.env.timeout(self.move_s * others)
            transfers += yield from self.submit(wave[1:], urgent=True)
            for transfer in transfers:
                transfer.told = signal.planned
            self.keep(wave)
            yield self.env.timeout(whole.publish_s)
        self.env.process(self.signal(signal.planned, whole.notice_s))
        moves = yield from self.choose(routing)
        if moves:
            self.keep(moves)
            yield self.env.timeout(whole.publish_s)
        for move in moves:
            # What is to come is in the table before it is issued.
            self.table.pop(move.victim, None)
            self.table.pop(move.copy, None)
        self.env.process(self.signal(signal.settled, whole.notice_s))
        yield from self.submit(moves, urgent=False)

    def signal(self, event: simpy.Event, seconds: float) -> Flow:
        """The other side notices after so many *seconds*."""
        yield self.env.timeout(seconds)
        event.succeed()

    def gpu(self, step: Step, routings: Sequence[Routing], signals: Sequence[Signals]) -> Flow:
        """The GPU's part of one step."""
        costs, whole = self.costs, self.costs.whole
        attention = whole.attention_s(step.size, step.kv_tokens)
        attention += costs.profile.software.policy_layer_s.get(self.planner.policy.name, 0.0)
        settled = self.env.event()
        self.env.process(self.signal(settled, whole.notice_s))
        for routing, signal in zip(routings, signals, strict=True):
            yield self.env.timeout(attention)
            self.env.process(self.signal(signal.answer, whole.answer_s))
            yield settled
            there = [e for e in routing.experts if self.found(e)]
            yield self.env.timeout(whole.handshake_s)
            seconds = dict(zip(routing.experts, map(whole.expert_s, routing.counts), strict=True))
            yield self.env.timeout(sum(seconds.pop(e) for e in there))
            if seconds:
                yield signal.planned
                for expert in seconds:
                    yield from self.landing(self.table[expert])
                yield self.env.timeout(sum(seconds.values()))
            settled = signal.settled
        yield self.env.timeout(whole.head_s)

    def found(self, expert: int) -> bool:
        """Whether the table has *expert*, and the GPU can see by now that it has landed."""
        transfer = self.table.get(expert)
        if transfer is None or not transfer.landed.triggered:
            return False
        told = transfer.told is None or transfer.told.triggered
        return told and self.env.now >= transfer.landed_s + self.costs.whole.notice_s

    def landing(self, transfer: Transfer) -> Flow:
        """Wait until the GPU sees that *transfer* has landed."""
        if not transfer.landed.processed:
            yield transfer.landed
        seen = transfer.landed_s + self.costs.whole.notice_s
        if seen > self.env.now:
            yield self.env.timeout(seen - self.env.now)

    def submit(
        self, moves: Sequence[Move], urgent: bool, **more: Any
    ) -> Generator[simpy.Event, object, list[Transfer]]:
        made = yield from super().submit(moves, urgent, **more)
        for transfer in made:
            self.table.pop(transfer.move.victim, None)
            self.table[transfer.move.copy] = transfer
        return made
