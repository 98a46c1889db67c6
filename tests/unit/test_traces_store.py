"""The trace file: what comes back, and one line for everything that can be wrong with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import simctl
import traces.columns
from traces.errors import InputError
from traces.model import ModelSpec
from traces.store import open_trace, write_trace
from traces.trace import TokenSequence

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelSpec("tiny", 3, 4, 2, 8, 8, 192, 100, 16)
IDS = np.array([[[0, 1], [2, 3], [1, 0]], [[3, 1], [0, 3], [2, 0]]], np.int16)
AHEAD = np.array([[[2, 3], [1, 0], [-1, -1]], [[0, 3], [2, 0], [-1, -1]]], np.int16)


def sequence(id: int = 0, **changes: Any) -> TokenSequence:
    values: dict[str, Any] = {
        "experts": IDS,
        "positions": np.array([0, 1]),
        "prefill": 1,
        "tokens": np.array([7, 9]),
        "weights": np.full(IDS.shape, 0.5),
        "ahead": (AHEAD,),
    }
    return TokenSequence(id, **(values | changes))


def write(path: Path, *sequences: TokenSequence, **more: Any) -> Any:
    return write_trace(path, MODEL, sequences, source="a test", license="CC0-1.0", **more)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.parquet"
    write(path, sequence(0), sequence(4, positions=np.array([5, 6])), extra={"by": "hand"})
    return path


def test_everything_comes_back(good: Path) -> None:
    stored = open_trace(good)
    assert (stored.model, stored.source, stored.license) == (MODEL, "a test", "CC0-1.0")
    assert (stored.tokens, stored.layers, stored.k, stored.extra) == (4, 3, 2, {"by": "hand"})
    assert (stored.has_tokens, stored.has_weights, stored.ahead_depth) == (True, True, 1)
    assert stored.name == str(good)
    first, second = stored.sequences()
    assert (first.id, second.id, first.prefill, len(second)) == (0, 4, 1, 2)
    assert second.positions.tolist() == [5, 6]
    assert first.tokens is not None
    assert first.tokens.tolist() == [7, 9]
    np.testing.assert_array_equal(first.experts, IDS)
    np.testing.assert_array_equal(first.ahead[0], AHEAD)
    assert first.weights is not None
    assert (first.experts.dtype, first.weights.dtype) == (np.int16, np.float16)
    assert len(list(stored.sequences())) == 2  # it can be read again


def test_types_are_those_of_the_format(good: Path) -> None:
    schema = pq.read_schema(good)
    kinds = {n: str(schema.field(n).type).replace("element", "item") for n in schema.names}
    assert kinds == {
        "sequence": "int32",
        "position": "int32",
        "phase": "dictionary<values=string, indices=int8, ordered=0>",
        "token": "int32",
        "layer": "int16",
        "experts": "fixed_size_list<item: int16>[2]",
        "weights": "fixed_size_list<item: halffloat>[2]",
        "ahead_1": "fixed_size_list<item: int16>[2]",
    }
    assert pq.read_metadata(good).row_group(0).column(0).compression == "ZSTD"
    assert pq.read_table(good)["ahead_1"].null_count == 4


def test_columns_can_be_left_unread(good: Path) -> None:
    (first, _) = open_trace(good).sequences(columns=["token"])
    assert first.tokens is not None
    assert (first.weights, first.ahead) == (None, ())
    with pytest.raises(ValueError, match="unknown column 'gate'"):
        list(open_trace(good).sequences(columns=["gate"]))


def test_required_columns_are_enough(good: Path) -> None:
    table = pq.read_table(good).select(["sequence", "position", "phase", "layer", "experts"])
    pq.write_table(table, good)
    stored = open_trace(good)
    assert (stored.has_tokens, stored.has_weights, stored.ahead_depth) == (False, False, 0)
    (first, _) = stored.sequences()
    assert (first.tokens, first.weights, first.ahead) == (None, None, ())


def test_what_pandas_writes_is_read(good: Path) -> None:
    """Plain lists, plain strings, wide integers; floats where whole numbers had gaps."""
    table = pq.read_table(good)
    frame = table.to_pandas().astype({"layer": "int64", "sequence": "int64", "phase": str})
    frame["experts"] = [list(map(int, ids)) for ids in frame["experts"]]
    frame["weights"] = [list(map(float, values)) for values in frame["weights"]]
    frame.loc[frame["position"] == 1, "token"] = np.nan
    again = pa.Table.from_pandas(frame).replace_schema_metadata(table.schema.metadata)
    kinds = {name: str(again.schema.field(name).type) for name in ("experts", "token", "ahead_1")}
    assert "int64" in kinds["experts"]
    assert (kinds["token"], "double" in kinds["ahead_1"]) == ("double", True)
    pq.write_table(again, good)
    (first, _) = open_trace(good).sequences()
    np.testing.assert_array_equal(first.experts, IDS)
    np.testing.assert_array_equal(first.ahead[0], AHEAD)
    assert first.experts.dtype == np.int16
    assert first.tokens is not None
    assert first.tokens.tolist() == [7, -1]
    assert first.weights is not None
    assert first.weights.dtype == np.float32


def test_unknown_token_ids_are_null(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    stored = write(path, sequence(tokens=np.array([-1, 9])), sequence(1, tokens=None))
    assert pq.read_table(path)["token"].null_count == 9
    first, second = stored.sequences()
    assert first.tokens is not None
    assert first.tokens.tolist() == [-1, 9]
    assert second.tokens is None


def test_sequences_span_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces.columns, "GROUP_ROWS", 4)
    path = tmp_path / "t.parquet"
    long = sequence(
        1,
        experts=np.tile(IDS, (5, 1, 1)),
        positions=np.arange(10),
        tokens=np.arange(10),
        weights=np.full((10, 3, 2), 0.5),
        ahead=(np.tile(AHEAD, (5, 1, 1)),),
    )
    stored = write(path, sequence(), long, sequence(2))
    assert pq.read_metadata(path).num_row_groups > 3
    assert [len(s) for s in stored.sequences()] == [2, 10, 2]
    np.testing.assert_array_equal(list(stored.sequences())[1].experts, long.experts)


# ------------------------------------------------------------------ what reading refuses

Frame = pd.DataFrame
Change = Callable[[Frame], Any]


def _set(column: str, row: int, value: Any) -> Change:
    def change(frame: Frame) -> None:
        frame.at[row, column] = value

    return change


def _drop_rows(*rows: int) -> Change:
    return lambda frame: frame.drop(index=list(rows))


#: What is done to the good trace -> what the one line must say.
BROKEN: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing column": (lambda f: f.drop(columns="layer"), ("column 'layer' is missing", "found")),
    "type": (lambda f: f.assign(layer="zero"), ("column 'layer'", "string", "expected integers")),
    "type of list": (
        lambda f: f.assign(experts=[["a", "b"]] * len(f)),
        ("column 'experts'", "expected lists of integers"),
    ),
    "type of phase": (lambda f: f.assign(phase=1), ("column 'phase'", "expected strings")),
    "expert": (_set("experts", 4, [0, 4]), ("row 4 (", "layer 1", "expert 4, expected 0 to 3")),
    "negative expert": (_set("experts", 0, [-1, 2]), ("row 0 (", "expert -1, expected 0 to 3")),
    "twice": (_set("experts", 5, [2, 2]), ("row 5 (", "experts [2, 2] hold one twice")),
    "null experts": (_set("experts", 3, None), ("row 3", "experts is null")),
    "null expert": (_set("experts", 3, [None, 1]), ("row 3", "experts holds a null")),
    "k": (_set("experts", 2, [0, 1, 2]), ("row 2", "3 values", "expected 2")),
    "nan": (_set("weights", 1, [0.5, np.nan]), ("row 1 (", "weight nan", "finite")),
    "infinite": (_set("weights", 1, [np.inf, 0.5]), ("row 1 (", "weight inf", "finite")),
    "negative weight": (_set("weights", 1, [-0.5, 0.5]), ("row 1 (", "weight -0.5")),
    "layer order": (lambda f: f.iloc[[0, 2, 1, *range(3, 12)]], ("row 1", "layer 2, expected 1")),
    "sequence order": (
        lambda f: f.iloc[[*range(6, 12), *range(6)]],
        ("row 6 (sequence 0", "follows sequence 4", "rising"),
    ),
    "position order": (
        lambda f: f.iloc[[3, 4, 5, 0, 1, 2, *range(6, 12)]],
        ("row 3 (", "position 0 follows 1, expected 2"),
    ),
    "gap": (
        lambda f: f.assign(position=[0] * 3 + [2] * 3 + [5] * 3 + [6] * 3),
        ("row 3 (", "position 2 follows 0, expected 1"),
    ),
    "repeated position": (lambda f: f.assign(position=0), ("row 3 (", "position 0 repeats 0")),
    "ragged": (_drop_rows(4), ("row 4", "layer 2, expected 1", "needs layers 0 to 2")),
    "ragged end": (_drop_rows(11), ("ends after row 10 inside a token", "2 of its 3 layers")),
    "layers": (_set("layer", 2, 3), ("row 2", "layer 3, expected 0 to 2 of the model's 3 layers")),
    "mixed token": (_set("position", 1, 8), ("row 1", "position 8, expected 0 as in")),
    "phase": (lambda f: f.assign(phase="draft"), ("row 0", "phase 'draft'", "prefill or decode")),
    "null phase": (_set("phase", 2, None), ("row 2", "phase is null")),
    "phase order": (
        lambda f: f.assign(phase=["decode"] * 3 + ["prefill"] * 3 + ["decode"] * 6),
        ("row 3 (", "prefill after decode"),
    ),
    "token": (lambda f: f.assign(token=-5), ("row 0", "token -5, expected 0 to")),
    "ahead": (_set("ahead_1", 1, [9, 1]), ("row 1 (", "ahead_1 holds 9, expected 0 to 3")),
    "ahead twice": (_set("ahead_1", 1, [1, 1]), ("row 1 (", "ahead_1 [1, 1] holds one expert")),
    "ahead past": (_set("ahead_1", 2, [0, 1]), ("row 2 (", "ahead_1 holds 0, expected nothing")),
    "ahead null": (_set("ahead_1", 1, None), ("row 1 (", "ahead_1 holds nothing")),
    "ahead gap": (
        lambda f: f.rename(columns={"ahead_1": "ahead_2"}),
        ("column 'ahead_1' is missing",),
    ),
    "broken token": (lambda f: f.assign(token=2.5), ("row 0", "token 2.5, expected a whole")),
    "broken ahead": (_set("ahead_1", 3, [0.5, 1.0]), ("row 3", "ahead_1 holds 0.5")),
    "null sequence": (_set("sequence", 1, None), ("row 1", "sequence is null")),
    "empty": (lambda f: f.iloc[:0], ("holds no rows",)),
}


def said(capsys: pytest.CaptureFixture[str], path: Path) -> str:
    """The one line that the command prints about the trace *path*."""
    assert simctl.main(["trace", "info", str(path)]) == 2
    text = capsys.readouterr()
    assert text.out == ""
    assert text.err.count("\n") == 1
    assert str(path) in text.err
    return text.err


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_is_told_in_one_line(
    name: str, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, expected = BROKEN[name]
    table = pq.read_table(good)
    values = {name: pd.Series(table[name].to_pylist(), dtype=object) for name in table.schema.names}
    frame = pd.DataFrame(values)
    changed = change(frame)
    frame = frame if changed is None else changed
    columns = {name: pa.array(list(frame[name]), from_pandas=False) for name in frame.columns}
    if not len(frame):
        pq.write_table(table.slice(0, 0), good)
    else:
        pq.write_table(pa.table(columns).replace_schema_metadata(table.schema.metadata), good)
    text = said(capsys, good)
    for fragment in expected:
        assert fragment in text


def test_a_batch_later_the_row_is_still_right(
    good: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(good)
    ids = table["experts"].to_pylist()
    ids[10] = [3, 3]
    experts = pa.array(ids, pa.list_(pa.int16(), 2))
    at = table.schema.get_field_index("experts")
    pq.write_table(table.set_column(at, "experts", experts), good)
    monkeypatch.setattr(traces.columns, "GROUP_ROWS", 4)
    assert "row 10 (sequence 4, position 6, layer 1)" in said(capsys, good)


@pytest.mark.parametrize(
    ("notes", "expected"),
    [
        (None, "metadata 'simctl' is missing"),
        ("{", "metadata 'simctl' is not JSON"),
        ("[]", "expected an object"),
        ('{"model": {}}', "version None, expected 1"),
        ('{"version": 2}', "version 2, expected 1"),
        ('{"version": 1}', "model is missing, expected a dict"),
        ('{"version": 1, "model": {"name": "x"}}', "field 'layers' is missing"),
        ('{"version": 1, "model": {"shape": 3}}', "unknown field 'shape'"),
        ({"model": {"top_k": 3}}, "column 'experts' holds 2 per row, expected the model's top_k"),
        ({"model": {"layers": 2}}, "row 2: layer 2, expected 0 to 1"),
        ({"model": {"layers": 4}}, "row 3: layer 0, expected 3"),
        ({"model": {"experts": 3}}, "row 1 (sequence 0, position 0, layer 1): expert 3"),
        ({"source": 5}, "source is 5, expected a str"),
    ],
)
def test_metadata_that_is_wrong(
    notes: Any, expected: str, good: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pq.read_table(good)
    if isinstance(notes, dict):
        whole = json.loads(table.schema.metadata[b"simctl"])
        for name, value in notes.items():
            whole[name] = whole[name] | value if isinstance(value, dict) else value
        notes = json.dumps(whole)
    metadata = {} if notes is None else {"simctl": notes}
    pq.write_table(table.replace_schema_metadata(metadata), good)
    assert expected in said(capsys, good)


def test_files_that_are_no_parquet(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = good.read_bytes()
    good.write_bytes(whole[: len(whole) // 2])
    assert "not a readable parquet file" in said(capsys, good)
    good.write_bytes(b"")
    assert "not a readable parquet file" in said(capsys, good)
    assert "is a folder" in said(capsys, good.parent)
    good.unlink()
    assert "no such file" in said(capsys, good)


def test_damaged_data_behind_a_good_footer(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    column = pq.read_metadata(good).row_group(0).column(5)
    whole = bytearray(good.read_bytes())
    start = column.dictionary_page_offset or column.data_page_offset
    whole[start : start + column.total_compressed_size] = b"\xa5" * column.total_compressed_size
    good.write_bytes(whole)
    assert "damaged parquet data" in said(capsys, good)


# ------------------------------------------------------------------ what writing refuses


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"experts": IDS + 2}, "expert 4, expected 0 to 3"),
        ({"experts": IDS[:, :2]}, "experts has shape (2, 2, 2), expected (2, 3, 2)"),
        ({"positions": np.array([3, 3])}, "position 3 repeats 3"),
        ({"positions": np.array([3])}, "positions has shape (1,), expected (2,)"),
        ({"weights": np.full(IDS.shape, 1e9)}, "weight inf"),
        ({"tokens": np.array([1, -7])}, "token -7"),
        ({"ahead": (AHEAD,) * 4}, "4 ahead arrays, expected at most 3"),
        ({"ahead": (np.abs(AHEAD),)}, "ahead_1"),
        ({"experts": IDS[:0], "positions": np.zeros(0)}, "expected"),
    ],
)
def test_writing_checks_the_same_rules(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(InputError) as caught:
        write(path, sequence(), sequence(1, **changes))
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_sequences_must_agree_on_what_they_have(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"sequence 1 has .* as in the first sequence"):
        write(tmp_path / "t.parquet", sequence(), sequence(1, weights=None))
    with pytest.raises(InputError, match="no sequences to write"):
        write(tmp_path / "t.parquet")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, InputError])
def test_an_interrupt_leaves_what_was_there(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traces.columns, "GROUP_ROWS", 3)

    def broken() -> Iterator[TokenSequence]:
        yield sequence()
        assert len(list(tmp_path.iterdir())) == 2
        raise error

    path = tmp_path / "t.parquet"
    path.write_text("before")
    with pytest.raises(error):
        write_trace(path, MODEL, broken(), source="", license="")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder"):
        write(tmp_path, sequence())
    with pytest.raises(InputError, match=r"cannot be written: No such file"):
        write(tmp_path / "absent" / "t.parquet", sequence())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied"):
        write(tmp_path / "t.parquet", sequence())


# ------------------------------------------------------------------ large traces

LARGE = """
import sys
import numpy as np
from traces.model import ModelSpec
from traces.store import write_trace, open_trace
from traces.trace import TokenSequence
model = ModelSpec("wide", 48, 128, 8, 8, 8, 8, 0, 0)
rng = np.random.default_rng(0)
ids = rng.permuted(np.tile(np.arange(128, dtype=np.int16), (512 * 48, 1)), axis=1)
ids = ids[:, :8].reshape(512, 48, 8)
weights = rng.random((512, 48, 8), dtype=np.float32)
def sequences():
    for i in range(int(sys.argv[2])):
        yield TokenSequence(i, ids, np.arange(512), 100, None, weights)
