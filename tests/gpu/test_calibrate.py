"""Calibration on a GPU: quick enough, complete, and true to a run that it did not see."""

from __future__ import annotations

import time

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

from policies.budget import Budget  # noqa: E402
from policies.costs import Costs  # noqa: E402
from policies.hardware import load_profile  # noqa: E402
from policies.session import Setup  # noqa: E402
from runtime.calibration.bench import Bench  # noqa: E402
from runtime.calibration.runs import Shape  # noqa: E402
from runtime.calibration.shapes import (  # noqa: E402
    FAMILIES,
    Decoding,
    offloaded,
    tiny_model,
)
from runtime.cli_calibrate import calibrate  # noqa: E402
from runtime.families import model_spec  # noqa: E402
from runtime.session import ReplaySession  # noqa: E402
from sim.session import Session  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A whole calibration: the profile, the seconds that it took, and its file."""
    path = tmp_path_factory.mktemp("calibrate") / "mine.toml"
    start = time.monotonic()
    words = ["--out", str(path), "--device", "cuda"]
    result = CliRunner().invoke(calibrate, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    print(result.output)
    return load_profile(path), time.monotonic() - start, path


def test_it_takes_less_than_five_minutes(measured):
    assert measured[1] < 300


def test_the_figures_are_of_this_world(measured):
    profile = measured[0]
    gpu, host, software = profile.gpu, profile.host, profile.software
    assert gpu.memory_bytes == torch.cuda.get_device_properties(0).total_memory
    assert 1e11 < gpu.memory_bytes_per_s < 2e13
    assert 1e13 < gpu.bf16_flops_per_s < 5e15
    assert 5e-7 < gpu.kernel_min_s < 2e-5
    rate = 2**28 / profile.link.h2d.copy_s(2**28, queued=True)
    assert 2e9 < rate < 1e12
    for seconds in (host.graph_launch_s, host.gate_sync_s, host.step_s):
        assert 5e-7 < seconds < 1e-3
    # A fit may give what a copy takes to the table that is told of it: together they are there.
    assert 5e-7 < host.copy_issue_s + host.table_update_s < 1e-3
    issuing = (host.copy_issue_s, host.late_issue_s, host.prefetch_issue_s, host.return_s)
    telling = (host.table_tell_s, host.table_update_s, host.miss_s, profile.link.wake_s)
    assert all(0 <= seconds < 2e-4 for seconds in (*issuing, *telling))
    for colds in (host.policy_cold_share, host.policy_cold_most_s):
        assert {"lru", "predictive"} <= set(colds) <= set(host.policy_event_s)
    assert host.policy_event_s["lru"] < host.policy_event_s["predictive"] < 1e-3
    assert set(host.policy_miss_s) == set(host.policy_event_s)
    assert all(0 <= seconds < 1e-3 for seconds in software.policy_layer_s.values())
    assert set(software.layer_floor_s) == {*FAMILIES, "any"}
    assert all(5e-6 < seconds < 1e-3 for seconds in software.layer_floor_s.values())
    assert all(0.0005 < share <= 1 for share in software.kv_efficiency.values())
    assert all(0 <= seconds < 1e-6 for seconds in software.kv_token_s.values())
    assert 0.2 < software.dense_efficiency <= 1
    one_graph(profile)
    # Of the rate of long copies: part of small experts may still lie in the cache beside it.
    assert 0.2 < profile.expert.fused_efficiency < 1.3
    assert 0.2 < profile.expert.memory_efficiency <= 1
    assert 0 < gpu.workspace_bytes < 2**30


def one_graph(profile):
    """What is said of decode steps as one graph each."""
    whole, software = profile.whole, profile.software
    assert whole is not None
    assert 5e-7 < whole.handshake_s < 1e-5
    ways = (whole.answer_s, whole.notice_s, whole.publish_s)
    assert all(0 < seconds < 2e-5 for seconds in ways)
    assert 0 <= whole.follow_s < 5e-5
    assert 2e-6 < whole.launch_s < 2e-3
    for mine, theirs in (
        (whole.layer_floor_s, software.layer_floor_s),
        (whole.several_floor_s, software.several_floor_s),
    ):
        assert set(mine) == {*FAMILIES, "any"}
        # The same kernels, less what begins and ends a graph.
        assert all(0.2 * theirs[name] < mine[name] < 1.2 * theirs[name] for name in mine)
    for name in ("handshake_s", "answer_s", "follow_s", "layer_floor_s"):
        assert profile.source_of(f"whole.{name}").startswith("measured: ")


#: A name by which costs know a model's family.
SPEC_NAMES = {"qwen3_moe": "a small qwen3", "mixtral": "a small mixtral"}


@pytest.mark.parametrize("family", SPEC_NAMES)
def test_a_resident_step_takes_what_the_profile_says(measured, family):
    """Another depth than those that were fitted, everything held, one token."""
    profile, bench, layers = measured[0], Bench(torch.device("cuda")), 6
    spec = model_spec(tiny_model(family, layers, bench), SPEC_NAMES[family])
    with offloaded(family, layers, bench) as model:
        found = Decoding(model, bench, 256).step_s(60)
    costs = Costs(profile, spec, cache_tokens=256)
    assert costs.graph is not None
    expected = layers * costs.layer_s("lru") + costs.graph.launch_s + costs.step_s
    assert found == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    ("sizes", "compute"), [("olmoe", "graph"), ("qwen3-30b", "graph"), ("olmoe", "fused")]
)
def test_a_resident_run_takes_what_is_simulated(measured, tmp_path, sizes, compute, batch):
    """Layers of published sizes, which nothing was fitted to, in both worlds; all is held."""
    profile, trace = str(measured[2]), tmp_path / "t.parquet"
    Shape(12, 512, 128, 48, experts=16, top_k=4).write(trace, 2 * batch)
    setup = Setup(str(trace), batch=batch, sizes=sizes, hardware=profile, compute=compute)
    expected = Session(setup).run("lru", Budget(cache="100%"))[0]
    real = ReplaySession(setup, "cuda", compute=compute)
    try:
        found = real.run("lru", Budget(cache="100%"))[0]
    finally:
        real.close()
    assert found.decisions_sha256 == expected.decisions_sha256
    took, said = (one.time["tpot_s"]["p50"] for one in (found, expected))
    assert took == pytest.approx(said, rel=0.1)
