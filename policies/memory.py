"""GPU memory of a run, predicted: what the world holds beside slots, dense part and cache.

The simulated world has no memory to measure, so what the runtime takes for a prompt is worked
out from the model's dimensions. The sums follow the tensors that are alive at once where the
runtime's fused experts hold most; attention, which holds less, needs no term.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from traces.model import QUANT_GROUP, ModelSpec
from traces.trace import TokenSequence

#: Low-precision experts are raised to full precision together up to this size, at least one.
RAISED_BYTES = 2**24

#: Weights that are made or raised at a time on the way, whole groups; bounds the float32 copies.
PIECE = QUANT_GROUP * 2**17

#: Device bytes for each weight of a piece while it is raised: its step int8, its value float32.
PIECE_WEIGHT_BYTES = 1 + 4

#: For each token and expert: their order as int64; slots, keys and experts as int32; a mask.
_PAIR_INDEX_BYTES = 8 + 3 * 4 + 1

#: Bytes of a float32: weighted rows are summed up in it.
_FLOAT_BYTES = 4

#: What a run's GPU memory is made of: keys of a result's ``memory``.
PREDICTED = (
    "slots_bytes",
    "dense_bytes",
    "kv_bytes",
    "padding_bytes",
    "activations_bytes",
    "workspace_bytes",
)


def predicted_bytes(memory: Mapping[str, float]) -> int:
    """The GPU memory that a run with a result's *memory* is expected to need at its peak."""
    return int(sum(memory[name] for name in PREDICTED))


@dataclass(frozen=True)
class Shape:
    """How large the passes of a run become.

    *prompt_tokens* is the longest prefill step; decode steps run up to *sequences* over a cache
    that has *cache_tokens* for each, however short some of them are.
    """

    prompt_tokens: int
    sequences: int
    cache_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens of the largest pass."""
        return max(self.prompt_tokens, self.sequences)

    def padding_tokens(self, kv_tokens: int) -> int:
        """Tokens that the cache has room for beyond the *kv_tokens* that are kept."""
        return max(self.sequences * self.cache_tokens - kv_tokens, 0)


def shape_of(batches: Iterable[Sequence[TokenSequence]]) -> Shape:
    """The shape of a run of *batches*, whose prompts are prefilled in one row."""
    prompt = sequences = cache = 0
    for members in batches:
        prompt = max(prompt, sum(m.prefill for m in members))
        sequences = max(sequences, sum(1 for m in members if len(m) > m.prefill))
        cache = max(cache, max(int(m.positions[-1]) + 1 for m in members))
    return Shape(prompt, sequences, cache)


@dataclass(frozen=True)
class TwoPrecisions:
    """Slots of a run whose budget is divided; a low-precision copy has *low_bytes*.

    Its prefills computed up to *together* of them at once, as its planner counted.
    """

    full_slots: int
    low_slots: int
    low_bytes: int
    together: int


def activations_bytes(model: ModelSpec, shape: Shape, low: TwoPrecisions | None = None) -> int:
    """Device bytes that the largest pass of *shape* holds at its peak, in one layer's experts.

    With H hidden, I intermediate, b bytes per weight and P = tokens * top_k rows, one for each
    token and expert:

    - all the while: inputs and outputs sorted by expert, 2 P H b, and their indices; the
      residual, the experts' input, and their sum twice in float32, tokens * H (2 b + 8);
    - between the projections: :func:`_gating_row_bytes` for each row;
    - after them: the rows in order, and weighed in float32 before and after the mask,
      P H (b + 8).

    The last two are never there together. With low slots (*low*) the rows go through the
    projections group by group; the full slots' group is taken as their share of all experts.
    Of the low copies that a prefill computes together :func:`raised_at_once` are brought to
    full precision for each group: none where every expert matters to some token.
    """
    tokens = shape.tokens
    hidden, item = model.hidden, model.param_bytes
    rows = tokens * model.top_k
    always = rows * (2 * hidden * item + _PAIR_INDEX_BYTES)
    always += tokens * hidden * (2 * item + 2 * _FLOAT_BYTES)
    weighing = rows * hidden * (item + 2 * _FLOAT_BYTES)
    gating = rows * _gating_row_bytes(model)
    if low is None or not low.low_slots:
        return always + max(gating, weighing)
    raised = raised_at_once(model.expert_bytes, low.together)
    copies = raised * model.expert_bytes
    pieces = PIECE_WEIGHT_BYTES * min(raised * model.expert_params, PIECE)
    share = min(low.full_slots / model.total_experts, 1.0)
    peaks = (
        weighing,
        int(gating * share),
        copies + raised * low.low_bytes + pieces,
        copies + gating * raised // model.experts,
    )
    return always + max(peaks)


def raised_at_once(expert_bytes: int, most: int) -> int:
    """How many of *most* low-precision experts are raised to *expert_bytes* each at a time."""
    return min(max(RAISED_BYTES // expert_bytes, 1), most)


def _gating_row_bytes(model: ModelSpec) -> int:
    """Bytes for each row between the projections, where they are most.

    The first projection, the activated gate and the product, all in the model's dtype, to which
    the runtime rounds them on a GPU. The clamped form, known by the biases that only its models
    have, holds five such vectors: gate, up, their product, the scaled gate, its sigmoid.
    """
    inner = model.intermediate
    matrices = model.expert_params // (model.hidden * inner)
    gated = matrices >= 3
    width = 2 * inner if gated else inner
    biased = model.expert_params > matrices * model.hidden * inner
    vectors = 5 if gated and biased else 2
    return (width + vectors * inner) * model.param_bytes
