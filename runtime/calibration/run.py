"""All measurements of one machine, in order, and the profile that they make."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers

from policies.hardware import FIGURES, HardwareProfile, load_profile
from policies.registry import POLICIES
from policies.tables import build, leaves
from runtime.calibration import machine
from runtime.calibration.bench import Bench
from runtime.calibration.copies import Copies, Table, measure_copies
from runtime.calibration.experts import (
    CpuRates,
    Experts,
    Low,
    measure_cpu,
    measure_dense,
    measure_experts,
    measure_fused,
    measure_low,
    measure_token_share,
)
from runtime.calibration.fits import Line, significant
from runtime.calibration.hosts import Planning
from runtime.calibration.kernels import Graphs, Rates, measure_graphs, measure_rates
from runtime.calibration.launches import (
    Launches,
    measure_launches,
)
from runtime.calibration.models import (
    Layers,
    Reads,
    measure_layers,
    measure_workspace,
)
from runtime.calibration.policies import Stages, measure_policies
from runtime.calibration.runs import Runs, measure_runs
from runtime.calibration.shapes import (
    FAMILIES,
)
from runtime.calibration.sources import sources_of
from runtime.calibration.toml import dumps
from runtime.calibration.whole_layers import WholeLayers
from runtime.calibration.wholes import STEPS as WHOLE_STEPS
from runtime.calibration.wholes import Wholes, measure_wholes
from traces.writing import replacing

#: Steps of progress besides those of copies, policies and families.
OTHER_STEPS = 14 + WHOLE_STEPS

#: Figures that must be above 0 are at least this.
LEAST_S = 1e-9


class Measured(NamedTuple):
    """All that was measured; *dense*, *fused*, *layers* and *runs* only where graphs run.

    *wholes* only where a decode step can be one graph.
    """

    copies: Copies
    rates: Rates
    graphs: Graphs
    experts: Experts
    cpu: CpuRates
    policies: dict[str, Stages]
    launches: Launches
    dense: Line | None
    fused: Line | None
    token_share: float
    low: Low | None
    layers: Layers
    runs: Runs | None
    workspace_bytes: int
    wholes: Wholes | None = None


def steps_of_progress() -> int:
    """At most how often *advance* is called by :func:`measure`."""
    return 2 + 2 * len(POLICIES.classes()) + len(FAMILIES) + OTHER_STEPS


def measure(bench: Bench, advance: Callable[[], None] = lambda: None) -> Measured:
    """Measure this machine; *advance* is called as the work goes on."""
    copies = measure_copies(bench, advance)
    rates = measure_rates(bench)
    advance()
    graphs = measure_graphs(bench)
    advance()
    experts = measure_experts(bench, rates, advance)
    cpu = measure_cpu(bench.quick or not bench.cuda)
    advance()
    launches = measure_launches(bench)
    advance()
    dense = fused = low = runs = wholes = None
    token_share = 0.0
    layers, in_one = Layers.empty(), WholeLayers.empty()
    if bench.cuda:
        dense = measure_dense(bench, rates.memory_bytes_per_s)
        fused = measure_fused(bench, rates.memory_bytes_per_s)
        token_share = measure_token_share(bench, rates.memory_bytes_per_s, fused)
        low = measure_low(bench, rates.memory_bytes_per_s)
        reads = Reads(rates.memory_bytes_per_s, dense.beta, fused.beta, token_share)
        layers, in_one = measure_layers(bench, reads, graphs.sync_s, advance)
    if layers.floor_s:
        runs = measure_runs(bench, copies, advance)
        wholes = measure_wholes(bench, in_one, runs.host, advance)
    # A run tells more; without one, what policies take when they are replayed in Python.
    known = () if runs is None else runs.host.planning
    alone = [name for name in POLICIES.classes() if name not in known]
    return Measured(
        copies=copies,
        rates=rates,
        graphs=graphs,
        experts=experts,
        cpu=cpu,
        policies=measure_policies(bench.quick, alone, advance),
        launches=launches,
        dense=dense,
        fused=fused,
        token_share=token_share,
        low=low,
        layers=layers,
        runs=runs,
        workspace_bytes=measure_workspace(bench),
        wholes=wholes,
    )


def write_profile(path: Any, values: dict[str, Any]) -> HardwareProfile:
    """Write *values* to the TOML file *path*, whole or not at all, and read it back."""
    head = "Written by `simctl calibrate`. Every figure's source is in [sources]."
    with replacing(path) as unfinished:
        unfinished.write_text(dumps(values, head), encoding="utf-8")
        load_profile(unfinished.resolve())
    return load_profile(path.resolve())


def profile_values(bench: Bench, found: Measured) -> dict[str, Any]:
    """What was measured as the tables of a hardware profile."""
    name = machine.device_name(bench.device)
    gpu = {
        "name": name,
        "memory_bytes": machine.device_memory_bytes(bench.device),
        **found.rates._asdict(),
    }
    if found.workspace_bytes:
        gpu["workspace_bytes"] = found.workspace_bytes
    values = {
        "title": f"{name}, calibrated{'' if bench.cuda else ' with the CPU as the device'}",
        "kind": "measured",
        "measurement": machine.measurement(bench.device),
        "gpu": gpu,
        "link": _link(found),
        "host": _host(found),
        "software": _software(found),
        **_whole(found),
        "expert": {
            "kernels": found.launches.expert_kernels,
            "memory_efficiency": found.experts.memory_efficiency,
            "activation_passes": found.experts.activation_passes or 1e-3,
            **_fused(found),
        },
        "cpu": found.cpu._asdict(),
        "expert_rows": [row._asdict() for row in found.experts.rows],
        "sources": sources_of(bench, found),
    }
    return values | {"sources": _of_figures(values)}


def _of_figures(values: dict[str, Any]) -> dict[str, str]:
    """The sources of what *values* do give: a figure that is at its default needs none."""
    profile = build(HardwareProfile, {"name": "calibrated", **values}, "calibrate")
    figures = [f"{path}." for path in leaves(profile, FIGURES)]
    sources: dict[str, str] = values["sources"]
    return {p: text for p, text in sources.items() if any(f.startswith(f"{p}.") for f in figures)}


def _fused(found: Measured) -> dict[str, Any]:
    """How the runtime's own kernels read experts, where they were measured."""
    if found.fused is None:
        return {}
    fused: dict[str, Any] = {
        "fused_efficiency": significant(found.fused.beta),
        "fused_token_share": significant(found.token_share),
    }
    if found.low is None:
        return fused
    low = found.low
    return fused | {"low_efficiency": low.efficiency, "low_token_share": low.token_share}


