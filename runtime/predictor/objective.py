"""What a predictor is trained towards: binary cross-entropy over layers times experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from runtime.predictor.model import Inputs, Predictor
from runtime.predictor.spec import PredictorSpec


def hot_of(experts: Tensor, width: int) -> Tensor:
    """The experts [..., L, k] as 0 and 1, float32 [..., L, *width*]."""
    shape = (*experts.shape[:-1], width)
    return torch.zeros(shape, device=experts.device).scatter_(-1, experts.long(), 1.0)


def used_within(hot: Tensor, windows: Sequence[int]) -> Tensor:
    """Whether each expert is used in the next w tokens: 0 and 1, [B, N, windows, L, E].

    *hot* is [B, N, L, E]. Near the end fewer than w tokens are looked at: see :func:`whole`.
    """
    counts = hot.cumsum(dim=1)
    last = hot.shape[1] - 1
    at = torch.arange(hot.shape[1], device=hot.device)
    spans = [counts[:, (at + w).clamp(max=last)] - counts for w in windows]
    return (torch.stack(spans, dim=2) > 0.5).to(hot.dtype)


def whole(lengths: Tensor, positions: int, windows: Sequence[int]) -> Tensor:
    """Where all of the next w tokens are known: bool [B, positions, windows]."""
    at = torch.arange(positions, device=lengths.device)[:, None]
    ends = at + torch.tensor(windows, device=lengths.device)
    return ends < lengths[:, None, None]


def weighted(logits: Tensor, target: Tensor, positive: float) -> Tensor:
    """Cross-entropy of each logit where positives count *positive* times.

    Weighting moves the best logit up by log *positive*; the logit given is freed from that, so
    that its sigmoid stays a probability whatever the weight.
    """
    shifted = logits + math.log(positive)
    weight = torch.full((), positive, device=logits.device)
    return binary_cross_entropy_with_logits(shifted, target, reduction="none", pos_weight=weight)


def loss_of(
    model: Predictor,
    inputs: Inputs,
    experts: Tensor,
    lengths: Tensor,
    weights: tuple[float, float] = (1.0, 1.0),
) -> tuple[Tensor, Tensor]:
    """Cross-entropy per token, summed over its path: of the token itself, and of the windows.

    *weights* are that of a positive and that of the second loss, which is the mean over
    the windows.
    """
    spec: PredictorSpec = model.spec
    positive, share = weights
    hot = hot_of(experts, spec.experts)
    real = torch.arange(experts.shape[1], device=lengths.device) < lengths[:, None]
    now, again = model.heads(model.states(inputs)[real])
    first = weighted(now, hot[real], positive).sum(dim=(-1, -2)).mean()
    if not share:
        return first, torch.zeros_like(first)
    known = whole(lengths, experts.shape[1], spec.windows)[real]
    each = weighted(again, used_within(hot, spec.windows)[real], positive).sum(dim=(-1, -2))
    second = (each * known).sum() / known.sum().clamp(min=1)
    return first, share * second
