"""Bad input through the real command: exit code 2, one line that helps, nothing half written."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import simctl

ROOT = Path(__file__).resolve().parents[2]

LAYERS, EXPERTS, TOP_K = 4, 8, 2

#: What a file of the policy under test begins with.
POLICY = """
from policies.base import Policy, Service
from policies.orders import recency


class Mine(Policy):
    '''LRU, with one hook gone wrong.'''

    def reset(self, context):
        self.recent = recency(context)

    def on_route(self, routing):
        self.recent.touch(routing.experts)

    def on_load(self, copy):
        self.recent.add(copy)

    def on_evict(self, copy):
        self.recent.remove(copy)

    def victims(self, incoming):
        return self.recent.order(incoming)
"""

REGISTER = "from policies.registry import register\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trace that has everything a trace can have."""
    path = tmp_path_factory.mktemp("good") / "good.parquet"
    shape = ["--layers", str(LAYERS), "--experts", str(EXPERTS), "--top-k", str(TOP_K)]
    length = ["--sequences", "4", "--prompt", "4", "--decode", "12"]
    more = ["--token-information", "0.5", "--ahead", "0.9,0.8"]
    assert simctl.main(["trace", "synth", str(path), *shape, *length, *more]) == 0
    return path


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: Path) -> Path:
    """Every test runs in a folder of its own that holds the good trace."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(good, tmp_path)
    return tmp_path


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must be refused; return its one line."""

    def run(*arguments: str) -> str:
        before = listing()
        capfd.readouterr()
        code = simctl.main(list(arguments))
        said = capfd.readouterr()
        assert code == 2, said
        assert_one_line(said.err)
        assert said.out == ""
        assert listing() == before
        return said.err

    return run


def listing() -> dict[str, bytes]:
    """Every file below the present folder with its content."""
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in sorted(Path().rglob("*"))}


def assert_one_line(text: str) -> None:
    assert text.count("\n") == 1, text
    assert text.strip(), text
    assert "Traceback" not in text


def assert_says(text: str, *fragments: str) -> None:
    for fragment in fragments:
        assert fragment in text, f"{fragment!r} is not in: {text}"


def run_on(trace: str = "good.parquet", policy: str = "lru", *more: str) -> list[str]:
    return ["run", "--policy", policy, "--trace", trace, *more]


# ---------------------------------------------------------------------------- trace files


def altered(name: str, change: Callable[[dict[str, Any], Any], None]) -> None:
    """Write *name*: the good trace with its columns (as Arrow arrays) changed."""
    table = pq.read_table("good.parquet")
    columns = {column: table[column].combine_chunks() for column in table.column_names}
    notes = json.loads(table.schema.metadata[b"simctl"])
    change(columns, notes)
    changed = pa.table(columns).replace_schema_metadata({"simctl": json.dumps(notes)})
    pq.write_table(changed, name)


def lists(values: Any) -> Any:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def at_row(column: str, row: int, value: Any) -> Callable[[dict[str, Any], Any], None]:
    """Change one row of a column of lists or numbers."""

    def change(columns: dict[str, Any], notes: Any) -> None:
        old = columns[column]
        if pa.types.is_fixed_size_list(old.type):
            values = old.flatten().to_numpy(zero_copy_only=False).reshape(len(old), -1).copy()
            values[row] = value
            columns[column] = lists(values)
        else:
            values = old.to_numpy(zero_copy_only=False).copy()
            values[row] = value
            columns[column] = pa.array(values)

    return change


def recast(column: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any], Any], None]:
    def change(columns: dict[str, Any], notes: Any) -> None:
        columns[column] = make(columns[column])

    return change


def model_says(**fields: Any) -> Callable[[dict[str, Any], Any], None]:
    def change(columns: dict[str, Any], notes: Any) -> None:
        notes["model"] |= fields

    return change


def drop(*names: str) -> Callable[[dict[str, Any], Any], None]:
    def change(columns: dict[str, Any], notes: Any) -> None:
        for name in names:
            del columns[name]

    return change


def ragged(columns: dict[str, Any], notes: Any) -> None:
    """Lists of any length, the one of row 6 too short."""
    rows = columns["experts"].to_pylist()
    rows[6] = rows[6][:1]
    columns["experts"] = pa.array(rows, pa.list_(pa.int16()))


def cut(rows: int) -> Callable[[dict[str, Any], Any], None]:
    def change(columns: dict[str, Any], notes: Any) -> None:
        for name, values in columns.items():
            columns[name] = values[:rows]

    return change


