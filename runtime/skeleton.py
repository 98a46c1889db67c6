"""A transformers model whose experts take no memory: they stay on ``meta``."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from runtime.families import Gate

#: Modules that an ordinary load keeps in single precision, by the dtypes for which it does.
_SINGLE_PRECISION = {
    "_keep_in_fp32_modules": (torch.float16,),
    "_keep_in_fp32_modules_strict": (torch.float16, torch.bfloat16),
}


def build_skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model of *config* in evaluation mode, every tensor on ``meta``.

    Weights have *dtype*, but for those that transformers keeps in single precision.
    """
    config = copy.deepcopy(config)
    # The experts are handed over at full precision, whatever the files hold.
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    maker: Any = AutoModelForCausalLM
    with torch.device("meta"):
        model = maker.from_config(config, dtype=dtype).eval()
    _keep_single_precision(model, dtype)
    return model


def _keep_single_precision(model: Any, dtype: torch.dtype) -> None:
    patterns = [
        pattern
        for attribute, dtypes in _SINGLE_PRECISION.items()
        if dtype in dtypes
        for pattern in getattr(model, attribute, None) or ()
    ]
    if not patterns:
        return
    single = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    for name, value in list(model.state_dict().items()):
        if single.search(name):
            put_tensor(model, name, value.to(torch.float32))


def put_tensor(model: Any, name: str, value: Tensor) -> None:
    """Make *value* the parameter or buffer called *name*, as transformers' loader does."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._buffers:
        module._buffers[leaf] = value
    else:
        trained = module._parameters[leaf].requires_grad
        module._parameters[leaf] = nn.Parameter(value, requires_grad=trained)


def expert_names(model: Any, gates: Sequence[Gate]) -> dict[str, tuple[int, str]]:
    """Full name of each stacked expert weight -> (MoE layer, name in the experts module)."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {
        f"{paths[id(gate.experts)]}.{name}": (layer, name)
        for layer, gate in enumerate(gates)
        for name, _ in gate.experts.named_parameters()
    }


def fill_buffers(model: Any, device: torch.device) -> None:
    """Compute on *device* the buffers that no checkpoint holds, such as rotary frequencies."""
    for module in model.modules():
        absent = [name for name in module._non_persistent_buffers_set if _is_meta(module, name)]
        for name in absent:
            module._buffers[name] = torch.empty_like(module._buffers[name], device=device)
        if absent:
            with torch.no_grad():
                model._init_weights(module)


def _is_meta(module: nn.Module, name: str) -> bool:
    value = module._buffers[name]
    return value is not None and value.is_meta


def dense_tensors(model: Any, gates: Sequence[Gate]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every parameter and buffer that is not an expert's, tied ones once."""
    experts = expert_names(model, gates)
    yield from ((name, value) for name, value in model.named_parameters() if name not in experts)
    yield from model.named_buffers()


def move_dense(model: Any, gates: Sequence[Gate], device: torch.device) -> Any:
    """Move everything but the experts to *device*; ``model.to`` fails on ``meta``.

    Tied weights stay tied.
    """
    experts = {id(gate.experts) for gate in gates}
    moved: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if id(module) in experts:
            continue
        for name, value in module._parameters.items():
            if value is not None:
                if id(value) not in moved:
                    moved[id(value)] = nn.Parameter(
                        value.detach().to(device), requires_grad=value.requires_grad
                    )
                module._parameters[name] = moved[id(value)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    return model