def _link(found: Measured) -> dict[str, Any]:
    copies = found.copies
    h2d = copies.h2d
    if found.runs is not None:
        h2d = h2d.longer(found.runs.copy_longer_s)
    link: dict[str, Any] = {"h2d": _direction(h2d), "d2h": _direction(copies.d2h)}
    return link | ({"wake_s": copies.wake_s} if copies.wake_s else {})


def _whole(found: Measured) -> dict[str, Any]:
    """Decode steps as one graph each, where they were measured; the chain's figures beside them."""
    wholes = None if found.runs is None else found.wholes
    return {} if wholes is None else {"whole": wholes.values()}


def _direction(table: Table) -> dict[str, Any]:
    return {
        "isolated": {"sizes_bytes": table.sizes_bytes, "seconds": table.isolated_s},
        "queued": {"sizes_bytes": table.sizes_bytes, "seconds": table.queued_s},
    }


def _planning(found: Measured) -> dict[str, Planning]:
    """Policies' times as they are in a run; as replayed alone where none was made."""
    alone = {
        n: Planning(t.event_s, t.access_s, 0.0, t.move_s, p.move_s, p.event_s, p.access_s)
        for n, (t, p) in found.policies.items()
    }
    if found.runs is None:
        return alone
    # What an event that misses takes before its first copy is issued, planned or not.
    issuing_s = found.runs.host.first_s + found.runs.misses.start_s
    planning = alone | found.runs.host.planning
    return {n: p._replace(miss_s=p.miss_s + issuing_s) for n, p in planning.items()}


