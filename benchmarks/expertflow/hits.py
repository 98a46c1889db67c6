"""Hit ratios by the paper's own definition, beside ours.

ExpertFlow (arXiv 2410.17954) counts one access for each (layer, distinct active expert) of a
step, and lets a layer wait for all of its prefetch before it asks what is resident: an expert
on the link is a hit however late it is. So the ratio depends on no clock. Here it is the share of
*held* accesses of a replay whose link takes no time. Its LRU has a fixed share of the slots in
every layer (``--pool layer``); its own cache moves slots across layers in the paper's text (one
pool) and within a layer in the released code (a pool for each). What is counted are decode steps;
*_all* counts the prompts' steps as well.

Ours are of a simulated run, prompts included, one pool over all layers: *held* (a slot when the
gate asks) and *hit* (its copy landed as well).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.expertflow.cells import ORACLES, Cell, forecasters_of, name_of, told
from benchmarks.expertflow_gaps import Source
from policies.budget import Budget
from policies.planner import Planner
from policies.routing import DECODE, Routing
from policies.session import no_garbage_collection
from sim.session import Session

#: A link that takes no time to speak of, so that nothing is too late or too dear to fetch.
INSTANT_S = 1e-12

#: What the paper's cache does: everything foreseen is fetched, what is not is evicted.
PAPERS = "predictive:horizon=64,margin=0.0,evict=recency"


@dataclass(frozen=True)
class Row:
    """One cell, told by one forecaster; ratios of 1. *copies* are moves per access, decoding."""

    trace: str
    sizes: str
    batch: int
    cache: str
    slots_per_layer: int
    forecaster: str
    lru: float
    papers: float
    papers_layer: float
    lru_all: float
    papers_all: float
    lru_copies: float
    papers_copies: float
    lru_held: float
    held: float
    hit: float
    hardware: str


@dataclass(frozen=True)
class Counted:
    """Ratios of 1 of a replay without clock."""

    decode: float
    everything: float
    copies: float


def replayed(session: Session, policy: str, cache: str) -> Counted:
    """Replay *policy* as the paper's engine runs: a layer waits for all of its prefetch."""
    prepared = session.prepare(policy, Budget(cache=cache))
    made = prepared.planner
    context = replace(made.context, transfer_s=INSTANT_S, layer_s=1.0)
    planner = Planner(made.policy, context, made.forecaster)
    if made.forecaster is not None and made.forecaster.offline:
        made.forecaster.reveal(session.future.demand())
    accesses, missed, moves = [0, 0], [0, 0], [0, 0]
    event = 0
    with no_garbage_collection():
        for step in prepared.steps():
            at = step.phase == DECODE
            before = dict(planner.counts)
            planner.begin(step)
            for layer, experts in enumerate(step.demand):
                planner.plan(Routing(step, layer, experts, event))
                planner.prefetch()
                accesses[at] += len(experts)
                event += 1
            after = planner.counts
            missed[at] += after["missed"] - before.get("missed", 0)
            moves[at] += sum(after[k] - before.get(k, 0) for k in ("demand", "prefetch"))
    return Counted(
        decode=1 - missed[True] / max(accesses[True], 1),
        everything=1 - sum(missed) / sum(accesses),
        copies=moves[True] / max(accesses[True], 1),
    )


def rows(
    source: Source,
    batches: tuple[int, ...] = (4, 16),
    caches: tuple[str, ...] = ("25%", "50%"),
    hardware: str = "h200-pcie5",
) -> Iterator[Row]:
    """Every batch and share of the experts, told by the trained predictor or by oracles."""
    for batch in batches:
        cell = Cell(source, batch, hardware)
        for cache in caches:
            lru = replayed(cell.session(pool="layer"), "lru", cache)
            lru_held = cell.run("lru", Budget(cache=cache)).held_ratio
            for forecaster in forecasters_of(source, ORACLES):
                session = cell.session(forecaster)
                papers = replayed(session, PAPERS, cache)
                layered = replayed(cell.session(forecaster, pool="layer"), PAPERS, cache)
                ours = cell.run("predictive", Budget(cache=cache), forecaster)
                yield Row(
                    trace=name_of(source),
                    sizes=source.sizes or "",
                    batch=batch,
                    cache=cache,
                    slots_per_layer=ours.slots // session.model.layers,
                    forecaster=told(forecaster),
                    lru=lru.decode,
                    papers=papers.decode,
                    papers_layer=layered.decode,
                    lru_all=lru.everything,
                    papers_all=papers.everything,
                    lru_copies=lru.copies,
                    papers_copies=papers.copies,
                    lru_held=lru_held,
                    held=ours.held_ratio,
                    hit=ours.hit_ratio,
                    hardware=hardware,
                )
