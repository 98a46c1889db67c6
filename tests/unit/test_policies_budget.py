"""Budgets: what a share, a number of slots or an amount of memory buys."""

from __future__ import annotations

from dataclasses import replace

import pytest

from policies.budget import Budget, parse_bytes
from policies.examples import example_model
from policies.hardware import HardwareProfile, load_profile
from tests.helpers import machine
from traces.errors import InputError

MODEL = replace(example_model(4, 8, 2), dense_params=5000)  # 32 experts of 3000 bytes
PROFILE: HardwareProfile = replace(
    machine(), gpu=replace(machine().gpu, memory_bytes=10**6)
)  # an expert more or less matters


@pytest.mark.parametrize(
    ("budget", "slots"),
    [
        (Budget(), 16),
        (Budget(cache="25%"), 8),
        (Budget(cache=" 12.5 % "), 4),
        (Budget(cache="100%"), 32),
        (Budget(cache="9.99%"), 3),
        (Budget(slots=2), 2),
        (Budget(slots=32), 32),
        (Budget(gpu_memory="16800B"), 2),  # 10,000 dense, 800 for 100 tokens, 2 experts
        (Budget(gpu_memory="19799B"), 2),
    ],
)
def test_slots(budget: Budget, slots: int) -> None:
    assert budget.resolve(MODEL, PROFILE, kv_tokens=100) == slots


def test_memory_beyond_the_experts_buys_no_more_slots() -> None:
    assert Budget(gpu_memory="1MB").resolve(MODEL, PROFILE, 0) == 32
    assert Budget(gpu_memory="1MB").resolve(MODEL, PROFILE, 120_000) == 10


def test_a_predictor_beside_the_model_takes_its_part() -> None:
    assert Budget(gpu_memory="19800B").resolve(MODEL, PROFILE, 100, beside_bytes=0) == 3
    assert Budget(gpu_memory="19800B").resolve(MODEL, PROFILE, 100, beside_bytes=1) == 2
    assert Budget(slots=3).resolve(MODEL, PROFILE, 100, beside_bytes=10**9) == 3
    with pytest.raises(InputError, match="the key-value cache and the predictor"):
        Budget(gpu_memory="19800B").resolve(MODEL, PROFILE, 100, beside_bytes=10**4)


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Budget(cache="3%"), r"--cache 3%: is 0 slots, expected at least top_k = 2"),
        (Budget(cache="0%"), r"--cache 0%: expected a share"),
        (Budget(cache="101%"), r"--cache 101%: expected a share"),
        (Budget(cache="0.5"), r"--cache 0.5: expected a share"),
        (Budget(cache="-5%"), r"--cache -5%: expected a share"),
        (Budget(cache="nan%"), r"--cache nan%: expected a share"),
        (Budget(slots=1), r"--slots 1: .*at least top_k = 2"),
        (Budget(slots=0), r"--slots 0: .*at least top_k = 2"),
        (Budget(slots=-4), r"--slots -4: .*at least top_k = 2"),
        (Budget(slots=33), r"--slots 33: .*at most .*32"),
        (Budget(gpu_memory="16799B"), r"--gpu-memory 16799B: cannot hold the dense part"),
        (Budget(gpu_memory="2MB"), r"--gpu-memory 2MB: more than"),
        (Budget(gpu_memory="lots"), r"--gpu-memory lots: expected an amount"),
        (Budget(gpu_memory="1 parsec"), r"--gpu-memory 1 parsec: expected an amount"),
        (Budget(gpu_memory="0"), r"--gpu-memory 0: expected an amount"),
        (Budget(cache="50%", slots=3), r"several given, expected one"),
        (Budget(slots=3, gpu_memory="1MB"), r"several given, expected one"),
    ],
)
def test_bad_budgets(budget: Budget, said: str) -> None:
    with pytest.raises(InputError, match=said):
        budget.resolve(MODEL, PROFILE, kv_tokens=100)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24 gib", 24 * 2**30),
        ("1.5GB", 1_500_000_000),
        ("512MiB", 512 * 2**20),
        ("7kb", 7000),
        ("1073741824", 2**30),
        ("80B", 80),
    ],
)
def test_units_are_powers_of_ten_or_of_two(text: str, size: int) -> None:
    assert parse_bytes(text, "--gpu-memory") == size


def test_a_published_model_on_a_published_card() -> None:
    """Mixtral-8x7B in bfloat16 does not fit 24 GB whole; a part of its experts does."""
    from traces.sizes import model_sizes

    mixtral = model_sizes("mixtral-8x7b")
    slots = Budget(gpu_memory="23GiB").resolve(mixtral, load_profile("rtx4090-pcie4"), 4096)
    assert 50 < slots < 70 < mixtral.total_experts == 256
