"""README and docs are kept true: their commands run, and print what the pages say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType

import click
import pytest

import simctl
from policies.budget import Budget
from policies.session import Setup
from sim.session import Session

ROOT = Path(__file__).resolve().parents[2]


def _load_refresh() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_refresh", ROOT / "docs/refresh.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


refresh = _load_refresh()
PAGES = [page.relative_to(ROOT).as_posix() for page in refresh.PAGES]

#: What was printed on a day. ``python docs/refresh.py --check`` prints it all again.
DATED = ("docs/log.md",)


def alike(shown: str, fresh: str) -> bool:
    """Equal words, and numbers within 2 %: another processor may round a last digit apart."""
    number = re.compile(r"-?[\d,]*\.?\d+")
    ours, theirs = number.split(shown), number.split(fresh)
    if [part.split() for part in ours] != [part.split() for part in theirs]:
        return False
    pairs = zip(number.findall(shown), number.findall(fresh), strict=True)
    values = [(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs]
    return all(abs(a - b) <= 0.02 * max(abs(a), abs(b)) + 2 for a, b in values)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The samples under their names, with four sequences each."""
    folder = tmp_path_factory.mktemp("short")
    for sample in (ROOT / "traces/samples").glob("*.parquet"):
        words = ["trace", "split", str(sample), str(folder / sample.name), "--sequences", "4"]
        assert simctl.main(words) == 0
    return folder


@pytest.mark.parametrize("name", [name for name in PAGES if name not in DATED])
def test_a_page_shows_what_its_commands_print(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = ROOT / name
    monkeypatch.chdir(tmp_path)
    refresh.furnish(tmp_path, page)
    for block in refresh.blocks(page):
        if block.kind == "console":
            fresh = refresh.replayed(block)
            assert alike(block.body, fresh), f"{name} is out of date, it would say:\n{fresh}"


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_of_a_page_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short: Path
) -> None:
    """Those whose output is not compared, and on short samples."""
    page = ROOT / name
    monkeypatch.chdir(tmp_path)
    refresh.furnish(tmp_path, page, short)
    for block in refresh.blocks(page):
        if block.kind == "python" and "write_text(" in block.body:
            exec(block.body, {})
        elif block.kind == "sh" or (block.kind == "console" and name in DATED):
            for command in refresh.commands(block.body, ("simctl", "cp")):
                follow(command.replace("--sequences 16 ", "--sequences 2 "), name)


def follow(command: str, page: str) -> None:
    if command.startswith("cp "):
        _, source, target = command.split()
        shutil.copy(ROOT / source, target)
    elif not refresh.placeholders(command):
        if command.startswith("simctl validate") and "--max-tokens" not in command:
            # On a CPU a token of a real model's sizes takes a second.
            command += " --sequences 1 --max-tokens 2"
        assert refresh.run(command)[0] == 0, f"{page}: {command}"


@pytest.mark.parametrize("name", PAGES)
def test_the_links_of_a_page_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name}: {target}"


def test_every_key_of_a_result_is_defined(short: Path) -> None:
    session = Session(Setup(trace=str(short / "coarse-8x2.parquet")))
    result, _ = session.run("mixed", Budget(cache="50%"))
    assert not undefined(result.to_dict(), besides=session.model.to_dict())


def test_every_statistic_of_a_trace_is_defined(
    short: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = str(short / "coarse-8x2.parquet")
    assert simctl.main(["trace", "info", trace, "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)
    figures["domains"].pop("token_share")  # its keys are the domains' names
    figures["prediction"]["ahead"] = figures["prediction"]["ahead"]["1"]
    parts = ("popularity", "locality", "reuse", "prediction", "settings", "domains")
    absent = undefined({part: figures[part] for part in parts}, besides=figures["settings"])
    assert not [key for key in absent if not key.endswith("_by_layer")]


def undefined(values: dict[str, object], besides: Collection[str]) -> list[str]:
    """Keys at any depth that no code of docs/metrics.md names."""
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    named = {word for code in re.findall(r"`([^`]+)`", page) for word in re.split(r"\W+", code)}
    missing = []
    for key, value in values.items():
        if key not in named and key not in besides:
            missing.append(key)
        if isinstance(value, dict) and key != "parameters":
            missing += undefined(value, besides)
    return missing


def test_the_contract_that_the_guide_shows_is_kept(tmp_path: Path) -> None:
    refresh.furnish(tmp_path, ROOT / "docs/policies.md")
    assert "policy = " in (tmp_path / "test_fading.py").read_text()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "failed" not in done.stdout


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
