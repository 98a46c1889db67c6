"""How much GPU memory a run may use: ``25%`` of the experts, ``96`` slots or ``24GiB``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from policies.hardware import HardwareProfile
from traces.errors import InputError
from traces.model import ModelSpec

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}


@dataclass(frozen=True)
class Budget:
    """One of three ways to say how many slots there are; half of the experts by default."""

    cache: str | None = None
    slots: int | None = None
    gpu_memory: str | None = None

    def resolve(
        self, model: ModelSpec, profile: HardwareProfile, kv_tokens: int, beside_bytes: int = 0
    ) -> int:
        """Slots for *model*: at least top_k, at most all experts.

        Of *gpu_memory* the dense weights, the key-value cache of *kv_tokens* tokens and the
        *beside_bytes* of a predictor beside the model are taken off first. Raises
        :class:`InputError` where nothing sensible remains.
        """
        if sum(value is not None for value in (self.cache, self.slots, self.gpu_memory)) > 1:
            raise InputError("--cache, --slots and --gpu-memory: several given, expected one")
        if self.gpu_memory is not None:
            return self._from_memory(model, profile, kv_tokens, beside_bytes)
        if self.slots is not None:
            return _check(self.slots, model, f"--slots {self.slots}")
        text = "50%" if self.cache is None else self.cache
        share = _percent(text)
        return _check(math.floor(share * model.total_experts + 1e-9), model, f"--cache {text}")

    def _from_memory(
        self, model: ModelSpec, profile: HardwareProfile, kv_tokens: int, beside_bytes: int
    ) -> int:
        memory = parse_bytes(str(self.gpu_memory), "--gpu-memory")
        if memory > profile.gpu.memory_bytes:
            raise InputError(
                f"--gpu-memory {self.gpu_memory}: more than the "
                f"{profile.gpu.memory_bytes / 2**30:.1f} GiB of {profile.gpu.name}"
            )
        fixed = model.dense_bytes + kv_tokens * model.kv_bytes_per_token + beside_bytes
        more = " and the predictor" if beside_bytes else ""
        least = fixed + model.top_k * model.expert_bytes
        if memory < least:
            raise InputError(
                f"--gpu-memory {self.gpu_memory}: cannot hold the dense part and the key-value "
                f"cache{more} ({fixed / 2**30:.2f} GiB) and {model.top_k} experts of "
                f"{model.expert_bytes / 2**20:.1f} MiB; expected at least {least / 2**30:.2f} GiB"
            )
        return min(int((memory - fixed) // model.expert_bytes), model.total_experts)


def _check(slots: int, model: ModelSpec, option: str) -> int:
    if slots < model.top_k:
        raise InputError(f"{option}: is {slots} slots, expected at least top_k = {model.top_k}")
    if slots > model.total_experts:
        raise InputError(
            f"{option}: is {slots} slots, expected at most "
            f"the model's {model.total_experts} experts"
        )
    return slots


def _percent(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if not match or not 0 < float(match[1]) <= 100:
        raise InputError(f"--cache {text}: expected a share of the experts such as 25%, up to 100%")
    return float(match[1]) / 100


def parse_bytes(text: str, option: str) -> int:
    """Bytes of ``24GiB``, ``512 MB`` or ``1073741824``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise InputError(f"{option} {text}: expected an amount of memory such as 24GiB")
    return int(min(float(match[1]) * _UNITS[match[2].upper()], 1e30))


def divide_budget(
    slots: int, low_share: float, low_bytes_share: float, pools: int = 1
) -> tuple[int, int]:
    """Full- and low-precision slots within the bytes of *slots* full ones.

    *low_share* of the budget goes to low-precision copies, each of which takes
    *low_bytes_share* of a full one's bytes. Each of *pools* keeps a full slot; where the rest
    is not one low slot for each, all are full.
    """
    if not low_share or not low_bytes_share:
        return slots, 0
    full = max(slots - round(slots * low_share), pools)
    low = int((slots - full) / low_bytes_share + 1e-9)
    return (full, low) if low >= pools else (slots, 0)
