"""Recordings of other programs: what they become, and what is said of broken ones."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import simctl
from traces.importers import SpecOptions, import_recording
from traces.importers.base import Imported
from traces.sizes import model_sizes
from traces.store import open_trace

SHARED = Path(__file__).resolve().parents[2].parent / "shared"

#: Two tokens, three layers, top-2 of 4 experts.
IDS = np.array([[[0, 1], [2, 3], [1, 0]], [[3, 1], [0, 3], [2, 0]]], np.int32)
FOUR = SpecOptions(experts=4)
SHAPE = SpecOptions(layers=3, experts=4, top_k=2)


def read(path: Path, options: SpecOptions = FOUR, form: str | None = None) -> Imported:
    found = import_recording(path, options, form)
    return Imported(found.model, list(found.sequences), found.source, found.license, found.extra)


def only(found: Imported) -> Any:
    (sequence,) = found.sequences
    return sequence


def text(array: Any) -> str:
    return base64.b64encode(np.asarray(array, "<i4").tobytes()).decode()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that ``trace import`` prints when it gives up, leaving no file."""
    out = Path(str(arguments[0])).with_name("out.parquet")
    assert (
        simctl.main(["trace", "import", str(arguments[0]), str(out), *map(str, arguments[1:])]) == 2
    )
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert not out.exists()
    assert str(arguments[0]) in line
    return line


# ------------------------------------------------------------------ npz


