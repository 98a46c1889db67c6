"""Runs in the simulated world."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from policies.budget import Budget
from policies.decisions import DecisionLog
from policies.outcome import result_of
from policies.recording import Recording
from policies.result import Result
from policies.routing import Step
from policies.session import TraceSession, no_garbage_collection
from sim.world import World


class Session(TraceSession):
    """A trace on a machine, ready to be simulated under any policy and budget."""

    def run(
        self,
        policy_text: str,
        budget: Budget,
        *,
        record: bool = False,
        spans: bool = False,
        watch: Callable[[Iterable[Step]], Iterable[Step]] = iter,
        log: DecisionLog | None = None,
    ) -> tuple[Result, Recording | None]:
        """Simulate one policy; a recording comes along if asked for (*spans* for a timeline).

        *watch* is handed the steps and passes them on: a progress bar. *log* takes the
        decisions, where more than their fingerprint is wanted.
        """
        prepared = self.prepare(policy_text, budget, log=log)
        planner = prepared.planner
        recording = Recording(planner.context, with_spans=spans) if record or spans else None
        world = World(planner, prepared.costs, depth=self.setup.depth, recording=recording)
        with no_garbage_collection():
            world.run(watch(prepared.steps()))
        return result_of(self, world), recording
