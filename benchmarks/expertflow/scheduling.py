"""What a token scheduler gains: distinct experts of a decode step, and speed without and with it.

The paper's own comparison has the scheduler alone. Here the cache is either ``lru`` with its slots
divided by layer, the paper's baseline, or ``predictive`` told by the same forecaster as the
scheduler.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.expertflow.cells import PAPERS_ORACLE, Cell, forecasters_of, name_of, told
from benchmarks.expertflow_gaps import Source
from policies.budget import Budget

#: As the paper divides; in groups that keep the GPU for a while; by prompts, over two batches
#: and over four.
SCHEDULERS = (
    "expertflow",
    "expertflow:every=16,in_a_row=true",
    "prompt-routes:unit=2",
    "prompt-routes",
)

#: Policies and the pool that each has.
POLICIES = {"lru": "layer", "predictive": "global"}


@dataclass(frozen=True)
class Row:
    """One scheduler in one cell. Speeds in output tokens per second."""

    trace: str
    sizes: str
    hardware: str
    batch: int
    cache: str
    policy: str
    forecaster: str
    scheduler: str
    before: float
    after: float
    without: float
    with_it: float
    held_without: float
    held_with: float
    cost: float

    @property
    def gain(self) -> float:
        """Speed with it over speed without, less 1."""
        return self.with_it / self.without - 1


def rows(
    source: Source,
    hardware: str = "a40-pcie4",
    batches: Sequence[int] = (16,),
    caches: Sequence[str] = ("25%", "50%"),
) -> Iterator[Row]:
    """Every batch, share of the experts, policy and scheduler."""
    (forecaster,) = forecasters_of(source, PAPERS_ORACLE)
    for batch in batches:
        cell = Cell(source, batch, hardware)
        for cache in caches:
            budget = Budget(cache=cache)
            for policy, pool in POLICIES.items():
                plain = cell.run(policy, budget, forecaster, pool=pool)
                for scheduler in SCHEDULERS:
                    found = cell.run(policy, budget, forecaster, pool=pool, scheduler=scheduler)
                    schedule = found.schedule or {}
                    spent = schedule["follow_s"] + schedule["waited_s"]
                    yield Row(
                        trace=name_of(source),
                        sizes=source.sizes or "",
                        hardware=hardware,
                        batch=batch,
                        cache=cache,
                        policy=policy,
                        forecaster=told(forecaster),
                        scheduler=scheduler,
                        before=schedule["distinct_in_file_order"],
                        after=schedule["distinct_experts"],
                        without=plain.time["tokens_per_s"],
                        with_it=found.time["tokens_per_s"],
                        held_without=plain.held_ratio,
                        held_with=found.held_ratio,
                        cost=spent / found.time["decode_s"],
                    )
