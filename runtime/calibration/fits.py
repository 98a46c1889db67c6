"""From samples to figures: arithmetic without a clock or a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

#: A larger copy is taken to be longer by at least this share: tables must rise.
LEAST_RISE = 1e-3


class Line(NamedTuple):
    """``alpha + beta * x``; *residual* is the root mean square of what it misses."""

    alpha: float
    beta: float
    residual: float


def line(xs: Sequence[float], ys: Sequence[float], weights: Sequence[float] | None = None) -> Line:
    """The least-squares line through (xs, ys), neither part below 0.

    Where a part would be negative it is 0 and the other is fitted alone. One distinct x gives
    a constant.
    """
    x, y = np.asarray(xs, dtype=float), np.asarray(ys, dtype=float)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=float)
    mean_x, mean_y = np.average(x, weights=w), np.average(y, weights=w)
    spread = np.average((x - mean_x) ** 2, weights=w)
    beta = 0.0
    if spread > 0:
        beta = max(float(np.average((x - mean_x) * (y - mean_y), weights=w) / spread), 0.0)
    alpha = float(mean_y - beta * mean_x)
    if alpha < 0:
        alpha, beta = 0.0, float(np.average(x * y, weights=w) / np.average(x * x, weights=w))
    missed = y - (alpha + beta * x)
    return Line(alpha, beta, math.sqrt(float(np.average(missed**2, weights=w))))


def rising(seconds: Sequence[float]) -> list[float]:
    """*seconds* as near as can be (least squares) that do rise, each by :data:`LEAST_RISE`.

    Neighbours in the wrong order are pooled (pool adjacent violators).
    """
    pools: list[tuple[float, int]] = []
    for value in seconds:
        total, count = float(value), 1
        while pools and pools[-1][0] / pools[-1][1] >= total / count:
            more, members = pools.pop()
            total, count = total + more, count + members
        pools.append((total, count))
    level = [total / count for total, count in pools for _ in range(count)]
    for i in range(1, len(level)):
        level[i] = max(level[i], level[i - 1] * (1 + LEAST_RISE))
    return level


def queued_within(queued: Sequence[float], isolated: Sequence[float]) -> list[float]:
    """*queued* seconds, none above the *isolated* ones of the same size: noise could say so."""
    return [min(pair) for pair in zip(queued, isolated, strict=True)]


class Thinking(NamedTuple):
    """Seconds of policy and planner: per event, per distinct expert of it, and per move."""

    event_s: float
    access_s: float
    move_s: float
    #: Root mean square that the fit misses of the medians, and that a constant would.
    residual_s: float
    constant_residual_s: float


def thinking(accesses: Sequence[int], moves: Sequence[int], seconds: Sequence[float]) -> Thinking:
    """What an event costs, each of its experts and each of its moves, from many timed events.

    The median of all events with as many experts and moves is one point: a pause of the host
    must not count. Points weigh as the root of their events; no part is below 0.
    """
    groups: dict[tuple[int, int], list[float]] = {}
    for key, value in zip(zip(accesses, moves, strict=True), seconds, strict=True):
        groups.setdefault(key, []).append(value)
    points = np.array([float(np.median(values)) for values in groups.values()])
    weights = np.sqrt([float(len(values)) for values in groups.values()])
    columns = np.array([(1.0, *key) for key in groups])
    parts, residual = _nonnegative(columns, points, weights)
    _, constant = _nonnegative(columns[:, :1], points, weights)
    event, access, move = parts
    return Thinking(event, access, move, residual, constant)


def _nonnegative(columns: Floats, values: Floats, weights: Floats) -> tuple[list[float], float]:
    """Least squares with no coefficient below 0, and the root mean square that is missed."""
    root = np.sqrt(weights)
    found = nonnegative(columns * root[:, None], values * root)
    missed = float(np.average((values - columns @ found) ** 2, weights=weights))
    return found.tolist(), math.sqrt(missed)


def nonnegative(columns: Floats, values: Floats) -> Floats:
    """The x of least squares of ``columns @ x - values`` with no element below 0.

    The active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter
    23), on columns scaled to unit length.
    """
    lengths = np.linalg.norm(columns, axis=0)
    lengths[lengths == 0] = 1.0
    scaled = columns / lengths
    square, right = scaled.T @ scaled, scaled.T @ values
    x = np.zeros(len(right))
    free = np.zeros(len(right), dtype=bool)
    close = 1e-12 * max(float(np.abs(right).max(initial=0.0)), 1e-300)
    for _ in range(3 * len(right)):
        pull = np.where(free, -np.inf, right - square @ x)
        if not len(pull) or pull.max() <= close:
            break
        free[int(pull.argmax())] = True
        while True:
            wanted = np.zeros(len(right))
            wanted[free] = np.linalg.lstsq(square[np.ix_(free, free)], right[free], rcond=None)[0]
            below = free & (wanted <= 0)
            if not below.any():
                break
            # As far towards it as nothing leaves the allowed region.
            share = float((x[below] / np.maximum(x[below] - wanted[below], 1e-300)).min())
            x = x + share * (wanted - x)
            free &= x > 1e-15
            x[~free] = 0.0
        x = wanted
    result: Floats = x / lengths
    return result


class ExpertTime(NamedTuple):
    """One timed expert: bytes of its weights, operations and bytes of activations."""

    read_bytes: float
    flops: float
    activation_bytes: float
    seconds: float


def activation_passes(
    rows: Sequence[ExpertTime], read_rate: float, flops_per_s: float, memory_rate: float
) -> float:
    """How often an expert's activations cross memory; *activation_bytes* are of one pass.

    A profile takes the time of an expert to be the root of squares of reading and of
    computing plus activations; what of the second is not operations is activations.
    Least squares over *rows*, 0 if operations alone explain them.
    """
    above = below = 0.0
    for row in rows:
        read_s = row.read_bytes / read_rate
        computing_s = math.sqrt(max(row.seconds**2 - read_s**2, 0.0))
        left = computing_s - row.flops / flops_per_s
        pass_s = row.activation_bytes / memory_rate
        # Relative to the row's time, so that long rows do not decide alone.
        above += left * pass_s / row.seconds**2
        below += pass_s**2 / row.seconds**2
    return max(above / below, 0.0) if below else 0.0


def read_efficiency(sizes_bytes: Sequence[float], seconds: Sequence[float], rate: float) -> Line:
    """The line through times of reading; its ``beta`` becomes the share of *rate* reached.

    *rate* is that of a copy, which reads and writes: reading alone may be faster.
    """
    found = line(sizes_bytes, seconds)
    return found._replace(beta=1 / (found.beta * rate) if found.beta > 0 else 1.0)


def significant(value: float, digits: int = 4) -> float:
    """*value* to *digits* significant digits: more would pretend."""
    return float(f"{value:.{digits - 1}e}")