def unsorted(columns: dict[str, Any], notes: Any) -> None:
    """Sequences in the order 3, 2, 1, 0."""
    columns["sequence"] = pa.array(3 - columns["sequence"].to_numpy(), pa.int32())


def prefill_last(columns: dict[str, Any], notes: Any) -> None:
    words = np.array(columns["phase"].to_pylist(), dtype=object)
    words[: 4 * LAYERS], words[4 * LAYERS : 16 * LAYERS] = "decode", "prefill"
    columns["phase"] = pa.array(words.tolist())


def swapped_layers(columns: dict[str, Any], notes: Any) -> None:
    layers = columns["layer"].to_numpy().copy()
    layers[[4, 5]] = layers[[5, 4]]
    columns["layer"] = pa.array(layers)


def null_experts(columns: dict[str, Any], notes: Any) -> None:
    rows = columns["experts"].to_pylist()
    rows[9] = None
    columns["experts"] = pa.array(rows, columns["experts"].type)


def no_version(columns: dict[str, Any], notes: Any) -> None:
    notes["version"] = 99


ALTERED: dict[str, tuple[Callable[[dict[str, Any], Any], None], tuple[str, ...]]] = {
    "no experts": (drop("experts"), ("column 'experts' is missing",)),
    "no layer": (drop("layer"), ("column 'layer' is missing", "found sequence, position")),
    "experts as floats": (
        recast("experts", lambda c: c.cast(pa.list_(pa.float32(), TOP_K))),
        ("column 'experts'", "float", "expected lists of integers"),
    ),
    "layer as text": (
        recast("layer", lambda c: pa.array([str(v) for v in c.to_pylist()])),
        ("column 'layer' holds string", "expected integers"),
    ),
    "phase as numbers": (
        recast("phase", lambda c: pa.array([0] * len(c))),
        ("column 'phase' holds int64", "expected strings"),
    ),
    "weights as integers": (
        recast("weights", lambda c: lists(np.ones((len(c), TOP_K), dtype=np.int32))),
        ("column 'weights'", "expected lists of floats"),
    ),
    "unknown phase": (
        recast("phase", lambda c: pa.array(["prefill", *["dream"] * (len(c) - 1)])),
        ("row 1", "phase 'dream'", "expected prefill or decode"),
    ),
    "expert too large": (
        at_row("experts", 5, [1, EXPERTS]),
        (f"expert {EXPERTS}", f"expected 0 to {EXPERTS - 1}", "row 5"),
    ),
    "negative expert": (at_row("experts", 5, [1, -1]), ("expert -1", "expected 0 to 7", "row 5")),
    "repeated expert": (at_row("experts", 7, [3, 3]), ("3, 3", "row 7", "expected")),
    "null experts": (null_experts, ("row 9", "experts is null", "expected 2 values")),
    "unsorted sequences": (unsorted, ("sequence 2", "follows sequence 3", "rising sequences")),
    "gap in positions": (
        at_row("position", slice(8, 12), 7),
        ("position 7 follows 1", "expected 2", "row 8"),
    ),
    "prefill after decode": (prefill_last, ("phase prefill after decode", "row 16")),
    "layers out of order": (swapped_layers, ("row 4", "layer 1, expected 0")),
    "ragged experts": (ragged, ("row 6", "experts has 1 values, expected 2")),
    "ends inside a token": (cut(5), ("ends after row 4 inside a token", "1 of its 4 layers")),
    "no rows": (cut(0), ("holds no rows", "expected at least one token")),
    "spec: top_k": (model_says(top_k=3), ("2 per row", "expected the model's top_k = 3")),
    "spec: fewer experts": (model_says(experts=4), ("expected 0 to 3", "expert")),
    "spec: more layers": (model_says(layers=5), ("layer 0, expected 4", "layers 0 to 4")),
    "spec: fewer layers": (model_says(layers=3), ("layer 3, expected 0 to 2",)),
    "spec: top_k above experts": (
        model_says(top_k=9),
        ("metadata 'simctl'", "top_k is 9", "at most experts = 8"),
    ),
    "spec: not a number": (
        model_says(hidden="wide"),
        ("metadata 'simctl'", "hidden is 'wide'", "expected a whole number"),
    ),
    "spec: unknown field": (model_says(colour=1), ("unknown field 'colour'", "expected name")),
    "spec: unknown dtype": (model_says(dtype="int3"), ("dtype is 'int3'", "expected one of")),
    "another version": (no_version, ("version 99, expected 1",)),
}

