"""How much of the gap from LRU to Belady ``predictive`` closes, by what it is told.

PYTHONPATH=. python benchmarks/expertflow_gaps.py --json OUT \\
    --trace traces/samples/granular-64x8.parquet:qwen3-30b:granular.forecast.npz \\
    --trace traces/samples/coarse-8x2.parquet:mixtral-8x7b:coarse.forecast.npz

A trace is given with the model whose sizes it takes (empty: its own) and, if there is one, a file
of forecasts. Every cell (trace, cache, batch) runs ``lru``, ``belady`` and ``predictive`` in the
simulator with every forecaster that the trace allows, by ``evict=recency`` and, where the
forecaster tells of reuse, by ``evict=reuse``.

Two shares of the gap: *missed* counts accesses that were not held at the gate, *moves* all copies,
prefetches too. Both 100 % are Belady's, who prefetches nothing; only the first can be passed.
Speed is LRU's time over the run's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from policies.budget import Budget
from policies.result import Result
from policies.session import Setup
from sim.session import Session
from traces.errors import InputError
from traces.writing import replacing

#: Forecasters by the reuse that they tell.
PLAIN = ("ahead", "markov")
ORACLES = tuple(f"oracle:accuracy={accuracy}" for accuracy in (1.0, 0.9, 0.8, 0.7))


@dataclass(frozen=True)
class Source:
    """A trace, the model whose sizes it takes, and a file of forecasts."""

    trace: str
    sizes: str | None = None
    forecasts: str | None = None


@dataclass(frozen=True)
class Row:
    """One run of ``predictive`` in one cell; shares and ratios of 1."""

    trace: str
    sizes: str
    cache: str
    batch: int
    forecaster: str
    evict: str
    lru_hit: float
    belady_hit: float
    hit: float
    held: float
    late: float
    gap_missed: float
    gap_moves: float
    prefetches_per_token: float
    speed: float


def source_of(text: str) -> Source:
    """``TRACE[:SIZES[:FORECASTS]]`` taken apart."""
    trace, sizes, forecasts, *_ = (*text.split(":", 2), "", "")
    return Source(trace, sizes or None, forecasts or None)


def runs(source: Source, session: Session) -> Iterator[tuple[str, str]]:
    """Forecaster and way of evicting of every run of a cell."""
    for forecaster in PLAIN:
        if forecaster != "ahead" or session.stored.ahead_depth:
            yield forecaster, "recency"
    known = (f"routing-path:{source.forecasts}",) if source.forecasts else ()
    for forecaster in (*known, *ORACLES):
        yield from ((forecaster, "recency"), (forecaster, "reuse"))


def cell(source: Source, cache: str, batch: int, hardware: str) -> Iterator[Row]:
    """All runs of one cell."""

    def session(forecaster: str | None = None) -> Session:
        return Session(
            Setup(
                source.trace,
                batch=batch,
                hardware=hardware,
                sizes=source.sizes,
                forecaster=forecaster,
            )
        )

    budget, plain = Budget(cache=cache), session()
    lru, _ = plain.run("lru", budget)
    belady, _ = plain.run("belady", budget)
    for forecaster, evict in runs(source, plain):
        result, _ = session(forecaster).run(f"predictive:evict={evict}", budget)
        yield row_of(source, cache, (forecaster, evict), (lru, belady, result))


def row_of(
    source: Source, cache: str, told: tuple[str, str], results: tuple[Result, Result, Result]
) -> Row:
    """The figures of one run, *told* forecaster and way of evicting: LRU's, Belady's, its own."""
    (forecaster, evict), (lru, belady, result) = told, results
    gap = max(lru.missed - belady.missed, 1)
    moved = result.moves["demand"] + result.moves["prefetch"]
    return Row(
        trace=source.trace,
        sizes=source.sizes or "",
        cache=cache,
        batch=result.batch,
        forecaster=forecaster,
        evict=evict,
        lru_hit=lru.hit_ratio,
        belady_hit=belady.hit_ratio,
        hit=result.hit_ratio,
        held=result.held_ratio,
        late=result.late / result.accesses,
        gap_missed=(lru.missed - result.missed) / gap,
        gap_moves=(lru.missed - moved) / gap,
        prefetches_per_token=result.moves["prefetch"] / result.tokens,
        speed=lru.time["total_s"] / result.time["total_s"],
    )


def table(rows: Sequence[Row]) -> Iterator[str]:
    """The rows of one trace as a Markdown table: a cell's figures are gap missed, moves, speed."""
    cells = list(dict.fromkeys((row.batch, row.cache) for row in rows))
    found = {(row.batch, row.cache, row.forecaster, row.evict): row for row in rows}
    yield "| forecaster | evict | " + " | ".join(f"B {b}, {c}" for b, c in cells) + " |"
    yield "|---|---|" + "---|" * len(cells)
    for forecaster, evict in dict.fromkeys((row.forecaster, row.evict) for row in rows):
        name = forecaster.partition(":")[0] if "routing-path" in forecaster else forecaster
        texts = [_figures(found[b, c, forecaster, evict]) for b, c in cells]
        yield f"| {name} | {evict} | " + " | ".join(texts) + " |"


def _figures(row: Row) -> str:
    return f"{row.gap_missed:.0%} {row.gap_moves:.0%} {row.speed:.2f}x".replace("%", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all cells, print a table for each trace, write the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", action="append", required=True, metavar="T[:SIZES[:FORECASTS]]")
    parser.add_argument("--cache", default="25%,50%", help="[default: %(default)s]")
    parser.add_argument("--batch", default="1,4,16", help="[default: %(default)s]")
    parser.add_argument("--hardware", default="h200-pcie5", help="[default: %(default)s]")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    everything: list[Row] = []
    try:
        batches = [int(batch) for batch in options.batch.split(",")]
        for source in map(source_of, options.trace):
            rows = [
                row
                for batch in batches
                for cache in options.cache.split(",")
                for row in cell(source, cache, batch, options.hardware)
            ]
            everything += rows
            sizes = f" with the sizes of {source.sizes}" if source.sizes else ""
            print(f"\n{source.trace}{sizes} on {options.hardware}", *table(rows), sep="\n")
    except (InputError, ValueError) as error:
        print(f"expertflow_gaps: {error}", file=sys.stderr)
        return 2
    slowest = min(everything, key=lambda row: row.speed)
    print(f"\nslowest against lru: {slowest.speed:.3f}x ({slowest.forecaster}, {slowest.evict})")
    if options.json:
        with replacing(options.json) as unfinished:
            unfinished.write_text(json.dumps([asdict(row) for row in everything], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
