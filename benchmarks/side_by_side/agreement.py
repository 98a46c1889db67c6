"""Whether two systems computed the same: their logits over the same forced tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]

#: A system agrees if its error is at most this many times the yardstick's. In bfloat16 a token
#: may choose another expert where two gates are level, so that errors scatter from run to run.
FACTOR = 2.0
#: An error that is nothing but rounding in float32 over a few layers.
ROUNDING = 1e-5


def relative_error(logits: Logits, exact: Logits) -> float:
    """Root of the summed squares of the difference over that of *exact*; NaN if any is NaN."""
    rows = exact[: len(logits)].astype(np.float64)
    return float(np.linalg.norm(logits.astype(np.float64) - rows) / np.linalg.norm(rows))


def agreement(logits: Logits, exact: Logits | None, yardstick: Logits | None) -> dict[str, Any]:
    """Compare *logits* [1 + decoded, vocabulary] with float32 and with transformers' own.

    ``error`` and ``yardstick_error`` are relative errors against *exact*;
    ``max_difference`` and ``same_choice``, the share of steps where a greedy choice would be the
    same token, compare with *yardstick*. ``agrees`` is None where either was not run.
    """
    found: dict[str, Any] = dict.fromkeys(
        ("error", "yardstick_error", "max_difference", "same_choice", "agrees")
    )
    if exact is not None:
        found["error"] = relative_error(logits, exact)
    if yardstick is not None:
        other = yardstick[: len(logits)]
        found["max_difference"] = float(np.abs(logits - other).max())
        found["same_choice"] = float((logits.argmax(-1) == other.argmax(-1)).mean())
    if exact is not None and yardstick is not None:
        limit = relative_error(yardstick[: len(logits)], exact)
        found["yardstick_error"] = limit
        found["agrees"] = bool(found["error"] <= FACTOR * limit + ROUNDING)
    return found
