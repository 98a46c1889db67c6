"""All measurements of one machine, in order, and the profile that they make."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers

from policies.hardware import ANY_FAMILY, FIGURES, HardwareProfile, load_profile
from policies.registry import POLICIES
from policies.tables import build, leaves
from runtime.calibration import machine
from runtime.calibration.bench import Bench
from runtime.calibration.copies import SIZES, Copies, Table, measure_copies
from runtime.calibration.experts import (
    CpuRates,
    Experts,
    measure_cpu,
    measure_dense,
    measure_experts,
    measure_fused,
)
from runtime.calibration.fits import Line, Thinking, significant
from runtime.calibration.hosts import in_profile, typical
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
from runtime.calibration.policies import measure_policies
from runtime.calibration.runs import Runs, measure_runs
from runtime.calibration.shapes import (
    FAMILIES,
    TYPICAL,
)
from runtime.calibration.toml import dumps
from traces.writing import replacing

#: Steps of progress besides those of copies, policies and families.
OTHER_STEPS = 14

#: Figures that must be above 0 are at least this.
LEAST_S = 1e-9


class Measured(NamedTuple):
    """All that was measured; *dense*, *fused*, *layers* and *runs* only where graphs run."""

    copies: Copies
    rates: Rates
    graphs: Graphs
    experts: Experts
    cpu: CpuRates
    policies: dict[str, Thinking]
    launches: Launches
    dense: Line | None
    fused: Line | None
    layers: Layers
    runs: Runs | None
    workspace_bytes: int


def steps_of_progress() -> int:
    """At most how often *advance* is called by :func:`measure`."""
    return 2 * len(SIZES) + 2 * len(POLICIES.classes()) + len(FAMILIES) + OTHER_STEPS


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
    policies = measure_policies(bench.quick, advance)
    launches = measure_launches(bench)
    advance()
    dense = fused = runs = None
    layers = Layers({}, {}, {})
    if bench.cuda:
        dense = measure_dense(bench, rates.memory_bytes_per_s)
        fused = measure_fused(bench, rates.memory_bytes_per_s)
        reads = Reads(rates.memory_bytes_per_s, dense.beta, fused.beta)
        layers = measure_layers(bench, reads, advance)
    if layers.floor_s:
        runs = measure_runs(bench, graphs, copies, policies, advance)
    return Measured(
        copies=copies,
        rates=rates,
        graphs=graphs,
        experts=experts,
        cpu=cpu,
        policies=policies,
        launches=launches,
        dense=dense,
        fused=fused,
        layers=layers,
        runs=runs,
        workspace_bytes=measure_workspace(bench),
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
    fused = found.fused
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
        "expert": {
            "kernels": found.launches.expert_kernels,
            "memory_efficiency": found.experts.memory_efficiency,
            "activation_passes": found.experts.activation_passes or 1e-3,
            **({"fused_efficiency": significant(fused.beta)} if fused is not None else {}),
        },
        "cpu": found.cpu._asdict(),
        "expert_rows": [row._asdict() for row in found.experts.rows],
        "sources": _sources(bench, found),
    }
    return values | {"sources": _of_figures(values)}


def _of_figures(values: dict[str, Any]) -> dict[str, str]:
    """The sources of what *values* do give: a figure that is at its default needs none."""
    profile = build(HardwareProfile, {"name": "calibrated", **values}, "calibrate")
    figures = [f"{path}." for path in leaves(profile, FIGURES)]
    sources: dict[str, str] = values["sources"]
    return {p: text for p, text in sources.items() if any(f.startswith(f"{p}.") for f in figures)}


def _link(found: Measured) -> dict[str, Any]:
    copies, runs = found.copies, found.runs
    link: dict[str, Any] = {"h2d": _direction(copies.h2d), "d2h": _direction(copies.d2h)}
    wake_s = copies.wake_s if runs is None else significant(runs.wake_s)
    return link | ({"wake_s": wake_s} if wake_s else {})


def _direction(table: Table) -> dict[str, Any]:
    return {
        "isolated": {"sizes_bytes": table.sizes_bytes, "seconds": table.isolated_s},
        "queued": {"sizes_bytes": table.sizes_bytes, "seconds": table.queued_s},
    }


def _thinking(found: Measured) -> dict[str, Thinking]:
    """Policies' times as they are in a run; as replayed alone where no runs were made."""
    if found.runs is None:
        return found.policies
    host = found.runs.host
    others = typical(host.slower)
    return {
        name: in_profile(alone, host.slower.get(name) or others, host.engine_s)
        for name, alone in found.policies.items()
    }


