"""Names for runs: as short as tells them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from policies.result import Result
from reports.metrics import budget_share


def budget_text(result: Result) -> str:
    """The budget as a share of the experts: ``25 %``, ``12.5 %``."""
    percent = 100 * budget_share(result)
    near = round(percent)
    return f"{near} %" if abs(percent - near) < 0.05 else f"{percent:.1f} %"


def policy_label(result: Result) -> str:
    """The policy with its forecaster."""
    return str(result.policy.get("label") or result.policy["name"])


def model_name(result: Result) -> str:
    """The model whose routing is replayed."""
    return str(result.model.get("routing") or result.model["name"])


def sizes_note(result: Result) -> str:
    """That the run borrows another model's dimensions, '' when it does not."""
    sizes = result.model.get("sizes")
    if not sizes:
        return ""
    return f"routing recorded from {model_name(result)}, sizes of one layer taken from {sizes}"


#: How a world is named to a reader.
WORLDS = {"sim": "simulated", "gpu": "measured on the GPU", "cpu": "measured on the CPU"}


def by_setting(results: Sequence[Result]) -> list[list[Result]]:
    """Runs together whose times can be compared: they differ in policy and budget alone."""
    groups: dict[tuple[object, ...], list[Result]] = {}
    for result in results:
        model = (result.model["name"], result.model.get("sizes", ""))
        machine = (result.hardware["name"], result.world)
        run = (result.trace, result.batch, result.pool, result.seed)
        groups.setdefault((*run, *model, *machine), []).append(result)
    return list(groups.values())


def labels(results: Sequence[Result]) -> list[str]:
    """One label per run: its policy and budget, and else only what differs between them."""
    found = [", ".join(words) for words in zip(*_columns(results), strict=True)]
    found = [", ".join(word for word in text.split(", ") if word) for text in found]
    times, seen = Counter(found), Counter[str]()
    numbered = []
    for text in found:
        seen[text] += 1
        numbered.append(f"{text} ({seen[text]})" if times[text] > 1 else text)
    return numbered


def series_labels(results: Sequence[Result]) -> list[str]:
    """Labels that leave the budget out: runs of one curve share one."""
    columns = _columns(results)
    del columns[1]
    return [", ".join(word for word in words if word) for words in zip(*columns, strict=True)]


def _columns(results: Sequence[Result]) -> list[list[str]]:
    """Words per run: policy, budget, then each setting that is not the same everywhere."""
    settings: list[list[str]] = [
        _tunables(results),
        [f"batch {r.batch}" for r in results],
        [f"pool by {r.pool}" for r in results],
        [str(r.hardware["name"]) for r in results],
        [f"sizes {r.model['sizes']}" if r.model.get("sizes") else "" for r in results],
        [Path(r.trace).stem for r in results],
        [r.world for r in results],
        [f"seed {r.seed}" for r in results],
    ]
    varying = [words for words in settings if len(set(words)) > 1]
    return [[policy_label(r) for r in results], [budget_text(r) for r in results], *varying]


def _tunables(results: Sequence[Result]) -> list[str]:
    """The parameters in which runs of the same policy differ."""
    words = []
    for result in results:
        mine = _parameters(result)
        alike = [_parameters(r) for r in results if policy_label(r) == policy_label(result)]
        differing = [key for key in mine if any(other.get(key) != mine[key] for other in alike)]
        words.append(" ".join(f"{key}={mine[key]}" for key in differing))
    return words


def _parameters(result: Result) -> dict[str, Any]:
    own: dict[str, Any] = dict(result.policy.get("parameters", {}))
    return own | dict(result.policy.get("forecaster", {}).get("parameters", {}))