WEIGHTS: dict[str, tuple[Any, str]] = {
    "nan": (float("nan"), "weight nan"),
    "negative": (-0.25, "weight -0.25"),
    "infinite": (float("inf"), "weight inf"),
}


@pytest.mark.parametrize("name", list(ALTERED))
@pytest.mark.parametrize("command", ["run", "info", "split"])
def test_a_trace_that_breaks_a_rule(name: str, command: str, refused: Any) -> None:
    change, fragments = ALTERED[name]
    altered("bad.parquet", change)
    commands = {
        # Weights are looked at where they are used.
        "run": run_on("bad.parquet", "mixed", "--json", "out.json", "--report", "report"),
        "info": ["trace", "info", "bad.parquet", "--json", "out.json"],
        "split": ["trace", "split", "bad.parquet", "part.parquet", "rest.parquet"],
    }
    assert_says(refused(*commands[command]), "bad.parquet", *fragments)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_gate_weights_that_are_none(name: str, refused: Any) -> None:
    value, said = WEIGHTS[name]
    altered("bad.parquet", at_row("weights", 11, [np.float16(0.5), np.float16(value)]))
    for command in (run_on("bad.parquet", "mixed"), ["trace", "info", "bad.parquet"]):
        assert_says(refused(*command), "bad.parquet", "row 11", said, "expected a finite number")


def damaged(kind: str) -> None:
    data = Path("good.parquet").read_bytes()
    content = {
        "truncated": data[: len(data) // 2],
        "empty": b"",
        "text": b"layer,experts\n0,1\n",
        "zeroed": data[:200] + bytes(len(data) - 6000) + data[-5800:],
        "other": b"",
    }[kind]
    Path("bad.parquet").write_bytes(content)
    if kind == "other":
        pq.write_table(pa.table({"x": [1, 2]}), "bad.parquet")


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "zeroed", "other"])
def test_a_file_that_is_no_trace(kind: str, refused: Any) -> None:
    damaged(kind)
    for command in (run_on("bad.parquet"), ["trace", "info", "bad.parquet"]):
        assert_says(refused(*command), "bad.parquet")


def test_a_trace_that_is_not_there(refused: Any) -> None:
    Path("folder.parquet").mkdir()
    for name, said in (("absent.parquet", "no such file"), ("folder.parquet", "is a folder")):
        for command in (
            run_on(name),
            ["compare", "--trace", name],
            ["trace", "info", name],
            ["trace", "split", name, "a.parquet"],
            ["trace", "import", name, "a.parquet", "--format", "npz"],
            run_on("good.parquet", "lru", "--train", name),
        ):
            assert_says(refused(*command), name, said, "expected")


# ---------------------------------------------------------------------------- options

