"""The JSON of a run as a Markdown table."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from benchmarks.side_by_side.plan import REFERENCE, Shape, System
from traces.errors import InputError

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"

_HEAD = (
    "system",
    "slots",
    "TPOT median",
    "mean",
    "p90",
    "prefill",
    "cold prefill",
    "GPU peak",
    "host peak",
    "host taken",
    "missed per token",
    "prefetched per token",
    "error",
    "same choice",
)


def _ms(seconds: float | None) -> str:
    """Milliseconds with three significant digits, none behind the point from 100 on."""
    if seconds is None:
        return ""
    value = seconds * 1000
    return f"{value:,.0f} ms" if value >= 100 else f"{value:#.3g} ms"


def _gb(size_bytes: int | None) -> str:
    return "" if size_bytes is None else f"{size_bytes / 1e9:.1f} GB"


def _missed(row: dict[str, Any], shape: Shape) -> str:
    """Experts copied per decoded token, and the share of the demand that was not."""
    if row.get("missed_decode") is None:
        return ""
    each = row["missed_decode"] / row["decode_tokens"]
    return f"{each:.1f} ({1 - each / (shape.layers * shape.top_k):.1%} held)"


def _prefetched(row: dict[str, Any]) -> str:
    """Experts copied per decoded token before a gate asked; nothing where none ever is."""
    if not row.get("prefetched_decode"):
        return ""
    return f"{row['prefetched_decode'] / row['decode_tokens']:.1f}"


def _error(found: dict[str, Any]) -> str:
    if found.get("error") is None:
        return ""
    verdict = {True: "", False: " **differs**", None: " (not judged)"}[found["agrees"]]
    return f"{found['error']:#.2g}{verdict}"


def _cells(row: dict[str, Any], data: dict[str, Any]) -> list[str]:
    shape, found = Shape(**data["shape"]), row.get("agreement", {})
    slots = System.parse(row["system"]).slots(shape)
    steps = row["decode_tokens"]
    name = row["system"]
    name += f" ({steps} steps)" if steps != data["decode_tokens"] else ""
    head = [name, "" if slots is None else f"{slots:,}"]
    if row["status"] != "ok":
        return [*head, row["status"]]
    same = found.get("same_choice")
    return [
        *head,
        *(_ms(row["tpot_s"][key]) for key in ("median", "mean", "p90")),
        _ms(row["prefill_s"]),
        _ms(row["cold_prefill_s"]),
        _gb(row["gpu_peak_bytes"]),
        _gb(row["host_peak_bytes"]),
        _gb(row["host_fell_bytes"]),
        _missed(row, shape),
        _prefetched(row),
        _error(found),
        "" if same is None else f"{same:.0%}",
    ]


def _reasons(rows: list[dict[str, Any]]) -> list[str]:
    """Below the table: why each system without figures has none; the reference is one of them."""
    told = [f"- {row['system']}: {row['reason']}" for row in rows if row["status"] != "ok"]
    return ["", *told] if told else []


def _command(words: str) -> str:
    """The command without the folders of one machine, which say nothing elsewhere."""
    return re.sub(r"(--(?:json|into)[ =])\S*/", r"\1", words)


def render(data: dict[str, Any]) -> str:
    """The machine in a sentence, the table, what is missing in it and why, how to repeat it."""
    shape, machine = Shape(**data["shape"]), data["machine"]
    facts = [machine.get("device", "unknown device")]
    facts += [f"driver {machine['driver']}"] if machine.get("driver") else []
    facts += [f"{name} {version}" for name, version in data["versions"].items() if version]
    lines = [
        f"{', '.join(facts)}; {data['date']}. {shape.layers} layers x {shape.experts} experts "
        f"({shape.total:,}), top-{shape.top_k}, hidden {shape.hidden}, {data['dtype']}, batch 1, "
        f"{data['prompt_tokens']} prompt tokens, {data['decode_tokens']} decoded.",
        "",
        "| " + " | ".join(_HEAD) + " |",
        "|" + "---|" * len(_HEAD),
    ]
    for row in data["systems"]:
        if row["system"] != REFERENCE:
            cells = _cells(row, data)
            cells += [""] * (len(_HEAD) - len(cells))
            lines.append("| " + " | ".join(cells) + " |")
    lines += _reasons(data["systems"])
    return "\n".join([*lines, "", f"`{_command(data['command'])}`", ""])


def put_into(page: Path, text: str) -> None:
    """Replace what stands between the two marks of *page*."""
    old = page.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        raise InputError(f"{page}: expected one line {BEGIN} and one {END}")
    head, _, rest = old.partition(BEGIN)
    tail = rest.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n{text}{END}{tail}", encoding="utf-8")
