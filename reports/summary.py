"""Text for terminals: one run in words."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

from policies.result import CAUSES, Result
from reports.comparison import compare_table
from reports.labels import WORLDS, budget_text, model_name, policy_label, sizes_note
from reports.metrics import (
    TokenTime,
    below_cycle,
    gpu_bytes,
    limit_share,
    missed_ratio,
    moves_made,
    token_cycle,
    token_time,
)
from reports.units import count, data, duration, percent, significant

__all__ = ["CAUSE_TEXT", "cliff_warning", "compare_table", "run_summary"]

#: Characters of a line.
WIDTH = 100

#: What each cause of the breakdown means, in a few words.
CAUSE_TEXT = {
    "attention": "attention, gates, all but the experts",
    "experts": "computing experts",
    "host": "waiting for the host to launch and plan",
    "stall_demand": "waiting for a missed expert",
    "stall_late": "waiting for a prefetch that is late",
    "idle": "waiting for experts computed on the CPU",
}


def run_summary(result: Result) -> str:
    """One run: what ran, what the cache did, how long it took and against which bounds."""
    blocks = [
        _setting(result),
        _cache(result),
        _time(result),
        _breakdown(token_time(result)),
        _bounds(result),
    ]
    return "\n\n".join("\n".join(lines) for lines in blocks) + "\n"


def cliff_warning(result: Result) -> str:
    """That the budget is below LRU's cliff, '' when it is not."""
    if not below_cycle(result):
        return ""
    model = result.model
    return (
        f"WARNING: {count(result.slots)} slots are fewer than the {token_cycle(result)} experts "
        f"of one token ({model['layers']} layers x {model['top_k']}):\n"
        "         LRU has given each expert away before its layer comes round again."
    )


