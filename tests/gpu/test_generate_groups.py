"""Generating in groups on a GPU: captured steps over rows that move or are gathered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.registry import SCHEDULERS  # noqa: E402
from runtime.generate import encode, open_offloaded  # noqa: E402
from runtime.grouped import Arrangement, GroupedWriter  # noqa: E402
from runtime.sampling import Sampling  # noqa: E402
from tests.helpers_checkpoint import tiny_checkpoint  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = ["w5 w9 w33 w12", "w40 w3", "w11 w60 w22 w7 w8", "w13", "w20 w21 w22"]
NEW = 24


def texts(folder: Path, batch: int, scheduler: str, **options: Any) -> tuple[list[str], int]:
    """What the prompts lead to, and how many shapes of decode steps were captured."""
    with open_offloaded(folder, "lru", slots=8, device="cuda", **options) as opened:
        prompts = list(zip(PROMPTS, encode(opened.tokenizer, PROMPTS), strict=True))
        arrangement = Arrangement(batch, SCHEDULERS.build(scheduler))
        writer = GroupedWriter(opened, prompts, Sampling(), NEW, arrangement)
        found = [item.text for item in writer]
        graphs = opened.runner.graphs
        return found, graphs.captured if graphs is not None else 0


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("scheduler", ["none", "expertflow", "expertflow:kv=reindex"])
def test_captured_or_not_the_text_is_the_same(tmp_path: Path, family: str, scheduler: str) -> None:
    folder = tiny_checkpoint(tmp_path / family, family)
    plain, none = texts(folder, 2, scheduler, graphs=False)
    found, captured = texts(folder, 2, scheduler)
    assert none == 0
    assert captured > 0
    assert found == plain


@pytest.mark.parametrize("scheduler", ["expertflow", "expertflow:kv=reindex", "prompt-routes"])
def test_no_text_changes(tmp_path: Path, scheduler: str) -> None:
    folder = tiny_checkpoint(tmp_path / "olmoe", "olmoe")
    alone, _ = texts(folder, 1, "none")
    assert texts(folder, 2, scheduler)[0] == alone
