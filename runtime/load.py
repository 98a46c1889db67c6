"""Models and tokenizers from a folder, with the user's mistakes said in one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from runtime.families import check_family
from traces.errors import InputError
from traces.model import DTYPE_BYTES

#: ``organisation/model``: what may be asked of the hub when there is no such folder.
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def pick_device(name: str) -> torch.device:
    """The device called *name*: ``cpu``, ``cuda``, or ``auto`` for a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device found, expected one; use --device cpu")
    return torch.device(name)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def read_config(folder: Path) -> Any:
    """The checkpoint's configuration, refused before any weight is read if unsupported."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json found, expected a model folder")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: configuration not understood: {_one_line(error)}") from None
    check_family(config.model_type, str(folder))
    return config


def quantisation(config: Any, where: str) -> dict[str, Any]:
    """Loading options for a quantised checkpoint: full-precision weights or a refusal."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return {}
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    if method != "mxfp4":
        raise InputError(
            f"{where}: weights are quantised with {method!r}, expected full precision or mxfp4"
        )
    # Packed experts come with a router path of their own that no hook sees.
    from transformers.utils.quantization_config import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}


def check_dtype(dtype: str) -> None:
    """Refuse a *dtype* that is neither ``auto`` nor a floating type weights can have."""
    if dtype != "auto" and dtype not in DTYPE_BYTES:
        raise InputError(f"--dtype {dtype}: expected auto or one of {', '.join(DTYPE_BYTES)}")


def find_folder(name: Path | str) -> Path:
    """The folder *name*, or the one into which the hub's model *name* is downloaded.

    A model that is already in the hub's cache needs no network.
    """
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not _HUB_NAME.fullmatch(str(name)):
        raise InputError(f"{name}: not found, expected a model folder or a name on the hub")
    try:
        return Path(huggingface_hub.snapshot_download(str(name), allow_patterns=_MODEL_FILES))
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{name}: no such folder, and not to be had from the hub: {_one_line(error)}"
        ) from None


def load_model(folder: Path, dtype: str = "auto", device: str = "auto") -> Any:
    """The causal language model in *folder*, in evaluation mode on *device*."""
    check_dtype(dtype)
    options = quantisation(read_config(folder), str(folder))
    target = pick_device(device)
    if not sys.stderr.isatty():
        # transformers draws its loading bar into pipes and log files too.
        bars: Any = logging
        bars.disable_progress_bar()
    with fitting(target):
        return _read_weights(folder, dtype, options).eval().to(target)


def _read_weights(folder: Path, dtype: str, options: dict[str, Any]) -> Any:
    """The model on the CPU; weights the checkpoint lacks are not made up."""
    loader: Any = AutoModelForCausalLM
    try:
        model, info = loader.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: weights not loaded: {_one_line(error)}") from None
    if info["missing_keys"]:
        absent = sorted(info["missing_keys"])
        raise InputError(
            f"{folder}: {len(absent)} weights are missing, expected all; first {absent[0]}"
        )
    return model


@contextmanager
def fitting(device: torch.device) -> Iterator[None]:
    """A full *device* is the user's to mend: it becomes an :class:`InputError`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"--device {device.type}: out of memory, expected room for model and batch; "
            f"try a smaller --batch or --device cpu ({_one_line(error)})"
        ) from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer that lies beside the model in *folder*."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: tokenizer not loaded: {_one_line(error)}") from None
