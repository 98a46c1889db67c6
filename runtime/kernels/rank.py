"""The best experts by a gate's scores, without a sort."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from runtime.kernels.cuts import power_of_two

#: Tokens from which on a matrix product and a sort are worth their launches.
MANY_TOKENS = 64

#: Experts and inputs that a program of the kernel of scores takes at a time.
ROWS, BLOCK = 4, 512

_TRITON = importlib.util.find_spec("triton") is not None


def best_experts(hidden: Tensor, weight: Tensor, bias: Tensor | None, width: int) -> Tensor:
    """The *width* experts int64 [T, width] with the highest scores, falling.

    Scores are *hidden* [T, H] times *weight* [E, H], plus *bias* [E] if there is one. On a GPU
    few tokens take two launches, which a CUDA graph may capture once they have run.
    """
    tokens, experts = len(hidden), len(weight)
    if hidden.device.type != "cuda" or tokens > MANY_TOKENS or not _TRITON:
        return F.linear(hidden, weight, bias).topk(width, dim=-1).indices
    from runtime.kernels import triton_rank

    scores = torch.empty(tokens, experts, device=hidden.device)
    best = torch.empty(tokens, width, dtype=torch.int64, device=hidden.device)
    kernel: Any = triton_rank.scores_kernel
    kernel[(-(-experts // ROWS), tokens)](
        hidden.contiguous(), weight, weight if bias is None else bias, scores, weight.shape[1],
        experts, bias is not None, ROWS, BLOCK,
    )  # fmt: skip
    kernel = triton_rank.rank_kernel
    kernel[(tokens,)](scores, best, experts, power_of_two(experts), width, num_warps=1)
    return best
