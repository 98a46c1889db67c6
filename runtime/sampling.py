"""Choosing the next token: greedy, or drawn with temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from traces.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; *temperature* 0 is greedy, *top_k* 0 and *top_p* 1 keep all."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature is {self.temperature}, expected 0 or more")
        if self.top_k < 0:
            raise InputError(f"top-k is {self.top_k}, expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top-p is {self.top_p}, expected more than 0 and at most 1")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}, expected 0 or more")


def _nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Drop the tail beyond probability *top_p*; the best token always stays."""
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return scores.masked_fill((before >= top_p).gather(-1, order.argsort(dim=-1)), float("-inf"))


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities float64 [B, V] from which tokens are drawn."""
    scores = logits.double() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if sampling.top_p < 1:
        scores = _nucleus(scores, sampling.top_p)
    return scores.softmax(dim=-1)


class Sampler:
    """Draws for the sequences *ids*, each from a random stream of its own.

    So a sequence's tokens do not depend on which others it shares a batch with, nor on
    where an interrupted capture was resumed. All random numbers lie on the device before
    the first step: drawing costs no exchange with the host.
    """

    def __init__(
        self, sampling: Sampling, ids: Sequence[int], steps: int, device: torch.device
    ) -> None:
        self.sampling = sampling
        streams = [np.random.default_rng([sampling.seed, i]).random(steps) for i in ids]
        self._draws = torch.as_tensor(np.stack(streams), device=device)

    def __call__(self, logits: Tensor, step: int) -> Tensor:
        """The next token int64 [B] for *logits* [B, V] at decode *step*."""
        return self._drawn(logits, self._draws[:, step : step + 1])

    def of(self, rows: Sequence[int], steps: Sequence[int], logits: Tensor) -> Tensor:
        """The next token int64 [B] of sequences *rows*, each at its own step, for *logits*."""
        return self._drawn(logits, self._draws[list(rows), list(steps)].unsqueeze(1))

    def _drawn(self, logits: Tensor, draws: Tensor) -> Tensor:
        if self.sampling.temperature == 0:
            return logits.argmax(dim=-1)
        sums = distribution(logits, self.sampling).cumsum(dim=-1)
        points = draws * sums[:, -1:]
        return torch.searchsorted(sums, points, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
