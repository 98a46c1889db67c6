"""The metrics of a report: name, definition, and the value of each run as text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from policies.result import CAUSES, Result
from reports.labels import budget_text
from reports.metrics import (
    TokenTime,
    gpu_bytes,
    limit_share,
    moves_made,
    token_time,
)
from reports.units import count, data, duration, percent, significant

Text = Callable[[Result], str]


@dataclass(frozen=True)
class Metric:
    """One row of a table: *text* gives a run's value with its unit."""

    name: str
    definition: str
    text: Text


@dataclass(frozen=True)
class Section:
    """Metrics under one heading."""

    title: str
    metrics: tuple[Metric, ...]


def _tpot(key: str) -> Text:
    return lambda r: duration(r.time["tpot_s"][key]) if r.time["decode_s"] else "none"


def _prefetched(key: str) -> Text:
    return lambda r: percent(r.prefetch[key]) if r.moves["prefetch"] else "none"


def _quality(key: str) -> Text:
    return lambda r: percent(r.quality[key], 2) if r.quality and key in r.quality else "exact"


#: The few columns that come first.
GLANCE = (
    Metric("budget", "slots as a share of all experts", budget_text),
    Metric("GPU memory", "dense part, KV cache and slots", lambda r: data(gpu_bytes(r))),
    Metric("held", "accesses whose expert had a slot", lambda r: percent(r.held_ratio)),
    Metric(
        "missed per token",
        "experts without a slot at the gate",
        lambda r: significant(r.missed / max(r.tokens, 1)),
    ),
    Metric("TPOT", "mean time per output token", _tpot("mean")),
    Metric("TPOT p99", "the slowest token of 100", _tpot("p99")),
    Metric("tokens/s", "while decoding", lambda r: significant(r.time["tokens_per_s"])),
    Metric("link", "time it is busy", lambda r: percent(r.link["utilisation"])),
    Metric("of the limit", "larger bound over time taken", lambda r: percent(limit_share(r))),
)

CACHE = Section(
    "Cache",
    (
        Metric("slots", "Experts that fit at full precision.", lambda r: count(r.slots)),
        Metric(
            "accesses",
            "One per event (a layer's gate in a step) and distinct expert it asks for.",
            lambda r: count(r.accesses),
        ),
        Metric(
            "held",
            "Accesses to an expert that had a slot when the gate asked, its copy landed or not.",
            lambda r: percent(r.held_ratio),
        ),
        Metric(
            "hit",
            "Accesses to an expert whose copy had landed.",
            lambda r: percent(r.hit_ratio),
        ),
        Metric(
            "late",
            "Held, but the copy was still waiting or on its way.",
            lambda r: count(r.late),
        ),
        Metric("missed", "Accesses to an expert without a slot.", lambda r: count(r.missed)),
        Metric(
            "missed per token",
            "Missed over all tokens, those of prompts included.",
            lambda r: significant(r.missed / max(r.tokens, 1)),
        ),
    ),
)

TRAFFIC = Section(
    "Moves",
    (
        Metric("moves", "Copies that crossed the link.", lambda r: count(moves_made(r))),
        Metric("demand", "Moves for missed experts.", lambda r: count(r.moves["demand"])),
        Metric(
            "prefetch",
            "Moves planned before a gate asked.",
            lambda r: count(r.moves["prefetch"]),
        ),
        Metric(
            "cancelled",
            "Prefetches that lost their slot while they waited in the queue.",
            lambda r: count(r.moves["cancelled"]),
        ),
        Metric(
            "wasted",
            "Prefetches that crossed the link and were not used before eviction or the end.",
            lambda r: count(r.moves["wasted"]),
        ),
        Metric(
            "demand bytes",
            "Bytes copied for missed experts.",
            lambda r: data(r.bytes["demand"]),
        ),
        Metric(
            "prefetch bytes",
            "Bytes copied by prefetch.",
            lambda r: data(r.bytes["prefetch"]),
        ),
        Metric(
            "wasted bytes",
            "Bytes of prefetches that were not used.",
            lambda r: data(r.bytes["wasted"]),
        ),
        Metric(
            "accuracy",
            "Prefetches used, over those that crossed the link.",
            _prefetched("accuracy"),
        ),
        Metric(
            "coverage",
            "Prefetches used, over those and the misses: the loads that were foreseen.",
            _prefetched("coverage"),
        ),
        Metric(
            "timeliness",
            "Used prefetches that had landed when the gate asked, over those used.",
            _prefetched("timeliness"),
        ),
        Metric(
            "link busy",
            "Time in which the host-to-device engine copies, over the whole run.",
            lambda r: percent(r.link["utilisation"]),
        ),
    ),
)

