"""Prompt files: what is read, in which order, and what is refused in one line."""

from __future__ import annotations

import json

import pytest

from runtime.prompts import Prompt, balanced, read_prompts
from traces.errors import InputError


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_reads_text_and_domain_and_skips_blank_lines(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        '{"domain": "code", "text": "x = 1"}',
        "",
        '{"text": "é", "more": 3}',
    )
    assert read_prompts(path) == [Prompt("x = 1", "code"), Prompt("é")]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[1]", "found list, expected an object"),
        ('{"domain": "code"}', "'text' is None"),
        ('{"text": "  "}', "expected a string that is not empty"),
        ('{"text": "a", "domain": 3}', "'domain' is 3, expected a string"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, problem):
    path = write(tmp_path / "p.jsonl", '{"text": "fine"}', line)
    with pytest.raises(InputError, match=problem) as caught:
        read_prompts(path)
    assert f"{path}, line 2:" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jsonl: No such file"):
        read_prompts(tmp_path / "absent.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompts(tmp_path / "binary")
    with pytest.raises(InputError, match="no prompt found"):
        read_prompts(write(tmp_path / "empty", ""))


def test_balanced_takes_one_of_each_domain_in_turn():
    prompts = [Prompt(text, text[0]) for text in ("a1", "a2", "a3", "b1", "c1", "c2")]
    assert [p.text for p in balanced(prompts)] == ["a1", "b1", "c1", "a2", "c2", "a3"]


def test_balanced_takes_prompts_without_a_domain_as_one(tmp_path):
    path = write(tmp_path / "p", *(json.dumps({"text": t}) for t in "xyz"))
    assert [p.text for p in balanced(read_prompts(path))] == ["x", "y", "z"]
