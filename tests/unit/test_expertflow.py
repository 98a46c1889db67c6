"""benchmarks/expertflow: rows on tiny traces, tables and figures of rows, the page, the command."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import expertflow_gaps
from benchmarks.expertflow import (
    figures,
    gpu,
    hits,
    page,
    parts,
    published,
    recall_rows,
    scheduling,
    slowest,
    speeds,
    tables,
    verdicts,
)
from benchmarks.expertflow.__main__ import main
from benchmarks.expertflow.cells import Cell, floor_slots, slots_for_saving, told
from benchmarks.expertflow_gaps import Source
from policies.batching import Batches
from policies.budget import Budget
from policies.examples import example_trace
from tests.helpers import ROOT
from traces.errors import InputError
from traces.store import open_trace, write_trace


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    path = tmp_path_factory.mktemp("traces") / "tiny.parquet"
    made = example_trace(3, shape=(3, 8, 2), lengths=(14, 9, 12, 11, 8, 10))
    write_trace(path, made.model, made.items, source="drawn", license="CC0-1.0")
    return Source(str(path))


def lru_by_layer(source: Source, batch: int, share: int) -> float:
    """Hits of decode steps of an LRU with *share* slots in each layer, written out on its own."""
    held: dict[int, OrderedDict[int, None]] = {}
    hit = asked = 0
    for step in Batches(open_trace(source.trace), batch).steps():
        for layer, experts in enumerate(step.demand):
            order = held.setdefault(layer, OrderedDict())
            if step.phase == "decode":
                hit += sum(e in order for e in experts)
                asked += len(experts)
            loading = [e for e in experts if e not in order]
            for e in experts:
                if e in order:
                    order.move_to_end(e)
            for e in loading:
                if len(order) == share:
                    spare = [c for c in order if c not in experts]
                    order.pop(spare[0] if spare else next(iter(order)))
                order[e] = None
            for e in experts:
                if e in order:
                    order.move_to_end(e)
    return hit / asked


def test_hits_are_counted_as_the_paper_does(source: Source) -> None:
    rows = list(hits.rows(source, batches=(2,), caches=("50%", "75%")))
    assert [(r.cache, r.slots_per_layer) for r in rows[::3]] == [("50%", 4), ("75%", 6)]
    assert [r.forecaster for r in rows[:2]] == ["oracle:accuracy=1.0", "oracle:accuracy=0.9"]
    for row in rows:
        share = row.slots_per_layer
        assert row.lru == pytest.approx(lru_by_layer(source, 2, share))
        assert row.lru_copies == pytest.approx(1 - row.lru)
        assert row.hit <= row.held
    perfect, worse = rows[0], rows[2]
    # Two tokens demand at most four experts, so whoever knows them all misses none.
    assert perfect.papers == perfect.papers_layer == 1.0
    assert perfect.lru < worse.papers < 1.0
    assert worse.papers_copies > perfect.papers_copies


def test_speeds_have_a_floor_and_a_saving(source: Source) -> None:
    # The tiny trace's own experts cost nothing to copy.
    large = replace(source, sizes="qwen1.5-moe")
    rows = list(
        speeds.rows(large, ("h200-pcie5",), (2,), ("50%", speeds.SAVING), others=("markov",))
    )
    assert [r.forecaster for r in rows[:2]] == ["oracle:accuracy=0.8", "markov"]
    row = rows[0]
    assert (row.floor_slots, row.slots) == (4, 12)
    assert row.on_demand <= row.lru < row.predictive
    assert row.floor_saving > row.saving > 0
    assert row.lru_layer is not None
    assert row.vs_lru_layer is not None
    assert row.vs_lru_layer > 1
    assert 0 < row.limit <= 1


def test_slots_for_a_saving_are_the_most_that_save_it(source: Source) -> None:
    cell = Cell(source, 2, "h200-pcie5")
    session = cell.session()
    assert floor_slots(session) == 4
    for wanted in (0.2, 0.5):
        slots = slots_for_saving(session, wanted)
        saved = [cell.run("lru", Budget(slots=n)).memory["saving"] for n in (slots, slots + 1)]
        assert saved[0] >= wanted > saved[1]
    assert slots_for_saving(session, 1.0) == 0


def test_a_scheduler_is_beside_none_in_the_same_cell(source: Source) -> None:
    rows = list(scheduling.rows(source, "a40-pcie4", (2,), ("50%",)))
    assert [(r.policy, r.scheduler) for r in rows] == [
        (policy, name) for policy in scheduling.POLICIES for name in scheduling.SCHEDULERS
    ]
    assert len({row.without for row in rows}) == 2
    for row in rows:
        assert row.gain == pytest.approx(row.with_it / row.without - 1)
        assert 0 < row.after <= row.before * 1.05
        assert 0 <= row.cost < 1


def test_a_forecasters_file_is_not_told() -> None:
    assert told("routing-path:/somewhere/x.npz") == "routing-path"
    assert told("oracle:accuracy=0.8") == "oracle:accuracy=0.8"


# Recall


def test_recall_of_the_predictor_beside_simpler_knowledge(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
    import simctl
    from benchmarks.expertflow import recall
    from runtime.predictor.baselines import TokenTable
    from runtime.predictor.data import read_corpus
    from tests.helpers_predictor import MODEL, rule_trace

    trace, predictor = tmp_path / "x.parquet", tmp_path / "p.safetensors"
    made = rule_trace(1, 20)
    write_trace(trace, MODEL, made.items, source="", license="", extra=made.extra)
    words = f"predictor train --trace {trace} --out {predictor} --steps 2 --vocabulary 20"
    words += " --device cpu --d-model 16 --d-ff 32 --heads 2 --d-kv 8 --blocks 1"
    assert simctl.main(words.split()) == 0
    rows = {row.method: row for row in recall.rows(trace, predictor)}
    assert {"routing-path", "previous", "token-table", "markov"} <= rows.keys()
    own = rows["routing-path"]
    assert len(own.by_layer) == MODEL.layers
    assert all(0 < value <= 1 for value in own.batch.values())
    assert own.wider
    assert all(found["1"] >= own.batch["1"] for found in own.wider.values())
    assert rows["token-table"].table == "counted on the other half of the sample"
    taught = {row.method: row for row in recall.rows(trace, predictor, trace)}
    assert taught["token-table"].batch["1"] >= rows["token-table"].batch["1"]

    corpus = read_corpus(trace)
    alone = recall.crossed(replace(corpus, domains=("",) * 2, sequences=corpus.sequences[:2]), 2)
    other = TokenTable(replace(corpus, sequences=corpus.sequences[1:2]))
    assert (alone[0] == other.ranks(corpus.sequences[0], 2)).all()


# Rows drawn up by hand: tables, verdicts, figures


def gap_row(speed: float, forecaster: str = "markov", evict: str = "recency"):
    return expertflow_gaps.Row(
        "t", "", "25%", 1, forecaster, evict, 0.1, 0.3, 0.2, 0.2, 0.0, 0.5, 0.4, 1.0, speed
    )


def hit_row(forecaster: str, ratio: float, batch: int = 16) -> hits.Row:
    return hits.Row(
        "switch-base-32", "", batch, "50%", 16, forecaster, 0.5, ratio, 0.8, 0.5, 0.7, 0.5, 0.6,
        0.1, 0.8, 0.7, "h200-pcie5",
    )  # fmt: skip


def test_what_is_too_slow_is_found(tmp_path: Path) -> None:
    assert slowest.sentence(slowest.pairs(tmp_path)).endswith("no cells")
    parts.write_rows(tmp_path / "gaps-coarse.json", [gap_row(1.2), gap_row(0.99)])
    found = slowest.pairs(tmp_path)
    assert not slowest.slower(found)
    assert "none below 0.98; the slowest 0.990x" in slowest.sentence(found)
    parts.write_rows(tmp_path / "gaps-gpt-oss.json", [gap_row(0.97)])
    found = slowest.pairs(tmp_path)
    assert [pair.speed for pair in slowest.slower(found)] == [0.97]
    assert "in 3 cells: 1 below 0.98; the slowest 0.970x" in slowest.sentence(found)


def test_a_claim_is_reached_or_told_why_not(tmp_path: Path) -> None:
    good = [hit_row("oracle:accuracy=1.0", 1.0), hit_row("oracle:accuracy=0.8", 0.87)]
    parts.write_rows(tmp_path / "hits.json", good)
    (line,) = verdicts.table(tmp_path)[2:]
    assert "| 85.9 : 58.4 % | 87.0 to 87.0 : 50.0 % | yes |  |" in line
    parts.write_rows(tmp_path / "hits.json", [good[0], hit_row("oracle:accuracy=0.8", 0.8)])
    (line,) = verdicts.table(tmp_path)[2:]
    assert "| 0 of 1 | a perfect oracle has 100.0 %" in line


def test_recall_that_falls_short_is_told_by_layer_and_domain(tmp_path: Path) -> None:
    row = recall_rows.Row(
        "coarse-8x2", "routing-path", "before the step", {"1": 0.85, "4": 0.95},
        {"3": {"1": 0.97, "4": 0.99}}, [0.9, 0.8], {"code": 0.8, "prose": 0.9}, 100,
    )  # fmt: skip
    parts.write_rows(tmp_path / "recall.json", [row])
    (line,) = verdicts.table(tmp_path)[2:]
    assert "| 85.0 / 95.0 % | 1 of 2 |" in line
    assert "from 90.0 % in layer 0 to 80.0 % in layer 1; 90.0 % of prose, 80.0 % of code" in line
    assert tables.recall_table([row])[-1].count("97.0 | 99.0") == 1
    assert tables.layer_table([row])[-1] == "| coarse-8x2 | 90.0 | 80.0 | 80.0 | 90.0 |"


def test_numbers_are_kept_to_six_digits_and_rows_come_back(tmp_path: Path) -> None:
    row = gap_row(1.23456789)
    parts.write_rows(tmp_path / "gaps-coarse.json", [row])
    (back,) = parts.read_rows(tmp_path, "gaps-coarse", expertflow_gaps.Row)
    assert back == replace(row, speed=1.23457)
    assert parts.read_rows(tmp_path, "hits", hits.Row) == []
    with pytest.raises(InputError, match="expected rows of gaps-coarse"):
        parts.read_rows(tmp_path, "gaps-coarse", hits.Row)


@pytest.mark.parametrize("text", [None, "hit ratios"])
def test_figures_are_drawn_of_what_is_there(tmp_path: Path, text: str | None) -> None:
    if text:
        told = ("oracle:accuracy=0.9", "oracle:accuracy=0.8", "routing-path")
        rows = [hit_row(name, 0.9, batch) for batch in (4, 16) for name in told]
        rows += [replace(row, trace="coarse-8x2") for row in rows if row.forecaster == told[2]]
        parts.write_rows(tmp_path / "hits.json", rows)
        ((name, figure),) = figures.drawn(tmp_path)
        assert name == "hits"
        assert all(axes.patches for axes in figure.axes)
        page.draw(tmp_path)
        assert (tmp_path / "hits.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert list(figures.drawn(tmp_path)) == []


# A GPU's measurements

MEASURED = {
    "machine": "a card",
    "date": "2026-11-27",
    "parts": {
        "speed": [
            {
                "sizes": "mixtral-8x7b", "routing": "coarse-8x2", "policy": "predictive",
                "batch": 1, "cache": "25%", "tokens_per_s_gpu": 30.0, "tokens_per_s_sim": 25.0,
                "over_lru_gpu": 1.25,
            },
            {"sizes": "x", "policy": "lru", "batch": 4, "cache": "50%", "skipped": "no time left"},
        ],
        "predictor": [
            {"model": "tiny", "policy": "predictive", "told": "routing-path", "batch": 1,
             "predictor_share": 0.031, "host_us": 120.4, "pass_us": 4000.0},
        ],
    },
}  # fmt: skip


def test_what_a_gpu_measured_is_shown_where_it_is_there(tmp_path: Path) -> None:
    assert gpu.table(tmp_path) == [gpu.ABSENT]
    (tmp_path / "gpu.json").write_text(json.dumps(MEASURED))
    lines = gpu.table(tmp_path)
    assert lines[0] == "Measured: a card; 2026-11-27."
    assert (
        "| mixtral-8x7b (coarse-8x2) | predictive | 1 | 25 % | 30.0 | 25.0 | 1.25x |  |  |  |"
        in lines
    )
    assert "Not measured: 1 of 2 cells (no time left)." in lines
    assert "| tiny | predictive (routing-path) | 1 |  |  | 3.1 % | 120 |  | 4,000 |  |" in lines


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"parts": 3}, "has no object 'parts'"),
        ({"date": None}, "'date' is None, expected text"),
        ({"parts": {"speed": 1}}, "part 'speed' is 1, expected a list of rows"),
        ({"parts": {"speed": [{"sizes": "x"}]}}, "speed, row 0: 'policy' is None, expected str"),
        ({"parts": {"memory": ["x"]}}, "memory, row 0: 'policy' is None"),
    ],
)
def test_measurements_of_no_use_are_refused(tmp_path: Path, change: dict, words: str) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps(MEASURED | change))
    with pytest.raises(InputError, match=r"gpu\.json") as error:
        gpu.table(tmp_path)
    assert words in str(error.value)


# The page and the command


def test_a_page_is_filled_in_between_its_marks() -> None:
    text = "a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n"
    assert page.filled(text, {"x": "new"}, "p") == text.replace("old", "new")
    with pytest.raises(InputError, match="p: expected one line <!-- y: begin -->"):
        page.filled(text, {"y": ""}, "p")


def test_the_command_runs_a_part_and_checks_it(
    source: Source,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(parts.PARTS, "gaps-coarse", lambda inputs: iter([gap_row(0.9)]))
    out = tmp_path / "out"
    command = [str(out), "--forecasts", str(tmp_path), "--only", "gaps-coarse"]
    assert main(command) == 1
    assert "1 below 0.98" in capsys.readouterr().out
    assert json.loads((out / "gaps-coarse.json").read_text())[0]["speed"] == 0.9
    assert set(json.loads((out / "about.json").read_text())["gaps-coarse"]) == {
        "date", "machine", "versions", "seconds",
    }  # fmt: skip
    assert (out / "gaps.png").is_file()
    monkeypatch.setitem(
        parts.PARTS, "hits", lambda inputs: hits.rows(source, (2,), ("50%",), "h200-pcie5")
    )
    (out / "gaps-coarse.json").unlink()
    assert main([*command[:-1], "hits"]) == 0
    assert len(json.loads((out / "hits.json").read_text())) == 3


def test_samples_and_drawn_traces_are_found(tmp_path: Path) -> None:
    inputs = parts.Inputs(ROOT, tmp_path, tmp_path / "work")
    with pytest.raises(InputError, match="what predictor forecast wrote"):
        inputs.sample("coarse-8x2")
    (tmp_path / "coarse-8x2.npz").touch()
    sample = inputs.sample("coarse-8x2")
    assert (Path(sample.trace).is_file(), sample.sizes) == (True, "mixtral-8x7b")
    drawn = inputs.switch(32, 2)
    assert inputs.switch(32, 2) == drawn
    assert open_trace(drawn.trace).model.experts == 32


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--only", "speed", "--forecasts", "."], "--only 'speed', expected any of recall"),
        ([], "no --forecasts"),
        (["--forecasts", "nowhere"], "nowhere/coarse-8x2.npz: not there"),
        (["--forecasts", ".", "--only", "gaps-gpt-oss"], "gaps-gpt-oss: no --gpt-oss"),
        (["--forecasts", ".", "--taught", "x=y"], "--taught 'x=y', expected SAMPLE=TRACE"),
        (["--render", "--page", "nowhere.md"], "nowhere.md: No such file"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, more: list[str], words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if "nowhere" in more:
        more = [*more, "--only", "gaps-coarse"]
    assert main([str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert words in said
    assert not list(tmp_path.glob("out/*"))


def test_the_papers_figures_are_ratios() -> None:
    for found in published.HITS.values():
        assert 0 < found.lru < found.plec < 1
    assert [round(s.with_it / s.without, 2) for s in published.SCHEDULER.values()] == [
        1.03, 1.16, 1.17,
    ]  # fmt: skip
    assert asdict(gap_row(1.0))["speed"] == 1.0
