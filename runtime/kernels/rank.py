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

#: Where what is no number comes among the bits of float32, as whole numbers that rise with them.
FIRST, LAST = 0x7FFFFFFF, -0x80000000

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
    kernel = triton_rank.best_kernel
    padded = power_of_two(experts)
    kernel[(tokens,)](scores, scores, best, experts, padded, width, False, LAST, num_warps=1)
    return best


def top_values(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The *width* largest of each of *rows* [T, E], falling, and where they are, int64: [T, width].

    What ``torch.topk`` gives, of equals the first; a value that is no number is the largest. One
    launch, which a CUDA graph may capture once it has run.
    """
    from runtime.kernels import triton_rank

    tokens, experts = rows.shape
    values = rows.new_empty(tokens, width)
    best = torch.empty(tokens, width, dtype=torch.int64, device=rows.device)
    kernel: Any = triton_rank.best_kernel
    padded = power_of_two(experts)
    kernel[(tokens,)](rows, values, best, experts, padded, width, True, FIRST, num_warps=1)
    return values, best
