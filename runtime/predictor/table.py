"""The figures of an evaluation as a text table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.predictor.evaluating import PHASES


def table(result: Mapping[str, Any], *, by_layer: bool = False) -> str:
    """What :func:`runtime.predictor.evaluating.evaluate` found, in percent."""
    about = result["predictor"]
    lines = [
        f"{about['name']} ({about['bytes'] / 1e6:.2f} MB) on {result['trace']}: "
        f"{result['tokens']['prompt']} prompt tokens, {result['tokens']['decode']} decoded"
    ]
    for phase in PHASES:
        if result["tokens"][phase]:
            lines += ["", *_phase(result, phase)]
            if by_layer:
                lines += ["", *_layers(result, phase)]
            lines += [*_domains(result, phase), "", *_reuse(result, phase)]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _row(name: str, cells: Sequence[str], known: str = "") -> str:
    return f"{name:<14}{''.join(f'{cell:>9}' for cell in cells)}  {known}".rstrip()


def _phase(result: Mapping[str, Any], phase: str) -> list[str]:
    """Recall at each number of experts, precision, and batch recall, by method."""
    first = result["methods"]["routing-path"][phase]
    widths, batches = list(first["at"]), list(first["batch_recall"])
    head = [f"R@{w}" for w in widths] + [f"P@{widths[0]}"] + [f"batch {b}" for b in batches]
    lines = [_row(phase, head, "known")]
    for name, method in result["methods"].items():
        figures = method[phase]
        if "at" not in figures:
            continue
        cells = [_percent(figures["at"][w]["recall"]) for w in widths]
        cells.append(_percent(figures["at"][widths[0]]["precision"]))
        cells += [_percent(figures["batch_recall"][b].get("recall")) for b in batches]
        note = method["known"]
        if None in figures["recall_by_layer"]:
            note += f", {figures['layers_named']} layers"
        lines.append(_row(name, cells, note))
    error = result[phase]["calibration"]["error"]
    lines.append(f"expected calibration error {100 * error:.2f} points")
    return lines


def _layers(result: Mapping[str, Any], phase: str) -> list[str]:
    methods = result["methods"]
    shown = {
        name: method[phase]["recall_by_layer"]
        for name, method in methods.items()
        if "at" in method[phase]
    }
    count = len(next(iter(shown.values())))
    lines = [_row("recall, layer", [str(layer) for layer in range(count)])]
    return lines + [_row(name, [_percent(x) for x in found]) for name, found in shown.items()]


def _domains(result: Mapping[str, Any], phase: str) -> list[str]:
    """Recall at top-k and batch recall of the predictor, by domain."""
    domains = result["methods"]["routing-path"][phase].get("domains", {})
    lines: list[str] = []
    for name, figures in domains.items():
        if "at" not in figures:
            continue
        first, *_ = figures["at"].values()
        cells = [_percent(first["recall"])]
        cells += [_percent(found.get("recall")) for found in figures["batch_recall"].values()]
        if not lines:
            batches = [f"batch {b}" for b in figures["batch_recall"]]
            lines += ["", _row("domain", ["recall", *batches])]
        lines.append(_row(name, cells))
    return lines


def _reuse(result: Mapping[str, Any], phase: str) -> list[str]:
    """The second head by window, beside what recency alone tells."""
    reuse = result[phase]["reuse"]
    rows = (("reuse", "recall"), ("recency", "recency_recall"), ("error", "calibration_error"))
    lines = [_row("next tokens", list(reuse))]
    for label, key in rows:
        lines.append(_row(label, [_percent(figures[key]) for figures in reuse.values()]))
    return lines
