"""From the two runs of a cell to the cell: every number of it, worked out in one place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from policies.costs import Costs
from policies.decisions import DecisionLog
from policies.recording import Recording, StepRow
from policies.result import Result
from policies.routing import DECODE
from reports.metrics import token_time
from reports.validation.cells import Cell
from reports.validation.decisions import first_difference

#: Quantiles of a step's time that a cell keeps, enough to draw how it is spread.
QUANTILES = np.linspace(0, 1, 41)


class Measured(Protocol):
    """What only the real world can tell of a run; None or 0 where its device cannot.

    *link_busy_of_stall* is the share of the time in which the GPU waited for copies during which
    the link copied, *link_bytes_per_s* its rate while it did; *step_s* are the seconds of every
    step or of every decode step; *host_speed* is 1 where the host ran as fast as it can.
    """

    @property
    def gpu_peak_bytes(self) -> int | None: ...
    @property
    def gpu_predicted_bytes(self) -> int | None: ...
    @property
    def host_peak_bytes(self) -> int | None: ...
    @property
    def link_busy_of_stall(self) -> float | None: ...
    @property
    def link_bytes_per_s(self) -> float | None: ...
    @property
    def step_s(self) -> Sequence[float]: ...
    @property
    def host_speed(self) -> float | None: ...


@dataclass(frozen=True)
class Pair:
    """One cell's two runs: results, the simulated recording, both logs, what was measured.

    *log_gpu* may be absent: fingerprints are then all that can be compared.
    """

    sim: Result
    gpu: Result
    recording: Recording
    costs: Costs
    measured: Measured
    log_sim: DecisionLog | None = None
    log_gpu: DecisionLog | None = None


def compare(pair: Pair, about: dict[str, Any]) -> Cell:
    """The cell of *pair*; *about* gives the fields that no result knows."""
    sim, gpu, measured = pair.sim, pair.gpu, pair.measured
    rows = [row for row in pair.recording.steps if row.phase == DECODE]
    bandwidth = pair.costs.full_bytes / pair.costs.queued_copy_s(pair.costs.full_bytes)
    naive = naive_token_s(rows, bandwidth)
    real = gpu.time["tpot_s"]["mean"] or None
    parts = token_time(gpu)
    fields: dict[str, Any] = {
        "batch": gpu.batch,
        "tpot_sim_s": sim.time["tpot_s"]["mean"] or None,
        "tpot_gpu_s": real,
        "decisions_equal": sim.decisions_sha256 == gpu.decisions_sha256,
        "demand_bytes_equal": sim.bytes["demand"] == gpu.bytes["demand"],
        "link_busy_of_stall": measured.link_busy_of_stall,
        "gpu_peak_bytes": measured.gpu_peak_bytes or None,
        "slots": gpu.slots,
        "world": gpu.world,
        "error": sim.time["tpot_s"]["mean"] / real - 1 if real else None,
        "naive_s": naive,
        "naive_error": naive / real - 1 if real and naive is not None else None,
        "stall_share": parts.stall_s / parts.total_s if parts.total_s else None,
        "link_bytes_per_s": measured.link_bytes_per_s or None,
        "link_profile_bytes_per_s": bandwidth,
        "gpu_predicted_bytes": measured.gpu_predicted_bytes,
        "host_peak_bytes": measured.host_peak_bytes,
        "host_speed": measured.host_speed,
        "step_quantiles_sim_s": quantiles([row.end_s - row.start_s for row in rows]),
        "step_quantiles_gpu_s": quantiles(decode_seconds(measured.step_s, pair.recording)),
        "first_difference": _difference(pair),
        "forecaster": gpu.policy.get("forecaster", {}).get("name", ""),
        "tokens": gpu.tokens,
        "steps": gpu.steps,
    }
    return Cell(**(about | fields | _of_world(sim, "sim") | _of_world(gpu, "gpu")))


def _of_world(result: Result, world: str) -> dict[str, Any]:
    """The fields that each world has one of."""
    tpot = result.time["tpot_s"]
    return {
        f"accesses_{world}": result.accesses,
        f"held_{world}": result.held,
        f"missed_{world}": result.missed,
        f"demand_bytes_{world}": result.bytes["demand"],
        f"prefetch_bytes_{world}": result.bytes["prefetch"],
        f"parts_{world}_s": token_time(result).parts_s,
        f"decisions_sha256_{world}": result.decisions_sha256,
        **{f"tpot_{world}_{name}_s": tpot[name] or None for name in ("p50", "p90", "p99")},
    }


def _difference(pair: Pair) -> str:
    """Where the decisions part; said as well as the logs at hand allow."""
    if pair.sim.decisions_sha256 == pair.gpu.decisions_sha256:
        return ""
    numbers = [log.numbers if log else None for log in (pair.log_sim, pair.log_gpu)]
    if numbers[0] is None or numbers[1] is None:
        return "the fingerprints differ; the logs were not kept"
    return first_difference(numbers[0], numbers[1], pair.recording.context)


def naive_token_s(rows: Sequence[StepRow], bytes_per_s: float) -> float | None:
    """Bytes over bandwidth: seconds per output token if decoding were copying alone.

    *rows* are decode steps. As in TPOT, each step counts once for each of its tokens.
    """
    tokens = sum(row.tokens for row in rows)
    if not tokens:
        return None
    moved = sum((row.demand_bytes + row.prefetch_bytes) * row.tokens for row in rows)
    return moved / tokens / bytes_per_s


def decode_seconds(step_s: Sequence[float], recording: Recording) -> list[float]:
    """Seconds of the decode steps, from those of all steps or of the decode steps alone."""
    phases = [row.phase for row in recording.steps]
    if len(step_s) != len(phases):
        return list(step_s)
    return [seconds for seconds, phase in zip(step_s, phases, strict=True) if phase == DECODE]


def quantiles(seconds: Sequence[float]) -> list[float]:
    """The :data:`QUANTILES` of *seconds* to six digits; none where there are no steps."""
    if not len(seconds):
        return []
    found: npt.NDArray[np.float64] = np.quantile(np.asarray(seconds), QUANTILES)
    return [float(f"{value:.6g}") for value in found]
