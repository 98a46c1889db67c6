"""Record the routing of a model while it reads prompts and writes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor

from runtime.families import find_gates, model_spec
from runtime.parts import Parts
from runtime.recorder import Recorder
from runtime.sampling import Sampler, Sampling
from traces.errors import InputError
from traces.store import write_trace
from traces.trace import TokenSequence

#: How many gates ahead a trace file has room for.
MAX_AHEAD = 3


@dataclass(frozen=True)
class CaptureSettings:
    """What is generated and what is recorded.

    At most *max_new_tokens* are sampled after each prompt, *batch* prompts at a time.
    *ahead* is how many layers further gates are asked, *ahead_width* how many of their
    experts are kept: twice the model's top_k if not given.
    """

    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    ahead: int = MAX_AHEAD
    ahead_width: int | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise InputError(f"max-new-tokens is {self.max_new_tokens}, expected 0 or more")
        if not 0 <= self.ahead <= MAX_AHEAD:
            raise InputError(f"ahead is {self.ahead}, expected 0 to {MAX_AHEAD}")
        if self.batch < 1:
            raise InputError(f"batch is {self.batch}, expected 1 or more")


@dataclass(frozen=True)
class Origin:
    """Provenance in words: the model's *name*, *source* and *license* of the trace.

    *extra* goes into the file's metadata as it is.
    """

    name: str
    source: str = ""
    license: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt as token ids, and its *domain* where one is known."""

    tokens: tuple[int, ...]
    domain: str | None = None


def make_recorder(model: Any, settings: CaptureSettings) -> Recorder:
    """A recorder for *model*; a width it cannot have is an :class:`InputError`."""
    gates = find_gates(model)
    experts, top_k = gates[0].num_experts, gates[0].top_k
    width = settings.ahead_width
    width = min(2 * top_k, experts) if width is None else width
    if not 1 <= width <= experts:
        raise InputError(f"ahead-width is {width}, expected 1 to {experts}, the model's experts")
    return Recorder(gates, min(settings.ahead, len(gates) - 1), width)


def end_tokens(model: Any) -> frozenset[int]:
    """The token ids after which *model* stops."""
    found = model.generation_config.eos_token_id
    if found is None:
        return frozenset()
    return frozenset([found] if isinstance(found, int) else found)


def vocabulary_of(model: Any) -> int:
    """The token ids that *model* knows: all are below this."""
    return int(model.config.get_text_config().vocab_size)


def left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask int64 [B, S], every prompt ending in the last column."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """No dropout, no router jitter, no gradients; the model's mode is restored."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


class _Batch:
    """Sequences that run together: the tokens and gate rows of each, and who still runs."""

    def __init__(self, prompts: Sequence[Sequence[int]], ends: frozenset[int], limit: int) -> None:
        self.tokens = [list(prompt) for prompt in prompts]
        self.prompts = [len(prompt) for prompt in prompts]
        self.rows: list[list[npt.NDArray[np.int16]]] = [[] for _ in prompts]
        self.live = [True] * len(prompts)
        self._ends = ends
        self._limit = limit

    def add(self, rows: npt.NDArray[np.int16], sampled: npt.NDArray[np.int32]) -> None:
        """Take one pass: *rows* int16 [B, S, L, columns] and the token *sampled* after it.

        The last token of a sequence is never run, so it is not part of the trace either.
        """
        for i, token in enumerate(sampled.tolist()):
            if not self.live[i]:
                continue
            # The first pass is left-padded; later ones hold one token of each sequence.
            self.rows[i].append(rows[i, -self.prompts[i] :])
            made = len(self.tokens[i]) - self.prompts[i] + 1
            self.live[i] = made < self._limit and token not in self._ends
            if self.live[i]:
                self.tokens[i].append(token)

    def sequences(self, recorder: Recorder, first: int) -> Iterator[TokenSequence]:
        """The finished sequences, numbered from *first*."""
        for i, tokens in enumerate(self.tokens):
            experts, weights, ahead = recorder.unpack(np.concatenate(self.rows[i]))
            yield TokenSequence(
                id=first + i,
                experts=experts,
                positions=np.arange(len(tokens), dtype=np.int32),
                prefill=self.prompts[i],
                tokens=np.array(tokens, dtype=np.int32),
                weights=weights,
                ahead=ahead,
            )


