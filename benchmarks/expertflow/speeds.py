"""Speed over load on demand and over LRU, with the GPU memory that is saved.

Load on demand is LRU with one slot for each expert that a layer can demand: next to nothing is
found again. LRU and ``predictive`` run twice, in one pool over all layers and, as the paper's
baseline has it, in a pool for each layer. Tokens per second are of decode steps; *vs_lru* and
*vs_lru_layer*, of which the latter compares both in pools by layer, are of whole runs, as
everywhere where it is checked that ``predictive`` is not slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.expertflow import published
from benchmarks.expertflow.cells import (
    PAPERS_ORACLE,
    Cell,
    floor_slots,
    forecasters_of,
    name_of,
    slots_for_saving,
    told,
)
from benchmarks.expertflow_gaps import Source
from policies.budget import Budget
from policies.result import Result

#: A budget in words: as many slots as save what the paper saves at most.
SAVING = "saving"


@dataclass(frozen=True)
class Row:
    """One budget of one cell, told by one forecaster. Speeds in output tokens per second."""

    trace: str
    sizes: str
    hardware: str
    batch: int
    cache: str
    slots: int
    saving: float
    gpu_bytes: float
    forecaster: str
    floor_slots: int
    floor_saving: float
    on_demand: float
    lru: float
    lru_layer: float | None
    predictive: float
    predictive_layer: float | None
    vs_lru: float
    vs_lru_layer: float | None
    held: float
    hit: float
    link: float
    limit: float


def rows(
    source: Source,
    hardware: Sequence[str] = ("a40-pcie4", "h200-pcie5"),
    batches: Sequence[int] = (1, 4, 16),
    caches: Sequence[str] = ("25%", "50%", SAVING),
    others: Sequence[str] = (),
) -> Iterator[Row]:
    """Every machine, batch and budget; *others* are forecasters beside the predictor."""
    for machine in hardware:
        for batch in batches:
            cell = Cell(source, batch, machine)
            plain = cell.session()
            floor = cell.run("lru", Budget(slots=floor_slots(plain)))
            for cache in caches:
                budget = Budget(cache=cache)
                if cache == SAVING:
                    slots = slots_for_saving(plain, published.SAVING)
                    if slots < floor.slots:
                        continue
                    budget = Budget(slots=slots)
                yield from _budget(cell, cache, budget, floor, others)


def _budget(
    cell: Cell, cache: str, budget: Budget, floor: Result, others: Sequence[str]
) -> Iterator[Row]:
    lru, layered = cell.run("lru", budget), None
    if lru.slots >= lru.model["layers"] * lru.model["top_k"]:
        layered = cell.run("lru", budget, pool="layer")
    for forecaster in (*forecasters_of(cell.source, PAPERS_ORACLE), *others):
        found = cell.run("predictive", budget, forecaster)
        beside = layered and cell.run("predictive", budget, forecaster, pool="layer")
        memory = found.memory
        yield Row(
            trace=name_of(cell.source),
            sizes=cell.source.sizes or name_of(cell.source),
            hardware=cell.hardware,
            batch=cell.batch,
            cache=cache,
            slots=found.slots,
            saving=memory["saving"],
            gpu_bytes=memory["slots_bytes"] + memory["dense_bytes"] + memory["kv_bytes"],
            forecaster=told(forecaster),
            floor_slots=floor.slots,
            floor_saving=floor.memory["saving"],
            on_demand=floor.time["tokens_per_s"],
            lru=lru.time["tokens_per_s"],
            lru_layer=layered.time["tokens_per_s"] if layered else None,
            predictive=found.time["tokens_per_s"],
            predictive_layer=beside.time["tokens_per_s"] if beside else None,
            vs_lru=lru.time["total_s"] / found.time["total_s"],
            vs_lru_layer=layered.time["total_s"] / beside.time["total_s"]
            if layered and beside
            else None,
            held=found.held_ratio,
            hit=found.hit_ratio,
            link=found.link["utilisation"],
            limit=found.limit_s / found.time["total_s"],
        )
