"""benchmarks/side_by_side: names, agreement, the table, and a dry run on the CPU."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import runtime
from benchmarks.side_by_side import child, launch
from benchmarks.side_by_side.__main__ import main
from benchmarks.side_by_side.agreement import agreement
from benchmarks.side_by_side.model import make_model
from benchmarks.side_by_side.plan import FULL, NARROW, SYSTEMS, TINY, YARDSTICK, System, Task
from benchmarks.side_by_side.render import BEGIN, END, put_into, render
from benchmarks.side_by_side.systems import GraphRunner, Runner
from benchmarks.side_by_side.tokens import draw_text, forced_tokens
from benchmarks.side_by_side.worker import measure, reference, work
from traces.errors import InputError

TASK = Task(
    system=YARDSTICK,
    shape=TINY,
    device="cpu",
    dtype="float32",
    prompt_tokens=8,
    decode_tokens=6,
    warmup_tokens=2,
    forced_tokens=6,
    seed=0,
)
RUN = (YARDSTICK, "ours:lru@50%", "moe-policylang:lru@50%")


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("ours:lru@50%", 768),
        ("ours:predictive@100%", 1536),
        ("ours:lru@floor", 8),
        ("moe-policylang:lru@25%", 384),
        ("accelerate", None),
        ("transformers:eager", None),
    ],
)
def test_slots_of_a_system(name: str, slots: int | None) -> None:
    assert System.parse(name).slots(FULL) == slots


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--systems", "vllm"], "system 'vllm': 'vllm' is none of"),
        (
            ["--systems", "transformers:fast"],
            "'fast' found after transformers, expected",
        ),
        (["--systems", "accelerate:x"], "'x' found after accelerate, expected nothing"),
        (["--systems", "accelerate@50%"], "a share '50%' found, accelerate has no slots"),
        (["--systems", "ours:lru"], "share '' found, expected say 50%"),
        (["--systems", "ours@50%"], "no policy found"),
        (["--systems", "ours:lru@0%"], "share '0%' found"),
        (["--systems", "moe-policylang:lru@floor"], "share 'floor' found"),
        (["--slow-steps", "0"], "--slow-steps: 0 found, expected 1 or more"),
        (["--layers", "0"], "--layers: 0 found"),
        (["--render", "absent.json"], "absent.json: "),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--tiny", "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_the_default_table_names_known_systems() -> None:
    kinds = {System.parse(name).kind for name in SYSTEMS}
    assert kinds == {"transformers", "accelerate", "moe-policylang", "ours"}


def test_a_machine_without_the_device_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["--tiny", "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch sees no CUDA device" in capsys.readouterr().err


def test_fewer_decoded_tokens_read_the_beginning_of_the_same_text() -> None:
    _, text = forced_tokens(TASK)
    _, short = forced_tokens(replace(TASK, decode_tokens=2, warmup_tokens=1))
    assert torch.equal(text, short)
    assert text.shape == (1, TASK.prompt_tokens + TASK.forced_tokens)


def test_a_text_repeats_itself_as_text_does() -> None:
    """Real ones: 47 to 49 % of the tokens 32 to 92 came before; 63 to 66 % are distinct."""
    generator = torch.Generator().manual_seed(0)
    texts = [draw_text(92, FULL.vocab, generator).tolist() for _ in range(40)]
    before = [text[at] in text[:at] for text in texts for at in range(32, 92)]
    assert 0.42 < np.mean(before) < 0.54
    assert 0.58 < np.mean([len(set(text)) / len(text) for text in texts]) < 0.70
    assert min(map(min, texts)) == 0
    assert max(map(max, texts)) < FULL.vocab


def _routes(model: Any, ids: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of each layer: the experts int64 [T, k] its gate chose, and what it saw [T, hidden]."""
    chosen, seen = list[torch.Tensor](), list[torch.Tensor]()

    def record(module: torch.nn.Module, given: tuple[Any, ...], made: tuple[Any, ...]) -> None:
        chosen.append(made[2])
        seen.append(given[0].reshape(-1, given[0].shape[-1]))

    hooks = [layer.mlp.gate.register_forward_hook(record) for layer in model.model.layers]
    model(ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return chosen, seen


def _common(one: torch.Tensor, other: torch.Tensor) -> float:
    """The share of the experts [T, k] of *one* that are in the same row of *other*."""
    return float((one[:, :, None] == other[:, None, :]).any(-1).double().mean())


def test_routing_is_varied_as_it_is_on_text() -> None:
    """Neither all tokens alike nor all different, and the next layers can be foreseen.

    What a trained model of 64 experts, top-8, does on text, as ``simctl trace info`` tells for
    ``traces/samples/granular-64x8.parquet``: tokens in a row share 2.5 times as many experts
    as chance has it; the gates of the next three layers name 77, 68 and 61 % beforehand.
    """
    shape = replace(NARROW, hidden=128, heads=4, kv_heads=1, moe_intermediate=48)
    shape = replace(shape, weight_std=0.08, gate_std=0.2)
    task = replace(TASK, shape=shape, prompt_tokens=32, forced_tokens=60)
    with torch.no_grad():
        model = make_model(task, torch.float32)
        chosen, seen = _routes(model, forced_tokens(task)[1])
        by_chance = shape.top_k / shape.experts
        for layer in (0, shape.layers - 1):
            shared = _common(chosen[layer][33:], chosen[layer][32:-1])
            assert 1.2 * by_chance < shared < 6 * by_chance, layer
        gates = [layer.mlp.gate.weight for layer in model.model.layers]
        for ahead, expected in ((1, 0.77), (2, 0.68), (3, 0.61)):
            found = [
                _common((state @ gate.T).topk(shape.top_k).indices, real)
                for state, gate, real in zip(
                    seen[:-ahead], gates[ahead:], chosen[ahead:], strict=True
                )
            ]
            assert np.mean(found) == pytest.approx(expected, abs=0.08)
    counts = torch.stack([layer.flatten().bincount(minlength=128) for layer in chosen])
    assert counts.max() > 3 * counts.double().mean()


def test_rounding_seldom_changes_a_choice() -> None:
    """Many experts are close, but bfloat16 must not make another model of it."""
    shape = replace(NARROW, layers=4, hidden=128, heads=4, kv_heads=1, moe_intermediate=48)
    shape = replace(shape, weight_std=0.08, gate_std=0.2)
    task = replace(TASK, shape=shape, dtype="bfloat16", prompt_tokens=32, forced_tokens=60)
    ids = forced_tokens(task)[1]
    with torch.no_grad():
        coarse, _ = _routes(make_model(task, torch.bfloat16), ids)
        fine, _ = _routes(make_model(task, torch.float32), ids)
    same = [_common(one, other) for one, other in zip(coarse, fine, strict=True)]
    assert min(same) > 0.97


def test_models_of_both_precisions_hold_the_same_numbers() -> None:
    task = replace(TASK, dtype="bfloat16")
    coarse = make_model(task, torch.bfloat16).state_dict()
    fine = make_model(task, torch.float32).state_dict()
    for name, values in coarse.items():
        assert values.dtype == torch.bfloat16
        assert torch.equal(values.float(), fine[name]), name
    other = make_model(replace(task, seed=1), torch.bfloat16).state_dict()
    assert not torch.equal(coarse["lm_head.weight"], other["lm_head.weight"])


@pytest.fixture(scope="module")
def exact() -> Iterator[np.ndarray]:
    with torch.no_grad():
        yield reference(TASK)[1].numpy()


@pytest.mark.parametrize("kernel", ["batched_mm", "grouped_mm", "eager"])
def test_steps_with_a_cache_agree_with_one_pass(kernel: str, exact: np.ndarray) -> None:
    with torch.no_grad():
        figures, logits = measure(replace(TASK, system=f"transformers:{kernel}"))
    assert logits.shape == (TASK.decode_tokens + 1, TINY.vocab)
    assert len(figures["steps_s"]) == TASK.decode_tokens
    found = agreement(logits.numpy(), exact, exact)
    assert found["agrees"]
    assert found["same_choice"] == 1


def test_two_experts_exchanged_are_noticed(exact: np.ndarray) -> None:
    """The weights are spread so that a wrong expert is no rounding error."""
    model = make_model(TASK, torch.float32)
    experts = model.model.layers[1].mlp.experts
    with torch.no_grad():
        experts.down_proj.copy_(experts.down_proj.roll(1, dims=0))
        _, text = forced_tokens(TASK)
        wrong = model(text, logits_to_keep=TASK.decode_tokens + 1).logits[0].numpy()
    found = agreement(wrong, exact, exact)
    assert found["agrees"] is False
    assert found["error"] > 0.01


def test_agreement_by_hand() -> None:
    exact = np.array([[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]], np.float32)
    near = exact + np.array([[0.0, 0.5], [0.0, 0.0], [0.0, 0.0]], np.float32)
    found = agreement(near[:2], exact, exact)
    assert found["error"] == pytest.approx(0.5 / 5)  # |(3, 0, 0, 4)| = 5
    assert found["yardstick_error"] == 0
    assert found["max_difference"] == 0.5
    assert found["same_choice"] == 1
    assert found["agrees"] is False
    assert agreement(near, exact, near)["agrees"]
    assert agreement(exact * np.nan, exact, near)["agrees"] is False
    assert agreement(near, None, exact)["agrees"] is None
    assert agreement(near, exact, None)["agrees"] is None


def test_a_graph_over_a_static_cache_decodes_as_a_growing_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Capturing is replaced by calling: what is proved is what the replayed step reads."""

    class Replayed:
        runner: GraphRunner

        def replay(self) -> None:
            self.runner._logits = self.runner._step()

    @contextlib.contextmanager
    def unlaunched(graph: Replayed) -> Iterator[None]:
        """A graph that is being captured runs nothing, so that the cache must not advance."""
        before = [layer.cumulative_length.clone() for layer in Replayed.runner._cache.layers]
        yield
        for layer, length in zip(Replayed.runner._cache.layers, before, strict=True):
            layer.cumulative_length.copy_(length)

    class Traced(GraphRunner):
        def _capture(self) -> torch.Tensor:
            Replayed.runner = self
            return super()._capture()

    class Stream:
        def wait_stream(self, other: Any) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", unlaunched)
    model = make_model(TASK, torch.float32)
    _, text = forced_tokens(TASK)
    with torch.no_grad():
        captured, plain = Traced(model, text.shape[1]), Runner(model)
        for runner in (captured, captured, plain):
            runner.restart()
            got = [runner.forward(text[:, : TASK.prompt_tokens])]
            rest = text[:, TASK.prompt_tokens :].split(1, dim=1)
            got += [runner.forward(token) for token in rest]
            if runner is captured:
                kept = torch.cat(got)
    assert torch.allclose(kept, torch.cat(got), atol=1e-5)


def test_ours_is_called_as_documented_and_its_misses_are_of_the_measured_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a stand-in that misses each token of each layer once and offloads nothing."""
    asked: list[dict[str, Any]] = []

    class Counting:
        def __init__(self) -> None:
            self.missed, self.closed = 0, False

        def count(self, module: torch.nn.Module, ids: tuple[torch.Tensor, ...]) -> None:
            self.missed += TINY.layers * ids[0].numel()

        def stats(self) -> dict[str, int]:
            return {"missed": self.missed}

        def close(self) -> None:
            self.closed = True

    cache = Counting()

    def offload(model: Any, **options: Any) -> Any:
        asked.append(options)
        model.expert_cache = cache
        model.model.embed_tokens.register_forward_pre_hook(cache.count)
        return model

    monkeypatch.setattr(runtime, "offload", offload, raising=False)
    with torch.no_grad():
        figures, _ = measure(replace(TASK, system="ours:lfru@25%", compute="reference"))
    assert asked == [{"policy": "lfru", "slots": 6, "device": "cpu", "compute": "reference"}]
    assert figures["missed_prefill"] == TINY.layers * TASK.prompt_tokens
    assert figures["missed_decode"] == TINY.layers * TASK.decode_tokens
    assert cache.closed


def test_what_fails_becomes_a_reason(tmp_path: Path) -> None:
    result = work(replace(TASK, dtype="float99"), tmp_path / "logits.npy")
    assert result["status"] == "failed"
    assert "float99" in result["reason"]
    assert "Traceback" in result["traceback"]
    result = work(replace(TASK, system="transformers:graph"), tmp_path / "logits.npy")
    assert result == {
        "status": "skipped",
        "reason": "a CUDA graph needs a CUDA device, the device is cpu",
    }
    assert not list(tmp_path.iterdir())


def test_a_worker_that_takes_too_long_is_stopped() -> None:
    result, logits = launch.run_task(TASK, timeout_s=0.01)
    assert result["status"] == "timeout"
    assert logits is None


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_worker_that_dies_costs_its_row_only(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves at once, before it has read its task."""
    context = multiprocessing.get_context(method)
    monkeypatch.setattr(child, "context", lambda device: context)
    monkeypatch.setattr(child, "run", sys.exit)
    result, _ = launch.run_task(TASK, timeout_s=60)
    assert result["status"] == "failed"
    assert result["reason"] == "left with 1: it printed nothing"


def test_after_the_limit_nothing_is_begun() -> None:
    rows = launch.run_all([TASK, TASK], timeout_s=10, limit_s=0, tell=lambda rows: None)
    assert [row["status"] for row in rows] == ["not run", "not run"]


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Exit code and JSON of the command, in processes of its own."""
    path = tmp_path_factory.mktemp("side_by_side") / "result.json"
    words = ["--tiny", "--device", "cpu", "--decode", "6", "--prompt", "8"]
    return main([*words, "--systems", ",".join(RUN), "--json", str(path)]), path


def test_a_dry_run_measures_what_is_there(dry_run: tuple[int, Path]) -> None:
    code, path = dry_run
    data = json.loads(path.read_text())
    assert code == 0
    assert data["versions"]["torch"]
    assert data["machine"]["device"] == "CPU"
    rows = {row["system"]: row for row in data["systems"]}
    assert list(rows) == ["reference", *RUN]
    there = {
        "ours:lru@50%": hasattr(runtime, "offload"),
        "moe-policylang:lru@50%": importlib.util.find_spec("moe_policylang") is not None,
    }
    for name, row in rows.items():
        if not there.get(name, True):
            assert row["status"] == "skipped"
            continue
        assert row["status"] == "ok", row
        if name == "reference":
            continue
        assert row["agreement"]["agrees"]
        assert row["agreement"]["error"] < 1e-5
        assert set(row["tpot_s"]) == {"median", "mean", "p90"}
        assert min(row["tpot_s"]["median"], row["prefill_s"], row["cold_prefill_s"]) > 0
        assert len(row["steps_s"]) == 6
        assert row["host_peak_bytes"] > 50e6
        assert row["gpu_peak_bytes"] is None
        if "@" in name:
            assert 0 <= row["missed_decode"] <= 6 * TINY.layers * TINY.top_k


def test_the_table_goes_between_the_marks(
    dry_run: tuple[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = dry_run
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["--render", str(path), "--into", str(page)]) == 0
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(RUN)
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith(f"| {YARDSTICK} |  | ")
    assert main(["--render", str(path), "--into", str(page)]) == 0
    assert page.read_text().splitlines() == lines
    capsys.readouterr()
    assert main(["--render", str(path)]) == 0
    assert table[2] in capsys.readouterr().out


def test_cells_of_a_row() -> None:
    """The figures are made up; what is checked is how they are shown."""
    row = {
        "system": "ours:lru@50%",
        "decode_tokens": 5,
        "status": "ok",
        "tpot_s": {"median": 0.0140, "mean": 2.3331, "p90": 0.0},
        "prefill_s": 0.0299,
        "cold_prefill_s": 0.1184,
        "gpu_peak_bytes": 7_940_000_000,
        "host_peak_bytes": None,
        "host_fell_bytes": 1_000_000_000,
        "missed_decode": 120,
        "prefetched_decode": 12,
        "agreement": {"error": 0.0123, "agrees": False, "same_choice": 0.9},
    }
    other = {"system": "accelerate", "decode_tokens": 60, "status": "skipped", "reason": "a | b"}
    data = {
        "shape": TASK.to_dict()["shape"] | {"layers": 12, "experts": 128, "top_k": 8},
        "machine": {"device": "card", "driver": "1.2"},
        "versions": {"torch": "2.11", "triton": None},
        "date": "2026-11-23",
        "dtype": "bfloat16",
        "prompt_tokens": 32,
        "decode_tokens": 60,
        "command": "the command --json /some/folder/r.json --seed 1",
        "systems": [row, other],
    }
    text = render(data)
    cells = [cell.strip() for cell in text.splitlines()[4].split("|")[1:-1]]
    assert cells == [
        "ours:lru@50% (5 steps)",
        "768",
        "14.0 ms",
        "2,333 ms",
        "0.00 ms",
        "29.9 ms",
        "118 ms",
        "7.9 GB",
        "",
        "1.0 GB",
        "24.0 (75.0% held)",  # 120 / 5 steps, of 12 x 8 asked for
        "2.4",
        "0.012 **differs**",
        "90%",
    ]
    assert "| accelerate |  | skipped |" in text
    assert "\n- accelerate: a | b\n" in text
    assert "`the command --json r.json --seed 1`" in text
    assert text.startswith("card, driver 1.2, torch 2.11; 2026-11-23. 12 layers x 128 experts")


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks\n")
    with pytest.raises(InputError, match=r"page\.md: expected one line"):
        put_into(page, "table\n")


def test_the_page_of_the_documentation_has_the_marks() -> None:
    text = (launch.ROOT / "docs/side_by_side.md").read_text()
    assert (text.count(BEGIN), text.count(END)) == (1, 1)