def run_batch(
    model: Any,
    recorder: Recorder,
    prompts: Sequence[Sequence[int]],
    first: int,
    settings: CaptureSettings,
) -> list[TokenSequence]:
    """Run *prompts* together to their end; *first* is the id of the first sequence.

    The recorder must be entered. A sequence that has ended stays in the batch as ballast
    until all have: its rows are dropped, and no row depends on another.
    """
    ids, mask = left_padded(prompts, model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    passes = max(1, settings.max_new_tokens)
    sampler = Sampler(settings.sampling, range(first, first + len(prompts)), passes, model.device)
    batch = _Batch(prompts, end_tokens(model), settings.max_new_tokens)
    cache = None
    for step in range(passes):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = output.past_key_values
        chosen = sampler(output.logits[:, -1], step)
        rows, sampled = recorder.take(chosen)
        batch.add(rows.reshape(*ids.shape, *rows.shape[1:]), sampled)
        if not any(batch.live):
            break
        ids, positions = chosen[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return list(batch.sequences(recorder, first))


def fingerprint(model: Any, prompts: Sequence[TokenPrompt], settings: CaptureSettings) -> str:
    """What the bytes of a capture depend on, as a hash.

    Of every weight a few values are looked at: enough to tell two checkpoints apart.
    """
    digest = hashlib.sha256()
    facts = {
        "config": model.config.to_dict(),
        "prompts": [dataclasses.astuple(prompt) for prompt in prompts],
        "settings": dataclasses.asdict(settings),
        "ends": sorted(end_tokens(model)),
        "device": model.device.type,
        "versions": [torch.__version__, transformers.__version__],
    }
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, values in model.named_parameters():
        flat = values.detach().flatten()
        few = flat[:: max(1, flat.numel() // 16)].float().cpu().numpy()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode() + few.tobytes())
    return digest.hexdigest()


def _check_prompts(model: Any, prompts: Sequence[TokenPrompt], settings: CaptureSettings) -> None:
    room = getattr(model.config, "max_position_embeddings", None)
    if not prompts:
        raise InputError("no prompts given, expected at least one")
    for number, prompt in enumerate(prompts):
        if not prompt.tokens:
            raise InputError(f"prompt {number}: no token, expected at least one")
        needed = len(prompt.tokens) + settings.max_new_tokens
        if room and needed > room:
            raise InputError(
                f"prompt {number}: {len(prompt.tokens)} tokens and {settings.max_new_tokens} new "
                f"ones need {needed} positions, the model has {room}"
            )


def _metadata(model: Any, prompts: Sequence[TokenPrompt], settings: CaptureSettings) -> Any:
    sampling = dataclasses.asdict(settings.sampling)
    extra: dict[str, Any] = {
        "capture": {
            **sampling,
            "max_new_tokens": settings.max_new_tokens,
            "batch": settings.batch,
            "model_type": model.config.model_type,
            "vocabulary": vocabulary_of(model),
            "device": model.device.type,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    }
    if any(prompt.domain is not None for prompt in prompts):
        extra["domains"] = [prompt.domain or "unknown" for prompt in prompts]
    return extra


def _run_all(
    model: Any,
    prompts: Sequence[TokenPrompt],
    settings: CaptureSettings,
    parts: Parts,
    progress: Callable[[int], None],
) -> None:
    """Capture every batch that no earlier run has left in *parts*."""
    with _evaluating(model), make_recorder(model, settings) as recorder:
        for number, first in enumerate(range(0, len(prompts), settings.batch)):
            group = [prompt.tokens for prompt in prompts[first : first + settings.batch]]
            if not parts.has(number):
                parts.save(number, run_batch(model, recorder, group, first, settings))
            progress(len(group))


def capture(
    model: Any,
    prompts: Sequence[TokenPrompt],
    out: Path,
    settings: CaptureSettings,
    origin: Origin,
    progress: Callable[[int], None] = lambda sequences: None,
) -> None:
    """Write the routing of *model* on *prompts* to the trace file *out*.

    Finished batches are kept in a folder beside *out* until the file is complete: calling
    this again after an interruption continues there and gives the same bytes. A folder left
    by another model, other prompts or settings is refused. *progress* is told how many
    sequences each batch adds.
    """
    _check_prompts(model, prompts, settings)
    spec = model_spec(model, origin.name)
    make_recorder(model, settings)
    today = datetime.now(UTC).date().isoformat()
    parts = Parts.open(out, fingerprint(model, prompts, settings), today)
    _run_all(model, prompts, settings, parts, progress)
    extra = _metadata(model, prompts, settings)
    extra["capture"]["date"] = parts.date
    write_trace(
        out,
        spec,
        parts.sequences(),
        source=origin.source,
        license=origin.license,
        extra={**extra, **origin.extra},
    )
    parts.remove()
