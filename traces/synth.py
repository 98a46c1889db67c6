"""Synthetic traces whose settings :mod:`traces.statistics` measures back.

Every token and layer has a field of Gaussian noise, one value per expert; the k experts with
the highest *popularity score + noise* are taken. The noise correlates from token to token and
from layer to layer, each by its own amount, so that repetition and correlation can be set
apart from one another. Layers number their experts by random permutations: the partner of an
expert is the one of the next layer that shares its noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.errors import InputError
from traces.gates import Gate, Scores, best, skew_of, zipf_exponent, zipf_shares
from traces.trace import TokenSequence

Ints = npt.NDArray[np.integer[Any]]

#: Noise values held at once while a long sequence is drawn.
CHUNK_VALUES = 2**22


@dataclass(frozen=True)
class SynthSettings:
    """What a synthetic trace should be like; all but sizes are measured back.

    - *skew*: (c - k/E) / (1 - k/E), c the share of a token's experts that an unrelated token
      takes too: 0 where all experts are wanted alike, 1 for always the same. Popularity
      follows the Zipf law over a layer's experts that has this skew.
    - *repetition*: (o - c) / (1 - c), o the share of a token's experts that the previous
      token of its sequence took in the same layer, c the share that an unrelated token of
      equal popularity takes.
    - *correlation*: the same from layer to layer: o is the share of a token's experts whose
      partner in the next layer it takes too.
    - *domains*: sequences belong to one domain in turn; each has its own random assignment
      of popularity ranks to experts. The other settings hold within a domain.
    - *token_information*: share of tokens whose id names their first expert of layer 0, the
      others name one at random; ids run from 0 to experts - 1. None: no token ids.
    - *ahead*: for each depth 1 to 3, the share of a later layer's experts among the best k of
      its prediction (recall at k). Each prediction lists *ahead_width* experts, default k.

    *prompt* and *decode* are the least and most tokens of a sequence in each phase.
    """

    layers: int = 24
    experts: int = 32
    top_k: int = 4
    sequences: int = 64
    prompt: tuple[int, int] = (64, 64)
    decode: tuple[int, int] = (192, 192)
    skew: float = 0.1
    repetition: float = 0.3
    correlation: float = 0.3
    domains: int = 1
    token_information: float | None = None
    ahead: tuple[float, ...] = ()
    ahead_width: int | None = None
    weights: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "experts", "top_k", "sequences", "domains"):
            _within(name, getattr(self, name), 1, 32767)
        _within("top_k", self.top_k, 1, self.experts)
        _within("skew", self.skew, 0, 1)
        for name in ("repetition", "correlation"):
            _within(name, getattr(self, name), 0, 0.99)
        if self.token_information is not None:
            _within("token_information", self.token_information, 0, 1)
        for accuracy in self.ahead:
            _within("ahead", accuracy, 0, 1)
        _within("the number of ahead depths", len(self.ahead), 0, 3)
        _within("ahead_width", self.width, self.top_k, self.experts)
        _within("seed", self.seed, 0, 2**63)
        for name in ("prompt", "decode"):
            low, high = getattr(self, name)
            _within(name, low, 0, high)
        most = self.prompt[0] + self.decode[1]
        _within("least prompt + most decode", most, 1, 2**31)

    @property
    def width(self) -> int:
        """Experts listed in one prediction of a later layer."""
        return self.top_k if self.ahead_width is None else self.ahead_width

    def notes(self) -> dict[str, Any]:
        """What a trace file should keep: the settings, and the domain of each sequence."""
        domains = [f"domain-{i % self.domains}" for i in range(self.sequences)]
        return {"synthetic": dataclasses.asdict(self), "domains": domains}


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InputError(f"synthetic trace: {name} is {value:g}, expected {low:g} to {high:g}")


def synthesise(settings: SynthSettings) -> Iterator[TokenSequence]:
    """Draw the sequences of *settings* one by one; the same settings give the same bytes.

    Raises :class:`InputError` at once when the settings contradict each other.
    """
    return _Generator(settings).sequences()


class _Generator:
    """Everything that the sequences of one trace share."""

    def __init__(self, settings: SynthSettings) -> None:
        self.settings = settings
        shares = _popularity(settings)
        self.gate = Gate(shares, settings.top_k)
        self.along_tokens = self._noise_for("repetition", settings.repetition)
        self.along_layers = self._noise_for("correlation", settings.correlation)
        self.ahead = [self._ahead_noise(accuracy) for accuracy in settings.ahead]
        rng = np.random.default_rng([settings.seed, 0])
        width, layers = settings.experts, settings.layers
        self.ids = np.stack([rng.permutation(width) for _ in range(layers)]).astype(np.int16)
        self.ranks = np.stack([rng.permutation(width) for _ in range(settings.domains)])

    def _noise_for(self, name: str, excess: float) -> float:
        if not excess:
            return 0.0
        if self.settings.top_k == self.settings.experts:
            raise InputError(
                f"synthetic trace: {name} is {excess:g}, expected 0: every token takes all experts"
            )
        chance = self.gate.chance
        return self.gate.correlation_for(chance + excess * (1 - chance))

    def _ahead_noise(self, accuracy: float) -> float:
        if accuracy < self.gate.chance - 0.005:
            raise InputError(
                f"synthetic trace: ahead accuracy is {accuracy:g}, "
                f"expected at least chance = {self.gate.chance:.3f}"
            )
        return 1.0 if accuracy == 1 else self.gate.correlation_for(accuracy)

    def sequences(self) -> Iterator[TokenSequence]:
        for index in range(self.settings.sequences):
            yield self._sequence(index, np.random.default_rng([self.settings.seed, 1, index]))

    def _sequence(self, index: int, rng: np.random.Generator) -> TokenSequence:
        settings = self.settings
        prompt, decode = (int(rng.integers(low, high + 1)) for low, high in self._lengths())
        ranks = self.ranks[index % settings.domains]
        step = max(CHUNK_VALUES // (settings.layers * settings.experts), 1)
        last: Scores | None = None
        parts: list[dict[str, Any]] = []
        for start in range(0, prompt + decode, step):
            noise = self._noise(rng, min(step, prompt + decode - start), last)
            last = noise[-1].copy()
            noise += self.gate.scores[ranks]
            parts.append(self._choose(rng, noise, ranks))
        arrays: dict[str, Any] = {
            name: np.concatenate([part[name] for part in parts]) for name in parts[0]
        }
        return TokenSequence(
            id=index,
            experts=arrays["experts"],
            positions=np.arange(prompt + decode, dtype=np.int32),
            prefill=prompt,
            tokens=arrays.get("tokens"),
            weights=arrays.get("weights"),
            ahead=tuple(arrays[f"ahead_{depth}"] for depth, _ in enumerate(self.ahead, start=1)),
        )

    def _lengths(self) -> tuple[tuple[int, int], tuple[int, int]]:
        low, high = self.settings.decode
        # A sequence needs a token: where both phases may be empty, the second is not.
        return self.settings.prompt, (max(low, 0 if self.settings.prompt[0] else 1), high)

    def _noise(self, rng: np.random.Generator, count: int, last: Scores | None) -> Scores:
        """Standard normal [count, layers, experts], correlated along tokens and layers."""
        settings = self.settings
        noise = rng.standard_normal((count, settings.layers, settings.experts), dtype=np.float32)
        _correlate(np.moveaxis(noise, 1, 0), self.along_layers)
        if last is None:
            _correlate(noise, self.along_tokens)
        else:
            _correlate(noise, self.along_tokens, last)
        return noise

    def _choose(self, rng: np.random.Generator, scores: Scores, ranks: Ints) -> dict[str, Any]:
        """The arrays of the tokens whose *scores* are [tokens, layers, experts]."""
        settings = self.settings
        chosen, top = best(scores, settings.top_k)
        arrays: dict[str, Any] = {"experts": self._named(chosen, 0)}
        if settings.weights:
            power = np.exp(top - top[..., :1])
            arrays["weights"] = (power / power.sum(axis=-1, keepdims=True)).astype(np.float16)
        if settings.token_information is not None:
            arrays["tokens"] = self._tokens(rng, chosen[:, 0, 0], ranks)
        for depth, correlation in enumerate(self.ahead, start=1):
            seen = np.full((*scores.shape[:2], settings.width), -1, np.int16)
            if depth < settings.layers:
                clean = scores[:, depth:] - self.gate.scores[ranks]
                blur = rng.standard_normal(clean.shape, dtype=np.float32)
                guess = np.float32(correlation) * clean
                guess += np.float32(math.sqrt(1 - correlation**2)) * blur
                guess += self.gate.scores[ranks]
                seen[:, :-depth] = self._named(best(guess, settings.width)[0], depth)
            arrays[f"ahead_{depth}"] = seen
        return arrays

    def _named(self, chosen: npt.NDArray[np.intp], first_layer: int) -> Ints:
        """The ids that the layers from *first_layer* give to the *chosen* fields."""
        layers = np.arange(first_layer, first_layer + chosen.shape[1])
        named: Ints = self.ids[layers[None, :, None], chosen]
        return named

    def _tokens(self, rng: np.random.Generator, first: npt.NDArray[np.intp], ranks: Ints) -> Ints:
        pool = self.gate.first_choices
        drawn = np.argsort(ranks)[pool[rng.integers(0, len(pool), len(first))]]
        told = rng.random(len(first)) < (self.settings.token_information or 0)
        named: Ints = self.ids[0][np.where(told, first, drawn)].astype(np.int32)
        return named


def _popularity(settings: SynthSettings) -> npt.NDArray[np.float64]:
    """The shares of a Zipf law with the wanted skew, most popular first."""
    experts, top_k = settings.experts, settings.top_k
    exponent = zipf_exponent(experts, top_k, settings.skew) if settings.skew else 0.0
    shares = zipf_shares(experts, top_k, exponent)
    reached = skew_of(shares, top_k)
    if abs(reached - settings.skew) > 0.005:
        raise InputError(
            f"synthetic trace: skew is {settings.skew:g}, expected at most {reached:.3f} "
            f"with top-{top_k} of {experts} experts"
        )
    return shares


def _correlate(noise: Scores, by: float, last: Scores | None = None) -> None:
    """Make each entry of the first axis correlate with the one before it, in place."""
    if not by:
        return
    fresh, kept = np.float32(math.sqrt(1 - by * by)), np.float32(by)
    start = 0
    if last is None:
        last, start = noise[0], 1
    for entry in noise[start:]:
        entry *= fresh
        entry += kept * last
        last = entry
