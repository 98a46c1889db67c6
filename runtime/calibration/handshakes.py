"""What host and device take to tell each other things while a step in one graph runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from policies.moves import Move
from runtime.calibration.bench import Bench, Work
from runtime.calibration.hosts import HostCosts, fit_return
from runtime.calibration.shapes import TYPICAL, Decoding, offloaded
from runtime.calibration.stamps import answers_apart_s
from runtime.calibration.timed import TimedRun
from runtime.errors import OffloadError
from runtime.eventclock import ANSWERED, FETCHED
from runtime.handshake import LIMIT_S, Handshake, SharedTable, can_shake
from runtime.hook import HostAnswer
from runtime.kernels.gate import GateKernel
from runtime.lanes import Lanes, lanes_for
from runtime.whole_steps import WholeStep

#: Gates of the graph that is answered at once, and what each chooses from how many experts.
GATES, TOP_K, EXPERTS = 32, 8, 64
PING_STEPS, WARM_STEPS = 60, 10

#: Depth of the model whose graph is launched: as deep as published ones often are.
LAUNCH_LAYERS, LAUNCHES = 24, 50

#: Moves of an event that moves anything.
MOVES = (1, 2)
TOLD_EVENTS, PASSES = 1000, 20

#: Copies issued in a row, of so many bytes each.
ISSUED, COPY_BYTES = 16, 4096


class Ping(NamedTuple):
    """Seconds from one gate's answer to the next in a graph of nothing else.

    *alone_s* when the device waits for nothing, *answered_s* when each gate waits for a host
    that answers at once.
    """

    alone_s: float
    answered_s: float

    @property
    def way_s(self) -> float:
        """One way, from device to host or back.

        No clock that both know tells which of the two ways is longer.
        """
        return max(self.answered_s - self.alone_s, 0.0) / 2


def measure_ping(bench: Bench) -> Ping | None:
    """Gates that wait for the plan of their own event; None where there is no handshake."""
    lanes = lanes_for(bench.device)
    if not can_shake(lanes):
        return None
    shake = Handshake(GATES, EXPERTS, 1, lanes, LIMIT_S)
    kernel = GateKernel(shake, served=True, early=False)
    # Whatever is chosen is served from the first slot, by a copy that has landed.
    shake.served.zero_()
    chosen = torch.arange(TOP_K, device=bench.device).unsqueeze(0)
    weights = torch.zeros(1, TOP_K, device=bench.device)
    host = HostAnswer(chosen, None, TOP_K, 0, pin=bench.cuda)

    def gates() -> None:
        for layer in range(GATES):
            kernel.run(layer, chosen, weights, chosen, host)

    shake.release()
    replay = bench.graph(gates)
    alone_s = _apart_s(bench, shake, replay)
    shake.renew()

    def answered() -> None:
        replay()
        for _ in range(GATES):
            shake.await_answer(None)
            shake.planned()
            shake.settled()

    try:
        return Ping(alone_s, _apart_s(bench, shake, answered))
    finally:
        # Should a gate still wait, it is not to wait for long.
        shake.release()
        bench.wait()


def _apart_s(bench: Bench, shake: Handshake, step: Work) -> float:
    """Seconds from one answer to the next, for a *step* through every gate."""
    found = []
    for _ in range(WARM_STEPS + PING_STEPS):
        bench.wait()
        step()
        bench.wait()
        found.append(shake.stamps.numpy().copy())
    return answers_apart_s(np.array(found[WARM_STEPS:]))


def measure_launch(bench: Bench) -> float:
    """Host seconds to launch a step in one graph, of a model of :data:`LAUNCH_LAYERS` layers."""
    with offloaded(TYPICAL, LAUNCH_LAYERS, bench, compute="graph") as model:
        decoding = Decoding(model, bench)
        for _ in range(4):
            decoding.step()
        graphs = model.expert_cache.runner.graphs
        steps = [] if graphs is None else [s for s in graphs.chains if isinstance(s, WholeStep)]
        if not steps or graphs.handshake is None:
            raise OffloadError(
                f"{TYPICAL}: decode steps were not captured as one graph, expected them to be, as "
                "those of smaller models were"
            )
        [graph] = steps[-1].segments()
        # The device goes through by itself, with whatever its gates choose.
        graphs.handshake.release()
        try:
            return bench.host_s(graph.replay, LAUNCHES)
        finally:
            graphs.handshake.renew()


def measure_publish(bench: Bench) -> float:
    """Host seconds beside those of a chain for an event that moves one or two experts."""
    telling_s = statistics.mean(_telling_s(moves, pin=bench.cuda) for moves in MOVES)
    return telling_s + _counting_s(bench)


def _telling_s(moves: int, *, pin: bool) -> float:
    """Host seconds to write *moves* into the shared table: when decided, and when issued."""
    table = SharedTable(GATES, EXPERTS, EXPERTS, pin=pin)
    made = [Move(i, i, EXPERTS + i, demand=True) for i in range(moves)]

    def events() -> None:
        for ticket in range(TOLD_EVENTS):
            table.coming(made)
            table.issued(made, ticket)

    return _median_s(events) / TOLD_EVENTS


def _median_s(work: Callable[[], None]) -> float:
    """Median seconds of *work* on the host."""
    found = []
    for _ in range(PASSES):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def _counting_s(bench: Bench) -> float:
    """Host seconds that issuing a copy takes longer where its landing is counted."""
    if not bench.cuda:
        return 0.0
    plain, counting = lanes_for(bench.device), lanes_for(bench.device)
    counting.count_landings()
    here = torch.zeros(2, COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.zeros_like(here, device=bench.device)
    pairs = list(zip(there, here, strict=True))

    def issue(lanes: Lanes) -> float:
        def work() -> None:
            for _ in range(ISSUED):
                lanes.copy_all(pairs)

        return bench.host_s(work, 5) / ISSUED

    # By turns: what else slows the host slows both.
    longer = [issue(counting) - issue(plain) for _ in range(PASSES // 2)]
    for lanes in (plain, counting):
        lanes.finish()
    return max(statistics.median(longer), 0.0)


def fit_follow(
    quiet: TimedRun, late: Sequence[TimedRun], host: HostCosts, publish_s: float
) -> float:
    """Host seconds of an event in one graph that neither *host* nor *publish_s* has.

    What events of *quiet*, for which nothing is to be done, take from answer to prefetches
    beyond policy and planner; and what passes from there until the next answer in runs *late*,
    where it is there before, less what is published.
    """
    planning = host.planning[quiet.policy]
    cold = planning.cold
    inside: list[float] = []
    apart: list[float] = []
    for counts, times in zip(quiet.counts, quiet.times.tolist(), strict=True):
        for one, (before, now) in zip(counts[1:], pairwise(times), strict=True):
            apart.append(now[ANSWERED] - before[ANSWERED])
            if one.quiet:
                weight = cold.weight(now[ANSWERED] - before[FETCHED])
                known_s = cold.longer(planning.seconds(one), weight) + planning.foreseeing_s(one)
                inside.append(now[FETCHED] - now[ANSWERED] - known_s)
    if not inside:
        return 0.0
    # Every gate answers before it waits for the host: so long after the one before, it has.
    turn_s, _ = fit_return(late, ANSWERED, statistics.median(apart))
    return max(statistics.median(inside) + max(turn_s - publish_s, 0.0), 0.0)