#: Options that are wrong on any trace -> what the line must say.
OPTIONS: list[tuple[list[str], tuple[str, ...]]] = [
    (["--policy", "lruu"], ("unknown policy 'lruu'", "did you mean 'lru'?", "known:")),
    (["--policy", "perdictive"], ("unknown policy", "'predictive'")),
    (["--policy", ""], ("unknown policy ''",)),
    (["--policy", "lru:size=3"], ("'lru'", "unknown parameter 'size'", "known: none")),
    (
        ["--policy", "predictive:horizn=3"],
        ("'predictive'", "unknown parameter 'horizn'", "'horizon'"),
    ),
    (["--policy", "predictive:horizon=0"], ("horizon is 0", "expected 1 to 4096")),
    (["--policy", "predictive:horizon=2.5"], ("horizon is '2.5'", "expected int")),
    (["--policy", "predictive:margin=nan"], ("margin is nan", "expected 0 to 1")),
    (["--policy", "predictive:protect=perhaps"], ("protect is 'perhaps'", "expected bool")),
    (["--policy", "predictive:horizon"], ("'horizon' found", "expected key=value")),
    (["--policy", "mixed:t1=0.9,t2=0.5"], ("t1 is 0.9", "expected at most t2 = 0.5")),
    (["--cache", "25"], ("--cache 25", "expected a share", "25%")),
    (["--cache", "0%"], ("--cache 0%", "expected a share")),
    (["--cache", "101%"], ("--cache 101%", "up to 100%")),
    (["--cache", "nan%"], ("--cache nan%", "expected a share")),
    (["--cache", ""], ("--cache", "expected a share")),
    (["--cache", "3%"], ("--cache 3%", "is 0 slots", "at least top_k = 2")),
    (["--slots", "1"], ("--slots 1", "at least top_k = 2")),
    (["--slots", "-4"], ("--slots -4", "at least top_k = 2")),
    (["--slots", "33"], ("--slots 33", "at most the model's 32 experts")),
    (["--gpu-memory", "24XB"], ("--gpu-memory 24XB", "such as 24GiB")),
    (["--gpu-memory", "-3GiB"], ("--gpu-memory -3GiB", "such as 24GiB")),
    (["--gpu-memory", "1KiB"], ("--gpu-memory 1KiB", "cannot hold the dense part", "at least")),
    (["--gpu-memory", "9TiB"], ("--gpu-memory 9TiB", "more than the", "GiB of NVIDIA H200")),
    (["--gpu-memory", "9" * 400 + "GiB"], ("--gpu-memory 999", "more than the")),
    (["--cache", "50%", "--slots", "8"], ("--cache, --slots", "several given", "expected one")),
    (["--slots", "8", "--gpu-memory", "8GiB"], ("several given, expected one",)),
    (["--batch", "0"], ("--batch 0", "expected at least 1")),
    (["--depth", "0"], ("--depth 0", "expected at least 1")),
    (["--seed", "-1"], ("--seed -1", "expected")),
    (["--batch", "two"], ("--batch", "'two'", "integer")),
    (["--depth", "1.5"], ("--depth", "'1.5'", "integer")),
    (["--seed", "x"], ("--seed", "'x'", "integer")),
    (["--slots", "many"], ("--slots", "'many'", "integer")),
    (["--pool", "expert"], ("--pool", "'expert'", "'global', 'layer'")),
    (["--pool", "layer", "--slots", "7"], ("--pool layer", "7 slots", "expected at least 8")),
    (["--hardware", "h200"], ("no profile 'h200'", "did you mean 'h200-pcie5'?")),
    (["--hardware", "absent.toml"], ("absent.toml", "expected a hardware profile")),
    (["--sizes", "mixtral"], ("mixtral", "mixtral-8x7b")),
    (["--scheduler", "prompt-lenght"], ("unknown scheduler", "'prompt-length'")),
    (["--scheduler", "prompt-length:window=0"], ("window is 0", "expected 1 to 1024")),
    (["--forecaster", "markow"], ("unknown forecaster 'markow'", "'markov'")),
    (["--forecaster", "oracle:accuracy=2"], ("accuracy is 2.0", "expected 0 to 1")),
    (["--forecaster", "token"], ("--train FILE", "forecaster 'token' needs training")),
    (["--train", "absent.parquet"], ("absent.parquet", "no such file")),
    (["--polcy", "lru"], ("--polcy", "--policy")),
    (["surplus"], ("surplus",)),
    (["--cache"], ("--cache", "argument")),
]


@pytest.mark.parametrize(("options", "fragments"), OPTIONS, ids=lambda v: " ".join(v)[:40])
def test_an_option_that_is_wrong(
    options: list[str], fragments: tuple[str, ...], refused: Any
) -> None:
    policy = "predictive" if "--forecaster" in options else "lru"
    outputs = ["--json", "out.json", "--timeline", "t.json.gz", "--report", "report"]
    assert_says(refused(*run_on("good.parquet", policy), *outputs, *options), *fragments)


def test_a_forecaster_is_checked_even_where_none_is_used(refused: Any) -> None:
    assert_says(refused(*run_on(), "--forecaster", "markow"), "unknown forecaster", "'markov'")


@pytest.mark.parametrize("text", ["kind = ", 'kind = "measured"\n', "kind = 3\n"])
def test_a_hardware_profile_that_is_none(text: str, refused: Any) -> None:
    Path("mine.toml").write_text(text)
    assert_says(refused(*run_on(), "--hardware", "mine.toml"), "mine.toml")
    assert_says(refused("hardware", "mine.toml"), "mine.toml")