write_trace(sys.argv[1], model, sequences(), source="", license="")
assert sum(len(s) for s in open_trace(sys.argv[1]).sequences()) == 512 * int(sys.argv[2])
# Not ru_maxrss: a child begins with that of the process that started it.
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    def peak(sequences: int) -> int:
        path = tmp_path / "large.parquet"
        command = [sys.executable, "-c", LARGE, str(path), str(sequences)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return int(done.stdout)

    small, large = peak(8), peak(40)
    assert large < small + 150_000, "kilobytes"
    assert large < 1_000_000


def test_reading_is_fast(tmp_path: Path) -> None:
    """A million rows of experts in well under a second of this process."""
    rng = np.random.default_rng(0)
    model = ModelSpec("deep", 24, 32, 4, 8, 8, 8, 0, 0)
    ids = rng.permuted(np.tile(np.arange(32, dtype=np.int16), (4096 * 24, 1)), axis=1)
    ids = ids[:, :4].reshape(4096, 24, 4)
    items = [TokenSequence(i, ids, np.arange(4096)) for i in range(10)]
    stored = write_trace(tmp_path / "t.parquet", model, items, source="", license="")
    start = time.process_time()
    assert sum(len(s) for s in stored.sequences(columns=())) == 40960
    assert time.process_time() - start < 1.0
