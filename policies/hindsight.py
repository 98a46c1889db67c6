"""What Belady would have missed, once a live run has shown all of its demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from policies.base import Context
from policies.future import NEVER
from policies.planner import Planner, run_counts
from policies.registry import POLICIES
from policies.routing import DECODE, Step

#: The demand of one step: for each layer its distinct experts in ascending order.
StepDemand = Sequence[Sequence[int]]


def belady_missed(context: Context, demand: Sequence[StepDemand]) -> int:
    """Missed accesses of the best demand-only replay of *demand* in one pool of full slots."""
    alike = Context(context.layers, context.experts, context.top_k, context.slots)
    return run_counts(Planner(POLICIES.build("belady"), alike), _steps(demand))


def _steps(demand: Sequence[StepDemand]) -> Iterator[Step]:
    coming = _next_uses(demand)
    for number, (layers, next_use) in enumerate(zip(demand, coming, strict=True)):
        step = Step(number, DECODE, 1)
        step.demand = [list(experts) for experts in layers]
        step._next_use = next_use
        yield step


def _next_uses(demand: Sequence[StepDemand]) -> list[list[list[int]]]:
    """For every access the event at which its expert is used next."""
    event = sum(map(len, demand))
    coming: dict[int, int] = {}
    found: list[list[list[int]]] = []
    for layers in reversed(demand):
        step: list[list[int]] = []
        for experts in reversed(layers):
            event -= 1
            step.append([coming.get(expert, NEVER) for expert in experts])
            coming.update(dict.fromkeys(experts, event))
        found.append(step[::-1])
    return found[::-1]
