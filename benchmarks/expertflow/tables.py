"""Rows as Markdown tables: one function for each part of the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import expertflow_gaps
from benchmarks.expertflow import hits, recall_rows, scheduling, speeds
from benchmarks.expertflow.published import HITS, SCHEDULER

#: Bytes of a GB, as the paper counts memory.
GB = 1e9


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table."""
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def percent(value: float | None, digits: int = 1) -> str:
    """A ratio of 1 as a number of per cent; nothing for None."""
    return "" if value is None else f"{100 * value:.{digits}f}"


def speed(value: float | None) -> str:
    """Tokens per second with three digits."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def gaps(rows: Sequence[expertflow_gaps.Row]) -> list[str]:
    """The gap of one trace by forecaster and way of evicting."""
    return list(expertflow_gaps.table(rows))


def hit_ratios(rows: Sequence[hits.Row]) -> list[str]:
    """Hit ratios by the paper's definition, the paper's own where it has the cell, and ours."""
    head = (
        "routing", "B", "slots a layer", "forecaster", "paper: LRU", "paper: PLEC", "LRU",
        "PLEC", "PLEC within layers", "copies: LRU", "copies: PLEC", "simulated: LRU held",
        "predictive held", "landed",
    )  # fmt: skip
    table = []
    for row in rows:
        papers = HITS.get((row.batch, row.slots_per_layer)) if is_switch_32(row) else None
        table.append(
            [
                row.trace,
                str(row.batch),
                f"{row.slots_per_layer} ({row.cache.replace('%', ' %')})",
                row.forecaster,
                *((percent(papers.lru), percent(papers.plec)) if papers else ("", "")),
                *map(percent, (row.lru, row.papers, row.papers_layer)),
                *(f"{x:.2f}" for x in (row.lru_copies, row.papers_copies)),
                *map(percent, (row.lru_held, row.held, row.hit)),
            ]
        )
    return markdown(head, table)


def is_switch_32(row: hits.Row) -> bool:
    """Whether the paper has this trace's shape."""
    return row.trace == "switch-base-32"


def told_by_predictor(rows: Sequence[speeds.Row]) -> list[speeds.Row]:
    """The rows of the learned predictor, or of the oracle where there is none to learn."""
    return [row for row in rows if row.forecaster.startswith(("routing-path", "oracle"))]


def model_of(row: speeds.Row) -> str:
    """Whose sizes and whose routing, in words."""
    return row.sizes + ("" if row.trace == row.sizes else f" ({row.trace})")


def best(row: speeds.Row) -> float:
    """The speed of ``predictive`` in the better kind of pool."""
    return max(row.predictive, row.predictive_layer or 0.0)


def best_lru(row: speeds.Row) -> float:
    """The same of ``lru``."""
    return max(row.lru, row.lru_layer or 0.0)


def speed_table(rows: Sequence[speeds.Row]) -> list[str]:
    """Tokens per second at shares of the experts, with the ratios of the better kinds of pools."""
    shown = [row for row in told_by_predictor(rows) if row.cache != speeds.SAVING]
    caches = list(dict.fromkeys(row.cache for row in shown))
    head = ["sizes (routing)", "machine", "B", "on demand"]
    for cache in caches:
        share = cache.replace("%", " %")
        head += [
            f"{share}: LRU",
            "LRU by layer",
            "predictive",
            "by layer",
            "over demand",
            "over LRU",
        ]
    lines: dict[tuple[str, str, int], list[str]] = {}
    for row in shown:
        key = (model_of(row), row.hardware, row.batch)
        line = lines.setdefault(key, [*map(str, key), speed(row.on_demand)])
        line += map(speed, (row.lru, row.lru_layer, row.predictive, row.predictive_layer))
        line += [f"{best(row) / x:.2f}x" for x in (row.on_demand, best_lru(row))]
    return markdown(head, list(lines.values()))


def memory_table(rows: Sequence[speeds.Row], machine: str = "h200-pcie5") -> list[str]:
    """GPU memory saved at each operating point, with the speed there."""
    head = (
        "sizes (routing)", "B", "slots", "GPU memory", "saved", "on demand", "LRU", "predictive",
        "% of the limit's speed",
    )  # fmt: skip
    table = [
        [
            model_of(row),
            str(row.batch),
            f"{row.slots} ({row.cache})" if row.cache != speeds.SAVING else f"{row.slots}",
            f"{row.gpu_bytes / GB:.2f} GB",
            f"{percent(row.saving)} %",
            *map(speed, (row.on_demand, row.lru, row.predictive)),
            percent(row.limit, 0),
        ]
        for row in sorted(
            (row for row in told_by_predictor(rows) if row.hardware == machine),
            key=lambda row: (model_of(row), row.batch, row.slots),
        )
    ]
    return markdown(head, table)


def scheduler_table(rows: Sequence[scheduling.Row]) -> list[str]:
    """The token scheduler's gain, with distinct experts of a step before and after."""
    head = (
        "routing", "paper", "policy", "cache", "scheduler", "experts before", "after", "fewer",
        "tok/s without", "with", "gain", "held without", "with", "own cost",
    )  # fmt: skip
    table = [
        [
            row.trace,
            _paper_gain(row),
            row.policy,
            row.cache.replace("%", " %"),
            row.scheduler,
            f"{row.before:.1f}",
            f"{row.after:.1f}",
            f"{percent(1 - row.after / row.before)} %",
            speed(row.without),
            speed(row.with_it),
            f"**{100 * row.gain:+.1f} %**",
            f"{percent(row.held_without)} %",
            f"{percent(row.held_with)} %",
            f"{percent(row.cost)} %",
        ]
        for row in rows
    ]
    return markdown(head, table)


def _paper_gain(row: scheduling.Row) -> str:
    papers = SCHEDULER.get(row.trace)
    return f"{100 * (papers.with_it / papers.without - 1):+.1f} %" if papers else ""


def recall_table(rows: Sequence[recall_rows.Row]) -> list[str]:
    """Batch recall by method, and the predictor's where more than top-k are named."""
    batches = list(rows[0].batch) if rows else []
    head = ["routing", "named by", "known", *(f"batch {b}" for b in batches)]
    table = []
    for row in sorted(rows, key=lambda row: (row.trace, -row.batch[batches[0]])):
        named = row.method + (f" ({row.table})" if row.table else "")
        table.append([row.trace, named, row.known, *_recalls(row.batch, batches)])
        for width, found in row.wider.items():
            table.append(
                [row.trace, f"{row.method}, {width} named", row.known, *_recalls(found, batches)]
            )
    return markdown(head, table)


def _recalls(found: dict[str, float], batches: Sequence[str]) -> Iterator[str]:
    for batch in batches:
        yield percent(found.get(batch))


def layer_table(rows: Sequence[recall_rows.Row]) -> list[str]:
    """The predictor's recall by layer and by domain, batch 1."""
    own = [row for row in rows if row.method == "routing-path"]
    names: list[str] = sorted({domain for row in own for domain in row.domains})
    depth = max((len(row.by_layer) for row in own), default=0)
    head = ["routing", *(f"layer {i}" for i in range(depth)), *names]
    return markdown(head, [_layers(row, depth, names) for row in own])


def _layers(row: recall_rows.Row, depth: int, names: Sequence[str]) -> list[str]:
    layers: list[Any] = [*row.by_layer, *[None] * (depth - len(row.by_layer))]
    return [row.trace, *map(percent, layers), *(percent(row.domains.get(n)) for n in names)]
