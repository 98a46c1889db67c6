"""Peaks of GPU memory are what was predicted, with one precision and with two."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.budget import Budget  # noqa: E402
from policies.session import Setup  # noqa: E402
from runtime.session import ReplaySession  # noqa: E402
from traces.sizes import model_sizes  # noqa: E402
from traces.store import write_trace  # noqa: E402
from traces.synth import SynthSettings, synthesise  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LAYERS, EXPERTS, TOP_K = 4, 64, 8


@pytest.fixture(scope="module", params=[1, 4])
def session(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("memory") / "made-up.parquet"
    settings = SynthSettings(
        layers=LAYERS, experts=EXPERTS, top_k=TOP_K, sequences=4, prompt=(90, 120),
        decode=(6, 9), seed=2,
    )  # fmt: skip
    spec = replace(model_sizes("olmoe"), layers=LAYERS, experts=EXPERTS, top_k=TOP_K)
    write_trace(path, spec, synthesise(settings), source="made up", license="none")
    made = ReplaySession(Setup(str(path), batch=request.param, sizes="olmoe"), device="cuda")
    made.open()
    yield made
    made.close()


def cublas_bytes():
    """What cuBLAS keeps for the two streams of a run; a profile's workspace has it."""
    one = torch.ones(64, 64, device="cuda")
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    result = one @ one
    kept = torch.cuda.memory_allocated() - before - result.untyped_storage().nbytes()
    torch._C._cuda_clearCublasWorkspaces()
    return 2 * kept


@pytest.mark.parametrize("policy", ["lru", "mixed"])
@pytest.mark.parametrize("cache", ["25%", "100%"])
def test_the_peak_of_a_replay(session, policy, cache):
    most = cublas_bytes()
    _, _, measured = session.run(policy, Budget(cache=cache))
    predicted = measured.gpu_predicted_bytes + most
    assert measured.gpu_peak_bytes == pytest.approx(predicted, rel=0.03)


def test_low_copies_leave_nothing_on_the_device(session):
    """Made before the peak is counted, once, and given back."""
    before = torch.cuda.memory_allocated()
    session.run("mixed", Budget(cache="25%"))
    low = session.real.store.low[0].data_ptr()
    session.run("mixed", Budget(cache="25%"))
    assert session.real.store.low[0].data_ptr() == low
    assert torch.cuda.memory_allocated() <= before + cublas_bytes() + 2**20
