"""Hardware profiles: reading them strictly, and what they answer."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from policies.costs import Costs
from policies.hardware import (
    FIGURES,
    PROFILES,
    SOURCES,
    HardwareProfile,
    load_profile,
    profile_names,
)
from policies.link_times import CopyTable
from policies.tables import leaves
from sim.cli import hardware
from traces.errors import InputError
from traces.sizes import model_sizes, size_names

H200 = load_profile("h200-pcie5")
MIB = 2**20

#: Host time of a bare eager launch: five of them are the shortest eager expert, 50 us.
EAGER_LAUNCH_S = 10e-6


def test_the_profiles_that_ship() -> None:
    assert profile_names() == [
        "a100-pcie4",
        "a40-pcie4",
        "gh200-c2c",
        "h100-captured",
        "h100-pcie5",
        "h200-pcie5",
        "rtx3090-pcie4",
        "rtx4090-pcie4",
        "rtx5090-pcie5",
    ]
    measured = [n for n in profile_names() if load_profile(n).kind == "measured"]
    assert measured == ["h100-captured", "h200-pcie5"]


@pytest.mark.parametrize("name", profile_names())
def test_every_figure_has_a_source(name: str) -> None:
    profile = load_profile(name)
    for path in leaves(profile, FIGURES):
        kind, _, words = profile.source_of(path).partition(": ")
        assert kind in SOURCES, path
        assert words, path
        if profile.kind == "datasheet":
            assert kind != "measured", path


@pytest.mark.parametrize("name", profile_names())
@pytest.mark.parametrize("way", ["h2d", "d2h"])
def test_copies_take_longer_when_larger_and_less_when_queued(name: str, way: str) -> None:
    direction = getattr(load_profile(name).link, way)
    sizes = [2**i for i in range(10, 33)]
    for queued in (False, True):
        seconds = [direction.copy_s(size, queued) for size in sizes]
        assert seconds == sorted(seconds)
        assert seconds[0] > 0
    assert all(direction.copy_s(s, True) <= direction.copy_s(s, False) * 1.0001 for s in sizes)


def test_the_measured_link_is_reproduced() -> None:
    h2d = H200.link.h2d
    isolated_us = {65_536: 13, MIB: 27, 4 * MIB: 84, 9_437_184: 180, 17_301_504: 323}
    isolated_us |= {352_321_536: 6355, 2**30: 19340}
    for size, wanted in isolated_us.items():
        assert h2d.copy_s(size, queued=False) * 1e6 == pytest.approx(wanted)
    for size, wanted in {MIB: 48.5, 9_437_184: 54.7, 17_301_504: 55.1, 2**30: 55.5}.items():
        assert size / h2d.copy_s(size, queued=True) / 1e9 == pytest.approx(wanted, rel=2e-3)


def test_a_slow_small_copy_does_not_break_the_order() -> None:
    """4 KiB was measured at 16 us, 64 KiB at 13 us: the smaller is taken to be 13 us too."""
    assert H200.link.h2d.isolated.seconds[0] == 16e-6
    assert H200.link.h2d.copy_s(4096, queued=False) == 13e-6
    assert H200.link.h2d.copy_s(1, queued=False) == 13e-6


def test_copies_go_on_beyond_the_table() -> None:
    table = CopyTable((100, 200, 400), (1.0, 2.0, 3.0))
    assert table.copy_s(150) == 1.5
    assert table.copy_s(600) == 4.0
    assert table.copy_s(50) == 0.5
    assert table.copy_s(0) == 0.0


@given(
    st.lists(st.integers(1, 10**9), min_size=2, max_size=8, unique=True),
    st.lists(st.floats(1e-6, 1.0), min_size=8, max_size=8),
    st.lists(st.integers(0, 2 * 10**9), min_size=2, max_size=2),
)
def test_any_table_is_monotone(sizes: list[int], seconds: list[float], pair: list[int]) -> None:
    times = [*seconds[: len(sizes) - 1], 2.0]
    table = CopyTable(tuple(sorted(sizes)), tuple(times))
    small, large = sorted(pair)
    assert table.copy_s(small) <= table.copy_s(large) * (1 + 1e-9)


def test_expert_times_are_the_measured_ones() -> None:
    """In a graph within 7 %; eager within 18 % (its gaps), from 256 tokens on within 11 %."""
    for row in H200.expert_rows:
        flops = row.expert_bytes  # two per weight, two bytes per weight
        assert H200.expert_s(row.expert_bytes, flops, 1) == pytest.approx(row.graph_s, rel=0.07)
        launches_s = H200.expert.kernels * EAGER_LAUNCH_S
        for tokens, measured in zip(row.tokens, row.eager_s, strict=True):
            eager_s = max(launches_s, H200.expert_s(row.expert_bytes, flops, tokens))
            within = 0.11 if tokens >= 256 else 0.18
            assert eager_s == pytest.approx(measured, rel=within), (row.model, tokens)


def test_expert_rows_are_experts_of_known_models() -> None:
    assert len(H200.expert_rows) == 4
    for row in H200.expert_rows:
        assert row.expert_bytes == model_sizes(row.model).expert_bytes


def test_a_resident_step_costs_what_was_measured() -> None:
    """12 layers of Qwen3-30B's dimensions, batch 1, batched_mm: 14.0 ms, 979 kernels."""
    software, host = H200.software, H200.host
    kernels = software.attention_kernels + H200.group_kernels(8)
    outside = round(host.step_s / host.kernel_launch_s)
    assert 12 * kernels + outside == 979
    assert 12 * kernels * host.kernel_launch_s + host.step_s == pytest.approx(14.0e-3, rel=0.01)
    model = model_sizes("qwen3-30b")
    gpu_s = H200.group_s(model.expert_bytes, 2 * model.expert_params, [1] * 8)
    assert gpu_s < H200.group_kernels(8) * host.kernel_launch_s, "it should be bound by the host"


