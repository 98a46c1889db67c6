"""The figures of a trace as lines for a reader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from traces.model import DTYPE_BYTES
from traces.store import StoredTrace

GIB = 2**30


def facts(stored: StoredTrace) -> dict[str, Any]:
    """What a trace's footer tells, as plain values."""
    return {
        "path": stored.name,
        "source": stored.source,
        "license": stored.license,
        "model": stored.model.to_dict(),
        "has_tokens": stored.has_tokens,
        "has_weights": stored.has_weights,
        "ahead_depth": stored.ahead_depth,
        "extra": {name: value for name, value in stored.extra.items() if name != "domains"},
    }


def describe(figures: dict[str, Any]) -> Iterator[str]:
    """Lines of a table for *figures*: :func:`facts` and what was measured."""
    yield from _what(figures)
    for title, lines in (
        ("popularity", _popularity(figures)),
        ("from token to token", _locality(figures)),
        (
            "reuse distance, in distinct experts used since (one token per step)",
            _reuse(figures["reuse"]),
        ),
        ("predictability, recall of a layer's experts", _prediction(figures["prediction"])),
        ("as settings of trace synth", _settings(figures["settings"])),
        ("domains", _domains(figures["domains"])),
    ):
        rows = list(lines)
        if rows:
            yield ""
            yield title
            width = max(len(name) for name, _ in rows)
            yield from (f"  {name:<{width}}  {value}" for name, value in rows)


def _what(figures: dict[str, Any]) -> Iterator[str]:
    model, lengths = figures["model"], figures["sequence_tokens"]
    total = model["layers"] * model["experts"]
    weight = DTYPE_BYTES[model["dtype"]]
    each = model["expert_params"] * weight
    yield figures["path"]
    yield f"  source     {figures['source'] or 'not told'}"
    yield f"  license    {figures['license'] or 'not told'}"
    yield (
        f"  model      {model['name']}: {model['layers']} layers, top-{model['top_k']} of "
        f"{model['experts']} experts, hidden {model['hidden']}, {model['dtype']}"
    )
    yield (
        f"  experts    {total} of {each / 2**20:.1f} MiB = {total * each / GIB:.1f} GiB, "
        f"beside {model['dense_params'] * weight / GIB:.1f} GiB dense"
    )
    yield (
        f"  tokens     {figures['tokens']:,} in {figures['sequences']:,} sequences of "
        f"{lengths['least']} to {lengths['most']} (median {lengths['median']:g}); "
        f"{figures['prefill_tokens']:,} in prompts"
    )
    present = ["experts"]
    present += ["gate weights"] if figures["has_weights"] else []
    present += ["token ids"] if figures["has_tokens"] else []
    present += [f"predictions to +{figures['ahead_depth']}"] if figures["ahead_depth"] else []
    yield f"  recorded   {', '.join(present)}"


def _popularity(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    values = figures["popularity"]
    by_layer = values["entropy_by_layer"]
    yield (
        "entropy of a layer",
        f"{values['entropy']:.3f} of 1; {min(by_layer):.3f} in layer {_least(by_layer)}",
    )
    yield (
        "two hottest of a layer",
        (
            f"{values['hottest_2']:.1%} of its accesses; "
            f"{values['hottest_2_highest']:.1%} in layer {values['hottest_2_layer']}"
        ),
    )
    yield "95 % of all accesses", f"go to {values['traffic_95']:.1%} of experts"
    yield "load, standard deviation", f"{values['load_std']:.2f} points of a layer's tokens"
    yield "Zipf exponent", f"{values['zipf_exponent']:.2f} within a domain"


def _locality(figures: dict[str, Any]) -> Iterator[tuple[str, str]]:
    values = figures["locality"]
    if "overlap_ratio" in values:
        yield (
            "shared experts",
            (
                f"{values['overlap_experts']:.2f} of {figures['model']['top_k']}, "
                f"{values['overlap_ratio']:.2f} times what uniform routing shares"
            ),
        )
        yield "any shared", f"{values['any_repeat']:.1%}"
        yield "first choice repeated", f"{values['first_choice_repeat']:.1%}"
    if "srp_16" in values:
        yield "16 tokens, one fixed set", f"F1 {values['srp_16']:.3f} (segment routing, SRP)"


def _reuse(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, title in (("global", "over all layers"), ("layer", "within the layer")):
        part = values[name]
        if part["p50"] is None:
            continue
        yield (
            title,
            (
                f"median {part['p50']}, 90 % {part['p90']}, 99 % {part['p99']}; "
                f"{part['first_uses']} first uses"
            ),
        )
        held = ", ".join(f"{part[f'lru_{share}']:.1%} at {share} %" for share in (25, 50, 75))
        yield "  LRU of that scope holds", held


def _prediction(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    rows = {
        "popularity_recall": "the layer's most popular",
        "previous_token_recall": "the token before",
        "next_layer_recall": "a table from the layer before",
        "token_table_recall": "a table from the token id",
    }
    for name, title in rows.items():
        if name in values:
            known = values.get("token_table_known", 0)
            more = f" ({known:.1%} of ids known)" if name == "token_table_recall" else ""
            yield title, f"{values[name]:.1%}{more}"
    for depth, part in values.get("ahead", {}).items():
        wide = f", best {part['m']}: {part['recall_m']:.1%}"
        yield f"recorded prediction, +{depth}", f"best k: {part['recall_k']:.1%}{wide}"


def _settings(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, list):
            if value:
                yield name, ", ".join(f"{x:.3f}" for x in value)
        elif value is not None:
            yield name.replace("_", "-"), f"{value:.3f}" if isinstance(value, float) else str(value)


def _domains(values: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    if values is None or len(values["token_share"]) < 2:
        return
    for name, share in values["token_share"].items():
        yield name, f"{share:.1%} of tokens"
    if values["separation"] is not None:
        yield "separation", f"{values['separation']:.3f} (0 alike, 1 unrelated popularity)"


def _least(values: list[float]) -> int:
    return min(range(len(values)), key=values.__getitem__)
