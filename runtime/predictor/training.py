"""Training a predictor: seeded, resumable, the same bytes for the same seed on a CPU."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime.predictor.data import Corpus, batches_of, experts_of, inputs_of, shortened
from runtime.predictor.files import fill, read_tensors, write_tensors
from runtime.predictor.model import Inputs, Predictor
from runtime.predictor.objective import loss_of
from runtime.predictor.spec import PredictorSpec
from runtime.predictor.starting import start
from traces.errors import InputError
from traces.trace import TokenSequence

CHECKPOINT = "unfinished training of a predictor"

#: How much faster than the rest the embedding learns: its rows have the size of 1, far from what
#: a few thousand steps of the common rate could change, and most of them are met rarely.
EMBEDDING_FACTOR = 10.0

#: Weight of one step in the running mean of the loss that is reported.
FRESH = 0.02


@dataclass(frozen=True)
class TrainSettings:
    """How a predictor is trained.

    *steps* batches of *batch* sequences in all, or *epochs* times every sequence where steps are
    not given. The learning rate *lr* is reached over the first *warmup* share of the steps and
    falls to 0 as a half cosine. A used expert counts *pos_weight* times an unused one; *again*
    is the weight of the second head's loss. Sequences are cut after *max_tokens*.
    """

    steps: int | None = None
    epochs: int = 10
    batch: int = 16
    lr: float = 5e-3
    warmup: float = 0.05
    weight_decay: float = 1e-4
    dropout: float = 0.0
    pos_weight: float = 1.0
    again: float = 1.0
    clip: float = 1.0
    max_tokens: int = 512
    seed: int = 0

    def total(self, sequences: int) -> int:
        """Steps of the whole training on so many *sequences*."""
        return self.steps or self.epochs * -(-sequences // self.batch)

    def rate(self, step: int, total: int) -> float:
        """The learning rate of *step*, counted from 0, of *total*."""
        rising = max(1, round(self.warmup * total))
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


class Trainer:
    """One training under way: the model, its optimiser and the number of steps done."""

    def __init__(
        self, spec: PredictorSpec, settings: TrainSettings, corpus: Corpus, device: torch.device
    ) -> None:
        self.settings, self.device = settings, device
        self.sequences = [shortened(s, settings.max_tokens) for s in corpus.sequences]
        self.total = settings.total(len(self.sequences))
        self.step = 0
        self._mean = torch.zeros(2, device=device)
        self._facts = {
            "spec": spec.to_dict(),
            "settings": dataclasses.asdict(settings),
            "data": corpus.fingerprint(),
        }
        with _seeded(device, settings.seed):
            self.model = Predictor(spec, settings.dropout)
        start(self.model, self.sequences)
        self.model.to(device)
        self._optimiser = torch.optim.AdamW(_groups(self.model, settings), lr=settings.lr)

    @property
    def losses(self) -> tuple[float, float]:
        """Running means of the two losses."""
        first, second = self._mean.tolist()
        return first, second

    def run(
        self,
        advance: Callable[[int], None] = lambda steps: None,
        stop: Callable[[], bool] = lambda: False,
        every: Callable[[], None] = lambda: None,
    ) -> bool:
        """Train to the end and return True, or False where *stop* says so between two steps.

        *advance* is told of each step; *every* is called after each, for what is due then.
        """
        self.model.train()
        advance(self.step)
        for members in self._coming():
            if stop():
                break
            fresh = self._learn([self.sequences[i] for i in members])
            self._mean = torch.lerp(self._mean, fresh, FRESH) if self.step else fresh
            self.step += 1
            advance(1)
            every()
        self.model.eval()
        return self.step >= self.total

    def _coming(self) -> Iterator[list[int]]:
        """The batches that are left: which they are depends on the seed and the step alone."""
        each = -(-len(self.sequences) // self.settings.batch)
        lengths = [len(sequence) for sequence in self.sequences]
        while self.step < self.total:
            epoch, done = divmod(self.step, each)
            order = list(batches_of(lengths, self.settings.batch, self.settings.seed, epoch))
            yield from order[done : done + self.total - self.step]

    def _learn(self, sequences: list[TokenSequence]) -> Tensor:
        """One step; the two losses [2]."""
        inputs, experts, lengths = self._batch(sequences)
        for group in self._optimiser.param_groups:
            group["lr"] = group["factor"] * self.settings.rate(self.step, self.total)
        with _seeded(self.device, self.settings.seed, self.step + 1):
            weights = (self.settings.pos_weight, self.settings.again)
            first, second = loss_of(self.model, inputs, experts, lengths, weights)
        self._optimiser.zero_grad(set_to_none=True)
        (first + second).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self._optimiser.step()
        return torch.stack([first, second]).detach()

    def _batch(self, sequences: list[TokenSequence]) -> tuple[Inputs, Tensor, Tensor]:
        inputs = inputs_of(sequences, self.model.spec)
        experts, lengths = experts_of(sequences)
        move = self.device
        return Inputs(*(x.to(move) for x in inputs)), experts.to(move), lengths.to(move)

    def save(self, path: Path) -> None:
        """Write all that :meth:`resume` needs. Random numbers follow from seed and step."""
        tensors = {f"model.{name}": w for name, w in self.model.state_dict().items()}
        state = self._optimiser.state_dict()["state"]
        for number, values in state.items():
            tensors |= {f"adam.{number}.{name}": value for name, value in values.items()}
        tensors["losses"] = self._mean
        facts = {**self._facts, "step": self.step}
        write_tensors(path, CHECKPOINT, tensors, facts)

    def resume(self, path: Path) -> None:
        """Go on where :meth:`save` was called; another training's file is refused."""
        tensors, facts = read_tensors(path, CHECKPOINT)
        for key, own in self._facts.items():
            if facts.get(key) != own:
                raise InputError(f"--resume {path}: {_difference(key, facts.get(key), own)}")
        model, adam = {}, dict[int, dict[str, Tensor]]()
        for name, values in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "model":
                model[rest] = values
            elif kind == "adam":
                number, _, key = rest.partition(".")
                adam.setdefault(int(number), {})[key] = values
        fill(self.model, model, str(path))
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": adam, "param_groups": groups})
        self.step = int(facts["step"])
        self._mean = tensors["losses"].to(self.device)


def _groups(model: Predictor, settings: TrainSettings) -> list[dict[str, Any]]:
    """The parameters by how they learn: matrices decay, vectors and the embedding do not."""
    embedding = model.embedding.weight
    others = [p for p in model.parameters() if p is not embedding]
    matrices = [p for p in others if p.ndim > 1]
    vectors = [p for p in others if p.ndim <= 1]
    return [
        {"params": [embedding], "weight_decay": 0.0, "factor": EMBEDDING_FACTOR},
        {"params": matrices, "weight_decay": settings.weight_decay, "factor": 1.0},
        {"params": vectors, "weight_decay": 0.0, "factor": 1.0},
    ]


@contextmanager
def _seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """Random numbers that depend on *numbers* alone; those outside go on as before."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _difference(key: str, found: Any, expected: Any) -> str:
    """In a few words what another training's file has and this one has not."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for name, value in expected.items():
            if found.get(name) != value:
                return f"{name} was {found.get(name)}, expected {value} as it is now"
    return f"other {key} than now, expected the same traces" if key == "data" else f"no {key}"