def test_experts_together_cost_no_more_than_one_by_one() -> None:
    model = model_sizes("qwen3-30b")
    size, flops = model.expert_bytes, 2 * model.expert_params
    alone = H200.expert_s(size, flops, 3)
    assert H200.group_s(size, flops, [3] * 8) < 8 * alone
    many = H200.group_s(size, flops, [2000] * 8)
    assert many == pytest.approx(8 * H200.expert_s(size, flops, 2000))


def test_more_tokens_never_take_less_time() -> None:
    for name in profile_names():
        profile = load_profile(name)
        for sizes in size_names():
            model = model_sizes(sizes)
            expert = (model.expert_bytes, 2 * model.expert_params)
            times = [profile.expert_s(*expert, 4**i) for i in range(8)]
            assert times == sorted(times)
            cpu = [profile.cpu_expert_s(*expert, 4**i) for i in range(8)]
            assert cpu == sorted(cpu)


def test_a_cpu_expert_is_bound_by_memory_then_by_operations() -> None:
    assert H200.cpu_expert_s(1e9, 1e9, 1) == pytest.approx(1e9 / H200.cpu.expert_bytes_per_s)
    assert H200.cpu_expert_s(1e9, 1e9, 999) == pytest.approx(999e9 / H200.cpu.flops_per_s)


def test_a_profile_becomes_json() -> None:
    values = json.loads(json.dumps(H200.to_dict()))
    assert values["gpu"]["name"] == "NVIDIA H200"
    assert values["link"]["h2d"]["queued"]["sizes_bytes"][0] == MIB
    assert values["measurement"]["date"] == "2026-11-23"


def test_what_only_graphs_need_is_optional() -> None:
    """A profile without it runs eagerly, and neither shows it nor needs sources for it."""
    assert H200.host.graph_launch_s == H200.host.move_s == H200.gpu.workspace_bytes == 0
    assert H200.host.policy_event_s == H200.software.layer_floor_s == {}
    assert H200.software.dense_efficiency == 1.0
    shown = set(leaves(H200, FIGURES))
    assert {path for path in shown if "graph" in path or "policy" in path} == set()
    assert H200.host.miss_s == H200.host.table_tell_s == H200.link.wake_s == 0
    assert H200.host.policy_miss_s == H200.software.policy_layer_s == {}
    assert H200.software.kv_token_s == {}
    assert Costs(H200, model_sizes("olmoe")).graph is None
    assert hash(H200.host) == hash(load_profile("h200-pcie5").host)


