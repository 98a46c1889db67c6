"""Verdicts over all cells: what must hold between the two worlds, and whether it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from reports.units import percent
from reports.validation.cells import BANDWIDTH, GPU, STALL, Cell, cell_labels

PASS, FAIL = "pass", "fail"
NOT_JUDGED, NOT_APPLICABLE, REPORTED = "not judged", "not applicable", "reported"

#: Why nothing that depends on time is judged on a CPU.
NO_PROFILE = (
    "no profile describes a CPU that stands in for a GPU (--judge-time judges all the same)"
)

Number = Callable[[Cell], float | None]


@dataclass(frozen=True)
class Limits:
    """How far the worlds may be apart; shares.

    *stall* is the share of a token's time from which a run counts as waiting for the link.
    """

    mean_error: float = 0.05
    max_error: float = 0.10
    prefetch: float = 0.02
    memory: float = 0.03
    link_busy: float = 0.95
    bandwidth: float = BANDWIDTH
    stall: float = STALL


@dataclass(frozen=True)
class Verdict:
    """One verdict: what was asked, how it ended, the number found and the one expected."""

    name: str
    state: str
    found: str
    expected: str = ""

    @property
    def failed(self) -> bool:
        """Whether it makes the validation fail."""
        return self.state == FAIL


def judge(cells: Sequence[Cell], limits: Limits, judge_time: bool = False) -> list[Verdict]:
    """Every verdict over *cells*; with *judge_time* a CPU's seconds are judged too."""
    ran = [cell for cell in cells if not cell.failed]
    timed = [cell for cell in ran if cell.error is not None]
    judged = [cell for cell in timed if judge_time or cell.world == GPU]
    kept = [cell for cell in ran if judge_time or cell.world == GPU]
    prefetching = [c for c in kept if c.prefetch_bytes_sim or c.prefetch_bytes_gpu]
    why = NO_PROFILE if ran and not kept else ""
    return [
        _every("every cell ran", cells, lambda cell: not cell.failed),
        _every("same decisions", ran, lambda cell: bool(cell.decisions_equal)),
        _every("same accesses, held and missed", ran, lambda cell: cell.counts_equal),
        _every("same demand bytes", ran, lambda cell: bool(cell.demand_bytes_equal)),
        _within("prefetch bytes", prefetching, _prefetch, limits.prefetch, why),
        _mean_error(judged, limits.mean_error, why),
        _within("worst error of mean TPOT", judged, _error, limits.max_error, why),
        *_reported(judged),
        _memory(ran, limits.memory),
        *_link([cell for cell in ran if cell.world == GPU], limits),
    ]


def _error(cell: Cell) -> float | None:
    return cell.error


def _prefetch(cell: Cell) -> float:
    return cell.prefetch_error


def signed(share: float) -> str:
    """A share with its sign: ``+3.1 %``."""
    return f"{100 * share:+.1f} %"


def _every(name: str, cells: Sequence[Cell], holds: Callable[[Cell], bool]) -> Verdict:
    """A verdict that holds if it holds for every cell."""
    if not cells:
        return Verdict(name, NOT_APPLICABLE, "no cell ran")
    good = [holds(cell) for cell in cells]
    found = f"{sum(good)} of {len(cells)} cells"
    if all(good):
        return Verdict(name, PASS, found, "all")
    first = cell_labels(cells)[good.index(False)]
    return Verdict(name, FAIL, f"{found}; first not: {first}", "all")


def _within(
    name: str, cells: Sequence[Cell], number: Number, limit: float, unjudged: str = ""
) -> Verdict:
    """A verdict over the cell with the largest absolute number."""
    expected = f"at most {percent(limit)}"
    known = [(value, cell) for cell in cells if (value := number(cell)) is not None]
    if not known:
        return _without(name, unjudged, expected)
    value, cell = max(known, key=lambda pair: abs(pair[0]))
    state = PASS if abs(value) <= limit else FAIL
    label = cell_labels(cells)[list(cells).index(cell)]
    return Verdict(name, state, f"{signed(value)} ({label})", expected)


def _without(name: str, unjudged: str, expected: str) -> Verdict:
    """A verdict without a number: not to be judged here, or with nothing to judge."""
    if unjudged:
        return Verdict(name, NOT_JUDGED, unjudged, expected)
    return Verdict(name, NOT_APPLICABLE, "in no cell", expected)


def _mean_error(cells: Sequence[Cell], limit: float, unjudged: str) -> Verdict:
    name, expected = "mean error of mean TPOT", f"at most {percent(limit)}"
    errors = [abs(cell.error) for cell in cells if cell.error is not None]
    if not errors:
        return _without(name, unjudged, expected)
    mean = sum(errors) / len(errors)
    state = PASS if mean <= limit else FAIL
    return Verdict(name, state, f"{percent(mean)} over {len(errors)} cells", expected)


def _reported(cells: Sequence[Cell]) -> list[Verdict]:
    """Numbers that stand beside the verdicts and fail nothing."""
    rows: list[tuple[str, Number, bool]] = [("signed bias of mean TPOT", _error, False)]
    for name in ("p50", "p90", "p99"):
        rows.append((f"mean error of TPOT {name}", _percentile(name), True))
    rows.append(("mean error of the naive estimate", lambda cell: cell.naive_error, True))
    found = []
    for title, number, absolute in rows:
        values = [value for cell in cells if (value := number(cell)) is not None]
        if values:
            mean = sum(map(abs, values) if absolute else values) / len(values)
            found.append(Verdict(title, REPORTED, percent(mean) if absolute else signed(mean)))
    return found


def _percentile(name: str) -> Number:
    return lambda cell: cell.percentile_error(name)


def _memory(cells: Sequence[Cell], limit: float) -> Verdict:
    on_gpu = [cell for cell in cells if cell.world == GPU]
    unjudged = "" if on_gpu else "no cell ran on a CUDA device"
    return _within("peak GPU memory", on_gpu, lambda cell: cell.memory_error, limit, unjudged)


def _link(cells: Sequence[Cell], limits: Limits) -> list[Verdict]:
    """The link in runs that wait for it: busy while they wait, and as fast as calibrated."""
    waiting = [cell for cell in cells if (cell.stall_share or 0.0) > limits.stall]
    busy = _least("link busy while waited for", waiting, _busy, limits.link_busy)
    fast = _least("link's rate while busy", waiting, lambda c: c.bandwidth_share, limits.bandwidth)
    return [busy, fast]


def _busy(cell: Cell) -> float | None:
    return cell.link_busy_of_stall


def _least(name: str, cells: Sequence[Cell], number: Number, limit: float) -> Verdict:
    """A verdict over the cell with the smallest number."""
    expected = f"at least {percent(limit)}"
    known = [(value, i) for i, cell in enumerate(cells) if (value := number(cell)) is not None]
    if not known:
        return Verdict(name, NOT_APPLICABLE, "no run waits for the link of a GPU", expected)
    value, at = min(known)
    state = PASS if value >= limit else FAIL
    return Verdict(name, state, f"{percent(value)} ({cell_labels(cells)[at]})", expected)
