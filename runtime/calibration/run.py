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
from runtime.bank import RING
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
from runtime.calibration.hosts import COLD_AFTER_S, Planning, capped
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
    SEVERAL,
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
    policies: dict[str, Stages]
    launches: Launches
    dense: Line | None
    fused: Line | None
    token_share: float
    low: Low | None
    layers: Layers
    runs: Runs | None
    workspace_bytes: int


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
    dense = fused = low = runs = None
    token_share = 0.0
    layers = Layers.empty()
    if bench.cuda:
        dense = measure_dense(bench, rates.memory_bytes_per_s)
        fused = measure_fused(bench, rates.memory_bytes_per_s)
        token_share = measure_token_share(bench, rates.memory_bytes_per_s, fused)
        low = measure_low(bench, rates.memory_bytes_per_s)
        reads = Reads(rates.memory_bytes_per_s, dense.beta, fused.beta, token_share)
        layers = measure_layers(bench, reads, graphs.sync_s, advance)
    if layers.floor_s:
        runs = measure_runs(bench, graphs, copies, advance)
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
        "expert": {
            "kernels": found.launches.expert_kernels,
            "memory_efficiency": found.experts.memory_efficiency,
            "activation_passes": found.experts.activation_passes or 1e-3,
            **_fused(found),
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
    link: dict[str, Any] = {"h2d": _direction(copies.h2d), "d2h": _direction(copies.d2h)}
    return link | ({"wake_s": copies.wake_s} if copies.wake_s else {})


def _direction(table: Table) -> dict[str, Any]:
    return {
        "isolated": {"sizes_bytes": table.sizes_bytes, "seconds": table.isolated_s},
        "queued": {"sizes_bytes": table.sizes_bytes, "seconds": table.queued_s},
    }


def _planning(found: Measured) -> dict[str, Planning]:
    """Policies' times as they are in a run; as replayed alone where none was made."""
    alone = {
        n: Planning(t.event_s, t.access_s, t.move_s, p.move_s, p.event_s, p.access_s)
        for n, (t, p) in found.policies.items()
    }
    if found.runs is None:
        return alone
    host = found.runs.host
    in_runs = {
        n: p._replace(event_s=p.event_s + host.launching_s) for n, p in host.planning.items()
    }
    return alone | in_runs


def _host(found: Measured) -> dict[str, Any]:
    planning = _planning(found)
    parts = {
        name: {n: significant(getattr(p, name)) for n, p in planning.items()}
        for name in ("event_s", "access_s", "move_s", "prefetch_s")
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
    # A fit may leave a part out that is there: what was measured alone then stands.
    issue_s = runs.host.issue_s or found.copies.issue_s
    return {
        "graph_launch_s": found.graphs.launch_s,
        "copy_issue_s": significant(issue_s),
        "step_s": significant(runs.step_s),
        "table_update_s": significant(runs.host.change_s),
        "table_rewrite_s": significant(capped(RING) * runs.host.change_s),
        "miss_s": significant(runs.misses.start_s),
        "return_s": significant(runs.host.return_s),
        "cold_share": runs.host.cold.share,
        "cold_after_s": COLD_AFTER_S,
        "cold_most_s": runs.host.cold.most_s,
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
        several = found.layers.several_s
        software["several_floor_s"] = {n: significant(s) for n, s in several.items()}
        positions = found.layers.kv_token_s
        software["kv_token_s"] = {n: significant(s) for n, s in positions.items()}
        software["dense_efficiency"] = significant(found.dense.beta)
    return software


def _sources(bench: Bench, found: Measured) -> dict[str, str]:
    by = "CUDA events" if bench.cuda else "the host's clock; the CPU was the device, no GPU"
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
            "replays of a made-up trace; event, experts and moves fitted to medians"
            + _missed(found.policies.get("lru"))
        ),
        "host.policy_access_s": "the same fit, per distinct expert of an event",
        "host.policy_move_s": "the same fit, per demanded move",
        "host.policy_prefetch_s": "a fit beside it, of what comes after the launch, per prefetch",
        "host.policy_foresee_event_s": "that fit, per event",
        "host.policy_foresee_access_s": "that fit, per distinct expert of an event",
        "host.prefetch_s": "median of policy_prefetch_s",
        "software": f"operations counted in {model}; experts as in a prompt of the runtime",
        "expert": f"single experts in plain torch (expert_rows), kernels as in software, {by}",
        "cpu": "bf16 experts in plain torch on all cores",
    }
    return {key: f"measured: {text}" for key, text in (sources | _graph_sources(found)).items()}


def _missed(lru: Stages | None) -> str:
    """What the fit of ``lru`` is off by, as an example; nothing if it was not replayed."""
    if lru is None:
        return ""
    constant = f"where a constant misses {lru.demand.constant_residual_s:.1e} s"
    return f"; lru misses {lru.demand.residual_s:.1e} s {constant}"


def _graph_sources(found: Measured) -> dict[str, str]:
    """Sources of the figures that only a device with graphs has."""
    sources = {}
    if found.workspace_bytes:
        sources["gpu.workspace_bytes"] = f"peak beyond slots, weights and cache, small {TYPICAL}"
    if found.dense is None or found.fused is None:
        return sources
    return sources | {
        "host.graph_launch_s": "device time between marks around a graph's replay, less the graph",
        "software.layer_floor_s": (
            "from launch to answer in decode steps of middle-sized models, medians, less the "
            f"answer's way and what a layer reads; {ANY_FAMILY}: their mean"
        ),
        "software.several_floor_s": f"the same with {SEVERAL} sequences",
        "software.kv_efficiency": (
            "the same with a short and a long cache, one and several sequences, heads as published"
        ),
        "software.kv_token_s": "the same, what does not grow with the sequences",
        "software.dense_efficiency": (
            f"slope of matrix-vector products over their bytes; misses {found.dense.residual:.1e} s"
        ),
        "expert.fused_efficiency": (
            "slope of the runtime's decode kernels over the bytes of an event; misses "
            f"{found.fused.residual:.1e} s"
        ),
        "expert.fused_token_share": "the same kernels with several tokens for each expert",
        "expert.low_efficiency": "the same kernels with low-precision copies alone",
        "expert.low_token_share": "the same with several tokens for each expert",
        **_run_sources(found.runs),
    }


def _run_sources(runs: Runs | None) -> dict[str, str]:
    """Sources of what whole runs told."""
    if runs is None:
        return {}
    fit = (
        "from plan to launch in whole runs of made-up models; copies and changes fitted to "
        f"means, misses {runs.host.missed:.1%}"
    )
    worst = max(runs.host.planning.items(), key=lambda item: item[1].residual_s, default=None)
    missed = "" if worst is None else f"; misses {worst[1].residual_s:.1e} s at most ({worst[0]})"
    return {
        "host.copy_issue_s": fit,
        "host.table_update_s": fit,
        "host.table_rewrite_s": "so many changes as are written together, each as above",
        "host.policy_event_s": (
            "from answer to plan in whole runs of made-up models; event, experts and moves fitted "
            f"to means{missed}"
        ),
        "host.return_s": "from prefetches issued to the next answer, of events whose answer waited",
        "host.cold_share": "fitted with policy_event_s to runs with short and with long waits",
        "host.cold_after_s": "the wait from which on cold_share was fitted",
        "host.cold_most_s": "fitted with cold_share, one of few lengths",
        "host.step_s": "steps of whole runs that miss experts, less their layers",
        "host.miss_s": (
            "answers of whole runs that wait for copies, beyond their copies of "
            f"{runs.misses.copy_s:.3e} s each; misses {runs.misses.missed:.1%} of an event"
        ),
    }


def calibrate_device(device: str, quick: bool) -> Bench:
    """A bench on the device called *device*: ``cpu``, ``cuda``, or ``auto``."""
    from runtime.load import pick_device

    torch.manual_seed(0)
    return Bench(pick_device(device), quick=quick)