def npz(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_npz_with_all_it_may_have(tmp_path: Path) -> None:
    path = npz(
        tmp_path / "x.npz",
        experts=np.tile(IDS, (2, 1, 1)).astype(np.uint8),
        weights=np.full((4, 3, 2), 0.5, np.float16),
        seq_offsets=[0, 3, 4],
        first_pos=[10, 0],
        prefill=[2, 0],
        tokens=[5, 6, 7, 8],
        dataset=["code", "prose"],
    )
    found = read(path)
    first, second = found.sequences
    assert (found.model.layers, found.model.top_k, found.model.experts) == (3, 2, 4)
    assert first.positions.tolist() == [10, 11, 12]
    assert (first.prefill, second.prefill) == (2, 0)
    assert second.tokens.tolist() == [8]
    assert found.extra == {"domains": ["code", "prose"]}


def test_npz_of_experts_alone_is_one_sequence(tmp_path: Path) -> None:
    sequence = only(read(npz(tmp_path / "x.npz", experts=IDS)))
    np.testing.assert_array_equal(sequence.experts, IDS)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"gates": IDS}, "array 'experts' is missing, found gates"),
        ({"experts": IDS.astype(float)}, "array 'experts' is float64, expected integers"),
        ({"experts": IDS[0]}, "array 'experts' has shape (3, 2), expected [tokens, layers, k]"),
        ({"experts": IDS, "weights": np.ones(2)}, "array 'weights' has shape (2,)"),
        ({"experts": IDS, "seq_offsets": [0, 5]}, "array 'seq_offsets' must rise from 0 to 2"),
        ({"experts": IDS, "seq_offsets": [0, 1, 1, 2]}, "array 'seq_offsets' must rise"),
        ({"experts": IDS, "first_pos": [0, 1]}, "array 'first_pos' has shape (2,), expected (1,)"),
        ({"experts": IDS + 1}, "row 1 (sequence 0, position 0, layer 1): expert 4"),
        ({"experts": IDS * 0}, "experts [0, 0] hold one twice"),
        ({"experts": IDS, "weights": np.full(IDS.shape, -1.0)}, "weight -1.0"),
    ],
)
def test_npz_that_is_broken(
    arrays: dict[str, Any], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = npz(tmp_path / "x.npz", **arrays)
    assert expected in refused(capsys, path, "--experts", 4)


def test_npz_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(b"PK\x03\x04 and no more")
    assert "not a readable npz archive" in refused(capsys, path)
    np.save(tmp_path / "y.npy", IDS)
    (tmp_path / "y.npy").rename(path)
    assert "holds a single array" in refused(capsys, path)
    path.unlink()
    assert "no such file" in refused(capsys, path)
    path.mkdir()
    assert "is a folder" in refused(capsys, path)


def test_the_published_recording_is_recognised(tmp_path: Path) -> None:
    path = SHARED / "traces" / "gpt-oss-20b-decode.npz"
    if not path.exists():
        pytest.skip("the recording of gpt-oss-20b is not there")
    out = tmp_path / "x.parquet"
    assert simctl.main(["trace", "import", str(path), str(out)]) == 0
    stored = open_trace(out)
    assert stored.model == model_sizes("gpt-oss-20b")
    assert stored.model.expert_bytes == 49_783_680
    assert (stored.tokens, stored.has_weights) == (79_612, True)
    with np.load(path) as arrays:
        experts = np.concatenate([s.experts for s in stored.sequences()])
        np.testing.assert_array_equal(experts, arrays["experts"])
        assert stored.extra["domains"] == arrays["dataset"].tolist()


# ------------------------------------------------------------------ arrays of serving engines


def test_npy_and_base64_are_one_sequence_each(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", IDS)
    np.testing.assert_array_equal(only(read(tmp_path / "x.npy")).experts, IDS)
    (tmp_path / "x.b64").write_text(text(IDS) + "\n")
    np.testing.assert_array_equal(only(read(tmp_path / "x.b64", SHAPE)).experts, IDS)


@pytest.mark.parametrize("form", ["object", "list", "lines", "lines in .json"])
def test_responses_are_one_sequence_each(form: str, tmp_path: Path) -> None:
    deep = {"choices": [{"meta_info": {"routed_experts": text(IDS), "prompt_tokens": 1}}]}
    flat = {"routed_experts": IDS.tolist(), "usage": {"prompt_tokens": 9}}
    items = [deep] if form == "object" else [deep, flat]
    path = tmp_path / ("x.jsonl" if form == "lines" else "x.json")
    if form.startswith("lines"):
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
    else:
        path.write_text(json.dumps(deep if form == "object" else items))
    found = list(read(path, SHAPE).sequences)
    assert [s.prefill for s in found] == [1, 2][: len(items)]
    for sequence in found:
        np.testing.assert_array_equal(sequence.experts, IDS)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.b64", "no base64!", "not base64"),
        ("x.b64", text(IDS)[:40], "30 bytes of routed experts, expected a multiple of 24"),
        ("x.b64", "", "0 bytes of routed experts"),
        ("x.json", "{", "not JSON"),
        ("x.json", "[3]", "item 0: 3, expected an object"),
        ("x.json", "[]", "holds no responses"),
        ("x.json", '{"text": "hi"}', "item 0: routed_experts is missing"),
        ("x.json", '{"routed_experts": [[1, 2]]}', "routed_experts is ragged"),
        ("x.json", '{"routed_experts": [[[1], [2, 3]]]}', "routed_experts is ragged"),
        ("x.jsonl", '{"routed_experts": "AAA="}', "line 1: 2 bytes of routed experts"),
        (
            "x.jsonl",
            json.dumps({"routed_experts": text(IDS)}) + '\n\n{"routed_experts": 5}',
            "line 3: routed_experts is 5, expected base64 text or lists",
        ),
        (
            "x.json",
            json.dumps({"routed_experts": text(IDS), "prompt_tokens": "two"}),
            "item 0: prompt length 'two'",
        ),
    ],
)
def test_responses_that_are_broken(
    name: str, content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    path.write_text(content)
    sizes = ("--layers", 3, "--top-k", 2, "--experts", 4)
    assert expected in refused(capsys, path, *(sizes[-2:] if "ragged" in expected else sizes))


def test_base64_needs_layers_and_top_k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.b64"
    path.write_text(text(IDS))
    assert "does not tell the model's layers, expected --layers" in refused(capsys, path)
    np.save(tmp_path / "x.npy", IDS)
    line = refused(capsys, tmp_path / "x.npy")
    assert "does not tell the model's experts, expected --experts" in line
    np.save(tmp_path / "x.npy", IDS[0])
    assert "array has shape (3, 2)" in refused(capsys, tmp_path / "x.npy")
    (tmp_path / "x.npy").write_bytes(b"no")
    assert "not a readable npy file" in refused(capsys, tmp_path / "x.npy")


# ------------------------------------------------------------------ JSON lines


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(of: Any = None, **names: str) -> list[dict[str, Any]]:
    """The rows of IDS, under the field names given."""
    word = {name: names.get(name, name) for name in ("position", "layer", "experts", "sequence")}
    rows = [
        {word["position"]: t, word["layer"]: layer, word["experts"]: IDS[t, layer].tolist()}
        for t in range(2)
        for layer in range(3)
    ]
    return rows if of is None else [{**row, word["sequence"]: of} for row in rows]


@pytest.mark.parametrize(
    "names",
    [
        {},
        {"position": "token_pos", "layer": "layer_idx", "experts": "expert_ids"},
        {"position": "token_idx", "experts": "selected_ids", "sequence": "request_id"},
    ],
)
def test_json_lines_under_any_name_in_any_order(names: dict[str, str], tmp_path: Path) -> None:
    rows = rows_of("a", **names) + rows_of("b", **names)
    mixed = rows[::-1]
    found = read(lines(tmp_path / "x.jsonl", mixed))
    assert found.extra == {"sequence_names": ["b", "a"]}
    for sequence in found.sequences:
        np.testing.assert_array_equal(sequence.experts, IDS)


def test_json_lines_with_all_they_may_have(tmp_path: Path) -> None:
    rows = rows_of(3)
    for i, row in enumerate(rows):
        row |= {"gate_weights": [0.75, 0.25], "token_id": 40 + i // 3}
        row |= {"phase": "prefill" if i < 3 else "decode", "note": "ignored"}
    sequence = only(read(lines(tmp_path / "x.jsonl", rows)))
    assert (sequence.prefill, sequence.tokens.tolist()) == (1, [40, 41])
    np.testing.assert_array_equal(sequence.weights[1, 2], [0.75, 0.25])


def test_layers_without_experts_are_left_out_of_the_count(tmp_path: Path) -> None:
    rows = [{**row, "layer": [1, 2, 5][row["layer"]]} for row in rows_of()]
    found = read(lines(tmp_path / "x.jsonl", rows))
    assert found.model.layers == 3
    assert found.extra == {"layer_ids": [1, 2, 5]}


def test_positions_may_be_left_to_the_layers(tmp_path: Path) -> None:
    rows = [{"layer": r["layer"], "experts": r["experts"]} for r in rows_of()]
    np.testing.assert_array_equal(only(read(lines(tmp_path / "x.jsonl", rows))).experts, IDS)


@pytest.mark.parametrize(
    ("row", "change", "expected"),
    [
        (1, {"experts": None}, "line 2: experts is missing, expected a field experts or"),
        (1, {"layer": "one"}, "line 2: layer 'one', expected a whole number"),
        (1, {"layer": -1}, "line 2: layer -1, expected 0 to"),
        (1, {"layer": 0}, "line 2: the token at sequence 0, position 0 has this layer twice"),
        (1, {"experts": [1]}, "line 2: 1 experts, expected 2"),
        (1, {"experts": "1 2"}, "line 2: experts '1 2', expected a list of whole numbers"),
        (1, {"experts": [0, 4]}, "line 2: expert 4, expected 0 to 3"),
        (1, {"experts": [-1, 0]}, "line 2: expert -1, expected 0 or more"),
        (1, {"experts": [1, 1]}, "line 2: experts [1, 1] hold one twice"),
        (1, {"position": None}, "line 2: position is missing, expected one as in the first"),
        (1, {"weights": [1, 0]}, "line 2: weights is given, expected none"),
        (1, {"sequence": [1]}, "line 2: sequence [1], expected a name or number"),
        (4, {"phase": "draft"}, "line 5: phase 'draft', expected prefill or decode"),
        (4, {"position": 7}, "line 6: the token at sequence 0, position 1 has 2 of 3 layers"),
        (3, {"position": True}, "line 4: position True"),
    ],
)
def test_json_lines_that_are_broken(
    row: int,
    change: dict[str, Any],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = rows_of()
    rows[row] |= change
    line = refused(capsys, lines(tmp_path / "x.jsonl", rows), "--experts", 4)
    assert expected in line


def test_json_lines_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    for content, expected in (
        ('{"layer": 0,\n', "line 1: not JSON"),
        ("[1, 2]\n", "line 1: [1, 2], expected an object"),
        ("\n", "holds no rows"),
        ("\xff", "cannot be read as text"),
    ):
        path.write_bytes(content.encode("latin-1"))
        assert expected in refused(capsys, path, "--experts", 4)
    rows = rows_of()
    for row in rows:
        row["weights"] = [1.0, float("nan")]
    assert "line 1: weights [1.0, nan]" in refused(capsys, lines(path, rows), "--experts", 4)
    rows = rows_of()
    for row in rows[3:]:
        row["phase"] = "prefill"
    line = refused(capsys, lines(path, rows), "--experts", 4)
    assert "line 4: phase prefill after decode" in line


# ------------------------------------------------------------------ CSV


@pytest.mark.parametrize(
    "content",
    [
        "layer,experts\n0,0 1\n1,2 3\n2,1 0\n0,3 1\n1,0 3\n2,2 0\n",
        'Layer ID,Activated Expert IDs\n0,"[0, 1]"\n1,"[2, 3]"\n2,"[1, 0]"\n'
        '0,"[3, 1]"\n1,"[0, 3]"\n2,"[2, 0]"\n',
        "0, 0, 1\n1, 2, 3\n2, 1, 0\n\n0, 3, 1\n1, 0, 3\n2, 2, 0\n",
        "layer;experts".replace(";", ",") + "\n0,0;1\n1,2;3\n2,1;0\n0,3;1\n1,0;3\n2,2;0\n",
    ],
    ids=["spaces", "brackets", "bare commas", "semicolons"],
)
def test_csv_in_its_spellings(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(content)
    np.testing.assert_array_equal(only(read(path)).experts, IDS)


def test_csv_with_sequences(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text(
        "sequence,layer,experts\na,0,0 1\na,1,2 3\nb,0,1 2\nb,1,3 0\nb,0,0 2\nb,1,1 2\n"
    )
    assert [len(s) for s in read(path).sequences] == [1, 2]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no rows"),
        ("depth,experts\n0,1 2\n", "line 1: column 'layer' is missing, found depth, experts"),
        ("layer,experts\n0,1 2\n1\n", "line 3: 1 cells, expected at least 2"),
        ("layer,experts\n0,1 2\n1,a b\n", "line 3: experts 'a b', expected ids such as"),
        ("layer,experts\n0,1 2\n1,\n", "line 3: experts '', expected ids"),
        ("layer,experts\nx,1 2\n", "line 2: layer 'x', expected a whole number"),
        ("layer,experts\n0,1 2\n1,1 2 3\n", "line 3: 3 experts, expected 2"),
        ("layer,experts\n0,1 2\n1,3 9\n", "line 3: expert 9, expected 0 to 3"),
        (
            "layer,experts\n0,1 2\n1,3 2\n0,1 2\n",
            "line 4: the token at sequence 0, position 1 has 1",
        ),
    ],
)
def test_csv_that_is_broken(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.csv"
    path.write_text(content)
    assert expected in refused(capsys, path, "--experts", 4)


# ------------------------------------------------------------------ the model


def test_dimensions_come_from_options_or_defaults(tmp_path: Path) -> None:
    path = npz(tmp_path / "mine.npz", experts=IDS)
    plain = read(path).model
    assert (plain.name, plain.hidden, plain.intermediate) == ("mine", 2048, 2048)
    assert plain.expert_params == 3 * 2048 * 2048
    assert plain.dense_params == 3 * (4 * 2048**2 + 2048 * 4)
    assert plain.kv_bytes_per_token == 3 * 2 * 2048 * 2
    said = read(path, SpecOptions(experts=4, name="m", hidden=64, dtype="float32")).model
    assert (said.name, said.expert_params) == ("m", 3 * 64 * 2048)
    assert said.kv_bytes_per_token == 3 * 2 * 64 * 4


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_dimensions_come_from_a_file(suffix: str, tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", experts=IDS)
    values = {**read(path).model.to_dict(), "name": "filed", "hidden": 32}
    spec = tmp_path / ("spec" + suffix)
    toml = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    spec.write_text(json.dumps(values) if suffix == ".json" else toml)
    assert read(path, SpecOptions(file=spec)).model.to_dict() == values
    assert read(path, SpecOptions(file=spec, hidden=48)).model.hidden == 48


def test_dimensions_come_from_a_published_model(tmp_path: Path) -> None:
    path = npz(tmp_path / "x.npz", experts=IDS)
    model = read(path, SpecOptions(experts=4, sizes="mixtral-8x7b")).model
    assert (model.layers, model.experts, model.top_k) == (3, 4, 2)
    assert model.expert_params == model_sizes("mixtral-8x7b").expert_params


def test_a_model_that_contradicts_the_recording(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = npz(tmp_path / "x.npz", experts=IDS)
    line = refused(capsys, path, "--experts", 4, "--layers", 5)
    assert "has layers = 3, expected 5 as the option says" in line
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({**read(path).model.to_dict(), "top_k": 3}))
    line = refused(capsys, path, "--model-spec", spec)
    assert "has top_k = 2, expected 3 as the model spec says" in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "spec.json: neither JSON nor TOML"),
        ("[]", "spec.json: holds a list, expected an object"),
        ("{}", "spec.json: field 'name' is missing"),
        (None, "spec.json: cannot be read"),
    ],
)
def test_a_model_file_that_is_broken(
    content: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = npz(tmp_path / "x.npz", experts=IDS)
    spec = tmp_path / "spec.json"
    if content is not None:
        spec.write_text(content)
    arguments = ["trace", "import", str(path), str(tmp_path / "o"), "--model-spec", str(spec)]
    assert simctl.main(arguments) == 2
    assert expected in capsys.readouterr().err


def test_forms_are_told_by_suffix_or_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.log"
    lines(path, rows_of())
    line = refused(capsys, path, "--experts", 4)
    assert "unknown suffix '.log', expected .json, .jsonl or one of" in line
    np.testing.assert_array_equal(only(read(path, form="jsonl")).experts, IDS)
