"""What a run of ``simctl generate`` amounted to, in a few lines."""

from __future__ import annotations

from typing import Any


def summary(facts: dict[str, Any]) -> str:
    """What a person wants to know of a run, in a few lines."""
    cache, times, memory = facts["cache"], facts["time"], facts["memory"]
    tokens = sum(item["new_tokens"] for item in facts["prompts"])
    accesses = cache["accesses"] or 1
    moved = cache["bytes"]["demand"] + cache["bytes"]["prefetch"]
    peak = memory["gpu_peak_bytes"]
    lines = [
        f"{facts['model']}, {facts['policy']}, {cache['slots']} of {facts['experts']} experts on "
        f"the {facts['device'].upper()}: {tokens} tokens for {counted(len(facts['prompts']))}",
        f"first token after {times['first_token_s']:.3f} s, then {times['tokens_per_s']:.1f} "
        f"tokens/s (loading took {times['load_s']:.1f} s)",
        f"hit {cache['hit'] / accesses:.1%}, late {cache['late'] / accesses:.1%}, missed "
        f"{cache['missed'] / accesses:.1%} of {accesses:,} accesses; missed {cache['missed']:,}, "
        f"Belady on demand alone {cache['belady_missed']:,}",
        f"over the link {moved / 1e9:.3f} GB: {cache['bytes']['demand'] / 1e9:.3f} on demand, "
        f"{cache['bytes']['prefetch'] / 1e9:.3f} ahead of it",
        f"host memory {_gib(memory['host_bytes'])} for the experts, "
        f"{_gib(memory['host_peak_bytes'])} at its peak; slots {_gib(memory['slots_bytes'])}"
        + (f", GPU {_gib(peak)} at its peak" if peak else ""),
    ]
    schedule = facts.get("schedule")
    if schedule and schedule["divisions"]:
        each_ms = 1e3 * schedule["divide_s"] / schedule["divisions"]
        lines.append(
            f"divided {schedule['divisions']} times, {each_ms:.2f} ms each; {schedule['moved']} "
            f"key-value rows moved ({schedule['moved_bytes'] / 1e6:.1f} MB); "
            f"{schedule['distinct_experts']:.1f} distinct experts a step, "
            f"{schedule['distinct_in_file_order']:.1f} in file order"
        )
    if cache["predictor"] is not None:
        lines.append(_predictor_line(cache["predictor"]))
    return "\n".join(lines)


def _predictor_line(costs: dict[str, Any]) -> str:
    """What the predictor beside the model took of decoding."""
    spent = costs["decode"]
    taken, whole = spent["host_s"] + spent["wait_s"], spent["pass_s"] or 1.0
    return (
        f"predictor {spent['host_s']:.3f} s on the host, {spent['wait_s']:.3f} s waited for, "
        f"{spent['stream_s']:.3f} s on its stream: {taken / whole:.1%} of decoding"
    )


def counted(prompts: int) -> str:
    """So many prompts in words."""
    return "one prompt" if prompts == 1 else f"{prompts} prompts"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
