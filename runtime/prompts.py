"""Prompt files: JSON lines with a text and, if known, its domain."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from traces.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """A *text* to start from and the *domain* it belongs to."""

    text: str
    domain: str | None = None


def _parse(line: str, where: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}), expected one object a line") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: found {type(record).__name__}, expected an object")
    text, domain = record.get("text"), record.get("domain")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: 'text' is {text!r}, expected a string that is not empty")
    if domain is not None and not isinstance(domain, str):
        raise InputError(f"{where}: 'domain' is {domain!r}, expected a string")
    return Prompt(text, domain)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text, expected JSON lines") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}, expected a file of JSON lines") from None


def read_prompts(path: Path) -> list[Prompt]:
    """Every prompt of the file in order; blank lines are skipped."""
    numbered = enumerate(_lines(path), start=1)
    prompts = [_parse(line, f"{path}, line {n}") for n, line in numbered if line.strip()]
    if not prompts:
        raise InputError(f"{path}: no prompt found, expected at least one JSON line")
    return prompts


def balanced(prompts: Sequence[Prompt]) -> list[Prompt]:
    """One prompt of every domain in turn; a domain that has run out is passed over."""
    domains: dict[str | None, list[Prompt]] = {}
    for prompt in prompts:
        domains.setdefault(prompt.domain, []).append(prompt)
    turns = chain.from_iterable(zip_longest(*domains.values()))
    return [prompt for prompt in turns if prompt is not None]
