"""Live runs on a GPU: decode graphs over one cache, and decisions that the simulator repeats."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

import runtime.live  # noqa: E402
import simctl  # noqa: E402
from policies.budget import Budget  # noqa: E402
from policies.decisions import DecisionLog  # noqa: E402
from runtime.generate import open_offloaded  # noqa: E402
from runtime.live import LiveSettings, run_live  # noqa: E402
from sim.session import Session  # noqa: E402
from tests.helpers_checkpoint import tiny_checkpoint  # noqa: E402
from traces.store import open_trace  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PROMPTS = ["w5 w9 w33 w12", "w40 w3", "w11 w60 w22 w7 w8", "w13", "w20 w21 w22"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "tiny-mixtral"
    return tiny_checkpoint(folder, layers=4, dtype=torch.bfloat16)


@pytest.mark.parametrize("compute", ["fused", "reference"])
@pytest.mark.parametrize(
    ("policy", "batch", "slots"),
    [("lru", 1, 9), ("lru", 3, 4), ("predictive", 2, 12), ("mixed", 1, 14), ("mixed", 3, 14)],
)
def test_the_simulator_decides_alike(tiny, tmp_path, monkeypatch, policy, batch, slots, compute):
    chains = []

    def opening(*arguments, **options):
        opened = open_offloaded(*arguments, **options)
        if opened.runner.graphs is not None:
            chains.append(opened.runner.graphs)
        return opened

    monkeypatch.setattr(runtime.live, "open_offloaded", opening)
    settings = {"device": "cuda", "max_new_tokens": 8, "batch": batch, "compute": compute}
    logs = DecisionLog(keep=True), DecisionLog(keep=True)
    path, found, recording, measured = run_live(
        tiny, prompts=PROMPTS, policy=policy, budget=Budget(slots=slots),
        out=tmp_path / "live.parquet", log=logs[1], spans=True, **settings,
    )  # fmt: skip
    setup = LiveSettings(**settings).setup(path)
    expected, _ = Session(setup).run(policy, Budget(slots=slots), log=logs[0])
    assert list(logs[0].numbers) == list(logs[1].numbers)
    assert len(logs[1].numbers) > 50
    assert expected.decisions_sha256 == found.decisions_sha256
    assert (expected.held, expected.missed) == (found.held, found.missed)
    assert expected.bytes["demand"] == found.bytes["demand"]
    assert found.world == "gpu"
    assert sum(found.breakdown_s.values()) == pytest.approx(found.time["total_s"], rel=0.05)
    assert measured.gpu_peak_bytes > 0
    assert recording.spans
    assert [len(s) - s.prefill for s in open_trace(path).sequences()] == [7] * len(PROMPTS)
    if compute == "fused":
        # One chain for each batch size, captured before the clock started.
        sizes = {min(batch, len(PROMPTS) - at) for at in range(0, len(PROMPTS), batch)}
        assert len(chains) == 1
        assert len(measured.step_s) == 7 * -(-len(PROMPTS) // batch)
        assert max(measured.step_s) < 0.5, f"a capture was timed ({len(sizes)} batch sizes)"
    else:
        assert not chains


def test_the_command_writes_text(tiny, capsys, monkeypatch):
    monkeypatch.setitem(simctl.COMMANDS, "generate", "runtime.cli_generate:generate")
    words = ["generate", "--model", str(tiny), "--policy", "predictive", "--slots", "12"]
    words += ["--device", "cuda", "--prompt", "w5 w9 w33", "--max-new-tokens", "12"]
    free = torch.cuda.memory_allocated()
    assert simctl.main(words) == 0
    printed = capsys.readouterr()
    assert len(printed.out.split()) == 12
    assert "on the CUDA" in printed.err
    assert "GPU" in printed.err.splitlines()[-1]
    assert torch.cuda.memory_allocated() <= free + 2**20
