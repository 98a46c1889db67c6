"""Claim by claim: the paper's figure, ours, and in numbers why where ours is less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.expertflow import hits, parts, published, recall_rows, scheduling, speeds
from benchmarks.expertflow.tables import (
    best,
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
        good_one, worst = told[0], told[-1]
        good = sum(row.papers >= papers.plec for row in told)
        why = ""
        if good < len(told):
            why = f"a perfect oracle has {percent(here[0].papers)} %; "
            why += f"{worst.papers_copies:.2f} copies per access were made"
        ours = f"{percent(worst.papers)} to {percent(good_one.papers)} : {percent(good_one.lru)} %"
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
    demand = [best(row) / row.on_demand for row in shares]
    least, most = published.OVER_DEMAND
    below = [row for row in shares if best(row) / row.on_demand < least]
    yield [
        "speed over load on demand (there over systems that load whole layers)",
        f"{least:.0f} to {most:.0f}x",
        f"{min(demand):.2f} to {max(demand):.2f}x",
        _reached(len(demand) - len(below), len(demand)),
        _why_slow(below, least),
    ]
    yield _over_lru(shares)
    yield from _saving([row for row in rows if row.cache == speeds.SAVING], rows)


def _over_lru(rows: Sequence[speeds.Row]) -> list[str]:
    """Over LRU in one pool, and over the paper's LRU, whose slots are divided by layer."""
    alike = [row.predictive / row.lru for row in rows]
    layered = [best(row) / row.lru_layer for row in rows if row.lru_layer]
    top, wanted = max(alike), published.OVER_LRU
    where = rows[alike.index(top)]
    return [
        "speed over LRU",
        f"up to {wanted:.2f}x",
        f"{min(alike):.2f} to {top:.2f}x in one pool; over LRU by layer {min(layered):.2f} to "
        f"{max(layered):.2f}x",
        "in one pool" if top >= wanted > max(layered) else _yes(top >= wanted),
        f"the widest margin ({where.sizes}, batch {where.batch}, {where.cache}) is over an LRU "
        f"that is {where.lru / where.on_demand:.2f}x load on demand: in one pool it forgets a "
        f"step's experts before the next one asks; LRU by layer is "
        f"{(where.lru_layer or 0.0) / where.on_demand:.2f}x there",
    ]


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"


def _why_slow(below: Sequence[speeds.Row], least: float) -> str:
    """What holds back the rows that are less than *least* times as fast as load on demand."""
    if not below:
        return ""
    bound = sum(row.predictive / row.limit < least * row.on_demand for row in below)
    share = [row.limit for row in below]
    return (
        f"in {bound} of the other {len(below)} not even the bound of every exact policy is "
        f"{least:.0f}x: experts are small beside a layer's work, or a step demands most of them. "
        f"All {len(below)} run at {percent(min(share), 0)} to {percent(max(share), 0)} % of it"
    )


def _saving(rows: Sequence[speeds.Row], everything: Sequence[speeds.Row]) -> Iterator[list[str]]:
    if rows:
        fast = max(rows, key=lambda row: row.predictive / row.on_demand)
        yield [
            "GPU memory saved, predicted",
            f"{percent(published.SAVING, 2)} %",
            f"{percent(max(row.saving for row in rows), 2)} %, at up to "
            f"{fast.predictive / fast.on_demand:.2f}x the speed of load on demand ({fast.sizes}, "
            f"batch {fast.batch}, {fast.hardware})",
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
        tokens, two, four = (
            [row for row in here if row.scheduler == name]
            for name in ("expertflow", "prompt-routes:unit=2", "prompt-routes")
        )
        worst = min(tokens, key=lambda row: row.gain)
        good = sum(row.gain >= gain for row in two)
        yield [
            f"token scheduler's gain, {trace}, LRU by layer, 25 / 50 %",
            f"{100 * gain:+.1f} %",
            f"by prompts {_gains(two)} % in units of two batches as there, {_gains(four)} % of "
            f"four; token by token {_gains(tokens)} %",
            _reached(good, len(two)),
            "token by token, groups that take turns evict each other's experts: "
            f"{percent(worst.held_without)} % held without, {percent(worst.held_with)} % with it "
            f"({worst.cache})",
        ]


def _gains(rows: Sequence[scheduling.Row]) -> str:
    return " / ".join(f"{100 * row.gain:+.1f}" for row in rows)