def test_usage_errors_of_every_command(refused: Any) -> None:
    for arguments, fragments in (
        (["rnu"], ("'rnu'",)),
        (["run"], ("--policy",)),
        (["run", "--policy", "lru"], ("--trace",)),
        (["compare"], ("--trace",)),
        (["report"], ("RESULT.json",)),
        (["report", "--nothing"], ("--nothing",)),
        (["trace", "inof"], ("'inof'",)),
        (["trace", "info"], ("PATH",)),
        (["trace", "synth", "x.parquet", "--layers", "few"], ("--layers", "'few'")),
        (["trace", "synth", "x.parquet", "--seed", "-1"], ("seed", "-1")),
        (["trace", "synth", "x.parquet", "--prompt", "9-3"], ("--prompt '9-3'", "expected")),
        (["trace", "synth", "x.parquet", "--skew", "1.5"], ("skew", "1.5", "expected")),
        (["trace", "synth", "x.parquet", "--top-k", "40"], ("40", "32")),
        (["trace", "split", "good.parquet", "x.parquet", "--share", "2"], ("--share", "2")),
        (["trace", "split", "good.parquet", "x.parquet", "--seed", "-1"], ("--seed", "-1")),
        (
            ["trace", "split", "good.parquet", "x.parquet", "--sequences", "9"],
            ("good.parquet", "4 sequences", "at least 9"),
        ),
        (["policies", "--nothing"], ("--nothing",)),
        (["hardware", "abacus"], ("'abacus'",)),
        (["doctor", "now"], ("now",)),
    ):
        assert_says(refused(*arguments), *fragments)


# ---------------------------------------------------------------------------- missing data


def test_policies_that_need_what_the_trace_lacks(refused: Any) -> None:
    altered("bare.parquet", recast("token", lambda c: pa.array([None] * len(c), pa.int32())))
    altered("plain.parquet", drop("weights"))
    altered("blind.parquet", drop("ahead_1", "ahead_2"))
    train = ["--train", "good.parquet"]
    for command, fragments in (
        (run_on("plain.parquet", "mixed"), ("plain.parquet", "'mixed'", "needs weights")),
        (
            [*run_on("blind.parquet", "predictive"), "--forecaster", "ahead"],
            ("blind.parquet", "'ahead'", "needs ahead", "expected a trace with ahead"),
        ),
        (
            [*run_on("bare.parquet", "predictive"), "--forecaster", "token", *train],
            ("bare.parquet", "'token'", "needs tokens"),
        ),
    ):
        assert_says(refused(*command), *fragments)


def test_a_training_trace_of_another_model(refused: Any) -> None:
    shape = ["--layers", "3", "--experts", "8", "--top-k", "2", "--sequences", "2"]
    assert simctl.main(["trace", "synth", "other.parquet", *shape]) == 0
    said = refused(*run_on(), "--train", "other.parquet")
    assert_says(said, "other.parquet", "layers is 3", "expected 4 as in the trace to run")


def test_a_trace_to_import_that_makes_no_sense(refused: Any) -> None:
    Path("t.csv").write_text("layer,experts\n0,1 2\n1,3 x\n")
    Path("t.jsonl").write_text('{"layer": 0, "experts": [1, 2]}\n{"layer": \n')
    np.save("t.npy", np.array([[[0, 0]]], dtype=np.int32))
    Path("spec.json").write_text('{"name": "x"}')
    for name, fragments in (
        ("t.csv", ("t.csv",)),
        ("t.jsonl", ("t.jsonl",)),
        ("t.npy", ("t.npy",)),
        ("good.parquet", ("good.parquet",)),
    ):
        more = ["--layers", "2", "--experts", "8", "--top-k", "2"]
        assert_says(refused("trace", "import", name, "new.parquet", *more), *fragments)
    said = refused("trace", "import", "t.npy", "new.parquet", "--model-spec", "spec.json")
    assert_says(said, "spec.json")


# ---------------------------------------------------------------------------- policies of a user


