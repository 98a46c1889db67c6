"""Where the figures of a calibrated profile come from, in words: its ``[sources]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from policies.hardware import ANY_FAMILY
from runtime.calibration.bench import Bench
from runtime.calibration.copies import PASSES
from runtime.calibration.handshakes import LAUNCH_LAYERS
from runtime.calibration.policies import Stages
from runtime.calibration.runs import Runs
from runtime.calibration.shapes import SEVERAL, TYPICAL
from runtime.calibration.wholes import LATE, QUIET, Wholes

if TYPE_CHECKING:
    from runtime.calibration.run import Measured


def sources_of(bench: Bench, found: Measured) -> dict[str, str]:
    """The source of every figure that may have been *found*, by its dotted name."""
    by = "CUDA events" if bench.cuda else "the host's clock; the CPU was the device, no GPU"
    memory = f"{'pinned' if bench.cuda else 'ordinary'} memory"
    model = f"small {TYPICAL} models of two depths"
    sources = {
        "gpu.name": "as the driver says" if bench.cuda else "the processor; no GPU was used",
        "gpu.memory_bytes": "as the driver says" if bench.cuda else "the host's; no GPU was used",
        "gpu.memory_bytes_per_s": f"copy within the device, read and write together, {by}",
        "gpu.bf16_flops_per_s": f"one large bf16 matmul, {by}",
        "gpu.kernel_min_s": f"200 smallest kernels in a row{' in a graph' * bench.cuda}, {by}",
        "link.h2d": f"{memory}, means of {PASSES} passes of medians, {by}{_longer(found.runs)}",
        "link.d2h": f"{memory}, means of {PASSES} passes of medians, {by}",
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


def _longer(runs: Runs | None) -> str:
    """What was added to the copies of experts; nothing if no runs were made."""
    if runs is None:
        return ""
    return f"; from 1 MiB on and {runs.copy_longer_s:.1e} s, which copies take longer in whole runs"


def _graph_sources(found: Measured) -> dict[str, str]:
    """Sources of the figures that only a device with graphs has."""
    sources = {}
    if found.workspace_bytes:
        sources["gpu.workspace_bytes"] = f"peak beyond slots, weights and cache, small {TYPICAL}"
    if found.dense is None or found.fused is None:
        return sources
    return sources | {
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
        **_whole_sources(found.wholes),
    }


def _run_sources(runs: Runs | None) -> dict[str, str]:
    """Sources of what whole runs told."""
    if runs is None:
        return {}
    fit = (
        "from plan to launch in whole runs of made-up models; copies, the table and its changes "
        f"fitted to means, misses {runs.host.missed:.1%}"
    )
    worst = max(runs.host.planning.items(), key=lambda item: item[1].residual_s, default=None)
    missed = "" if worst is None else f"; misses {worst[1].residual_s:.1e} s at most ({worst[0]})"
    return {
        "host.copy_issue_s": fit,
        "host.graph_launch_s": f"{fit}; what is left: one graph's replay, as the host sees it",
        "host.table_tell_s": fit,
        "host.table_update_s": fit,
        "host.policy_event_s": (
            "from answer to plan in whole runs of made-up models; event, experts, whether anything "
            f"is missed, and moves fitted to means{missed}"
        ),
        "host.policy_miss_s": (
            "that fit and the one of table_tell_s, for an event that misses anything; then what "
            "answers of whole runs that wait for copies take beyond their copies of "
            f"{runs.misses.copy_s:.3e} s each; misses {runs.misses.missed:.1%} of an event"
        ),
        "host.miss_s": "median of policy_miss_s",
        "host.late_issue_s": fit,
        "host.prefetch_issue_s": "fitted with return_s",
        "host.return_s": "from prefetches issued to the next answer, of events whose answer waited",
        "host.cold_share": "fitted with copy_issue_s to runs with short and with long waits",
        "host.policy_cold_share": "the same with policy_event_s; as lru where none was long",
        "host.policy_cold_most_s": "fitted with policy_cold_share, one of few lengths",
        "host.cold_after_s": "the wait from which on cold_share was fitted",
        "host.cold_most_s": "fitted with cold_share, one of few lengths",
        "host.step_s": "steps of whole runs that miss experts, less their layers",
        "software.policy_layer_s": (
            "from launch to answer in whole runs under policies that are not exact, beyond lru's"
        ),
    }


def _whole_sources(wholes: Wholes | None) -> dict[str, str]:
    """Sources of what decode steps in one graph each told."""
    if wholes is None:
        return {}
    ping, spread = wholes.ping, wholes.layers.handshakes_s
    way = (
        "half of what a gate that waits for the answer of an idle host takes beyond one that waits "
        f"for nothing ({ping.answered_s:.2e} and {ping.alone_s:.2e} s), stamps of the device; no "
        "clock tells the two ways apart"
    )
    return {
        "whole.handshake_s": (
            "from answer to experts found, stamps of the device in the steps of layer_floor_s, of "
            f"gates the host was in time for; {min(spread):.2e} to {max(spread):.2e} s by model, "
            "their median"
        ),
        "whole.answer_s": way,
        "whole.notice_s": way,
        "whole.publish_s": (
            "host time of one or two moves in the shared table, and of issuing copies whose "
            "landing is counted beyond that of others"
        ),
        "whole.follow_s": (
            "from answer to prefetches in such steps that miss nothing, beyond policy_event_s and "
            f"policy_access_s ({QUIET}); and from prefetches to an answer that was there before, "
            f"less publish_s ({LATE})"
        ),
        "whole.launch_s": (
            f"host time of one replay, a small {TYPICAL} of {LAUNCH_LAYERS} layers, device idle"
        ),
        "whole.layer_floor_s": (
            "from answer to answer in decode steps of middle-sized models in one graph, stamps of "
            f"the device, less handshake_s and what a layer reads; {ANY_FAMILY}: their mean"
        ),
        "whole.several_floor_s": f"the same with {SEVERAL} sequences",
    }