def test_a_profile_with_graphs(tmp_path: Path) -> None:
    values = json.loads(json.dumps(A40))
    values["host"] |= {"graph_launch_s": 7e-6, "policy_event_s": {"lru": 1e-5}}
    values["software"]["layer_floor_s"] = {"any": 4e-5, "olmoe": 5e-5}
    values["gpu"]["workspace_bytes"] = 1000
    values["sources"]["host.graph_launch_s"] = "assumed: for a test"
    values["sources"]["host.policy_event_s"] = "assumed: for a test"
    path = tmp_path / "graphs.toml"
    path.write_text("\n".join(f"{key} = {_toml(value)}" for key, value in values.items()))
    profile = load_profile(path)
    assert profile.host.policy_event_s == {"lru": 1e-5}
    assert profile.gpu.workspace_bytes == 1000
    shown = CliRunner().invoke(hardware, [str(path)]).output
    assert "host.graph_launch_s" in shown
    assert "host.policy_event_s" in shown
    assert "host.table_update_s" not in shown
    graph = Costs(profile, model_sizes("olmoe")).graph
    assert graph is not None
    assert (graph.launch_s, graph.floor_s) == (7e-6, 5e-5)


def test_an_efficiency_scales_reading_alone() -> None:
    whole, half = (H200.roofline_s(1e9, 0.0, efficiency=share) for share in (1.0, 0.5))
    assert half == pytest.approx(2 * whole)
    assert H200.roofline_s(1e9, 0.0) == pytest.approx(whole / H200.expert.memory_efficiency)


def test_sources_are_looked_up_by_the_longest_path() -> None:
    assert H200.source_of("link.h2d.queued.seconds").startswith("measured: pinned")
    assert H200.source_of("host.event_s").startswith("assumed")
    assert H200.source_of("nothing.at_all") == ""


def test_a_profile_can_be_read_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((PROFILES / "a40-pcie4.toml").read_text())
    for where in (path, str(path)):
        profile = load_profile(where)
        assert isinstance(profile, HardwareProfile)
        assert profile.name == "mine"
        assert profile.gpu == load_profile("a40-pcie4").gpu


A40 = tomllib.loads((PROFILES / "a40-pcie4.toml").read_text())


WHOLE = {"handshake_s": 3e-6, "answer_s": 2e-6, "notice_s": 0.0, "publish_s": 1e-6}


