"""Small results and recordings whose numbers are easy to check by hand."""

from __future__ import annotations

from typing import Any

from policies.base import Context
from policies.recording import Recording, StepRow
from policies.result import CAUSES, Result

LAYERS, EXPERTS, TOP_K = 4, 8, 2
EXPERT_BYTES = 2**20

#: Seconds by cause of one decode step with one token.
PARTS = {
    "attention": 0.002,
    "experts": 0.001,
    "host": 0.003,
    "stall_demand": 0.003,
    "stall_late": 0.001,
    "idle": 0.0,
}


def fake_result(name: str = "lru", slots: int = 16, **changes: Any) -> Result:
    """100 decode tokens of 10 ms each (less for belady), half of the experts held."""
    faster = 0.6 if name == "belady" else 1.0
    parts = {cause: faster * seconds for cause, seconds in PARTS.items()}
    mean = sum(parts.values())
    missed = int(400 * faster)
    prefetches = 120 if name == "predictive" else 0
    total = LAYERS * EXPERTS
    values: dict[str, Any] = dict(
        trace="traces/some.parquet",
        policy={
            "name": name,
            "label": f"{name} (ahead)" if prefetches else name,
            "parameters": {"horizon": 4} if prefetches else {},
            "exact": name != "mixed",
            "offline": name == "belady",
        },
        model={
            "name": "tiny",
            "layers": LAYERS,
            "experts": EXPERTS,
            "top_k": TOP_K,
            "routing": "tiny",
            "sizes": "",
        },
        hardware={"name": "bench", "kind": "measured"},
        world="sim",
        slots=slots,
        pool="global",
        batch=1,
        seed=0,
        steps=100,
        tokens=100,
        accesses=800,
        held=800 - missed,
        missed=missed,
        hit=790 - missed,
        late=10,
        hit_ratio=(790 - missed) / 800,
        held_ratio=(800 - missed) / 800,
        moves={
            "demand": missed,
            "prefetch": prefetches,
            "cancelled": prefetches // 6,
            "wasted": prefetches // 4,
        },
        bytes={
            "demand": missed * EXPERT_BYTES,
            "prefetch": prefetches * EXPERT_BYTES,
            "wasted": 30 * EXPERT_BYTES if prefetches else 0,
        },
        prefetch={"used": 70, "late": 10, "accuracy": 0.7, "coverage": 0.15, "timeliness": 0.85},
        time={
            "total_s": 100 * mean,
            "prefill_s": 0.0,
            "decode_s": 100 * mean,
            "tokens_per_s": 1 / mean,
            "prefill_tokens_per_s": 0.0,
            "tpot_s": {"mean": mean, "p50": mean, "p90": 1.1 * mean, "p99": 1.5 * mean},
        },
        breakdown_s={cause: 100 * seconds for cause, seconds in parts.items()},
        link={"busy_s": 40 * mean, "utilisation": 0.4},
        memory={
            "experts_bytes": total * EXPERT_BYTES,
            "slots_bytes": slots * EXPERT_BYTES,
            "dense_bytes": 8 * EXPERT_BYTES,
            "kv_bytes": 0,
            "saving": 1 - (slots + 8) / (total + 8),
        },
        bounds={"compute_s": 0.4, "transfer_s": 0.3, "belady_missed": 240},
        decisions_sha256="ab" * 32,
    )
    return Result(**(values | changes))


def borrowed(result: Result, sizes: str) -> dict[str, Any]:
    """The model of *result* with the sizes of another."""
    return {**result.model, "name": f"tiny routing with {sizes} sizes", "sizes": sizes}


def fake_recording(steps: int = 40, prefetch: bool = False, prompts: int = 0) -> Recording:
    """Steps of 10 ms that keep the link busy for 4 ms; *prompts* of them carry 20 tokens."""
    recording = Recording(Context(LAYERS, EXPERTS, TOP_K, slots=16), with_spans=True)
    recording.uses += range(1, LAYERS * EXPERTS + 1)
    recording.held_steps += steps // 2
    for number in range(steps):
        prompt = number < prompts
        start = 0.01 * number
        row = StepRow(number, "prefill" if prompt else "decode", 20 if prompt else 1, start)
        row.end_s = start + 0.01
        for cause in CAUSES:
            setattr(row, f"{cause}_s", PARTS[cause])
        row.demand_bytes, row.link_busy_s = 10 * EXPERT_BYTES, 0.004
        row.prefetch_bytes = 5 * EXPERT_BYTES if prefetch else 0
        recording.steps.append(row)
        recording.span("GPU", "attention 0", start, start + 0.002)
        recording.span("GPU", "experts 0", start + 0.002, start + 0.008)
        recording.span("H2D", "demand layer 0 expert 1", start + 0.001, start + 0.005)
        recording.span("host", "plan and launch 0", start + 0.0005, start + 0.001)
        recording.queue.append((start, 2 if prefetch else 0))
        recording.slots_used.append((start, min(number, 16)))
    return recording
