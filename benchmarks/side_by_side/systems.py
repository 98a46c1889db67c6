"""Each system: how a user sets it up, one forward pass of it, and what it counts."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.side_by_side.model import placed_model
from benchmarks.side_by_side.plan import System, Task


class Unavailable(Exception):
    """This system cannot run here; the message says what is missing, in one line."""


class Runner:
    """A model that decodes as transformers does, with a growing cache of keys and values.

    :meth:`forward` takes token ids int64 [1, T] and gives the logits [1, vocabulary] after the
    last of them. A subclass adds what its system counts or must undo.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: Any = None

    def restart(self) -> None:
        """Forget the text; experts that are on the GPU stay there."""
        self._cache = None

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [1, vocabulary] after *ids* int64 [1, T]."""
        output = self._model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self._cache = output.past_key_values
        logits: Tensor = output.logits[:, -1]
        return logits

    def counts(self) -> dict[str, Any]:
        """What the system counts since it began: ``missed``, ``prefetched`` if it knows."""
        return {}

    def close(self) -> None:
        """Give back what is not freed with the object."""


class GraphRunner(Runner):
    """Decoding captured in one CUDA graph over a :class:`StaticCache`; prefill is not captured."""

    def __init__(self, model: Any, tokens: int) -> None:
        library: Any = importlib.import_module("transformers")
        super().__init__(model)
        self._cache = library.StaticCache(config=model.config, max_cache_len=tokens)
        self._ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._position = torch.zeros_like(self._ids)
        self._length = 0
        self._graph = torch.cuda.CUDAGraph()
        self._logits = self._capture()
        self.restart()

    def restart(self) -> None:
        """Empty the cache in place: the graph holds its addresses."""
        self._cache.reset()
        self._length = 0

    def _step(self) -> Tensor:
        output = self._model(
            input_ids=self._ids,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _capture(self) -> Tensor:
        """Record one decode step; the tensor that every replay writes the logits to."""
        super().forward(self._ids)
        cuda: Any = torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(3):
                self._step()
        cuda.current_stream().wait_stream(side)
        with cuda.graph(self._graph):
            return self._step()

    def forward(self, ids: Tensor) -> Tensor:
        """As :meth:`Runner.forward`; a single token replays the graph."""
        at, self._length = self._length, self._length + ids.shape[1]
        if ids.shape[1] > 1:
            return super().forward(ids)
        self._ids.copy_(ids)
        self._position.fill_(at)
        self._graph.replay()
        return self._logits.clone()


class PolicyLangRunner(Runner):
    """moe-policylang; its transfers are its misses: each is one expert copied to the GPU."""

    def __init__(self, model: Any, manager: Any) -> None:
        super().__init__(model)
        self._manager = manager

    def counts(self) -> dict[str, Any]:
        """Its own statistics, and ``missed`` out of them."""
        told = self._manager.get_stats()
        return {"missed": told["placement"]["cpu_to_gpu_transfers"], "told": told}


class OursRunner(Runner):
    """This project's runtime, over a static cache, as ``simctl generate`` runs it on a GPU."""

    def __init__(self, model: Any, tokens: int) -> None:
        library: Any = importlib.import_module("transformers")
        super().__init__(model)
        self._cache = library.StaticCache(config=model.config, max_cache_len=tokens)
        self._length = 0

    def restart(self) -> None:
        self._cache.reset()
        self._length = 0

    def forward(self, ids: Tensor) -> Tensor:
        begin, self._length = self._length, self._length + ids.shape[1]
        places = torch.arange(begin, self._length, device=ids.device).unsqueeze(0)
        output = self._model(
            input_ids=ids,
            position_ids=places,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def counts(self) -> dict[str, Any]:
        """Its own statistics; out of them ``missed``, and ``prefetched`` but for the cancelled."""
        told = self._model.expert_cache.stats()
        moves = told.get("moves", {})
        prefetched = moves.get("prefetch", 0) - moves.get("cancelled", 0) if moves else None
        return {"missed": told.get("missed"), "prefetched": prefetched, "told": told}

    def close(self) -> None:
        self._model.expert_cache.close()


def _transformers(system: System, task: Task) -> Runner:
    model = placed_model(task, "device")
    if system.choice != "graph":
        model.set_experts_implementation(system.choice)
        return Runner(model)
    model.set_experts_implementation("batched_mm")
    tokens = task.prompt_tokens + max(task.decode_tokens, task.warmup_tokens, 4)
    return GraphRunner(model, tokens)


def _accelerate(system: System, task: Task) -> Runner:
    """A device map with every layer's experts on the CPU, all else on the device.

    The experts' kernel stays transformers' default. On a machine without a GPU the main device
    is the CPU as an object, which accelerate does not take for its word ``"cpu"``: it offloads.
    """
    model = placed_model(task, "experts on host")
    main = torch.device(task.device, 0) if task.device == "cuda" else torch.device(task.device)
    places: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own:
            places[name] = "cpu" if name.endswith(".mlp.experts") else main
    library: Any = importlib.import_module("accelerate")
    return Runner(library.dispatch_model(model, places, main_device=main))


def _policylang(system: System, task: Task) -> Runner:
    """Its ``attach`` on a model whose experts lie on the CPU. Its capacity counts per layer."""
    model = placed_model(task, "experts on host")
    share = system.share or 0.0
    capacity = max(round(share * task.shape.experts), task.shape.top_k)
    policy = f"policy peer {{ cache {{ capacity = {capacity} eviction = {system.choice} }} }}"
    attach: Any = importlib.import_module("moe_policylang").attach
    if task.device == "cpu":
        # It waits for the GPU after each copy, whatever device it was given.
        torch.cuda.synchronize = lambda *_: None
        return PolicyLangRunner(model, attach(model, policy, gpu_device=task.device))
    return PolicyLangRunner(model, attach(model, policy))


def _ours(system: System, task: Task) -> Runner:
    """``runtime.offload`` as the README shows it, the whole model on the CPU before."""
    model = placed_model(task, "host")
    told: dict[str, Any] = {} if task.compute is None else {"compute": task.compute}
    offload: Any = importlib.import_module("runtime").offload
    slots = system.slots(task.shape)
    model = offload(model, policy=system.choice, slots=slots, device=task.device, **told)
    return OursRunner(model, task.prompt_tokens + max(task.decode_tokens, task.warmup_tokens))


_SETUPS: dict[str, Callable[[System, Task], Runner]] = {
    "transformers": _transformers,
    "accelerate": _accelerate,
    "moe-policylang": _policylang,
    "ours": _ours,
}


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def check_available(system: System, device: str) -> None:
    """Raise :class:`Unavailable` before anything is built that *system* could not use."""
    if system.choice == "graph" and device != "cuda":
        raise Unavailable(f"a CUDA graph needs a CUDA device, the device is {device}")
    if system.kind == "accelerate" and not _installed("accelerate"):
        raise Unavailable("accelerate is not installed: pip install accelerate")
    if system.kind == "moe-policylang":
        missing = [name for name in ("moe_policylang", "lark") if not _installed(name)]
        if missing:
            raise Unavailable(
                f"{missing[0]} is not installed: pip install moe-policylang==1.15.0 lark"
            )
    if system.kind == "ours":
        import runtime

        if not hasattr(runtime, "offload"):
            raise Unavailable("this checkout's runtime has no offload()")


def set_up(system: System, task: Task) -> Runner:
    """*system* ready to run *task*'s model."""
    return _SETUPS[system.kind](system, task)