def _row(name: str, text: str) -> str:
    """A line under a heading, wrapped where it is too long for a terminal."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=f"  {name:<18}",
        subsequent_indent=" " * 20,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _setting(result: Result) -> list[str]:
    model, memory = result.model, result.memory
    lines = [
        f"{policy_label(result)} on {result.trace}",
        _row("model", f"{model_name(result)}: {model['layers']} layers x {model['experts']} "
             f"experts, top-{model['top_k']}"),
        _row("routing", f"{count(result.tokens)} tokens in {count(result.steps)} steps"),
    ]  # fmt: skip
    if note := sizes_note(result):
        lines.append(_row("sizes", note))
    tunables = result.policy.get("parameters") or {}
    if tunables:
        lines.append(_row("parameters", ", ".join(f"{k}={v}" for k, v in tunables.items())))
    each = memory["experts_bytes"] / (model["layers"] * model["experts"])
    lines += [
        _row("budget", f"{count(result.slots)} slots of {data(each)} = {budget_text(result)} of "
             f"the experts = {data(memory['slots_bytes'])}, pool: {result.pool}"),
        _row("GPU memory", f"{data(gpu_bytes(result))} with the dense part "
             f"({data(memory['dense_bytes'])}) and the KV cache ({data(memory['kv_bytes'])}); "
             f"saves {percent(memory['saving'])}"),
        _row("hardware", f"{result.hardware['name']} ({result.hardware['kind']}), "
             f"{WORLDS.get(result.world, result.world)}, batch {result.batch}, seed {result.seed}"),
    ]  # fmt: skip
    if warning := cliff_warning(result):
        lines.append(warning)
    return lines


def _cache(result: Result) -> list[str]:
    moves, size = result.moves, result.bytes
    lines = [
        "cache",
        _row("accesses", f"{count(result.accesses)} (event x distinct expert)"),
        _row("held", f"{percent(result.held_ratio)}, landed in time (hit): "
             f"{percent(result.hit_ratio)}, late: {count(result.late)}"),
        _row("missed", f"{percent(missed_ratio(result))}: {count(result.missed)}, "
             f"{significant(result.missed / max(result.tokens, 1))} per token"),
        _row("moves", f"{count(moves_made(result))}: demand {count(moves['demand'])}, prefetch "
             f"{count(moves['prefetch'] - moves['cancelled'])}, {count(moves['wasted'])} of them "
             f"wasted; {count(moves['cancelled'])} cancelled"),
        _row("bytes", f"{data(size['demand'] + size['prefetch'])}: demand {data(size['demand'])}, "
             f"prefetch {data(size['prefetch'])}, {data(size['wasted'])} of it wasted"),
        _row("prefetch", _prefetch(result)),
    ]  # fmt: skip
    if result.quality:
        lines.append(_row("not exact", _departure(result.quality)))
    if result.schedule:
        lines.append(_row("scheduler", _scheduling(result)))
    return lines


def _scheduling(result: Result) -> str:
    """What a token scheduler won in distinct experts, and what it moved for that."""
    found = result.schedule or {}
    distinct, before = found["distinct_experts"], found["distinct_in_file_order"]
    return (
        f"{result.scheduler}: {significant(distinct)} distinct experts per step, in file order "
        f"{significant(before)}; {count(int(found['divisions']))} divisions, "
        f"{data(found['moved_bytes'])} of KV moved, {duration(found['waited_s'])} waited"
    )


def _departure(quality: Mapping[str, float]) -> str:
    """How experts were served that were not computed in full, with the gate weight they had."""
    words = []
    for kind, name in (("low", "low precision"), ("skip", "skipped"), ("substitute", "replaced")):
        accesses, weight = quality.get(f"{kind}_accesses"), quality.get(f"{kind}_weight", 0.0)
        if accesses:
            words.append(f"{name} {percent(accesses)} of accesses ({percent(weight)} of weight)")
    return ", ".join(words) or "by its kind, but nothing was changed in this run"


def _prefetch(result: Result) -> str:
    if not result.moves["prefetch"]:
        return "none made"
    share = result.prefetch
    return (
        f"accuracy {percent(share['accuracy'])}, coverage {percent(share['coverage'])}, "
        f"timeliness {percent(share['timeliness'])}"
    )


def _time(result: Result) -> list[str]:
    time, tpot = result.time, result.time["tpot_s"]
    if not time["decode_s"]:
        return ["time", _row("prefill", duration(time["prefill_s"])), _row("decode", "none")]
    return [
        "time",
        _row("tokens/s", f"{significant(time['tokens_per_s'])} while decoding"),
        _row("TPOT", ", ".join(f"{name} {duration(tpot[name])}" for name in tpot)),
        _row("total", f"{duration(time['total_s'])}: prefill {duration(time['prefill_s'])}, "
             f"decode {duration(time['decode_s'])}"),
        _row("link", f"busy {percent(result.link['utilisation'])} of the time"),
    ]  # fmt: skip


def _breakdown(time: TokenTime) -> list[str]:
    """One line per cause with milliseconds, share and a bar."""
    if not time.total_s:
        return ["time per output token: no decode steps in this trace"]
    title = "time per output token"
    if time.whole_run:
        title += " (by the shares of the whole run, prompts included)"
    lines = [title]
    for cause in CAUSES:
        share = time.parts_s[cause] / time.total_s
        bar = "#" * round(20 * share)
        lines.append(
            f"  {cause.replace('_', ' '):<13}{1e3 * time.parts_s[cause]:>9.3f} ms"
            f"{percent(share):>8}  {bar:<20}  {CAUSE_TEXT[cause]}"
        )
    return lines


def _bounds(result: Result) -> list[str]:
    bounds, moves = result.bounds, moves_made(result)
    least = bounds["belady_missed"]
    times = f" ({significant(moves / least)} x)" if least else ""
    lines = [
        "against the bounds",
        _row("compute", f"{duration(bounds['compute_s'])} with every expert on the GPU"),
        _row("transfer", f"{duration(bounds['transfer_s'])} for Belady's "
             f"{count(least)} moves at link speed; made here: {count(moves)}{times}"),
        _row("limit", f"{duration(result.limit_s)}, this run {duration(result.time['total_s'])}: "
             f"{percent(limit_share(result))} of the limit's speed"),
    ]  # fmt: skip
    if not result.policy.get("exact", True):
        lines.append(_row("", "not an exact policy: the transfer bound does not bind it"))
    return lines
