"""How much of a long sequence a predictor reads: what it keeps must not grow without end."""

from __future__ import annotations

import dataclasses

from runtime.predictor.spec import PredictorSpec
from traces.trace import TokenSequence

#: The last tokens of a prompt that are read. Attention over them takes memory by their square.
PROMPT_TOKENS = 1024

#: Tokens that the decoder reads at most, the prompt's tail included.
DECODED_TOKENS = 4096


def read_part(prompt: int, decoded: int, spec: PredictorSpec) -> slice:
    """The positions of a sequence, of *prompt* and *decoded* tokens, that are read.

    Of a longer prompt its last tokens, and decoded tokens until the decoder is full. What lies
    outside is not forecast.
    """
    first = max(0, prompt - PROMPT_TOKENS)
    return slice(first, prompt + min(decoded, DECODED_TOKENS - min(spec.tail, prompt)))


def read_of(sequence: TokenSequence, spec: PredictorSpec) -> tuple[TokenSequence, slice]:
    """The part of *sequence* that is read, and where it lies in it."""
    part = read_part(sequence.prefill, len(sequence) - sequence.prefill, spec)
    if part.start == 0 and part.stop == len(sequence):
        return sequence, part
    tokens = sequence.tokens
    return dataclasses.replace(
        sequence,
        experts=sequence.experts[part],
        positions=sequence.positions[part],
        prefill=sequence.prefill - part.start,
        tokens=None if tokens is None else tokens[part],
        weights=None,
        ahead=(),
    ), part
