"""Sequences that have taken the same experts so far decode together, to their end."""

from __future__ import annotations

from dataclasses import dataclass

from policies.registry import parameter, register_scheduler
from policies.schedulers.expertflow import ExpertFlow


@register_scheduler("prompt-routes")
@dataclass
class PromptRoutes(ExpertFlow):
    """Groups sequences by the experts of their prompts, and lets each group run to its end.

    ExpertFlow's way of dividing, once for each unit and from all that a sequence has taken
    instead of one token's path. What the cache holds for one step of a group is then of use to
    its next; groups that take turns push each other's experts out.
    """

    unit: int = parameter(4, "batches that decode together", low=1, high=8)
    every: int = parameter(1 << 20, "rounds of decode steps between divisions", low=1, high=1 << 20)
    in_a_row: bool = parameter(True, "a group takes its steps between divisions in a row")
    paths: str = parameter("history", "whose paths, as for expertflow")
