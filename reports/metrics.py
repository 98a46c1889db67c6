"""Numbers that follow from a result: per token, as shares, against the bounds."""

from __future__ import annotations

from dataclasses import dataclass

from policies.recording import Recording
from policies.result import CAUSES, Result
from policies.routing import DECODE

GIB = 2**30


@dataclass(frozen=True)
class TokenTime:
    """Mean seconds per output token by cause; they add up to the mean TPOT.

    *whole_run* says that only the whole run's breakdown is known, so that the parts are its
    shares, prompts included, laid over the mean TPOT.
    """

    parts_s: dict[str, float]
    whole_run: bool = False

    @property
    def total_s(self) -> float:
        """Mean time per output token."""
        return sum(self.parts_s.values())

    @property
    def stall_s(self) -> float:
        """Seconds per output token in which the GPU waits for a move."""
        return self.parts_s["stall_demand"] + self.parts_s["stall_late"]


def token_time(result: Result, recording: Recording | None = None) -> TokenTime:
    """Where the time of an output token goes.

    Exact with a *recording*, with ``time.tpot_parts_s`` in the result, and for a trace
    without prompts; else the breakdown of the whole run serves as a stand-in.
    """
    if recording is not None:
        parts = _recorded(recording)
        if parts is not None:
            return TokenTime(parts)
    known = result.time.get("tpot_parts_s")
    if known is not None:
        return TokenTime({cause: known[cause] for cause in CAUSES})
    total = sum(result.breakdown_s.values()) or 1.0
    mean = result.time["tpot_s"]["mean"]
    shares = {cause: result.breakdown_s[cause] / total * mean for cause in CAUSES}
    return TokenTime(shares, whole_run=result.time["prefill_s"] > 0)


def _recorded(recording: Recording) -> dict[str, float] | None:
    """The decode steps' parts, each step weighing as much as it has tokens."""
    rows = [row for row in recording.steps if row.phase == DECODE]
    tokens = sum(row.tokens for row in rows)
    if not tokens:
        return None
    return {
        cause: sum(getattr(row, f"{cause}_s") * row.tokens for row in rows) / tokens
        for cause in CAUSES
    }


def total_experts(result: Result) -> int:
    """Experts over all layers."""
    return int(result.model["layers"] * result.model["experts"])


def budget_share(result: Result) -> float:
    """Slots as a share of all experts."""
    return result.slots / total_experts(result)


def gpu_bytes(result: Result) -> float:
    """GPU memory in use: slots, everything that is no expert, keys and values."""
    memory = result.memory
    return memory["slots_bytes"] + memory["dense_bytes"] + memory["kv_bytes"]


def full_gpu_bytes(result: Result) -> float:
    """GPU memory that the run would need to hold every expert."""
    memory = result.memory
    return memory["experts_bytes"] + memory["dense_bytes"] + memory["kv_bytes"]


def missed_ratio(result: Result) -> float:
    """Accesses to experts that the ledger did not hold, as a share of all."""
    return result.missed / result.accesses if result.accesses else 0.0


def belady_missed_ratio(result: Result) -> float:
    """The least share that any exact policy can miss when it moves only on demand."""
    return result.bounds["belady_missed"] / result.accesses if result.accesses else 0.0


def moves_made(result: Result) -> int:
    """Copies that crossed the link: what was cancelled in the queue did not."""
    return result.moves["demand"] + result.moves["prefetch"] - result.moves["cancelled"]


def tokens_per_s(result: Result) -> float:
    """Tokens of the whole run per second, those of prompts included."""
    return result.tokens / result.time["total_s"] if result.time["total_s"] else 0.0


def limit_tokens_per_s(result: Result) -> float:
    """What :func:`tokens_per_s` would be at the run's bound."""
    return result.tokens / result.limit_s if result.limit_s else 0.0


def resident_tokens_per_s(result: Result) -> float:
    """What :func:`tokens_per_s` would be with every expert on the GPU."""
    seconds = result.bounds["compute_s"]
    return result.tokens / seconds if seconds else 0.0


def limit_share(result: Result) -> float:
    """How far the run has come: its bound over its time, 1 at the bound."""
    return result.limit_s / result.time["total_s"] if result.time["total_s"] else 0.0


def token_cycle(result: Result) -> int:
    """Experts that one token goes through from layer 0 to the last."""
    return int(result.model["layers"] * result.model["top_k"])


def below_cycle(result: Result) -> bool:
    """Whether one global pool is smaller than a token's path: where LRU finds nothing again."""
    return result.pool == "global" and result.slots < token_cycle(result)