def _set(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    *parents, last = path.split("/")

    def change(profile: dict[str, Any]) -> None:
        for parent in parents:
            profile = profile[parent]
        if value is None:
            del profile[last]
        else:
            profile[last] = value

    return change


def _toml(value: Any) -> str:
    """Just enough TOML for a profile: inline tables, lists, texts, numbers."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value) if isinstance(value, str | bool) else repr(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("gpu/memory_bytes", "48 GB"), "gpu.memory_bytes is '48 GB', expected a whole number"),
        (_set("gpu/memory_bytes", 1.5), "gpu.memory_bytes is 1.5, expected a whole number"),
        (_set("gpu/memory_bytes", -1), "gpu.memory_bytes is -1, expected a whole number above 0"),
        (_set("gpu/memory_bytes", True), "gpu.memory_bytes is True"),
        (_set("gpu/name", 7), "gpu.name is 7, expected a text"),
        (_set("gpu/name", ""), "gpu.name is empty"),
        (_set("gpu/kernel_min_s", float("nan")), "gpu.kernel_min_s is nan, expected a number"),
        (_set("gpu/kernel_min_s", None), "key 'gpu.kernel_min_s' is missing"),
        (_set("gpu/bandwidth", 3), "unknown key 'gpu.bandwidth', expected name, memory_bytes"),
        (_set("gpu", 3), "gpu is 3, expected a table"),
        (_set("gpu", None), "key 'gpu' is missing"),
        (_set("name", "x"), "unknown key 'name'"),
        (_set("kind", "guessed"), "kind is 'guessed', expected measured or datasheet"),
        (_set("kind", "measured"), "[measurement] belongs to kind 'measured'"),
        (_set("software/expert_kernels_each", -1), "software.expert_kernels_each is -1"),
        (_set("link/h2d/queued/seconds", 3), "link.h2d.queued.seconds is 3, expected a list"),
        (_set("link/h2d/queued/seconds", [1e-6]), "link.h2d.queued: 2 sizes_bytes and 1 seconds"),
        (_set("link/h2d/queued/seconds", [2e-6, 1e-6]), "the last of seconds is not the longest"),
        (_set("link/h2d/queued/seconds", [1.0, 2.0]), "link.h2d: queued copies of 4096 bytes"),
        (_set("link/h2d/queued/sizes_bytes", [9, 9]), "sizes_bytes are not rising"),
        (_set("link/h2d/queued/sizes_bytes", [1, "a"]), "sizes_bytes[1] is 'a'"),
        (_set("gpu/workspace_bytes", -1), "gpu.workspace_bytes is -1"),
        (_set("host/policy_event_s", {"lru": -1}), "host.policy_event_s.lru is -1, expected a"),
        (_set("host/policy_event_s", 3), "host.policy_event_s is 3, expected a table"),
        (_set("software/layer_floor_s", {"any": "x"}), "software.layer_floor_s.any is 'x'"),
        (_set("software/layer_floor_s", {"olmoe": 1e-5}), "'software.layer_floor_s.any' is mis"),
        (_set("software/kv_efficiency", {"any": 0}), "software.kv_efficiency.any is 0, expected"),
        (_set("software/kv_efficiency", {"olmoe": 1}), "'software.kv_efficiency.any' is missing"),
        (_set("software/kv_token_s", {"olmoe": 1}), "'software.kv_token_s.any' is missing"),
        (_set("host/policy_miss_s", {"lru": -1}), "host.policy_miss_s.lru is -1, expected a"),
        (_set("host/table_tell_s", -1), "host.table_tell_s is -1, expected a number of at least 0"),
        (_set("host/table_rewrite_s", 1e-4), "unknown key 'host.table_rewrite_s', expected"),
        (_set("software/policy_layer_s", {"mixed": "x"}), "software.policy_layer_s.mixed is 'x'"),
        (_set("link/wake_s", -1), "link.wake_s is -1, expected a number of at least 0"),
        (_set("link/wake_s", 1e-6), "sources: nothing is said of link.wake_s"),
        (_set("whole", {"answer_s": 1e-6}), "key 'whole.handshake_s' is missing"),
        (_set("whole", WHOLE | {"notice_s": -1}), "whole.notice_s is -1, expected a number of at"),
        (_set("whole", WHOLE | {"poll_s": 1}), "unknown key 'whole.poll_s', expected handshake_s"),
        (_set("whole", WHOLE), "sources: nothing is said of whole.handshake_s"),
        (_set("software/dense_efficiency", 0), "software.dense_efficiency is 0, expected a nu"),
        (_set("sources/cpu", None), "sources: nothing is said of cpu.expert_bytes_per_s"),
        (_set("sources/cpu", "hearsay: a friend"), "sources.cpu is 'hearsay: a friend'"),
        (_set("sources/cpu", 3), "sources.cpu is 3, expected a text"),
        (_set("sources/tpu", "assumed: none"), "sources.tpu names no figure"),
        (_set("sources", ["a"]), "sources is ['a'], expected a table"),
    ],
)
def test_a_bad_profile_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    values = json.loads(json.dumps(A40))
    change(values)
    path = tmp_path / "bad.toml"
    path.write_text("\n".join(f"{key} = {_toml(value)}" for key, value in values.items()))
    with pytest.raises(InputError) as caught:
        load_profile(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert message in text
    assert "\n" not in text


def test_graphs_need_a_floor(tmp_path: Path) -> None:
    values = json.loads(json.dumps(A40))
    values["host"]["graph_launch_s"] = 7e-6
    values["sources"]["host"] = "assumed: for a test"
    path = tmp_path / "bad.toml"
    path.write_text("\n".join(f"{key} = {_toml(value)}" for key, value in values.items()))
    with pytest.raises(InputError, match=r"expected software\.layer_floor_s as well"):
        load_profile(path)


def test_whole_steps_need_a_chain_for_the_others(tmp_path: Path) -> None:
    """And say nothing of floors and launches that are those of the chain."""
    values = json.loads(json.dumps(A40)) | {"whole": WHOLE}
    values["sources"] |= {"whole": "assumed: for a test", "host": "assumed: for a test"}
    path = tmp_path / "whole.toml"
    path.write_text("\n".join(f"{key} = {_toml(value)}" for key, value in values.items()))
    with pytest.raises(InputError, match=r"\[whole\] is given, expected host\.graph_launch_s as"):
        load_profile(path)
    values["host"]["graph_launch_s"] = 7e-6
    values["software"]["layer_floor_s"] = {"any": 4e-5}
    path.write_text("\n".join(f"{key} = {_toml(value)}" for key, value in values.items()))
    profile = load_profile(path)
    costs = Costs(profile, model_sizes("olmoe")).whole
    assert costs is not None
    assert (costs.launch_s, costs.floor_s, costs.handshake_s) == (7e-6, 4e-5, 3e-6)
    shown = CliRunner().invoke(hardware, [str(path)]).output
    assert "whole.answer_s" in shown
    assert "whole.follow_s" not in shown
    assert load_profile("a40-pcie4").whole is None


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(InputError, match="no profile 'H200'; did you mean 'h200-pcie5'"):
        load_profile("H200")
    with pytest.raises(InputError, match=r"no profile 'qqq' \(known: a100-pcie4"):
        load_profile("qqq")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml: No such file"):
        load_profile(tmp_path / "none.toml")
    with pytest.raises(InputError, match="Is a directory"):
        load_profile(f"{tmp_path}/")
    for content in (b"a = = 1", b"\xff\xfe"):
        path = tmp_path / "broken.toml"
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a TOML file") as caught:
            load_profile(path)
        assert "\n" not in str(caught.value)


def test_the_command_lists_profiles_and_sizes() -> None:
    result = CliRunner().invoke(hardware, [])
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.output.splitlines() if line}
    for name in [*profile_names(), *size_names()]:
        assert name in lines
    assert "measured" in lines["h200-pcie5"]
    assert "2026-11-23" in lines["h200-pcie5"]
    assert "datasheet" in lines["a40-pcie4"]
    assert "352.3" in lines["mixtral-8x7b"]
    assert "config.json" in lines["mixtral-8x7b"]


def test_the_command_shows_one_profile() -> None:
    result = CliRunner().invoke(hardware, ["gh200-c2c"])
    for path in leaves(load_profile("gh200-c2c"), FIGURES):
        assert path in result.output
    assert "reported: 411 GB/s" in result.output


def test_the_command_writes_json(tmp_path: Path) -> None:
    whole = json.loads(CliRunner().invoke(hardware, ["--json"]).output)
    assert list(whole["profiles"]) == profile_names()
    assert list(whole["sizes"]) == size_names()
    path = tmp_path / "hardware.json"
    result = CliRunner().invoke(hardware, ["a40-pcie4", "--json", str(path)])
    assert result.output == ""
    one = json.loads(path.read_text())
    assert one["profiles"]["a40-pcie4"] == whole["profiles"]["a40-pcie4"]


def test_the_command_through_the_front_door() -> None:
    command = [sys.executable, "-m", "simctl", "hardware", "h20-pcie5"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROFILES.parents[1])
    assert done.returncode == 2
    assert "did you mean 'h200-pcie5'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_command_needs_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'matplotlib', 'pandas', 'pyarrow', 'simpy'}"
    script = f"import sys, sim.cli; print(sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROFILES.parents[1])
    assert done.stdout.strip() == "[]", done.stderr
