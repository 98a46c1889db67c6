"""``simctl trace``: what a reader sees, and parts of a trace."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simctl
from traces.errors import InputError
from traces.model import ModelSpec
from traces.split import divide
from traces.store import StoredTrace, open_trace
from traces.trace import MemoryTrace

ROOT = Path(__file__).resolve().parents[2]

SHAPE = ("--layers", "3", "--experts", "8", "--top-k", "2", "--sequences", "12")
LENGTH = ("--prompt", "2-6", "--decode", "20", "--domains", "3")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "made.parquet"
    more = ("--token-information", "0.5", "--ahead", "0.9,0.8")
    assert simctl.main(["trace", "synth", str(path), *SHAPE, *LENGTH, *more]) == 0
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert simctl.main(["trace", *map(str, arguments)]) == 0
    text = capsys.readouterr()
    assert text.err == ""
    return text.out


def test_synth_writes_what_was_asked(made: Path) -> None:
    stored = open_trace(made)
    assert (stored.layers, stored.model.experts, stored.k) == (3, 8, 2)
    assert (stored.has_tokens, stored.has_weights, stored.ahead_depth) == (True, True, 2)
    assert stored.extra["synthetic"]["repetition"] == 0.3
    assert Counter(stored.extra["domains"]) == {f"domain-{i}": 4 for i in range(3)}
    assert "seed 0" in stored.source


def test_synth_with_sizes_of_a_published_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.parquet"
    said = run(capsys, "synth", out, *SHAPE, "--sizes", "mixtral-8x7b", "--no-weights")
    assert said.startswith(f"{out}: 3072 tokens, 3 layers, top-2 of 8 experts")
    stored = open_trace(out)
    assert (stored.model.hidden, stored.has_weights) == (4096, False)


def test_info_is_a_table_for_a_reader(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "info", made)
    assert max(map(len, said.splitlines())) <= 100 + len(str(made))
    for fragment in (
        str(made),
        "license    CC0-1.0",
        "top-2 of 8 experts",
        "24 of 24.0 MiB = 0.6 GiB",
        "in 12 sequences of 2",
        "gate weights, token ids, predictions to +2",
        "popularity",
        "16 tokens, one fixed set",
        "over all layers",
        "recorded prediction, +2",
        "a table from the token id",
        "repetition         0.3",
        "domain-2",
        "separation",
    ):
        assert fragment in said


def test_info_of_the_barest_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "one.npy", np.array([[[0, 1]]]))
    out = tmp_path / "one.parquet"
    run(capsys, "import", tmp_path / "one.npy", out, "--experts", "2", "--source", "mine")
    said = run(capsys, "info", out)
    assert "source     mine" in said
    assert "license    unknown" in said
    for absent in ("nan", "None", "from token to token", "domains"):
        assert absent not in said


def test_info_as_json(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = json.loads(run(capsys, "info", made, "--json", "-"))
    assert figures["model"]["experts"] == 8
    assert figures["settings"]["domains"] == 3
    assert figures["extra"]["synthetic"]["skew"] == 0.1
    target = tmp_path / "info.json"
    assert "popularity" in run(capsys, "info", made, "--json", target)
    assert json.loads(target.read_text()) == figures


def test_info_goes_to_a_pipe_without_a_bar(made: Path) -> None:
    command = [sys.executable, str(ROOT / "simctl.py"), "trace", "info", str(made)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "\r" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("info", "{made}", "--json", "{folder}/absent/x.json"), "cannot be written"),
        (("synth", "{folder}/x", "--prompt", "9-3"), "--prompt '9-3', expected a number"),
        (("synth", "{folder}/x", "--ahead", "high"), "--ahead 'high', expected numbers"),
        (("synth", "{folder}/x", "--top-k", "99"), "top_k is 99"),
        (("synth", "{folder}/x", "--sizes", "mixtrel-8x7b"), "mixtral-8x7b"),
        (("split", "{made}", "{folder}/x", "--sequences", "13"), "has 12 sequences, expected"),
        (("split", "{made}", "{folder}/x", "--share", "1"), "leaves one part empty"),
        (("split", "{made}", "{folder}/x", "--share", "1", "--sequences", "2"), "both given"),
        (("split", "{made}", "{folder}/x", "{folder}/y", "--sequences", "12"), "are left for"),
        (("split", "{folder}/absent", "{folder}/x"), "no such file"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(
    arguments: tuple[str, ...], expected: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"made": made, "folder": made.parent}
    assert simctl.main(["trace", *(a.format(**places) for a in arguments)]) == 2
    said = capsys.readouterr()
    assert expected in said.err
    assert said.err.count("\n") == 1
    assert not (made.parent / "y").exists()


# ------------------------------------------------------------------ parts


def ids(stored: StoredTrace) -> list[int]:
    return [sequence.id for sequence in stored.sequences()]


def test_split_shares_out_every_domain(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = made.with_name("a.parquet"), made.with_name("b.parquet")
    run(capsys, "split", made, one, two)
    first, second = open_trace(one), open_trace(two)
    assert sorted(ids(first) + ids(second)) == list(range(12))
    for part in (first, second):
        assert Counter(part.extra["domains"]) == {f"domain-{i}": 2 for i in range(3)}
        assert part.extra["domains"] == [f"domain-{i % 3}" for i in ids(part)]
        assert (part.has_tokens, part.has_weights, part.ahead_depth) == (True, True, 2)
    assert "0.5 of it, seed 0" in first.source
    whole = {s.id: s for s in open_trace(made).sequences()}
    for sequence in second.sequences():
        np.testing.assert_array_equal(sequence.experts, whole[sequence.id].experts)


def test_split_takes_the_first_sequences(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = made.with_name("a.parquet"), made.with_name("b.parquet")
    run(capsys, "split", made, one, two, "--sequences", "5")
    assert ids(open_trace(one)) == [0, 1, 2, 3, 4]
    assert ids(open_trace(two)) == [5, 6, 7, 8, 9, 10, 11]
    assert open_trace(one).extra["domains"][:4] == ["domain-0", "domain-1", "domain-2", "domain-0"]


def test_a_trace_can_be_split_onto_itself(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "split", made, made, "--sequences", "2")
    assert ids(open_trace(made)) == [0, 1]


def labelled(labels: list[str]) -> Any:
    return MemoryTrace(ModelSpec("m", 1, 2, 1, 1, 1, 1, 0, 0), [], extra={"domains": labels})


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_the_draw_is_even_and_repeatable(share: float) -> None:
    labels = ["a"] * 40 + ["b"] * 10 + ["c"] * 50
    trace = labelled(labels)
    first = divide(trace, 100, share, seed=1)
    assert first == divide(trace, 100, share, seed=1)
    assert first != divide(trace, 100, share, seed=2)
    assert sum(first) == round(100 * share)
    taken = Counter(label for label, chosen in zip(labels, first, strict=True) if chosen)
    for label, count in Counter(labels).items():
        assert abs(taken[label] - count * share) <= 1


def test_a_draw_needs_sequences_for_both_parts() -> None:
    with pytest.raises(InputError, match="of 1 sequences leaves one part empty"):
        divide(labelled(["a"]), 1, 0.5, seed=0)
    assert sum(divide(labelled([]), 2, 0.5, seed=0)) == 1
