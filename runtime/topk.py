"""The best few of a gate's scores in one launch, where a router asks ``torch.topk`` for them.

torch finds them in one kernel and sorts them in another, together 8 us of the 100 that a layer of
a decode step takes; one program of our own for each token takes 2. Inside :func:`quick_topk` calls
that suit become the operator ``expertflow::topk``, also in code that is traced.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from runtime.kernels.rank import top_values

#: Rows, numbers in a row, and best of them, at most: beyond, torch's way is the quicker one.
MOST_ROWS, MOST_NUMBERS, MOST_BEST = 512, 1024, 32

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_TRITON = importlib.util.find_spec("triton") is not None


class Best(NamedTuple):
    """What ``torch.topk`` returns."""

    values: Tensor
    indices: Tensor


@torch.library.custom_op("expertflow::topk", mutates_args=())
def _topk(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if rows.device.type == "cuda":
        return top_values(rows.contiguous(), k)
    found: Any = rows.topk(k, dim=1)
    return found.values, found.indices


@_topk.register_fake
def _shapes(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (len(rows), k)
    return rows.new_empty(shape), rows.new_empty(shape, dtype=torch.int64)


#: What is asked, also by code that is traced.
_operator: Any = torch.ops.expertflow.topk


def with_quick_topk(forward: Callable[..., Any]) -> Callable[..., Any]:
    """*forward*, its calls of ``torch.topk`` made quick."""

    def quick(**kwargs: Any) -> Any:
        with QuickTopK():
            return forward(**kwargs)

    return quick


class QuickTopK(TorchFunctionMode):
    """Inside, ``torch.topk`` of few short rows on *device* is one launch of our own."""

    def __init__(self, device: str = "cuda") -> None:
        super().__init__()
        self._device = device if _TRITON or device != "cuda" else ""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.topk or function is Tensor.topk:
            found = self._best(*args, **kwargs)
            if found is not None:
                return found
        return function(*args, **kwargs)

    def _best(
        self,
        input: Tensor,
        k: int,
        dim: int = -1,
        largest: bool = True,
        sorted: bool = True,
        out: Any = None,
    ) -> Best | None:
        """The answer, or None where torch is to give it. (*sorted* or not, it is.)"""
        numbers = input.shape[-1] if input.dim() else 0
        suits = (
            input.device.type == self._device
            and input.dtype in DTYPES
            and largest
            and out is None
            and input.dim() >= 1
            and dim in (-1, input.dim() - 1)
            and 0 < k <= min(numbers, MOST_BEST)
            and numbers <= MOST_NUMBERS
            and 0 < input.numel() <= MOST_ROWS * numbers
        )
        if not suits:
            return None
        values, indices = _operator(input.reshape(-1, numbers), k)
        shape = (*input.shape[:-1], k)
        return Best(values.view(shape), indices.view(shape))
