"""Token schedulers on a GPU: the simulated world's groups, captured, their KV moved or gathered."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")
pytest.importorskip("triton", reason="triton is not installed")

from policies.session import Setup  # noqa: E402
from runtime.kv_rows import KvRows, make_gathered  # noqa: E402
from tests.contract.test_runtime_policies import SCHEDULED, Worlds, tiny_trace  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402
from tests.unit.test_kv_rows import LENGTH, used_cache  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("scheduler", SCHEDULED)
@pytest.mark.parametrize("policy", ["lru", "predictive", "mixed"])
def test_the_same_decisions(tmp_path: Path, scheduler: str, policy: str) -> None:
    batch, moves = SCHEDULED[scheduler]
    trace = tiny_trace(tmp_path / "tiny.parquet")
    both = Worlds(Setup(trace, batch=batch, scheduler=scheduler), device="cuda")
    try:
        found, _ = both.compare(policy, 7)
    finally:
        both.real.close()
    if scheduler != "prompt-length":
        assert (found.schedule["moved"] > 0) == moves
        assert (found.schedule["follow_s"] > 0) == (moves or "reindex" in scheduler)


@torch.no_grad()
def test_a_captured_gather_reads_the_rows_it_is_told() -> None:
    """One graph, other rows at every replay: the logits of a cache that lies in order."""
    model = tiny_model("mixtral").cuda()
    # transformers' default kernel reads numbers on the host, which no capture allows.
    model.set_experts_implementation("batched_mm")
    filled = used_cache(model, 4)
    torch.manual_seed(3)
    for layer in filled.layers:
        layer.keys.normal_()
        layer.values.normal_()
    rows = KvRows(filled, 4)
    for view, values in zip(
        rows.views(0, 4),
        [part for layer in filled.layers for part in (layer.keys, layer.values)],
        strict=True,
    ):
        view.copy_(values)
    where, position = torch.arange(2, device="cuda"), torch.full((2,), 5, device="cuda")
    cache = used_cache(model, 2)
    rows.seat(cache, 0, 4)
    make_gathered(cache, where, position)
    seen = (torch.arange(LENGTH, device="cuda") <= 5).expand(4, 1, 1, LENGTH)
    tokens = torch.tensor([[7], [9], [11], [13]], device="cuda")

    def step(of, kept):
        return model(
            input_ids=of,
            position_ids=torch.full_like(of, 5),
            attention_mask=seen[: len(of)],
            past_key_values=kept,
        ).logits[:, -1]

    for layer in filled.layers:
        layer.cumulative_length.fill_(5)
    expected = step(tokens, filled)
    given = tokens[:2].clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(given, cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(given, cache)
    for order in ([3, 0], [1, 2], [2, 3]):
        where.copy_(torch.tensor(order))
        given.copy_(tokens[order])
        graph.replay()
        torch.testing.assert_close(found, expected[order], rtol=1e-3, atol=1e-3)