def _host(found: Measured) -> dict[str, Any]:
    planning = _planning(found)
    # Replays alone do not tell what an event takes that misses anything.
    missing = ("miss_s",) if found.runs else ()
    parts = {
        name: {n: significant(getattr(p, name)) for n, p in planning.items()}
        for name in ("event_s", "access_s", *missing, "move_s", "prefetch_s")
    }
    ahead = {
        f"policy_{name}": {n: significant(getattr(p, name)) for n, p in planning.items()}
        for name in ("foresee_event_s", "foresee_access_s")
    }
    parts["event_s"] = {n: max(s, LEAST_S) for n, s in parts["event_s"].items()}
    host: dict[str, Any] = {
        "copy_issue_s": found.copies.issue_s,
        "kernel_launch_s": significant(found.launches.kernel_launch_s),
        "gate_sync_s": found.graphs.sync_s,
        "step_s": significant(found.launches.step_s),
        "pinned_alloc_bytes_per_s": found.copies.pinned_alloc_bytes_per_s,
    }
    for name, by_policy in parts.items():
        host[name] = significant(statistics.median(by_policy.values()))
        host[f"policy_{name}"] = by_policy
    return host | ahead | _captured(found)


def _captured(found: Measured) -> dict[str, Any]:
    """What a run tells of the host where decode steps are captured."""
    runs = found.runs
    if runs is None:
        return {}
    # Where return_s has it all, a prefetch takes next to nothing: 0 would be copy_issue_s.
    prefetch_s = runs.host.prefetch_s or min(runs.host.return_s, LEAST_S)
    colds = {n: p.cold for n, p in runs.host.planning.items()}
    return {
        "graph_launch_s": significant(runs.host.launching_s or found.graphs.launch_s),
        # A fit may give all of it to the table: what it tells together is what counts.
        "copy_issue_s": significant(max(runs.host.issue_s, LEAST_S)),
        "late_issue_s": significant(runs.host.late_s),
        "step_s": significant(runs.step_s),
        "table_tell_s": significant(runs.host.tell_s),
        "table_update_s": significant(runs.host.change_s),
        "return_s": significant(runs.host.return_s),
        "prefetch_issue_s": significant(prefetch_s),
        "cold_share": runs.host.cold.share,
        "cold_after_s": runs.host.cold.after_s,
        "cold_most_s": runs.host.cold.most_s,
        "policy_cold_share": {n: cold.share for n, cold in colds.items()},
        "policy_cold_most_s": {n: cold.most_s for n, cold in colds.items()},
    }


def _software(found: Measured) -> dict[str, Any]:
    launches = found.launches
    software: dict[str, Any] = {
        "name": f"transformers {transformers.__version__}, experts by this runtime",
        "attention_kernels": launches.attention_kernels,
        "expert_kernels_fixed": launches.expert_kernels,
        "expert_kernels_each": 0,
        "prompt_kernels": launches.prompt_kernels,
    }
    if found.layers.floor_s and found.dense is not None:
        software["layer_floor_s"] = {n: significant(s) for n, s in found.layers.floor_s.items()}
        kept = found.layers.kv_efficiency
        software["kv_efficiency"] = {n: significant(s) for n, s in kept.items()}
        several = found.layers.several_s
        software["several_floor_s"] = {n: significant(s) for n, s in several.items()}
        positions = found.layers.kv_token_s
        software["kv_token_s"] = {n: significant(s) for n, s in positions.items()}
        software["dense_efficiency"] = significant(found.dense.beta)
    if found.runs is not None:
        more = found.runs.more_layer_s
        software["policy_layer_s"] = {n: significant(s) for n, s in more.items()}
    return software


def calibrate_device(device: str, quick: bool) -> Bench:
    """A bench on the device called *device*: ``cpu``, ``cuda``, or ``auto``."""
    from runtime.load import pick_device

    torch.manual_seed(0)
    return Bench(pick_device(device), quick=quick)
