# mypy: ignore-errors
# ruff: noqa: PLR0913
"""What the decode kernels do with sums: round them, add biases, activate, gate."""

import triton
import triton.language as tl


@triton.jit
def rounded(x, DTYPE: tl.constexpr, ROUND: tl.constexpr):
    """Float32 *x* as DTYPE would hold it, if ROUND."""
    if ROUND:
        return x.to(DTYPE).to(tl.float32)
    else:
        return x


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def activate(x, ACT: tl.constexpr):
    """An activation of :data:`runtime.kernels.gating.ACTIVATIONS` on float32."""
    if ACT == "silu":
        # As torch computes it: the product with a sigmoid rounds once more.
        return x / (1 + tl.exp(-x))
    elif ACT == "gelu":
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        return 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACT == "relu":
        return tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACT == "relu2")
        return tl.maximum(x, 0.0) * tl.maximum(x, 0.0)


@triton.jit
def gated(
    gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    DTYPE: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """What goes into the second projection, from a gate and an up value.

    With ROUND every step but the last, which storing rounds, is one that transformers rounds.
    """
    if ACT == "clamped_swiglu":
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
        share = rounded(tl.sigmoid(rounded(gate * ALPHA, DTYPE, ROUND)), DTYPE, ROUND)
        return rounded(up + 1, DTYPE, ROUND) * rounded(gate * share, DTYPE, ROUND)
    else:
        return rounded(activate(gate, ACT), DTYPE, ROUND) * up


@triton.jit
def halves(y, INTERLEAVED: tl.constexpr, BLOCK_N: tl.constexpr, M: tl.constexpr):
    """Gates and ups [BLOCK_N, M] of *y* [2 * BLOCK_N, M], alternating or one after the other."""
    if INTERLEAVED:
        return tl.split(tl.permute(tl.reshape(y, [BLOCK_N, 2, M]), [0, 2, 1]))
    else:
        return tl.split(tl.permute(tl.reshape(y, [2, BLOCK_N, M]), [1, 2, 0]))
