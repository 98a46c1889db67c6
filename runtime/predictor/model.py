"""The predictor itself: one embedding, an encoder, a decoder and two heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from runtime.predictor.blocks import MASKED, Stack
from runtime.predictor.spec import PredictorSpec


class Inputs(NamedTuple):
    """Sequences of token ids, padded to the right.

    *prompt* [B, P] begins with the start id and has *prompt_lengths* [B] true columns; *decoded*
    [B, D] are what the decoder reads; *place* [B, N] says for each position of a sequence which
    column of [prompt, decoded] holds its state (0 where it has ended).
    """

    prompt: Tensor
    prompt_lengths: Tensor
    decoded: Tensor
    place: Tensor


class Predictor(nn.Module):
    """Token ids to logits: the experts of each token, and those of the tokens after it.

    The embedding is shared by encoder and decoder. A prompt's token takes its scores from the
    encoder, a decoded one from the decoder; both through the same heads.
    """

    def __init__(self, spec: PredictorSpec, dropout: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocabulary + 1, spec.d_model)
        self.encoder = Stack(spec, dropout, causal=False)
        self.decoder = Stack(spec, dropout, causal=True)
        self.now = nn.Linear(spec.d_model, spec.paths)
        self.again = nn.Linear(spec.d_model, len(spec.windows) * spec.paths)
        for head in (self.now, self.again):
            nn.init.normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def encode(self, prompt: Tensor, lengths: Tensor) -> Tensor:
        """States [B, P, d_model] of *prompt* [B, P], of which *lengths* [B] columns count."""
        at = torch.arange(prompt.shape[1], device=prompt.device)
        bias = self.encoder.positions(at, at) + self.unseen(lengths, len(at))
        states: Tensor = self.encoder(self.embedding(prompt), bias)
        return states

    def decode(self, decoded: Tensor, prompt_states: Tensor, lengths: Tensor) -> Tensor:
        """States [B, D, d_model] of *decoded* [B, D], each blind to what comes after it."""
        at = torch.arange(decoded.shape[1], device=decoded.device)
        bias = self.decoder.positions(at, at)
        memory = self.decoder.memory(prompt_states)
        unseen = self.unseen(lengths, prompt_states.shape[1])
        states: Tensor = self.decoder(self.embedding(decoded), bias, memory, unseen)
        return states

    @staticmethod
    def unseen(lengths: Tensor, columns: int) -> Tensor:
        """The bias [B, 1, 1, columns] that hides all but the first *lengths* [B] columns."""
        at = torch.arange(columns, device=lengths.device)
        hidden = (at >= lengths[:, None])[:, None, None]
        return torch.zeros_like(hidden, dtype=torch.float32).masked_fill(hidden, MASKED)

    def states(self, inputs: Inputs) -> Tensor:
        """The state [B, N, d_model] behind every position of every sequence."""
        prompt = self.encode(inputs.prompt, inputs.prompt_lengths)
        decoded = self.decode(inputs.decoded, prompt, inputs.prompt_lengths)
        columns = torch.cat([prompt, decoded], dim=1)
        return columns.gather(1, inputs.place[..., None].expand(-1, -1, columns.shape[2]))

    def heads(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [..., L, E] of the token itself and [..., windows, L, E] of those after it."""
        spec = self.spec
        now = self.now(states).unflatten(-1, (spec.layers, spec.experts))
        shape = (len(spec.windows), spec.layers, spec.experts)
        return now, self.again(states).unflatten(-1, shape)

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Logits of every position, [B, N, L, E] and [B, N, windows, L, E]."""
        return self.heads(self.states(inputs))