TIME = Section(
    "Time",
    (
        Metric(
            "tokens/s",
            "Output tokens over the time of the decode steps.",
            lambda r: significant(r.time["tokens_per_s"]),
        ),
        Metric("TPOT mean", "Time per output token: the length of its step.", _tpot("mean")),
        Metric("TPOT p50", "Half of the tokens take no longer.", _tpot("p50")),
        Metric("TPOT p90", "90 of 100 tokens take no longer.", _tpot("p90")),
        Metric("TPOT p99", "99 of 100 tokens take no longer.", _tpot("p99")),
        Metric("total", "The whole run.", lambda r: duration(r.time["total_s"])),
        Metric(
            "prefill",
            "The steps that carry prompts.",
            lambda r: duration(r.time["prefill_s"]),
        ),
        Metric(
            "decode",
            "The steps that carry one token of each sequence.",
            lambda r: duration(r.time["decode_s"]),
        ),
    ),
)

MEMORY = Section(
    "GPU memory",
    (
        Metric("in use", "Dense part, KV cache and slots.", lambda r: data(gpu_bytes(r))),
        Metric("slots", "Room for experts.", lambda r: data(r.memory["slots_bytes"])),
        Metric(
            "dense part",
            "Everything that is no routed expert.",
            lambda r: data(r.memory["dense_bytes"]),
        ),
        Metric(
            "KV cache",
            "Keys and values of the most tokens alive at once.",
            lambda r: data(r.memory["kv_bytes"]),
        ),
        Metric(
            "saving",
            "Share saved against holding every expert.",
            lambda r: percent(r.memory["saving"]),
        ),
    ),
)

BOUNDS = Section(
    "Bounds",
    (
        Metric(
            "compute",
            "The run with every expert on the GPU.",
            lambda r: duration(r.bounds["compute_s"]),
        ),
        Metric(
            "Belady's moves",
            "The least that any exact policy must load, known only afterwards.",
            lambda r: count(r.bounds["belady_missed"]),
        ),
        Metric(
            "transfer",
            "Belady's moves at link speed.",
            lambda r: duration(r.bounds["transfer_s"]),
        ),
        Metric(
            "limit",
            "The larger of the two: no exact run on the GPU alone is faster.",
            lambda r: duration(r.limit_s),
        ),
        Metric(
            "of the limit",
            "Limit over total: 100 % cannot be beaten.",
            lambda r: percent(limit_share(r)),
        ),
    ),
)

_SERVICES = {
    "low": "computed with a low-precision copy",
    "skip": "left out",
    "substitute": "served by another expert",
}

QUALITY = Section(
    "Departure from the model's output",
    tuple(
        Metric(f"{service} ({kind})", f"Share of {what} {words}.", _quality(f"{service}_{kind}"))
        for service, words in _SERVICES.items()
        for kind, what in (("accesses", "accesses"), ("weight", "gate weight"))
    ),
)


def sections(results: list[Result], times: list[TokenTime] | None = None) -> list[Section]:
    """What a report tells of *results*; *times* are their times per token, if known better."""
    known = times or [token_time(r) for r in results]
    by_id = {id(r): time for r, time in zip(results, known, strict=True)}
    found = [CACHE, TRAFFIC, TIME, _breakdown(by_id), MEMORY, BOUNDS]
    return found + ([QUALITY] if any(r.quality for r in results) else [])


_CAUSES = {
    "attention": "Attention, gates and everything else that is no expert.",
    "experts": "Computing experts.",
    "host": "The GPU waits for the host: launches, reading gates, planning.",
    "stall_demand": "The GPU waits for an expert that was missed.",
    "stall_late": "The GPU waits for a prefetch that is late.",
    "idle": "The GPU waits for experts computed on the CPU.",
}


def _breakdown(times: dict[int, TokenTime]) -> Section:
    def text(cause: str) -> Text:
        def value(result: Result) -> str:
            time = times[id(result)]
            share = time.parts_s[cause] / time.total_s if time.total_s else 0.0
            return f"{duration(time.parts_s[cause])} ({percent(share, 0)})"

        return value

    title = "Time per output token by cause"
    if any(time.whole_run for time in times.values()):
        title += ", by the shares of the whole run"
    return Section(title, tuple(Metric(c.replace("_", " "), _CAUSES[c], text(c)) for c in CAUSES))
