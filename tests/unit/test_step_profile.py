"""Tables of the profile of decode steps."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from click.testing import CliRunner

from benchmarks import step_profile
from benchmarks.step_profile import Kernel, event_rows, kernel_rows, stamped


def test_kernels_are_summed_by_name():
    long = "k" * 100
    kernels = [Kernel("gate", us) for us in (5.0, 6.0, 7.0, 6.0)] + [Kernel(long, 60.0)] * 2
    lines = kernel_rows(kernels, steps=2, layers=2)
    assert lines[2:] == [
        f"| 0.5 | 60.0 | 60.0 | `{'k' * (step_profile.NAME - 3)}...` |",
        "| 1 | 6.0 | 12.0 | `gate` |",
    ]


def test_events_are_grouped_by_what_they_missed():
    stamps = [[1000, 3000, 5000, 5000], [0, 2000, 100_000, 276_000], [0, 2000, 90_000, 270_000]]
    events = stamped(stamps, [0, 1, 1])
    assert event_rows(events)[2:] == [
        "| 0 | 1 | 2.0 | 4.0 | 4.0 |",
        "| 1 | 2 | 2.0 | 95.0 | 273.0 |",
    ]


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(step_profile.torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(step_profile.main, [])
    assert result.exit_code == 1
    assert "no CUDA device" in result.output