def test_policy_files_that_do_not_load(refused: Any) -> None:
    Path("folder.py").mkdir()
    for name, text in (
        ("syntax.py", "class Mine(:\n"),
        ("imports.py", "import no_such_module\n"),
        ("raises.py", "raise ValueError('first line\\nsecond line')\n"),
        ("exits.py", "raise SystemExit(3)\n"),
        ("empty.py", ""),
        ("other.py", "class Mine:\n    pass\n"),
        ("two.py", POLICY + POLICY.replace("Mine", "Yours")),
        ("abstract.py", POLICY.replace("victims", "viktims")),
        ("asks.py", POLICY + "\n    def __init__(self, needed):\n        pass\n"),
        ("breaks.py", POLICY + "\n    def __init__(self):\n        self.x = 1 / 0\n"),
        ("again.py", REGISTER + POLICY.replace("class", "@register('lru')\nclass")),
    ):
        Path(name).write_text(text)
    for policy, fragments in (
        ("absent.py:Mine", ("policy file absent.py: not found",)),
        ("folder.py:Mine", ("folder.py",)),
        ("syntax.py:Mine", ("syntax.py", "does not import", "SyntaxError")),
        ("imports.py:Mine", ("imports.py", "does not import", "no_such_module")),
        ("raises.py:Mine", ("raises.py", "ValueError: first line")),
        ("exits.py:Mine", ("exits.py", "does not import", "SystemExit")),
        ("empty.py:Mine", ("empty.py", "no policy class 'Mine'", "expected one of none")),
        ("other.py:Mine", ("other.py", "no policy class 'Mine'")),
        ("two.py", ("two.py", "no class was named", "Mine, Yours")),
        ("two.py:Minne", ("no policy class 'Minne'", "Mine, Yours")),
        ("abstract.py:Mine", ("abstract.py:Mine", "abstract", "victims")),
        ("asks.py:Mine", ("asks.py:Mine", "needed")),
        ("breaks.py:Mine", ("breaks.py:Mine", "division by zero")),
        ("two.py:Mine:width=3", ("unknown parameter 'width'", "known: none")),
        ("again.py:Mine", ("again.py", "registered twice")),
    ):
        assert_says(refused(*run_on("good.parquet", policy)), *fragments)


#: Hook -> its definition, which raises at some event.
RAISING = {
    "on_route": "def on_route(self, routing):\n        1 / 0",
    "on_load": "def on_load(self, copy):\n        1 / 0",
    "on_evict": "def on_evict(self, copy):\n        1 / 0",
    "victims": "def victims(self, incoming):\n        1 / 0",
    "victims, later": "def victims(self, incoming):\n        yield 1 / 0",
    "serve": "def serve(self, routing, missed):\n        1 / 0",
    "prefetch": "def prefetch(self, routing, forecast):\n        1 / 0",
    "prefetch, later": "def prefetch(self, routing, forecast):\n        yield 1 / 0",
    "plan_step": "def plan_step(self, step, forecast):\n        1 / 0",
    "reset": "def reset(self, context):\n        1 / 0",
}


@pytest.mark.parametrize("hook", list(RAISING))
def test_a_policy_that_raises_in_mid_run(hook: str, refused: Any) -> None:
    Path("mine.py").write_text(f"{POLICY}\n    {RAISING[hook]}\n")
    outputs = ["--json", "out.json", "--timeline", "t.json.gz", "--report", "report"]
    said = refused(*run_on("good.parquet", "mine.py:Mine", "--slots", "4"), *outputs)
    assert_says(said, "'mine.py:Mine' raised ZeroDivisionError", "mine.py:", hook.split(",")[0])
    if hook != "reset":
        assert_says(said, "at event ", "layer ")


def test_a_failure_names_the_event(refused: Any) -> None:
    check = "        if routing.event == 7:\n            raise RuntimeError('two\\nlines')\n"
    Path("mine.py").write_text(POLICY + "\n    def on_route(self, routing):\n" + check)
    said = refused(*run_on("good.parquet", "mine.py:Mine", "--slots", "32"))
    assert_says(said, "RuntimeError: two at event 7 (step 1, layer 3)", "mine.py:", "on_route")


#: What a hook gives back that cannot be -> what the line must say.
ABSURD = {
    "def victims(self, incoming):\n        return None": "victims",
    "def victims(self, incoming):\n        return ()": "names no victim",
    "def victims(self, incoming):\n        return [[1], [2]]": "victims",
    "def victims(self, incoming):\n        return iter(lambda: 99, 1)": "endless victims",
    "def prefetch(self, routing, forecast):\n        return 5": "prefetch",
    "def prefetch(self, routing, forecast):\n        return ['a']": "'a'",
    "def prefetch(self, routing, forecast):\n        return [1.5]": "1.5",
    "def prefetch(self, routing, forecast):\n        return [32]": "32",
    "def prefetch(self, routing, forecast):\n        return [-1]": "-1",
    "def plan_step(self, step, forecast):\n        return [64]": "64",
    "def serve(self, routing, missed):\n        return {missed[0]: Service.SKIP}": "exact = True",
    "def serve(self, routing, missed):\n        return {missed[0]: 'skip'}": "expected a Service",
    "def serve(self, routing, missed):\n        return [missed[0]]": "serve",
    "def serve(self, routing, missed):\n        return {99: Service.CPU}": "99",
}


