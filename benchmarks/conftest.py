"""Where the benchmarks get their trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from traces.sizes import model_sizes

#: The model whose recorded trace sets the targets; the synthetic one has its statistics.
SHAPE = model_sizes("gpt-oss-20b")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--routing", help="Trace to run; synthetic in gpt-oss-20b's shape if absent.")
    parser.addoption("--tokens", type=int, default=20_000, help="Tokens of the synthetic trace.")


@pytest.fixture(scope="session")
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parquet trace: the one that was given, or a synthetic one."""
    given = request.config.getoption("--routing")
    if given:
        return Path(given)
    path = tmp_path_factory.mktemp("trace") / "synthetic.parquet"
    import simctl

    tokens = request.config.getoption("--tokens")
    options = {
        "--layers": SHAPE.layers,
        "--experts": SHAPE.experts,
        "--top-k": SHAPE.top_k,
        "--sizes": "gpt-oss-20b",
        "--sequences": max(tokens // 320, 1),
        "--prompt": 0,
        "--decode": 320,
        "--skew": 0.09,
        "--repetition": 0.3,
        "--correlation": 0.49,
    }
    words = [str(word) for pair in options.items() for word in pair]
    assert simctl.main(["trace", "synth", str(path), *words]) == 0
    return path