def _host(found: Measured) -> dict[str, Any]:
    policies = _thinking(found)
    events = {n: significant(max(t.event_s, LEAST_S)) for n, t in policies.items()}
    accesses = {n: significant(t.access_s) for n, t in policies.items()}
    moves = {n: significant(t.move_s) for n, t in policies.items()}
    host: dict[str, Any] = {
        "copy_issue_s": found.copies.issue_s,
        "kernel_launch_s": significant(found.launches.kernel_launch_s),
        "gate_sync_s": found.graphs.sync_s,
        "event_s": significant(statistics.median(events.values())),
        "step_s": significant(found.launches.step_s),
        "pinned_alloc_bytes_per_s": found.copies.pinned_alloc_bytes_per_s,
        "access_s": significant(statistics.median(accesses.values())),
        "move_s": significant(statistics.median(moves.values())),
        "policy_event_s": events,
        "policy_access_s": accesses,
        "policy_move_s": moves,
    }
    return host | _captured(found)


def _captured(found: Measured) -> dict[str, Any]:
    """What a run tells of the host where decode steps are captured."""
    if not found.layers.floor_s:
        return {}
    host: dict[str, Any] = {
        "graph_launch_s": found.graphs.launch_s,
        "table_update_s": found.graphs.table_s,
    }
    runs = found.runs
    if runs is None:
        return host
    # A fit may leave a part out that is there: what was measured alone then stands.
    issue_s = runs.host.issue_s or found.copies.issue_s
    return host | {
        "copy_issue_s": significant(issue_s),
        "step_s": significant(runs.step_s),
        "table_update_s": significant(runs.host.update_s),
        "miss_s": significant(runs.miss_s),
    }


def _software(found: Measured) -> dict[str, Any]:
    launches = found.launches
    software: dict[str, Any] = {
        "name": f"transformers {transformers.__version__}, experts by this runtime",
        "attention_kernels": launches.attention_kernels,
        "expert_kernels_fixed": launches.expert_kernels,
        "expert_kernels_each": 0,
    }
    if found.layers.floor_s and found.dense is not None:
        software["layer_floor_s"] = {n: significant(s) for n, s in found.layers.floor_s.items()}
        kept = found.layers.kv_efficiency
        software["kv_efficiency"] = {n: significant(s) for n, s in kept.items()}
        positions = found.layers.kv_token_s
        software["kv_token_s"] = {n: significant(s) for n, s in positions.items()}
        software["dense_efficiency"] = significant(found.dense.beta)
    return software


