"""One self-contained HTML page about a set of runs, with its figures and results as files."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from policies.recording import Recording
from policies.result import Result
from reports.figures.style import to_bytes
from reports.files import write_folder
from reports.gallery import Chart, Curves, charts
from reports.labels import WORLDS, budget_text, labels, model_name, policy_label, sizes_note
from reports.metrics import below_cycle, token_cycle, token_time
from reports.table import GLANCE, sections
from reports.units import count
from traces.errors import InputError

#: Distributions whose versions a report names.
VERSIONED = ("expertflow-lab", "simpy", "numpy", "matplotlib")


@dataclass(frozen=True)
class Picture:
    """A chart as the page shows it: the file's name, its words and its SVG as a data URI."""

    name: str
    title: str
    caption: str
    source: str


@dataclass(frozen=True)
class Provenance:
    """Settings: (name, value) of the shared ones, columns and (label, values) of the others."""

    shared: list[tuple[str, str]]
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def write_report(
    directory: Path,
    results: Sequence[Result],
    recordings: Mapping[int, Recording] | None = None,
    curves: Curves | None = None,
    title: str = "",
    *,
    command: str = "",
) -> Path:
    """Write ``index.html``, ``figures/`` and ``results.json`` to *directory*; return the page.

    *recordings* belong to the results by index, *curves* are further miss-ratio curves
    (label -> (slots, missed ratio)), *command* is the command line that made the results. The
    same arguments give the same bytes. Raises :class:`InputError` if nothing can be written.
    """
    if not results:
        raise InputError(f"{directory}: no results to report, expected at least one")
    drawn = charts(results, recordings, curves)
    files: dict[str, bytes] = {}
    for chart in drawn:
        for kind in ("svg", "png"):
            files[f"figures/{chart.name}.{kind}"] = to_bytes(chart.figure, kind)
    files["results.json"] = results_json(results)
    pictures = [_picture(chart, files[f"figures/{chart.name}.svg"]) for chart in drawn]
    page = _page(results, recordings or {}, pictures, title or _title(results), command)
    files["index.html"] = page.encode()
    write_folder(directory, files)
    return directory / "index.html"


def results_json(results: Sequence[Result]) -> bytes:
    """The results as one JSON list, as ``simctl report`` reads them."""
    text = json.dumps([r.to_dict() for r in results], indent=1, allow_nan=False)
    return text.encode() + b"\n"


def _picture(chart: Chart, svg: bytes) -> Picture:
    source = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    return Picture(chart.name, chart.title, chart.caption, source)


def _title(results: Sequence[Result]) -> str:
    traces = sorted({Path(r.trace).stem for r in results})
    if len(results) == 1:
        return f"{policy_label(results[0])}, {budget_text(results[0])} of experts, on {traces[0]}"
    return f"{len(results)} runs on {', '.join(traces)}"


def _page(
    results: Sequence[Result],
    recordings: Mapping[int, Recording],
    pictures: Sequence[Picture],
    title: str,
    command: str,
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    times = [token_time(r, recordings.get(i)) for i, r in enumerate(results)]
    runs = list(zip(labels(results), results, strict=True))
    page = environment.get_template("report.html.j2").render(
        title=title,
        runs=runs,
        lead=_lead(results),
        notes=_notes(results),
        glance=GLANCE,
        sections=sections(list(results), times),
        pictures=pictures,
        provenance=_provenance(results),
        versions=_versions(),
        command=command,
    )
    return page.replace(" %", "\u00a0%")  # a number and its sign stay on one line


def _lead(results: Sequence[Result]) -> str:
    """What all runs have in common, in one sentence."""
    models = dict.fromkeys(
        f"{model_name(r)}: {r.model['layers']} layers of {r.model['experts']} experts, "
        f"top-{r.model['top_k']}, {count(r.tokens)} tokens"
        for r in results
    )
    machines = dict.fromkeys(
        f"{WORLDS.get(r.world, r.world)}, {r.hardware['name']} ({r.hardware['kind']} profile)"
        for r in results
    )
    return "; ".join([*models, *machines])


def _notes(results: Sequence[Result]) -> list[str]:
    """What a reader must know before the numbers."""
    notes = [f"Sizes: {sizes_note(r)}." for r in results if sizes_note(r)]
    notes += [
        f"{r.hardware['name']} is a datasheet profile: its figures are not measured."
        for r in results
        if r.hardware["kind"] == "datasheet"
    ]
    notes += [
        f"{count(r.slots)} slots are fewer than the {token_cycle(r)} experts of one token "
        f"({r.model['layers']} layers x {r.model['top_k']}): LRU has given each expert away "
        "before its layer comes round again."
        for r in results
        if below_cycle(r)
    ]
    notes += [
        f"{policy_label(r)} is not exact: it may change the model's output, and the transfer "
        "bound does not bind it."
        for r in results
        if not r.policy.get("exact", True)
    ]
    return list(dict.fromkeys(notes))


def _setting(result: Result) -> dict[str, str]:
    """Where one run's numbers come from."""
    return {
        "trace": result.trace,
        "model": model_name(result),
        "sizes": result.model.get("sizes") or "as recorded",
        "policy": result.policy["name"],
        "parameters": _listed(result.policy.get("parameters")),
        "forecaster": _forecaster(result),
        "hardware profile": f"{result.hardware['name']} ({result.hardware['kind']})",
        "world": WORLDS.get(result.world, result.world),
        "slots": f"{count(result.slots)}, pool: {result.pool}",
        "batch": str(result.batch),
        "seed": str(result.seed),
        "decisions (SHA-256)": result.decisions_sha256,
    }


def _forecaster(result: Result) -> str:
    known = result.policy.get("forecaster")
    if not known:
        return "none"
    tunables = known.get("parameters")
    return f"{known['name']}: {_listed(tunables)}" if tunables else str(known["name"])


def _listed(parameters: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key}={value}" for key, value in (parameters or {}).items()) or "none"


def _provenance(results: Sequence[Result]) -> Provenance:
    """Settings that all runs share, said once, and a table of those that differ."""
    settings = [_setting(result) for result in results]
    shared = {key: v for key, v in settings[0].items() if all(s[key] == v for s in settings)}
    columns = [key for key in settings[0] if key not in shared]
    rows = [
        (label, [setting[key] for key in columns])
        for label, setting in zip(labels(results), settings, strict=True)
    ]
    return Provenance(list(shared.items()), columns, rows)


def _versions() -> list[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for name in VERSIONED:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
