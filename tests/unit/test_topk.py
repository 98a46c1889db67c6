"""Calls of torch.topk that become one operator, and those that do not."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from runtime import topk  # noqa: E402
from runtime.families import FAMILIES, find_gates  # noqa: E402
from runtime.topk import QuickTopK  # noqa: E402
from tests.tiny_models import tiny_model  # noqa: E402

ROWS = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], int]]:
    """Shapes and numbers that the operator is asked for."""
    found: list[tuple[tuple[int, ...], int]] = []

    def ask(rows: Any, k: int) -> Any:
        found.append((tuple(rows.shape), k))
        best = rows.topk(k, dim=1)
        return best.values, best.indices

    monkeypatch.setattr(topk, "_operator", ask)
    return found


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: torch.topk(x, 4, dim=-1),
        lambda x: x.topk(4),
        lambda x: torch.topk(x, k=4, dim=2, sorted=False),
        lambda x: torch.topk(input=x, k=4, largest=True),
    ],
)
def test_it_is_asked_however_it_is_written(asked, ask):
    expected = torch.topk(ROWS, 4)
    with QuickTopK("cpu"):
        values, indices = ask(ROWS)
    assert asked == [((6, 16), 4)]
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: torch.topk(ROWS, 2, dim=0),
        lambda: torch.topk(ROWS, 2, largest=False),
        lambda: torch.topk(ROWS.double(), 2),
        lambda: torch.topk(torch.arange(9), 2),
        lambda: torch.topk(torch.zeros(1, topk.MOST_NUMBERS + 1), 2),
        lambda: torch.topk(torch.zeros(topk.MOST_ROWS + 1, 8), 2),
        lambda: torch.topk(torch.zeros(1, 64), topk.MOST_BEST + 1),
        lambda: torch.topk(torch.tensor(3.0), 1),
    ],
)
def test_what_does_not_suit_is_left_to_torch(asked, ask):
    expected = ask()
    with QuickTopK("cpu"):
        found = ask()
    assert not asked
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.indices, expected.indices)


def test_errors_are_those_of_torch(asked):
    with QuickTopK("cpu"), pytest.raises(RuntimeError, match="out of range"):
        torch.topk(ROWS, 17)


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_of_every_family_ask(family, asked):
    model = tiny_model(family)
    ids = torch.tensor([[5, 9, 33]])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with QuickTopK("cpu"):
            quick = model(input_ids=ids).logits
    assert torch.equal(plain, quick)
    gates = find_gates(model)
    # phimoe takes the largest, and then the largest of the others.
    assert (sum(k == gates[0].top_k for _, k in asked) >= len(gates)) == (family != "phimoe")


def test_it_is_traced():
    """Compiled code without a break asks the operator."""
    found: list[str] = []

    def backend(module: Any, inputs: Any) -> Any:
        found.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    def best(x: Any) -> Any:
        values, indices = torch.topk(x.softmax(-1), 4, dim=-1)
        return values / values.sum(-1, keepdim=True), indices

    compiled = torch.compile(best, fullgraph=True, backend=backend)
    with QuickTopK("cpu"):
        values, indices = compiled(ROWS)
    assert "expertflow.topk" in " ".join(found)
    assert torch.equal(values, best(ROWS)[0])
    assert torch.equal(indices, best(ROWS)[1])
