"""What serving experts at low precision costs: perplexity of ``mixed`` beside the exact one.

PYTHONPATH=. python benchmarks/perplexity.py --models DIR --prompts FILE --json OUT

Every text is teacher-forced, so that all policies predict the same tokens: once as a single
prefill, and once token by token, as in decoding, because ``mixed`` works at what was missed. The
cache is kept from text to text, as in use. Perplexity is exp of the mean negative log likelihood
in nats, in float32 from the model's logits. What was served at low precision or skipped is given
as a share of all accesses and of all gate weight. Beside the exact policy stands the difference on
the same texts with its standard error over them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from runtime.generate import Offloaded, check_room, encode, open_offloaded
from runtime.load import load_tokenizer
from runtime.prompts import balanced, read_prompts
from traces.writing import replacing

#: What is measured: the exact policy, then mixed with its defaults and with others.
POLICIES = (
    "lru",
    "mixed",
    "mixed:low_bits=8",
    "mixed:t1=0.3,t2=0.6",
    "mixed:t1=0.8,t2=1",
    "mixed:low_share=0.5",
)

#: Ways to feed a text: one pass over all of it, or a pass for each token.
MODES = ("prefill", "decode")


@dataclass(frozen=True)
class Task:
    """Texts as token ids, and how they are run."""

    folder: Path
    tokens: Sequence[Sequence[int]]
    device: str
    hardware: str


def _passes(ids: Any, mode: str) -> Iterator[Any]:
    """*ids* [1, n] in the pieces that one pass runs."""
    if mode == "prefill":
        yield ids
    else:
        yield from ids.split(1, dim=1)


def _loss(opened: Offloaded, tokens: Sequence[int], mode: str) -> float:
    """Sum of the negative log likelihoods of all tokens but the first, in nats."""
    ids = torch.tensor([list(tokens)], device=opened.device)
    cache, rows = None, []
    with torch.no_grad():
        for part in _passes(ids, mode):
            out = opened.model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0].float())
    logits = torch.cat(rows)
    return float(F.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum"))


def measure(task: Task, policy: str, cache: str, mode: str) -> dict[str, Any]:
    """One row of the report."""
    start = time.monotonic()
    room = max(map(len, task.tokens))
    with open_offloaded(
        task.folder, policy, cache=cache, device=task.device, hardware=task.hardware,
        max_tokens=room, graphs=False,
    ) as opened:  # fmt: skip
        losses = [_loss(opened, tokens, mode) for tokens in task.tokens]
        engine = opened.runner.engine
        planner = engine.planner
        predicted = sum(len(tokens) - 1 for tokens in task.tokens)
        weight = planner.quality["weight"] or 1.0
        row = {
            "model": opened.spec.name,
            "policy": policy,
            "cache": cache,
            "mode": mode,
            "slots": planner.context.slots,
            "low_slots": planner.context.low_slots,
            "exact": planner.policy.exact,
            "perplexity": math.exp(sum(losses) / predicted),
            "loss_nats": sum(losses) / predicted,
            "predicted_tokens": predicted,
            "text_losses_nats": [round(loss, 4) for loss in losses],
            "missed_ratio": planner.counts["missed"] / engine.accesses,
        }
        for kind in ("low", "skip"):
            row[f"{kind}_accesses"] = planner.quality[kind] / engine.accesses
            row[f"{kind}_weight"] = planner.quality[f"{kind}_weight"] / weight
        row["seconds"] = round(time.monotonic() - start, 2)
    return row


def rows_of(task: Task, policies: Sequence[str], caches: Sequence[str]) -> list[dict[str, Any]]:
    """Every policy at every budget in both modes, compared with the exact one before it."""
    rows: list[dict[str, Any]] = []
    for mode in MODES:
        for cache in caches:
            exact: dict[str, Any] | None = None
            for policy in policies:
                row = measure(task, policy, cache, mode)
                if row["exact"]:
                    exact = row
                rows.append(row | _beside(row, exact))
                print(line(rows[-1]), flush=True)
    return rows


def _beside(row: dict[str, Any], exact: dict[str, Any] | None) -> dict[str, Any]:
    """How far *row* is above the *exact* one on the same texts, and how sure that is.

    The standard error is that of the mean difference, in nats per token, over the texts.
    """
    if exact is None:
        return {"over_exact": None, "over_exact_nats": None, "standard_error_nats": None}
    pairs = zip(row["text_losses_nats"], exact["text_losses_nats"], strict=True)
    differences = [ours - theirs for ours, theirs in pairs]
    spread = statistics.stdev(differences) if len(differences) > 1 else 0.0
    tokens = row["predicted_tokens"]
    return {
        "over_exact": row["perplexity"] / exact["perplexity"] - 1,
        "over_exact_nats": sum(differences) / tokens,
        "standard_error_nats": spread * math.sqrt(len(differences)) / tokens,
    }


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    over = ""
    if row["over_exact"] is not None:
        over = f"{row['over_exact']:+.2%} (+-{row['standard_error_nats']:.2%})"
    return (
        f"{row['model']:<14} {row['mode']:<8} {row['cache']:>4} {row['policy']:<20} "
        f"{row['perplexity']:9.3f} {over:>18}  missed {row['missed_ratio']:6.1%}  "
        f"low {row['low_accesses']:6.2%} ({row['low_weight']:6.2%} of weight)  "
        f"skipped {row['skip_accesses']:6.2%} ({row['skip_weight']:6.2%})"
    )


def markdown(rows: Sequence[dict[str, Any]], mode: str) -> str:
    """The rows of one *mode* as a table: a line for each policy, a column for each budget."""
    cells = {(r["policy"], r["model"], r["cache"]): r for r in rows if r["mode"] == mode}
    columns = list(dict.fromkeys((model, cache) for _, model, cache in cells))
    heads = [f"{model}, {cache.rstrip('%')} %" for model, cache in columns]
    lines = [f"| {' | '.join(['policy', *heads])} |", "|---" * (len(heads) + 1) + "|"]
    for policy in dict.fromkeys(policy for policy, _, _ in cells):
        found = [_cell(cells[policy, *column]) for column in columns]
        lines.append(f"| {' | '.join([f'`{policy}`', *found])} |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    if row["exact"] or row["over_exact"] is None:
        return f"{row['perplexity']:.2f}"
    return (
        f"{100 * row['over_exact']:+.1f} ± {100 * row['standard_error_nats']:.1f} %; low "
        f"{100 * row['low_weight']:.1f}, skipped {100 * row['skip_weight']:.1f}"
    )


def _texts(path: Path, folder: Path, texts: int, tokens: int) -> list[list[int]]:
    """The first *tokens* tokens of *texts* texts, of each domain in turn."""
    chosen = [prompt.text for prompt in balanced(read_prompts(path))]
    found = [ids[:tokens] for ids in encode(load_tokenizer(folder), chosen[:texts])]
    return [ids for ids in found if len(ids) > 1]


def _surroundings(options: argparse.Namespace) -> dict[str, Any]:
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": options.device,
        "machine": f"{name}, {os.cpu_count()} cores",
        "versions": {
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "prompts": options.prompts.name,
        "texts": options.texts,
        "tokens": options.tokens,
    }


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", type=Path, required=True, help="folder of model folders")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with a text")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=128, help="of each text at most")
    parser.add_argument("--policy", action="append", help=f"default {' '.join(POLICIES)}")
    parser.add_argument("--cache", action="append", help="default 25%% and 50%%")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hardware", default="h200-pcie5")
    options = parser.parse_args(argv)
    options.folders = sorted(path.parent for path in options.models.glob("*/config.json"))
    if not options.folders:
        parser.error(f"{options.models}: no model folders found, expected DIR/NAME/config.json")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = _parsed(argv)
    rows = []
    for folder in options.folders:
        tokens = _texts(options.prompts, folder, options.texts, options.tokens)
        check_room(folder, list(map(len, tokens)), 0)
        task = Task(folder, tokens, options.device, options.hardware)
        rows += rows_of(task, options.policy or POLICIES, options.cache or ("25%", "50%"))
    report = _surroundings(options) | {"rows": rows}
    with replacing(options.json) as unfinished:
        unfinished.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for mode in MODES:
        print(f"\n{mode}:\n{markdown(rows, mode)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
