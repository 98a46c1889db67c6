"""Text from a checkpoint whose experts are offloaded, with its routing kept."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, StaticCache, TextStreamer

from policies.base import Policy
from policies.routing import Step
from runtime.capture import end_tokens, vocabulary_of
from runtime.families import model_spec
from runtime.load import find_folder, fitting, load_tokenizer, read_config
from runtime.offloading import offload
from runtime.predictor.forecaster import LivePath
from runtime.runner import Runner
from runtime.sampling import Sampling
from runtime.steps import Ints, LiveSteps
from runtime.store import Loaded
from runtime.streaming import open_checkpoint
from traces.errors import InputError, first_line
from traces.model import ModelSpec
from traces.store import write_trace

#: A progress bar: from a label and a length to a function that is told of each advance.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_progress(label: str, length: int) -> Iterator[Callable[[int], None]]:
    """A :data:`Progress` that shows nothing."""
    yield lambda steps: None


class KeptSteps(LiveSteps):
    """Steps whose routing is kept unless *keep* is false, and which ran last."""

    def __init__(
        self, spec: ModelSpec, *, ahead: int, keep: bool = True, read_ids: bool = False
    ) -> None:
        super().__init__(spec, ahead=ahead, keep=keep, read_ids=read_ids)
        #: The step that ran last.
        self.last: Step | None = None

    def seat(self, ids: Ints, positions: Ints) -> None:
        """The next decode step is of sequences *ids* [B], whose tokens are at *positions* [B]."""
        self._ids, self._positions = ids, positions

    def begin(self, tokens: Ints, real: Any, fresh: bool) -> Step:
        self.last = super().begin(tokens, real, fresh)
        return self.last


@dataclass(frozen=True)
class _Shown:
    """A checkpoint whose experts, as they are read, move a progress bar on."""

    checkpoint: Any
    advance: Callable[[int], None]

    @property
    def model(self) -> Any:
        return self.checkpoint.model

    def experts(self) -> Iterator[Loaded]:
        for loaded in self.checkpoint.experts():
            yield loaded
            self.advance(1)


@dataclass
class Offloaded:
    """A checkpoint that generates with its experts offloaded; use it in a ``with`` statement.

    *spec* are the dimensions of the *model*, *steps* keeps its routing if that was asked for,
    *load_s* is how long loading took.
    """

    folder: Path
    model: Any
    spec: ModelSpec
    tokenizer: Any
    steps: KeptSteps | None = None
    load_s: float = 0.0
    _caches: dict[int, tuple[int, Any]] = field(default_factory=dict)

    def __enter__(self) -> Offloaded:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def keep_routing(self, keep: bool = True) -> KeptSteps:
        """Keep the routing from here on, or only know each step; nothing may have run yet."""
        runner = self.runner
        reads = runner.steps.reads_ids
        steps = KeptSteps(self.spec, ahead=runner.hook.reader.ahead, keep=keep, read_ids=reads)
        runner.steps = runner.hook.steps = steps
        self.steps = steps if keep else None
        return steps

    def close(self) -> None:
        """Free the experts' host memory, the slots and the key-value caches."""
        self._caches.clear()
        self.model.expert_cache.close()

    @property
    def runner(self) -> Runner:
        """What runs the model's forward passes."""
        runner: Runner = self.model.expert_cache.runner
        return runner

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.runner.engine.lanes.device

    def cache(self, batch: int, length: int) -> Any:
        """An empty key-value cache for *batch* sequences of up to *length* tokens, or None.

        Decode graphs need one of fixed size, and the same one from prompt to prompt: it is
        made once for a batch size, and emptied when it is asked for again. None leaves the
        choice to transformers.
        """
        if self.runner.graphs is None:
            return None
        room, found = self._caches.get(batch, (0, None))
        if room < length:
            found = StaticCache(config=self.model.config, max_cache_len=length)
            self._caches[batch] = length, found
        else:
            found.reset()
        # An emptied cache means new sequences, as a new one does.
        self.runner._seen = None
        return found

    def generate(
        self,
        ids: Tensor,
        mask: Tensor,
        config: GenerationConfig,
        length: int,
        streamer: Any = None,
    ) -> Tensor:
        """Prompts *ids* int64 [B, S], padded on the left by *mask*, and what follows them.

        *length* is the room in tokens that the longest of all prompts needs with what it
        makes.
        """
        options = {"streamer": streamer} if streamer is not None else {}
        cache = self.cache(len(ids), length)
        if cache is not None:
            options["past_key_values"] = cache
        model = self.model
        # As an argument, what it leaves open would be filled in from the model's own.
        usual, model.generation_config = model.generation_config, config
        try:
            found: Tensor = model.generate(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **options
            )
        finally:
            model.generation_config = usual
        return found

    def write_trace(self, out: Path, source: str, extra: dict[str, Any]) -> None:
        """Write the routing that was kept to the trace file *out*.

        What a predictor said meanwhile goes beside it, so that a simulation can replay it.
        """
        if self.steps is None:
            raise InputError(f"{out}: no routing was kept, expected it to be asked for")
        notes = {
            "model_type": self.model.config.model_type,
            "device": self.device.type,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "vocabulary": vocabulary_of(self.model),
        }
        sequences = list(self.steps.sequences())
        forecaster = self.runner.engine.planner.forecaster
        if isinstance(forecaster, LivePath):
            forecaster.write(out, self.spec, sequences)
        write_trace(
            out,
            self.spec,
            sequences,
            source=source,
            license="unstated",
            extra={"capture": {**notes, **extra}},
        )


