# ruff: noqa: F811
"""Who says how decode steps run: chains of graphs or one graph each, in commands and sessions."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import simctl
from policies.budget import Budget
from policies.hardware import load_profile
from policies.session import Setup
from sim.session import Session
from tests.helpers_whole import whole, write_profile
from tests.unit.validate_fakes import real, small  # noqa: F401
from traces.errors import InputError

PLAIN = load_profile("h200-pcie5")


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """Files of a machine that knows steps in one graph, and of one that knows chains alone."""
    folder = tmp_path_factory.mktemp("profiles")
    known = whole(PLAIN)
    return {
        "graph": str(write_profile(folder / "whole.toml", known)),
        "fused": str(write_profile(folder / "chains.toml", replace(known, whole=None))),
    }


def simulated(capsys, trace, *words):
    options = ("--policy", "predictive", "--trace", str(trace), "--slots", "12", "--json", "-")
    assert simctl.main(["run", *options, *words]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_in_one_graph_where_the_profile_knows_it_unless_chains_are_asked_for(
    capsys, small, profiles
):
    both, chains = (("--hardware", profiles[name]) for name in ("graph", "fused"))
    default = simulated(capsys, small, *both)
    asked = simulated(capsys, small, *both, "--compute", "graph")
    chained = simulated(capsys, small, *both, "--compute", "fused")
    assert default["time"] == asked["time"] != chained["time"]
    assert chained["time"] == simulated(capsys, small, *chains)["time"]
    assert len({found["decisions_sha256"] for found in (default, chained)}) == 1


def test_what_the_profile_does_not_know_is_refused(capsys, small, profiles):
    words = ["--policy", "lru", "--trace", str(small), "--compute", "graph"]
    for command in ("run", "compare", "validate"):
        assert simctl.main([command, *words, "--hardware", profiles["fused"]]) == 2
        error = capsys.readouterr().err
        assert "--compute graph: hardware profile chains has no section [whole]" in error
        assert "simctl calibrate" in error
        assert error.count("\n") == 1
    with pytest.raises(InputError, match="--compute eager: expected one of graph"):
        Session(Setup(trace=str(small), compute="eager"))


def test_costs_of_one_graph_are_there_where_such_steps_are_simulated(small, profiles):
    for compute, known in ((None, True), ("graph", True), ("fused", False), ("reference", False)):
        session = Session(Setup(str(small), hardware=profiles["graph"], compute=compute))
        costs = session.prepare("lru", Budget(slots=12)).costs
        assert (costs.whole is not None) == known
        assert costs.graph is not None


@pytest.mark.parametrize(
    ("device", "profile", "asked", "runs", "simulates"),
    [
        ("cuda", "graph", None, "graph", "graph"),
        ("cuda", "graph", "fused", "fused", "fused"),
        ("cuda", "graph", "reference", "reference", "reference"),
        ("cuda", "fused", None, "fused", "fused"),
        ("cpu", "graph", None, "reference", "reference"),
        ("cpu", "graph", "graph", "graph", "reference"),
    ],
)
def test_validate_simulates_what_runs(
    capsys, real, small, profiles, monkeypatch, device, profile, asked, runs, simulates
):
    pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
    monkeypatch.setattr("reports.cli_validate._device", lambda asked: device)
    words = ["--policy", "lru", "--trace", str(small), "--slots", "12", "--json", "-"]
    words += ["--hardware", profiles[profile], *(("--compute", asked) if asked else ())]
    real.measured["link_bytes_per_s"] = 1e12
    simctl.main(["validate", *words])
    [cell] = json.loads(capsys.readouterr().out)["cells"]
    [opened] = real.opened
    setup, asked_device, compute = opened.arguments
    assert (asked_device, compute, setup.compute) == (device, runs, simulates)
    assert cell["compute"] == runs
    # The stand-in for the real world goes by the same setup.
    assert cell["error"] == pytest.approx(0)
