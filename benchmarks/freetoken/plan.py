"""What is measured: the model's shape, the cells, and the task of one process."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.side_by_side.plan import NARROW, Shape
from policies.base import Forecaster, Policy
from policies.registry import FORECASTERS, POLICIES
from traces.errors import InputError

#: Kinds of processes: one makes the checkpoint, the others measure.
CHECKPOINT, OURS, OFFLOAD, FUSED = "checkpoint", "ours", "freetoken", "freetoken-fused"
#: How a model routes: by weights as transformers initialises them, but for its embeddings, on
#: tokens drawn evenly; or as trained models route text, by the spreads of its shape, on tokens with
#: text's repetitions.
RANDOM, TEXT = "random", "text"
ROUTINGS = (RANDOM, TEXT)
#: The policy that FreeToken has, and the one that every row of ours is compared with.
LRU = "lru"
#: Exact policies whose best is told, with ``+`` before a forecaster other than ``ahead``.
POLICIES_TRIED = (
    LRU,
    "lfru",
    "fading",
    "fading:half_life=96",
    "predictive",
    "predictive:evict=frequency",
    "predictive:evict=frequency,horizon=1",
)
#: Steps of a batch, at least: the first half of them only fills the slots.
LEAST_STEPS = 128
#: Small enough for a CPU, and dimensions that FreeToken's kernels take.
TINY = replace(NARROW, layers=3, experts=16, top_k=4, moe_intermediate=128, vocab=256)


@dataclass(frozen=True)
class Cell:
    """One measurement: *steps* decode steps of *batch* sequences over *slots* slots.

    *policy* is one of ours, as ``--policy`` names it, and empty for FreeToken.
    """

    slots: int
    batch: int
    steps: int
    policy: str = ""


@dataclass(frozen=True)
class Task:
    """All that one process is told; *folder* is that of the checkpoint.

    *shape* has the spreads that *routing* asks for: :func:`routed`.
    """

    system: str
    folder: str
    shape: Shape
    device: str
    prompt: int
    seed: int
    hardware: str
    routing: str
    cells: tuple[Cell, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Task:
        """The task that :meth:`to_dict` wrote."""
        cells = tuple(Cell(**cell) for cell in values["cells"])
        return cls(**{**values, "shape": Shape(**values["shape"]), "cells": cells})


def routed(shape: Shape, routing: str) -> Shape:
    """*shape* with weights that route as *routing* says.

    Random embeddings are torch's own, of 1: with transformers' 0.02 layers soon drown the token,
    and hardly any expert changes from step to step.
    """
    if routing == TEXT:
        return shape
    return replace(shape, weight_std=0.02, gate_std=0.02, gate_spread=0.0, embed_std=1.0)


def steps_of(tokens: int, batch: int) -> int:
    """Decode steps in which a batch makes *tokens* tokens in all, but some at least."""
    return max(tokens // batch, min(tokens, LEAST_STEPS))


def share_of(text: str) -> float:
    """``25%`` as a fraction; else an :class:`InputError`."""
    number = re.fullmatch(r"(\d+(?:\.\d+)?)%", text.strip())
    if number is None or not 0 < float(number[1]) <= 100:
        raise InputError(f"--share {text}: expected a share of the experts, say 50%")
    return float(number[1]) / 100


def slots_of(share: float, shape: Shape, *, theirs: bool) -> int:
    """Slots that are *share* of all experts; *theirs* says whether FreeToken must take them.

    It wants one for each expert of a layer, we one for each that a token activates.
    """
    slots = round(share * shape.total)
    least = shape.experts if theirs else shape.top_k
    if slots < least:
        whose = "FreeToken" if theirs else "a token"
        raise InputError(
            f"--share {share:.4g}: {slots} slots of {shape.total}, expected the {least} or more "
            f"that {whose} needs"
        )
    return slots


def parse_policy(text: str) -> tuple[str, str | None]:
    """Policy and forecaster of ``predictive:horizon=4+markov``, both checked.

    One that changes the output, needs the future or learns beforehand is an
    :class:`InputError`.
    """
    name, plus, forecaster = text.partition("+")
    policy = POLICIES.build(name)
    if not policy.exact:
        raise InputError(f"--policy {text}: changes the output, expected an exact policy")
    _check(text, policy)
    if plus:
        if not policy.forecasts:
            raise InputError(f"--policy {text}: {policy.name} takes no forecaster")
        _check(text, FORECASTERS.build(forecaster))
    return name, forecaster or None


def _check(text: str, plugin: Policy | Forecaster) -> None:
    """Refuse what cannot run beside a model that has no trace."""
    if plugin.offline:
        raise InputError(f"--policy {text}: {plugin.name} needs the future")
    if {"training", "popularity"} & set(plugin.needs):
        raise InputError(f"--policy {text}: {plugin.name} learns from a trace, there is none")


def our_cells(
    slots: Sequence[int], batches: Sequence[int], tokens: int, policies: Sequence[str], total: int
) -> tuple[Cell, ...]:
    """Ours: every policy at every size; where all experts fit, LRU alone stands for all."""
    return tuple(
        Cell(count, batch, steps_of(tokens, batch), policy)
        for count in slots
        for batch in batches
        for policy in (policies if count < total else (LRU,))
    )


def their_cells(slots: Sequence[int], batches: Sequence[int], tokens: int) -> tuple[Cell, ...]:
    """FreeToken's, the most slots first: it can make its pool smaller, and has one policy."""
    return tuple(
        Cell(count, batch, steps_of(tokens, batch))
        for count in sorted(slots, reverse=True)
        for batch in batches
    )
