"""From a finished world to its result: every number of the JSON, worked out in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from policies.costs import Costs
from policies.kv_moves import SchedulingTimes
from policies.memory import TwoPrecisions, activations_bytes
from policies.planner import Planner
from policies.registry import values_of
from policies.result import CAUSES, Result

if TYPE_CHECKING:
    from policies.session import TraceSession


class Carried(Protocol):
    """What a finished world tells of its host-to-device link; its length is what still waits."""

    busy_s: float
    demand_bytes: int
    prefetch_bytes: int
    cancelled: int

    def __len__(self) -> int: ...


class World(Protocol):
    """What a finished world tells of its run, in seconds and counts.

    *kind* is the world's name in a result. *parts_s* splits the total by
    :data:`policies.result.CAUSES`; *decode_parts_s* sums that over the decode steps, each
    counted once for each of its tokens.
    """

    kind: str
    planner: Planner
    costs: Costs
    steps: int
    accesses: int
    late: int
    decode_tokens: int
    prefill_tokens: int
    scheduling: SchedulingTimes

    @property
    def prefill_s(self) -> float: ...

    @property
    def decode_step_s(self) -> Sequence[float]: ...

    @property
    def decode_step_tokens(self) -> Sequence[int]: ...

    @property
    def decode_parts_s(self) -> Sequence[float]: ...

    @property
    def link(self) -> Carried: ...

    @property
    def total_s(self) -> float: ...

    @property
    def parts_s(self) -> Sequence[float]: ...

    @property
    def compute_bound_s(self) -> float: ...


def result_of(session: TraceSession, world: World) -> Result:
    """The result of *world*, which ran a policy of *session*."""
    planner = world.planner
    setup, model = session.setup, session.model
    missed = planner.counts["missed"]
    held = world.accesses - missed
    hit = held - world.late
    moves = _moves(world)
    slots = planner.context.slots
    return Result(
        trace=setup.trace,
        policy=_policy(planner),
        model=model.to_dict() | {"routing": session.stored.model.name, "sizes": setup.sizes or ""},
        hardware={"name": session.profile.name, "kind": session.profile.kind},
        world=world.kind,
        slots=slots,
        pool=setup.pool,
        batch=setup.batch,
        seed=setup.seed,
        steps=world.steps,
        tokens=world.decode_tokens + world.prefill_tokens,
        accesses=world.accesses,
        held=held,
        missed=missed,
        hit=hit,
        late=world.late,
        hit_ratio=hit / world.accesses,
        held_ratio=held / world.accesses,
        moves=moves,
        bytes=_bytes(world, moves),
        prefetch=_prefetch(world, moves),
        time=_time(world),
        breakdown_s=dict(zip(CAUSES, world.parts_s, strict=True)),
        link={"busy_s": world.link.busy_s, "utilisation": world.link.busy_s / world.total_s},
        memory=_memory(session, world),
        bounds={
            "compute_s": world.compute_bound_s,
            "transfer_s": session.fewest_moves(slots) * planner.context.transfer_s,
            "belady_missed": session.belady_missed(slots),
        },
        decisions_sha256=planner.log.sha256(),
        scheduler=setup.scheduler,
        depth=setup.depth,
        train=setup.train or "",
        quality=None if planner.policy.exact else _quality(planner, world.accesses),
        schedule=_schedule(session, world),
    )


def _policy(planner: Planner) -> dict[str, Any]:
    policy, forecaster = planner.policy, planner.forecaster
    described: dict[str, Any] = {
        "name": policy.name,
        "label": policy.name,
        "parameters": values_of(policy),
        "exact": policy.exact,
        "offline": policy.offline,
    }
    if forecaster is not None:
        described["label"] = f"{policy.name} ({forecaster.name})"
        described["forecaster"] = {"name": forecaster.name, "parameters": values_of(forecaster)}
    return described


def _moves(world: World) -> dict[str, int]:
    counts = world.planner.counts
    used = counts["prefetch"] - counts["unused"] - world.planner.unused
    cancelled = world.link.cancelled + len(world.link)
    return {
        "demand": counts["demand"],
        "prefetch": counts["prefetch"],
        "cancelled": cancelled,
        "wasted": counts["prefetch"] - used - cancelled,
    }


def _bytes(world: World, moves: dict[str, int]) -> dict[str, int]:
    planner, costs, link = world.planner, world.costs, world.link
    low = planner.counts["prefetch_low"] - planner.counts["unused_low"] - planner.unused_low
    used = moves["prefetch"] - moves["wasted"] - moves["cancelled"]
    used_bytes = (used - low) * costs.full_bytes + low * costs.low_bytes
    return {
        "demand": link.demand_bytes,
        "prefetch": link.prefetch_bytes,
        "wasted": link.prefetch_bytes - used_bytes,
    }


def _prefetch(world: World, moves: dict[str, int]) -> dict[str, float]:
    """Accuracy, coverage and timeliness: shares, 0 where nothing was prefetched."""
    carried = moves["prefetch"] - moves["cancelled"]
    used = carried - moves["wasted"]
    missed = world.planner.counts["missed"]
    return {
        "used": used,
        "late": world.late,
        "accuracy": used / carried if carried else 0.0,
        "coverage": used / (used + missed) if used else 0.0,
        "timeliness": max(used - world.late, 0) / used if used else 0.0,
    }


def _time(world: World) -> dict[str, Any]:
    decode_s = float(sum(world.decode_step_s))
    per_token = np.repeat(np.array(world.decode_step_s), np.array(world.decode_step_tokens))
    if not len(per_token):
        tpot = dict.fromkeys(("mean", "p50", "p90", "p99"), 0.0)
    else:
        p50, p90, p99 = np.percentile(per_token, (50, 90, 99)).tolist()
        tpot = {"mean": float(per_token.mean()), "p50": p50, "p90": p90, "p99": p99}
    return {
        "total_s": world.total_s,
        "prefill_s": world.prefill_s,
        "decode_s": decode_s,
        "tokens_per_s": world.decode_tokens / decode_s if decode_s else 0.0,
        "prefill_tokens_per_s": (
            world.prefill_tokens / world.prefill_s if world.prefill_s else 0.0
        ),
        "tpot_s": tpot,
        "tpot_parts_s": _per_token(world),
    }


def _per_token(world: World) -> dict[str, float]:
    """Where the time per output token goes: adds up to its mean."""
    tokens = world.decode_tokens or 1
    return {c: part / tokens for c, part in zip(CAUSES, world.decode_parts_s, strict=True)}


def _memory(session: TraceSession, world: World) -> dict[str, float]:
    """Bytes that the GPU must hold, and the share saved against holding every expert there."""
    model, shape = session.model, session.shape
    slots = world.planner.context.slots * model.expert_bytes
    experts = model.total_experts * model.expert_bytes
    rest = model.dense_bytes + session.kv_tokens * model.kv_bytes_per_token
    return {
        "experts_bytes": experts,
        "slots_bytes": slots,
        "dense_bytes": model.dense_bytes,
        "kv_bytes": session.kv_tokens * model.kv_bytes_per_token,
        "padding_bytes": shape.padding_tokens(session.kv_tokens) * model.kv_bytes_per_token,
        "activations_bytes": activations_bytes(model, shape, precisions(world)),
        "workspace_bytes": session.profile.gpu.workspace_bytes,
        "saving": 1 - (slots + rest) / (experts + rest),
    }


def precisions(world: World) -> TwoPrecisions:
    """How the budget of *world* was divided, and what its prefills made of the low part."""
    planner, cache = world.planner, world.planner.cache
    low_bytes, together = world.costs.low_bytes, planner.low_together
    return TwoPrecisions(cache.full_slots, cache.low_slots, low_bytes, together)


def _quality(planner: Planner, accesses: int) -> dict[str, float]:
    """How far an inexact policy departed: shares of accesses and of gate weight by service."""
    tally = planner.quality
    weight = tally["weight"] or 1.0
    shares = {f"{kind}_accesses": tally[kind] / accesses for kind in QUALITY}
    return shares | {f"{kind}_weight": tally[f"{kind}_weight"] / weight for kind in QUALITY}


def _schedule(session: TraceSession, world: World) -> dict[str, float] | None:
    """What a token scheduler did and cost; None without one."""
    if session.schedule is None:
        return None
    tally, steps = session.schedule.tally, session.schedule.tally.steps or 1
    times = world.scheduling
    return {
        "divisions": tally.divisions,
        "moved": tally.moved,
        "moved_bytes": tally.moved_kv_tokens * session.model.kv_bytes_per_token,
        "follow_s": times.kv_s,
        "divide_s": times.host_s,
        "waited_s": times.waited_s,
        "distinct_experts": tally.distinct / steps,
        "distinct_in_file_order": tally.distinct_file_order / steps,
    }


#: Ways in which an expert can be served that change the output.
QUALITY = ("low", "skip", "substitute")