@pytest.mark.parametrize("hook", list(ABSURD))
def test_a_policy_that_asks_for_the_impossible(hook: str, refused: Any) -> None:
    Path("mine.py").write_text(f"{POLICY}\n    {hook}\n")
    said = refused(*run_on("good.parquet", "mine.py:Mine", "--slots", "4"))
    assert_says(said, "'mine.py:Mine'", "event ", ABSURD[hook])


def test_a_forecaster_that_raises(refused: Any) -> None:
    Path("guess.py").write_text(
        "from policies.base import Forecaster\n\n\nclass Guess(Forecaster):\n"
        "    def on_route(self, routing):\n        return {}['nothing']\n"
    )
    said = refused(*run_on("good.parquet", "predictive"), "--forecaster", "guess.py:Guess")
    assert_says(said, "'guess.py:Guess' raised KeyError", "at event 0 (step 0, layer 0)")


def test_a_plugin_that_wants_what_does_not_exist(refused: Any) -> None:
    Path("mine.py").write_text(POLICY + "\n    needs = ('weather',)\n")
    said = refused(*run_on("good.parquet", "mine.py:Mine"))
    assert_says(said, "'mine.py:Mine'", "weather")


# ---------------------------------------------------------------------------- outputs


def test_outputs_that_cannot_be_written(refused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("file").write_text("in the way")
    Path("folder").mkdir()
    ran: list[str] = []
    monkeypatch.setattr("sim.world.World.run", lambda *_: ran.append("a run that was in vain"))
    for option, path in (
        ("--json", "file/out.json"),
        ("--json", "absent/out.json"),
        ("--json", "folder"),
        ("--timeline", "file/t.json.gz"),
        ("--timeline", "folder"),
        ("--timeline", "absent/t.json.gz"),
        ("--report", "file"),
        ("--report", "file/report"),
    ):
        assert_says(refused(*run_on(), option, path), path.split("/")[0])
        if option != "--timeline":
            assert_says(refused("compare", "--trace", "good.parquet", option, path), path)
    assert not ran


def test_other_outputs_that_cannot_be_written(refused: Any) -> None:
    Path("file").write_text("in the way")
    Path("folder").mkdir()
    synth = ["--layers", "2", "--experts", "4", "--top-k", "1", "--sequences", "2"]
    for command, name in (
        (["trace", "info", "good.parquet", "--json", "file/x.json"], "file/x.json"),
        (["trace", "info", "good.parquet", "--json", "folder"], "folder"),
        (["trace", "synth", "file/x.parquet", *synth], "file/x.parquet"),
        (["trace", "synth", "folder", *synth], "folder"),
        (["trace", "synth", "absent/x.parquet", *synth], "absent/x.parquet"),
        (["trace", "split", "good.parquet", "file/x.parquet"], "file/x.parquet"),
        (["doctor", "--json", "file/x.json"], "file/x.json"),
        (["hardware", "--json", "file/x.json"], "file/x.json"),
    ):
        assert_says(refused(*command), name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(refused: Any) -> None:
    Path("locked").mkdir()
    Path("locked").chmod(0o500)
    assert_says(refused(*run_on(), "--report", "locked/report"), "locked", "not writable")


# ---------------------------------------------------------------------------- results to report


def test_results_that_are_none(refused: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert simctl.main(run_on("good.parquet", "lru", "--json", "good.json")) == 0
    capfd.readouterr()
    whole = json.loads(Path("good.json").read_text())

    def write(name: str, **changes: Any) -> None:
        values = whole | changes
        Path(name).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))

    write("schema.json", schema="other/1")
    write("lacks.json", moves=...)
    write("hollow.json", time={})
    write("words.json", moves="many")
    write("text.json", slots="many")
    write("within.json", bounds=whole["bounds"] | {"compute_s": None})
    Path("cut.json").write_text(Path("good.json").read_text()[:200])
    Path("list.json").write_text("[]")
    Path("none.json").write_text('{"results": 3}')
    Path("number.json").write_text("3")
    Path("binary.json").write_bytes(bytes([200, 201, 0]))
    for name, fragments in (
        ("absent.json", ("expected a result",)),
        ("cut.json", ("no JSON", "expected a result")),
        ("binary.json", ("no JSON",)),
        ("schema.json", ("'other/1'", "expected 'simctl.result/1'")),
        ("lacks.json", ("'moves' is missing",)),
        ("hollow.json", ("time", "missing")),
        ("words.json", ("moves", "'many'", "expected")),
        ("text.json", ("slots", "'many'", "expected")),
        ("within.json", ("bounds", "compute_s")),
        ("list.json", ("holds no result",)),
        ("none.json", ("expected",)),
        ("number.json", ("int", "expected")),
    ):
        assert_says(refused("report", name, "--out", "report"), name, *fragments)
    Path("file").write_text("")
    assert_says(refused("report", "good.json", "--out", "file/report"), "file/report")


# ---------------------------------------------------------------------------- as a process


def start(*arguments: str, **more: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "simctl", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment,
        **more,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "--policy", "lru", "--trace", "absent.parquet"],
        ["run", "--polcy", "lru", "--trace", "good.parquet"],
        ["run", "--policy", "mine.py:Mine", "--trace", "good.parquet", "--slots", "4"],
    ],
    ids=["missing trace", "unknown option", "policy that raises"],
)
def test_a_process_leaves_with_two(arguments: list[str]) -> None:
    Path("mine.py").write_text(f"{POLICY}\n    {RAISING['victims']}\n")
    process = start(*arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert_one_line(err)


def wait_for(find: Callable[[], Any], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not find():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def stop(process: subprocess.Popen[str]) -> str:
    """Ctrl-C; returns what the process said."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.strip() == "interrupted"
    return err


SLOW = """
    def plan_step(self, step, forecast):
        if step.number == 5:
            import pathlib, time
            pathlib.Path("reached").touch()
            time.sleep(60)
        return ()
"""


def test_ctrl_c_in_mid_run_leaves_nothing() -> None:
    Path("mine.py").write_text(POLICY + SLOW)
    outputs = ["--json", "out.json", "--timeline", "t.json.gz", "--report", "report"]
    process = start(*run_on("good.parquet", "mine.py:Mine"), *outputs)
    wait_for(Path("reached").exists)
    stop(process)
    assert {p.name for p in Path().iterdir()} - {"__pycache__"} == {
        "good.parquet",
        "mine.py",
        "reached",
    }


def test_ctrl_c_while_a_trace_is_drawn_leaves_nothing() -> None:
    process = start("trace", "synth", "new.parquet", "--sequences", "4000")
    wait_for(lambda: list(Path().glob(".*.part")))
    time.sleep(0.3)
    stop(process)
    assert [p.name for p in Path().iterdir()] == ["good.parquet"]


def interrupted(*_: Any, **__: Any) -> Iterator[Any]:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "left"),
    [
        ("reports.timeline._counters", {"good.parquet"}),
        ("reports.html.to_bytes", {"good.parquet"}),
        ("reports.files.os.replace", {"good.parquet"}),
    ],
)
def test_ctrl_c_while_outputs_are_written(
    place: str, left: set[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(place, interrupted)
    more = ["--report", "report"] if "html" in place else ["--timeline", "t.json.gz"]
    assert simctl.main([*run_on(), *more]) == 130
    assert "Traceback" not in capfd.readouterr().err
    assert {str(p) for p in Path().rglob("*")} == left


def test_a_pipe_gets_no_progress_bar_and_may_close() -> None:
    """The reader of a pipe may leave early: no traceback then."""
    shell = "set -o pipefail; {} -m simctl {} | head -n 2"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for arguments in (
        "run --policy lru --trace good.parquet --json -",
        "trace info good.parquet",
        "compare --trace good.parquet --slots 8",
        "policies",
        "hardware --json -",
    ):
        done = subprocess.run(
            ["bash", "-c", shell.format(sys.executable, arguments)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )
        assert done.stderr == "", arguments
        assert done.stdout.count("\n") == 2
        assert "\r" not in done.stdout


def test_a_closed_pipe_is_no_error_of_ours() -> None:
    with start(*run_on(), "--json", "-") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode not in (0, 2)


def test_files_are_whole_when_all_goes_well(capfd: pytest.CaptureFixture[str]) -> None:
    outputs = ["--json", "out.json", "--timeline", "t.json.gz", "--report", "report"]
    assert simctl.main([*run_on(), *outputs]) == 0
    assert capfd.readouterr().err == ""
    assert json.loads(Path("out.json").read_text())["schema"] == "simctl.result/1"
    assert json.loads(gzip.decompress(Path("t.json.gz").read_bytes()))["traceEvents"]
    assert Path("report/index.html").read_text().lstrip().lower().startswith("<!doctype html>")
    assert not [p for p in Path().rglob("*") if "part" in p.name or "unfinished" in p.name]
