"""What the terminal summaries say."""

import subprocess
import sys

import pytest

from policies.result import CAUSES
from reports.comparison import compare_table
from reports.labels import labels, series_labels
from reports.metrics import token_time
from reports.summary import run_summary
from tests.unit.reports_fakes import PARTS, borrowed, fake_recording, fake_result

RUNS = [fake_result(name) for name in ("lru", "predictive", "belady")]


@pytest.mark.parametrize(
    "text",
    [
        "lru on traces/some.parquet",
        "16 slots of 1.00 MiB = 50 % of the experts = 16.0 MiB, pool: global",
        "24.0 MiB with the dense part (8.00 MiB)",
        "saves 40.0 %",
        "bench (measured), simulated, batch 1, seed 0",
        "held              50.0 %, landed in time (hit): 48.8 %, late: 10",
        "50.0 %: 400, 4.00 per token",
        "prefetch          none made",
        "100 while decoding",
        "mean 10.0 ms, p50 10.0 ms, p90 11.0 ms, p99 15.0 ms",
        "busy 40.0 % of the time",
        "stall demand     3.000 ms  30.0 %  ######",
        "400 ms with every expert on the GPU",
        "300 ms for Belady's 240 moves at link speed; made here: 400 (1.67 x)",
        "400 ms, this run 1.00 s: 40.0 % of the limit's speed",
    ],
)
def test_run_summary_says(text):
    assert text in run_summary(RUNS[0])


def test_summary_of_prefetches():
    text = run_summary(RUNS[1])
    assert "accuracy 70.0 %, coverage 15.0 %, timeliness 85.0 %" in text
    assert "500: demand 400, prefetch 100, 30 of them wasted; 20 cancelled" in text
    assert "horizon=4" in text


def test_borrowed_sizes_are_said_everywhere():
    result = fake_result(model=borrowed(RUNS[0], "mixtral-8x7b"))
    note = "routing recorded from tiny, sizes of one layer taken from mixtral-8x7b"
    assert note in run_summary(result)
    assert note in compare_table([result])
    assert note not in run_summary(RUNS[0])


def test_cliff_is_warned_of_below_one_token():
    below, above = fake_result(slots=7), fake_result(slots=8)
    assert "WARNING: 7 slots are fewer than the 8 experts of one token (4 layers x 2)" in (
        run_summary(below)
    )
    assert "LRU's cliff" in compare_table([below])
    assert "WARNING" not in run_summary(above) + compare_table([above])
    assert "WARNING" not in run_summary(fake_result(slots=7, pool="layer"))


def test_inexact_policies_are_named():
    quality = {"low_accesses": 0.2, "low_weight": 0.1, "skip_accesses": 0.0, "skip_weight": 0.0}
    mixed = fake_result("mixed", quality=quality)
    text = run_summary(mixed)
    assert "low precision 20.0 % of accesses (10.0 % of weight)" in text
    assert "skipped" not in text
    assert "not exact (may change the output): mixed" in compare_table([mixed])


def test_a_trace_without_decode_steps():
    none = {"mean": 0.0, "p50": 0.0, "p90": 0.0, "p99": 0.0}
    time = {**RUNS[0].time, "prefill_s": 1.0, "decode_s": 0.0, "tokens_per_s": 0.0, "tpot_s": none}
    result = fake_result(time=time)
    assert "no decode steps" in run_summary(result)
    assert "TPOT" in compare_table([result])


def test_compare_table_has_lru_first_and_belady_last():
    rows = [line.split() for line in compare_table(RUNS[::-1]).splitlines()]
    first = rows.index(next(row for row in rows if row[:1] == ["lru"]))
    assert [row[0] for row in rows[first : first + 3]] == ["lru", "predictive", "belady"]


def test_compare_table_numbers():
    lines = compare_table(RUNS).splitlines()
    lru = next(line for line in lines if line.startswith("  lru"))
    belady = next(line for line in lines if line.startswith("  belady"))
    #     held missed moves TPOT tok/s stall link vs-lru gap
    assert " ".join(lru.split()[1:]) == "50.0 4.00 4.00 10.0 100 4.00 40.0 1.00 x 0 %"
    assert " ".join(belady.split()[1:]) == "70.0 2.40 2.40 6.00 167 2.40 40.0 1.67 x 100 %"