def _sources(bench: Bench, found: Measured) -> dict[str, str]:
    by = "CUDA events" if bench.cuda else "the host's clock; the CPU was the device, no GPU"
    lru = found.policies["lru"]
    model = f"small {TYPICAL} models of two depths"
    sources = {
        "gpu.name": "as the driver says" if bench.cuda else "the processor; no GPU was used",
        "gpu.memory_bytes": "as the driver says" if bench.cuda else "the host's; no GPU was used",
        "gpu.memory_bytes_per_s": f"copy within the device, read and write together, {by}",
        "gpu.bf16_flops_per_s": f"one large bf16 matmul, {by}",
        "gpu.kernel_min_s": f"200 smallest kernels in a row{' in a graph' * bench.cuda}, {by}",
        "link.h2d": f"{'pinned' if bench.cuda else 'ordinary'} memory, medians, {by}",
        "link.d2h": f"{'pinned' if bench.cuda else 'ordinary'} memory, medians, {by}",
        "host.copy_issue_s": "the runtime's own copies of 4 KiB, host time with their marks",
        "host.kernel_launch_s": f"host time of a layer over its operations, {model}",
        "link.wake_s": f"from a copy's end until a lane that waits for it goes on, {by}",
        "host.gate_sync_s": "round trip of a graph on the host's clock, less the device's own time",
        "host.event_s": "median of policy_event_s",
        "host.step_s": f"what does not grow with the layers, {model}",
        "host.pinned_alloc_bytes_per_s": "one block as the runtime takes it",
        "host.access_s": "median of policy_access_s",
        "host.move_s": "median of policy_move_s",
        "host.policy_event_s": (
            "replays of a made-up trace; event, experts and moves fitted to medians, lru misses "
            f"{lru.residual_s:.1e} s where a constant misses {lru.constant_residual_s:.1e} s"
        ),
        "host.policy_access_s": "the same fit, per distinct expert of an event",
        "host.policy_move_s": "the same fit, per move",
        "software": f"operations counted in {model}; experts as in a prompt of the runtime",
        "expert": f"single experts in plain torch (expert_rows), kernels as in software, {by}",
        "cpu": "bf16 experts in plain torch on all cores",
    }
    return {key: f"measured: {text}" for key, text in (sources | _graph_sources(found)).items()}


def _graph_sources(found: Measured) -> dict[str, str]:
    """Sources of the figures that only a device with graphs has."""
    sources = {}
    if found.workspace_bytes:
        sources["gpu.workspace_bytes"] = f"peak beyond slots, weights and cache, small {TYPICAL}"
    if found.dense is None or found.fused is None:
        return sources
    return sources | {
        "host.graph_launch_s": "device time between marks around a graph's replay, less the graph",
        "host.table_update_s": "host time of four changes of the runtime's expert table",
        "software.layer_floor_s": (
            "one layer's graph of middle-sized models behind others, less what it reads; "
            f"{ANY_FAMILY}: their mean"
        ),
        "software.kv_efficiency": (
            "layers' graphs with a short and a long cache, one and several sequences, heads as "
            "published"
        ),
        "software.kv_token_s": "the same, what does not grow with the sequences",
        "software.dense_efficiency": (
            f"slope of matrix-vector products over their bytes; misses {found.dense.residual:.1e} s"
        ),
        "expert.fused_efficiency": (
            "slope of the runtime's decode kernels over the bytes of an event; misses "
            f"{found.fused.residual:.1e} s"
        ),
        **_run_sources(found.runs),
    }


def _run_sources(runs: Runs | None) -> dict[str, str]:
    """Sources of what whole runs told."""
    if runs is None:
        return {}
    host = runs.host
    fit = f"step times of whole runs of small models, all policies; misses {host.missed:.1%}"
    slower = ", ".join(f"{name} {factor:.2f}" for name, factor in host.slower.items())
    return {
        "link.wake_s": (
            "from a copy's end until a middle-sized layer's graph that waits for it is done, less "
            "the graph"
        ),
        "host.copy_issue_s": fit,
        "host.table_update_s": fit,
        "host.policy_event_s": (
            f"{fit}; {host.engine_s:.2e} s for all alike, planning as replayed alone times {slower}"
        ),
        "host.step_s": "steps of whole runs of two depths, what does not grow with the layers",
        "host.miss_s": (
            f"step times of whole runs that wait for copies; misses {runs.misses_off:.1%}"
        ),
    }


def calibrate_device(device: str, quick: bool) -> Bench:
    """A bench on the device called *device*: ``cpu``, ``cuda``, or ``auto``."""
    from runtime.load import pick_device

    torch.manual_seed(0)
    return Bench(pick_device(device), quick=quick)
