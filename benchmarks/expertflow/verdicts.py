"""Claim by claim: the paper's figure, ours, and in numbers why where ours is less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.expertflow import hits, parts, published, recall_rows, scheduling, speeds
from benchmarks.expertflow.tables import (
    is_switch_32,
    markdown,
    percent,
    told_by_predictor,
)


def table(folder: Path) -> list[str]:
    """All claims that *folder* has rows for."""
    lines = [
        *_recall(parts.read_rows(folder, "recall", recall_rows.Row)),
        *_hits(parts.read_rows(folder, "hits", hits.Row)),
        *_speed(told_by_predictor(parts.read_rows(folder, "speeds", speeds.Row))),
        *_scheduler(parts.read_rows(folder, "scheduling", scheduling.Row)),
    ]
    return markdown(("claim", "paper", "here", "reached", "where not, why"), lines)


def _reached(count: int, of: int) -> str:
    return "yes" if count == of else f"{count} of {of}"


def _recall(rows: Sequence[recall_rows.Row]) -> Iterator[list[str]]:
    for row in rows:
        if row.method != "routing-path":
            continue
        many = row.trace.startswith("granular")
        least = published.RECALL_64 if many else published.RECALL
        good = sum(value >= least for value in row.batch.values())
        values = " / ".join(percent(value) for value in row.batch.values())
        wanted = "80 to 90 % (Switch-64)" if many else "> 90 %"
        yield [
            f"batch recall, {row.trace}, batch {' / '.join(row.batch)}",
            wanted,
            f"{values} %",
            _reached(good, len(row.batch)),
            _why_recall(row) if good < len(row.batch) else "",
        ]


def _why_recall(row: recall_rows.Row) -> str:
    known = [value for value in row.by_layer if value is not None]
    best = max(row.domains, key=row.domains.__getitem__)
    worst = min(row.domains, key=row.domains.__getitem__)
    wider, found = next(iter(row.wider.items()))
    return (
        f"recall falls with depth, from {percent(known[0])} % in layer 0 to "
        f"{percent(known[-1])} % in layer {len(known) - 1}; {percent(row.domains[best])} % of "
        f"{best}, {percent(row.domains[worst])} % of {worst}. With {wider} named for each token "
        f"it is {' / '.join(percent(value) for value in found.values())} %"
    )


def _hits(rows: Sequence[hits.Row]) -> Iterator[list[str]]:
    for (batch, slots), papers in published.HITS.items():
        here = [
            r for r in rows if is_switch_32(r) and (r.batch, r.slots_per_layer) == (batch, slots)
        ]
        told = [r for r in here if not r.forecaster.endswith("1.0")]
        if not told:
            continue
        best, worst = told[0], told[-1]
        good = sum(row.papers >= papers.plec for row in told)
        why = ""
        if good < len(told):
            why = f"a perfect oracle has {percent(here[0].papers)} %; "
            why += f"{worst.papers_copies:.2f} copies per access were made"
        ours = f"{percent(worst.papers)} to {percent(best.papers)} : {percent(best.lru)} %"
        yield [
            f"hit ratio, PLEC : LRU, {slots} slots of 32, batch {batch}; here an oracle that is "
            "right 8 to 9 times in 10",
            f"{percent(papers.plec)} : {percent(papers.lru)} %",
            ours,
            _reached(good, len(told)),
            why,
        ]


def _speed(rows: Sequence[speeds.Row]) -> Iterator[list[str]]:
    if not rows:
        return
    shares = [row for row in rows if row.cache != speeds.SAVING]
    demand = [row.predictive / row.on_demand for row in shares]
    least = published.OVER_DEMAND[0]
    below = [row for row in shares if row.predictive / row.on_demand < least]
    yield [
        "speed over load on demand",
        f"{published.OVER_DEMAND[0]:.0f} to {published.OVER_DEMAND[1]:.0f}x",
        f"{min(demand):.2f} to {max(demand):.2f}x",
        _reached(len(demand) - len(below), len(demand)),
        _why_slow(below),
    ]
    over = [row.predictive / row.lru for row in shares]
    layered = [row.predictive / row.lru_layer for row in shares if row.lru_layer]
    yield [
        "speed over LRU",
        f"up to {published.OVER_LRU:.2f}x",
        f"{min(over):.2f} to {max(over):.2f}x over one pool, {min(layered):.2f} to "
        f"{max(layered):.2f}x over LRU by layer",
        "yes" if max(layered) >= published.OVER_LRU else "in one pool" * (
            max(over) >= published.OVER_LRU) or "no",
        "",
    ]  # fmt: skip
    yield from _saving([row for row in rows if row.cache == speeds.SAVING], rows)


def _why_slow(below: Sequence[speeds.Row]) -> str:
    """What holds back the rows that are less than twice as fast as load on demand."""
    if not below:
        return ""
    large = sum(row.batch == 16 for row in below)
    limit = [row.limit for row in below]
    return (
        f"{len(below)} cells, {large} of them at batch 16, where a step demands most of a layer: "
        f"they run at {percent(min(limit), 0)} to {percent(max(limit), 0)} % of the speed that no "
        "exact policy can pass"
    )


def _saving(rows: Sequence[speeds.Row], everything: Sequence[speeds.Row]) -> Iterator[list[str]]:
    if rows:
        best = max(rows, key=lambda row: row.predictive / row.on_demand)
        yield [
            "GPU memory saved, predicted",
            f"{percent(published.SAVING, 2)} %",
            f"{percent(max(row.saving for row in rows), 2)} %, at up to "
            f"{best.predictive / best.on_demand:.2f}x the speed of load on demand ({best.sizes}, "
            f"batch {best.batch}, {best.hardware})",
            f"{len({r.sizes for r in rows})} of {len({r.sizes for r in everything})} models",
            _why_less(rows, everything),
        ]


def _why_less(rows: Sequence[speeds.Row], everything: Sequence[speeds.Row]) -> str:
    """The models that cannot save as much, with what they can."""
    reached = {row.sizes for row in rows}
    most: dict[str, float] = {}
    for row in everything:
        if row.sizes not in reached:
            most[row.sizes] = max(most.get(row.sizes, 0.0), row.floor_saving)
    told = ", ".join(f"{name} {percent(value)} %" for name, value in most.items())
    return f"with a slot for each expert of one layer's step at most {told}" if told else ""


def _scheduler(rows: Sequence[scheduling.Row]) -> Iterator[list[str]]:
    for trace, papers in published.SCHEDULER.items():
        here = [row for row in rows if row.trace == trace and row.policy == "lru"]
        if not here:
            continue
        gain = papers.with_it / papers.without - 1
        best = max(here, key=lambda row: row.gain)
        own = [row for row in here if row.scheduler == "expertflow"]
        good = best.gain >= gain
        worst = min(own, key=lambda row: row.gain)
        yield [
            f"token scheduler's gain, {trace}, LRU by layer",
            f"{100 * gain:+.1f} %",
            f"{100 * best.gain:+.1f} % ({best.scheduler}, {best.cache.replace('%', ' %')}); "
            f"the paper's division {100 * worst.gain:+.1f} to "
            f"{100 * max(row.gain for row in own):+.1f} %",
            "yes" if good else "no",
            f"groups that take turns evict each other's experts: {percent(worst.held_without)} % "
            f"held without, {percent(worst.held_with)} % with it ({worst.cache})",
        ]
