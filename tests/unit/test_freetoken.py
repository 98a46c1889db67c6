"""benchmarks/freetoken: options, bookkeeping, tables and our side, on made-up numbers and a CPU."""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.freetoken import checkpoint, launch, ours, rows, theirs
from benchmarks.freetoken.__main__ import main
from benchmarks.freetoken.plan import (
    CHECKPOINT,
    FUSED,
    OFFLOAD,
    OURS,
    POLICIES_TRIED,
    RANDOM,
    TEXT,
    TINY,
    Cell,
    Task,
    our_cells,
    parse_policy,
    routed,
    slots_of,
    steps_of,
    their_cells,
)
from benchmarks.freetoken.render import gpt_oss_section
from benchmarks.freetoken.tokens import counted_from, texts, times_ms
from benchmarks.side_by_side.plan import FULL
from runtime.streaming import open_checkpoint
from traces.errors import InputError

TASK = Task(CHECKPOINT, "", replace(TINY, layers=2), "cpu", 4, 0, "h200-pcie5", TEXT)
FACTS = {"machine": {"device": "Card", "driver": "1"}, "versions": {"torch": "2.11.0"}}
HALF = Cell(768, 1, 512)
BIG = replace(TASK, shape=FULL, folder="/nowhere", device="cuda")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--share", "0%"], "--share 0%: expected a share of the experts, say 50%"),
        (["--share", "half"], "--share half: expected a share"),
        (["--share", "5%"], "2 slots of 48, expected the 4 or more that a token needs"),
        (["--policy", "nonesuch"], "nonesuch"),
        (["--policy", "mixed"], "--policy mixed: changes the output, expected an exact policy"),
        (["--policy", "belady"], "--policy belady: belady needs the future"),
        (["--policy", "static"], "static learns from a trace"),
        (["--policy", "lru+markov"], "--policy lru+markov: lru takes no forecaster"),
        (["--policy", "predictive+oracle"], "oracle needs the future"),
        (["--policy", "predictive+token"], "token learns from a trace"),
        (["--batch", "0"], "--batch"),
        (["--only", "vllm"], "--only"),
        (["--routing", "even"], "--routing"),
        (["--cells", "cells.json"], "--cells: only for --render"),
        (["--render", "--out", "absent.json"], "absent.json: "),
    ],
)
def test_bad_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    usual = ["--tiny", "--device", "cpu", "--only", "ours", "--out", str(tmp_path / "graph.json")]
    assert main([*usual, *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_freetoken_is_asked_for_only_where_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tiny", "--device", "cpu"]) == 2
    assert "FreeToken runs on CUDA alone, expected --only ours" in capsys.readouterr().err
    if importlib.util.find_spec("freetoken") is None:
        assert main(["--tiny"]) == 2
        assert "FreeToken is not installed" in capsys.readouterr().err


def test_both_systems_get_as_many_slots_over_as_many_steps() -> None:
    assert [slots_of(share, FULL, theirs=True) for share in (1.0, 0.5, 0.25)] == [1536, 768, 384]
    with pytest.raises(InputError, match="expected the 128 or more that FreeToken needs"):
        slots_of(0.05, FULL, theirs=True)
    assert [steps_of(512, batch) for batch in (1, 2, 8)] == [512, 256, 128]
    assert steps_of(16, 8) == 16
    mine = our_cells([1536, 768], [1, 8], 512, ["lru", "lfu"], 1536)
    assert [(c.slots, c.batch, c.policy) for c in mine] == [
        (1536, 1, "lru"), (1536, 8, "lru"),
        (768, 1, "lru"), (768, 1, "lfu"), (768, 8, "lru"), (768, 8, "lfu"),
    ]  # fmt: skip
    his = their_cells([384, 1536], [1, 8], 512)
    assert [(c.slots, c.batch, c.steps) for c in his] == [
        (1536, 1, 512), (1536, 8, 128), (384, 1, 512), (384, 8, 128),
    ]  # fmt: skip


def test_the_policies_tried_can_all_be_tried() -> None:
    assert POLICIES_TRIED[0] == "lru"
    assert parse_policy("predictive:horizon=1+markov") == ("predictive:horizon=1", "markov")
    for text in POLICIES_TRIED:
        parse_policy(text)


def test_a_task_survives_its_file() -> None:
    task = replace(TASK, cells=(HALF, Cell(8, 2, 4, "lfu")))
    assert Task.from_dict(json.loads(json.dumps(task.to_dict()))) == task


def test_tokens_do_not_depend_on_the_batch() -> None:
    one, four = texts(TASK, Cell(8, 1, 6)), texts(TASK, Cell(8, 4, 6))
    assert four.shape == (4, 4 + 6 + 1)
    assert torch.equal(one[0], four[0])
    assert not torch.equal(four[1], four[2])


@pytest.mark.parametrize("routing", [TEXT, RANDOM])
def test_text_repeats_its_tokens_and_even_drawing_does_not(routing: str) -> None:
    tokens = texts(replace(BIG, routing=routing), Cell(768, 1, 512))
    distinct = len(tokens.unique()) / tokens.numel()
    # Of 517 tokens drawn evenly from 32,000, about 4 were there before.
    assert distinct < 0.8 if routing == TEXT else distinct > 0.97


def test_only_the_last_half_counts() -> None:
    assert counted_from(512) == 256
    assert times_ms([9.0, 9.0, 9.0, 0.001, 0.002, 0.003])["ms"] == pytest.approx(2.0)


def filled(found: list[dict[str, Any]]) -> None:
    """Rows of a run as it goes: half the slots, and all of them with both backends."""
    whole = replace(HALF, slots=1536)
    lru, best = replace(HALF, policy="lru"), replace(HALF, policy="predictive+markov")

    def put(system: str, cell: Cell, ms: float, missed: float | None, fetched: float = 0.0) -> None:
        result = {"ms": ms, "missed_per_token": missed, "prefetched_per_token": fetched}
        assert rows.add(found, replace(BIG, system=system), cell, result, FACTS) == ""

    put(OFFLOAD, HALF, 3.0, 7.5)
    put(OFFLOAD, whole, 1.5, 0.2)
    put(FUSED, whole, 1.8, None)
    put(OURS, lru, 2.4, 7.4)
    put(OURS, best, 2.25, 2.0, 9.0)
    put(OURS, replace(lru, slots=1536), 1.2, 0.0)


def test_a_row_begins_with_what_the_list_promises() -> None:
    found: list[dict[str, Any]] = []
    filled(found)
    assert [list(row)[:8] for row in found] == [list(rows.FIRST)] * 2
    first, second = ([row[key] for key in rows.FIRST] for row in found)
    head = ["Qwen3-30B-A3B, 12 layers", TEXT, 1]
    assert first == [*head, 1.0, 1.5, 1.2, 1.2, "lru"]
    assert second == [*head, 0.5, 3.0, 2.4, 2.25, "predictive+markov"]
    assert found[1]["slots"] == 768
    assert found[1]["freetoken_missed_per_token"] == 7.5
    assert found[1]["lru_missed_per_token"] == 7.4
    assert found[1]["best_prefetched_per_token"] == 9.0
    assert found[1]["machine"] == FACTS["machine"]


def test_the_faster_backend_stands_for_freetoken() -> None:
    found: list[dict[str, Any]] = []
    filled(found)
    cell = replace(HALF, slots=1536)
    rows.add(found, replace(BIG, system=FUSED), cell, {"ms": 1.1, "missed_per_token": None}, FACTS)
    assert found[0]["freetoken_ms"] == 1.1
    assert found[0]["freetoken_missed_per_token"] == 0.2


def test_a_failure_is_kept_until_it_is_measured() -> None:
    found: list[dict[str, Any]] = []
    filled(found)
    cell, task = replace(HALF, policy="lru"), replace(BIG, system=OURS)
    rows.add(found, task, cell, {"failed": "left with 1: no"}, {})
    assert found[1]["failed"] == {"ours, lru": "left with 1: no"}
    assert found[1]["lru_ms"] is None
    assert found[1]["best_policy"] == "predictive+markov"
    result = {"ms": 2.0, "missed_per_token": 7.4, "prefetched_per_token": 0.0}
    rows.add(found, task, cell, result, FACTS)
    assert found[1]["failed"] == {}
    assert found[1]["best_policy"] == "lru"


def test_another_machine_begins_a_row_anew() -> None:
    found: list[dict[str, Any]] = []
    filled(found)
    other = FACTS | {"machine": {"device": "Another"}}
    cell, result = replace(HALF, policy="lru"), {"ms": 1.0, "missed_per_token": 7.0}
    result["prefetched_per_token"] = 0.0
    told = rows.add(found, replace(BIG, system=OURS), cell, result, other)
    assert told == "text routing, batch 1, 50%: measured before with another machine, begun anew"
    assert len(found) == 2
    assert found[1]["freetoken_ms"] is None
    assert found[1]["best_policy"] == "lru"
    assert found[0]["freetoken_ms"] == 1.5


def test_each_routing_has_rows_of_its_own() -> None:
    found: list[dict[str, Any]] = []
    filled(found)
    task, lru = replace(BIG, system=OURS, routing=RANDOM), replace(HALF, policy="lru")
    result = {"ms": 1.4, "missed_per_token": 5.0, "prefetched_per_token": 0.0}
    assert rows.add(found, task, lru, result, FACTS) == ""
    assert [(row["routing"], row["lru_ms"]) for row in found] == [
        (RANDOM, 1.4), (TEXT, 1.2), (TEXT, 2.4),
    ]  # fmt: skip


def test_the_list_is_read_as_it_was_written(tmp_path: Path) -> None:
    found: list[dict[str, Any]] = []
    filled(found)
    path = tmp_path / "deeper/graph.json"
    rows.write(path, found)
    assert rows.read(path) == found
    path.write_text("[{}]")
    with pytest.raises(InputError, match="no list of rows found, expected objects with model"):
        rows.read(path)


def rendered(tmp_path: Path, cells: Sequence[dict[str, Any]] = ()) -> str:
    """The page that ``--render`` fills in from made-up rows."""
    found: list[dict[str, Any]] = []
    filled(found)
    reason = {"failed": "left with 1: OutOfMemoryError (log: out/freetoken/ours-1/log)"}
    rows.add(found, replace(BIG, system=OURS), replace(HALF, policy="lfu"), reason, {})
    rows.write(tmp_path / "graph.json", found)
    page = tmp_path / "page.md"
    marks = [f"<!-- {n}: begin -->\n<!-- {n}: end -->" for n in ("freetoken", "gpt-oss")]
    page.write_text("\n".join(["before", *marks, "after"]))
    words = ["--render", "--out", str(tmp_path / "graph.json"), "--page", str(page)]
    if cells:
        (tmp_path / "cells.json").write_text(json.dumps(cells))
        words += ["--cells", str(tmp_path / "cells.json")]
    assert main(words) == 0
    return page.read_text()


def test_the_table_tells_shares_goals_and_failures(tmp_path: Path) -> None:
    text = rendered(tmp_path)
    lines = text.splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert (
        "Qwen3-30B-A3B, 12 layers, Card, driver 1, torch 2.11.0; "
        + time.strftime("%Y-%m-%d", time.gmtime())
        in text
    )
    half = next(line for line in lines if line.startswith("| text | 1 | 768"))
    assert half == (
        "| text | 1 | 768 (50%) | 3.00 ms | 2.40 ms, 0.80 x (goal 0.90) | "
        "2.25 ms `predictive+markov`, 0.75 x (goal 0.70, **missed**) | 7.5 | 7.4 | 2.0 (9.0) |"
    )
    whole = next(line for line in lines if line.startswith("| text | 1 | 1,536"))
    assert "1.20 ms, 0.80 x (goal 0.95) | 1.20 ms `lru`, 0.80 x |" in whole
    assert "- ours, lfu, text routing, batch 1, 50%: left with 1: OutOfMemoryError\n" in text
    assert "](graph.png)" in text
    assert (tmp_path / "graph.png").read_bytes()[:4] == b"\x89PNG"


CELL = {
    "model": "gpt-oss-20b routing with gpt-oss-20b sizes", "policy": "lru", "cache": 0.25,
    "batch": 1, "tpot_sim_s": 0.0101, "tpot_gpu_s": 0.01, "error": 0.01, "naive_s": 0.008,
    "decisions_equal": True, "failed": "", "machine": "Card", "date": "2026-01-01",
}  # fmt: skip


def test_cells_of_gpt_oss_make_a_table(tmp_path: Path) -> None:
    failed = CELL | {"policy": "lfu", "failed": "out of memory"}
    text = rendered(tmp_path, [CELL, failed, CELL | {"model": "olmoe"}])
    assert "| `lru` | 1 | 25% | 10.1 ms | 10.0 ms | +1.0 % | 8.00 ms | equal |" in text
    assert "| `lfu` | 1 | 25% |  | failed |  |  | out of memory |" in text
    assert "gpt-oss-20b routing with gpt-oss-20b sizes, Card; 2026-01-01." in text
    assert "olmoe" not in text


def test_cells_without_gpt_oss_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    path.write_text(json.dumps([CELL | {"model": "olmoe"}]))
    with pytest.raises(InputError, match="1 cells, none of gpt-oss-20b, expected some"):
        gpt_oss_section(path)


def outcomes(monkeypatch: pytest.MonkeyPatch, *found: launch.Outcome) -> list[Task]:
    """Let processes come to *found*, one after the other; the tasks that they were given."""
    given: list[Task] = []

    def run(task: Task, folder: Path, timeout_s: float) -> launch.Outcome:
        given.append(task)
        return found[len(given) - 1]

    monkeypatch.setattr(launch, "run", run)
    return given


def test_behind_a_cell_that_kills_its_process_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells = tuple(Cell(8, 1, 4, name) for name in ("lru", "lfu", "fifo"))
    killed = launch.Outcome([{"ms": 1.0}], FACTS, "left with -9: killed")
    given = outcomes(monkeypatch, killed, launch.Outcome([{"ms": 3.0}], FACTS))
    task = replace(TASK, system=OURS, cells=cells)
    found = list(launch.run_all(task, Path("logs"), time.monotonic() + 60))
    assert [task.cells for task in given] == [cells, cells[2:]]
    assert [cell for cell, *_ in found] == list(cells)
    assert found[0][1:] == ({"ms": 1.0}, FACTS)
    assert found[1][1] == {"failed": "left with -9: killed (log: logs/ours-1/log)"}
    assert found[2][1] == {"ms": 3.0}


def test_a_process_that_never_began_is_not_begun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = (Cell(8, 1, 4, "lru"), Cell(8, 1, 4, "lfu"))
    given = outcomes(monkeypatch, launch.Outcome([], {}, "left with 1: no such file"))
    task = replace(TASK, system=OURS, cells=cells)
    found = list(launch.run_all(task, Path("logs"), time.monotonic() + 60))
    assert len(given) == 1
    assert all("no such file" in result["failed"] for _, result, _ in found)
    late = list(launch.run_all(task, Path("logs"), time.monotonic() - 1))
    assert [result for _, result, _ in late] == [{"failed": "not begun: --limit was reached"}] * 2


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A checkpoint of two small layers, where ``--folder`` would put it."""
    task = replace(TASK, folder=str(tmp_path_factory.mktemp("checkpoints") / TEXT))
    checkpoint.make(task)
    return task


def test_the_checkpoint_holds_what_was_drawn(made: Task, tmp_path: Path) -> None:
    assert checkpoint.is_made(made)
    assert not checkpoint.is_made(replace(made, seed=1))
    opened = open_checkpoint(made.folder)
    assert [(layer, expert) for layer, expert, _ in opened.experts()] == [
        (layer, expert) for layer in range(2) for expert in range(16)
    ]
    again = replace(made, folder=str(tmp_path))
    checkpoint.make(again)
    mine, other = opened.model.state_dict(), open_checkpoint(tmp_path).model.state_dict()
    dense = [name for name, value in mine.items() if not value.is_meta]
    assert all(torch.equal(mine[name], other[name]) for name in dense)
    assert float(mine["model.norm.weight"].sum()) == TINY.hidden


def test_weights_of_random_routing_are_as_transformers_draws_them_but_for_embeddings(
    tmp_path: Path,
) -> None:
    shape = routed(TASK.shape, RANDOM)
    made = replace(TASK, folder=str(tmp_path), shape=shape, routing=RANDOM)
    checkpoint.make(made)
    assert checkpoint.is_made(made)
    assert not checkpoint.is_made(replace(made, routing=TEXT))
    config = open_checkpoint(tmp_path).model.config
    for name, value in open_checkpoint(tmp_path).model.state_dict().items():
        if not value.is_meta and value.dim() > 1:
            spread = float(value.float().std())
            drawn = 1.0 if "embed" in name else config.initializer_range
            assert spread == pytest.approx(drawn, rel=0.05), name


def test_our_side_decodes_every_cell_of_one_checkpoint(made: Task) -> None:
    cells = (Cell(32, 1, 4, "lru"), Cell(16, 2, 4, "lru"), Cell(16, 2, 4, "predictive+markov"))
    found = list(ours.results(replace(made, system=OURS, cells=cells)))
    assert len(found) == 3
    assert all(result["ms"] > 0 for result in found)
    # All experts fit: what was not used in the first half may still come once.
    assert found[0]["missed_per_token"] <= 8
    assert found[1]["prefetched_per_token"] == 0
    assert found[2]["missed_per_token"] <= 8


def test_a_run_writes_the_list(made: Task, tmp_path: Path) -> None:
    """In processes of their own, the checkpoint found as it was left."""
    out, folder = tmp_path / "graph.json", Path(made.folder)
    words = ["--routing", TEXT]
    written = (folder / checkpoint.INDEX).stat().st_mtime_ns
    words += ["--tiny", "--layers", "2", "--device", "cpu", "--only", "ours", "--out", str(out)]
    words += ["--batch", "1", "--share", "50%", "--tokens", "4", "--prompt", "4"]
    words += ["--policy", "lru", "--folder", str(folder.parent), "--logs", str(tmp_path / "logs")]
    assert main(words) == 0
    (row,) = rows.read(out)
    assert row["freetoken_ms"] is None
    assert row["lru_ms"] == row["best_ms"] > 0
    assert row["steps"] == 4
    assert (folder / checkpoint.INDEX).stat().st_mtime_ns == written
    assert "Cell(slots=16, batch=1" in (tmp_path / "logs/text/ours-1/log").read_text()


class Sampler:
    """FreeToken's own as far as it is used."""

    def __init__(self) -> None:
        self.asked = 0

    def prepare(self, batch: Any) -> Any:
        return SimpleNamespace(temperatures=None)

    def sample(self, logits: torch.Tensor, args: Any) -> torch.Tensor:
        self.asked += 1
        return logits.argmax(-1)


def batch_of(*places: tuple[int, int]) -> Any:
    return SimpleNamespace(reqs=[SimpleNamespace(uid=u, device_len=at) for u, at in places])


def test_the_sampler_chooses_what_it_is_told() -> None:
    own, tokens = Sampler(), torch.tensor([[1, 2], [3, 4], [5, 6]], dtype=torch.int32)
    forced, called = theirs.ForcedSampler(own, tokens), []
    forced.after = {2: lambda: called.append("here")}
    for place, expected in ((1, [3, 4]), (2, [5, 6])):
        args = forced.prepare(batch_of((0, place), (1, place)))
        assert forced.sample(torch.zeros(2, 9), args).tolist() == expected
    assert own.asked == 2
    assert called == ["here"]
    with pytest.raises(RuntimeError, match="expected all at one place"):
        forced.prepare(batch_of((0, 1), (1, 2)))
    with pytest.raises(RuntimeError, match=r"sequences \[1, 0\]"):
        forced.prepare(batch_of((1, 1), (0, 1)))


def test_arrivals_are_noted_and_tokens_alone_make_them() -> None:
    class Base:
        def offline_send_result(self, reply: Sequence[Any]) -> None:
            self.last = reply

    engine = theirs.timed_class(Base)()
    engine.offline_send_result([SimpleNamespace(prompt_tokens=4)])
    engine.offline_send_result([SimpleNamespace(next_token=1), SimpleNamespace(next_token=2)])
    engine.offline_send_result([])
    assert len(engine.arrivals) == 1


def test_steps_are_waited_for_only_while_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Engine:
        def forward_batch(self, batch: Any, args: Any) -> Any:
            return SimpleNamespace(copy_done_event=SimpleNamespace(synchronize=lambda: None))

    engine = Engine()
    with theirs.steps_timed(engine) as steps_s:
        engine.forward_batch(SimpleNamespace(is_decode=False), None)
        engine.forward_batch(SimpleNamespace(is_decode=True), None)
    engine.forward_batch(SimpleNamespace(is_decode=True), None)
    assert len(steps_s) == 1


def test_its_pool_is_ours() -> None:
    task = replace(BIG, system=OFFLOAD, cells=their_cells([768, 384], [1, 8], 512))
    options = theirs.options_of(task)
    assert options["moe_cache_size"] == 768
    assert options["cuda_graph_bs"] == [1, 8]
    assert options["moe_prefill_overlap"]
    assert options["max_seq_len_override"] > 4 + 512
    assert theirs.options_of(replace(task, system=FUSED))["moe_backend"] == "fused"
    small = replace(task, cells=(Cell(128, 1, 8),))
    assert not theirs.options_of(small)["moe_prefill_overlap"]
