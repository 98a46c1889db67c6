"""README and docs are kept true: their commands run, and print what the pages say."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

import simctl
from sim.budget import Budget
from sim.session import Session, Setup

ROOT = Path(__file__).resolve().parents[2]


def _load_refresh() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_refresh", ROOT / "docs/refresh.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


refresh = _load_refresh()
PAGES = [page.relative_to(ROOT).as_posix() for page in refresh.PAGES]


def alike(shown: str, fresh: str) -> bool:
    """Equal words, and numbers within 2 %: another processor may round a last digit apart."""
    number = re.compile(r"-?[\d,]*\.?\d+")
    ours, theirs = number.split(shown), number.split(fresh)
    if [part.split() for part in ours] != [part.split() for part in theirs]:
        return False
    pairs = zip(number.findall(shown), number.findall(fresh), strict=True)
    values = [(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs]
    return all(abs(a - b) <= 0.02 * max(abs(a), abs(b)) + 2 for a, b in values)


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_do_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / name
    monkeypatch.chdir(tmp_path)
    refresh.furnish(tmp_path, page)
    for block in refresh.blocks(page):
        if block.kind == "console":
            fresh = refresh.replayed(block)
            assert alike(block.body, fresh), f"{name} is out of date, it would say:\n{fresh}"
        elif block.kind == "python" and "write_text(" in block.body:
            exec(block.body, {})
        elif block.kind == "sh":
            for command in refresh.commands(block.body, ("simctl", "cp")):
                follow(command, name)


def follow(command: str, page: str) -> None:
    if command.startswith("cp "):
        _, source, target = command.split()
        shutil.copy(ROOT / source, target)
    elif not refresh.placeholders(command):
        assert refresh.run(command)[0] == 0, f"{page}: {command}"


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name}: {target}"


def test_every_key_of_a_result_is_defined() -> None:
    session = Session(Setup(trace=str(ROOT / "traces/samples/coarse-8x2.parquet")))
    metrics = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    formats = (ROOT / "docs/formats.md").read_text(encoding="utf-8")
    result, _ = session.run("mixed", Budget(cache="50%"))

    def keys(value: object) -> list[str]:
        if not isinstance(value, dict):
            return []
        return [key for k, v in value.items() if k != "parameters" for key in (k, *keys(v))]

    absent = [key for key in keys(result.to_dict()) if key not in metrics + formats]
    assert not absent


def test_every_option_is_in_the_reference() -> None:
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    context = click.Context(simctl.cli)

    def options(command: click.Command, name: str) -> list[str]:
        if isinstance(command, click.Group):
            names = command.list_commands(context)
            return [
                o for n in names for o in options(command.get_command(context, n), f"{name} {n}")
            ]
        found = [o for p in command.params for o in p.opts if o.startswith("--")]
        return [f"{name} {option}" for option in found if option not in text]

    assert options(simctl.cli, "simctl") == []


def test_the_example_is_shown_as_it_is() -> None:
    example = (ROOT / "examples/fading.py").read_text(encoding="utf-8")
    assert example in (ROOT / "docs/policies.md").read_text(encoding="utf-8")