def test_gap_between_lru_and_belady():
    time = {**RUNS[0].time, "tpot_s": {**RUNS[0].time["tpot_s"], "mean": 0.007}}
    table = compare_table([RUNS[0], fake_result("fifo", time=time), RUNS[2]])
    assert next(line for line in table.splitlines() if "fifo" in line).endswith("75 %")


def test_belady_stands_by_its_counts_when_it_was_not_run():
    line = next(x for x in compare_table(RUNS[:1]).splitlines() if "belady (counts only)" in x)
    assert line.split()[3:6] == ["70.0", "2.40", "2.40"]


def test_budgets_are_blocks_in_rising_order():
    runs = [fake_result(n, slots) for slots in (24, 8) for n in ("lru", "belady")]
    table = compare_table(runs)
    assert table.index("25 % of the experts: 8 slots") < table.index("75 % of the experts: 24")
    assert table.count("no exact run below 400 ms") == 2


def test_best_policy_needs_no_hindsight():
    assert "without hindsight: lru, 1.00 s, 40.0 %" in compare_table([RUNS[0], RUNS[2]])


def test_lines_fit_a_terminal():
    long = fake_result("lru", policy={**RUNS[0].policy, "label": "an unusually long label " * 3})
    lines = compare_table([*RUNS, long]).splitlines()
    lines += run_summary(long).splitlines() + run_summary(RUNS[1]).splitlines()
    assert max(map(len, lines)) <= 110


def test_no_results():
    assert compare_table([]) == "no results\n"


def test_token_time_of_a_recording_is_that_of_its_decode_steps():
    time = token_time(RUNS[0], fake_recording(prompts=10))
    assert time.parts_s == pytest.approx(PARTS)
    assert not time.whole_run


def test_token_time_weighs_steps_by_their_tokens():
    recording = fake_recording(steps=2)
    recording.steps[0].tokens, recording.steps[0].host_s = 3, 0.007
    assert token_time(RUNS[0], recording).parts_s["host"] == pytest.approx(0.006)


def test_token_time_without_a_recording_says_so_when_there_were_prompts():
    assert not token_time(RUNS[0]).whole_run
    prompts = fake_result(time={**RUNS[0].time, "prefill_s": 0.2})
    assert token_time(prompts).whole_run
    assert token_time(prompts).total_s == pytest.approx(0.01)
    assert "prompts included" in run_summary(prompts)


def test_token_time_in_the_result_is_taken():
    known = {cause: 0.001 for cause in CAUSES}
    result = fake_result(time={**RUNS[0].time, "prefill_s": 0.2, "tpot_parts_s": known})
    assert token_time(result).parts_s == known
    assert not token_time(result).whole_run


def test_labels_say_what_differs_and_no_more():
    assert labels(RUNS) == ["lru, 50 %", "predictive (ahead), 50 %", "belady, 50 %"]
    batches = [fake_result(batch=1), fake_result(batch=4)]
    assert labels(batches) == ["lru, 50 %, batch 1", "lru, 50 %, batch 4"]
    policy = RUNS[1].policy
    tuned = [fake_result(policy={**policy, "parameters": {"horizon": h}}) for h in (2, 4)]
    assert labels(tuned)[0] == "predictive (ahead), 50 %, horizon=2"
    assert labels([RUNS[0], RUNS[0]]) == ["lru, 50 % (1)", "lru, 50 % (2)"]
    assert labels([fake_result(slots=5)]) == ["lru, 15.6 %"]


def test_runs_of_one_curve_share_a_label():
    assert series_labels([fake_result(slots=8), fake_result(slots=16)]) == ["lru", "lru"]


def test_text_needs_no_matplotlib():
    code = "import sys, reports.summary; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_settings_have_tables_of_their_own():
    other = [fake_result(n, trace="other.parquet", batch=4) for n in ("lru", "belady")]
    table = compare_table([*RUNS, *other])
    first, second = table.split("other.parquet: tiny")
    assert "predictive" in first
    assert "predictive" not in second
    assert "  lru  " in second
    assert "batch 4" in second