def open_offloaded(
    model: Path | str,
    policy: str | Policy,
    *,
    dtype: str = "auto",
    record: bool = False,
    progress: Progress = no_progress,
    **options: Any,
) -> Offloaded:
    """Open the checkpoint in the folder or of the hub's name *model* and offload its experts.

    *options* are those of :class:`runtime.offloading.Options`; *record* keeps the routing.
    """
    start = time.monotonic()
    folder = find_folder(model)
    tokenizer = load_tokenizer(folder)
    checkpoint = open_checkpoint(folder, dtype)
    spec = model_spec(checkpoint.model, _name(model, folder))
    options |= {"record": record, "name": spec.name}
    with progress("experts into host memory", checkpoint.total_experts) as advance:
        found = offload(_Shown(checkpoint, advance), policy, **options)
    opened = Offloaded(folder, found, spec, tokenizer)
    if record:
        opened.keep_routing()
    opened.load_s = time.monotonic() - start
    return opened


def _name(model: Path | str, folder: Path) -> str:
    """What a trace calls the model: its name on the hub, or its folder's."""
    return folder.resolve().name if Path(model).is_dir() else str(model)


def generation_config(
    model: Any, sampling: Sampling, max_new_tokens: int, *, stop: bool = True
) -> GenerationConfig:
    """How *model* chooses up to *max_new_tokens*: by *sampling*, whatever its files say.

    Without *stop* its end tokens are not heeded.
    """
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    drawn = sampling.temperature > 0
    config.do_sample = drawn
    config.num_beams = 1
    config.temperature = sampling.temperature if drawn else None
    config.top_k = (sampling.top_k or 0) if drawn else None
    config.top_p = sampling.top_p if drawn else None
    config.max_length = None
    config.max_new_tokens = max_new_tokens
    ends = sorted(end_tokens(model)) if stop else []
    config.eos_token_id = ends or None
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = ends[0] if ends else 0
    config.cache_implementation = None
    config.disable_compile = True
    return config


def check_room(folder: Path, lengths: Sequence[int], max_new_tokens: int) -> int:
    """The tokens that the longest prompt takes with what it makes; refused if too many.

    *lengths* are those of the prompts, in tokens.
    """
    room = getattr(read_config(folder), "max_position_embeddings", None)
    for number, length in enumerate(lengths, start=1):
        if not length:
            raise InputError(f"prompt {number}: no token, expected at least one")
        if room and length + max_new_tokens > room:
            raise InputError(
                f"prompt {number}: {length} tokens and {max_new_tokens} new ones, expected no "
                f"more than the {room} positions of the model"
            )
    return max(lengths) + max_new_tokens


def encode(tokenizer: Any, texts: Sequence[str], *, chat: bool = False) -> list[list[int]]:
    """Token ids of each text; with *chat* as a user's message in the model's own template."""
    if not chat:
        return [list(tokenizer(text)["input_ids"]) for text in texts]
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("--chat: the tokenizer has no chat template, expected one that has")
    found = []
    for text in texts:
        messages = [{"role": "user", "content": text}]
        try:
            written = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False
            )
        except Exception as error:  # templates are programs of the checkpoint's author
            raise InputError(f"--chat: the chat template failed: {first_line(error)}") from None
        found.append(list(tokenizer(written, add_special_tokens=False)["input_ids"]))
    return found


class Streamer(TextStreamer):
    """Hands on finished words of one sequence as they come, and notes when tokens came.

    *write* is called with text, and after every token *note* with the times of all so far.
    """

    def __init__(
        self, tokenizer: Any, write: Callable[[str], None], note: Callable[[Sequence[float]], None]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write, self._note = write, note
        self._prompted = False
        #: When each token came, in seconds of the monotonic clock.
        self.times_s: list[float] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each token."""
        prompt, self._prompted = not self._prompted, True
        super().put(value)  # type: ignore[no-untyped-call]
        if not prompt:
            self.times_s.append(time.monotonic())
            self._note(self.times_s)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take text that no further token changes."""
        self.text += text
        if text:
            self._write(text)


@dataclass(frozen=True)
class Written:
    """What one prompt led to; times are seconds since the prompt was handed over."""

    prompt: str
    text: str
    prompt_tokens: int
    token_s: Sequence[float]

    @property
    def new_tokens(self) -> int:
        """Tokens that were made."""
        return len(self.token_s)

    @property
    def first_token_s(self) -> float:
        """Time to the first token."""
        return self.token_s[0]

    @property
    def decode_s(self) -> float:
        """Time between the first token and the last."""
        return self.token_s[-1] - self.token_s[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": self.new_tokens,
            "first_token_s": self.first_token_s,
            "decode_s": self.decode_s,
        }


def write_on(
    opened: Offloaded,
    prompts: Sequence[tuple[str, Sequence[int]]],
    sampling: Sampling,
    max_new_tokens: int,
    write: Callable[[str], None],
    note: Callable[[Sequence[float]], None],
) -> Iterator[Written]:
    """Continue *prompts* (text, token ids) one after the other; ``fitting`` guards the device."""
    config = generation_config(opened.model, sampling, max_new_tokens)
    length = max(len(ids) for _, ids in prompts) + max_new_tokens
    torch.manual_seed(sampling.seed)
    for text, tokens in prompts:
        streamer = Streamer(opened.tokenizer, write, note)
        ids = torch.tensor([list(tokens)])
        start = time.monotonic()
        with fitting(opened.device):
            opened.generate(ids, torch.ones_like(ids), config, length, streamer)
        times = [at - start for at in streamer.times_s]
        yield Written(text, streamer.text, len(tokens), times)
