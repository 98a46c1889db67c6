"""The project's own promises: packages, pins, budgets for code, and a quick front door."""

from __future__ import annotations

import ast
import re
import shutil
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import simctl

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("traces", "policies", "sim", "runtime", "reports")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = [ROOT / "simctl.py", *(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))]

#: What `simctl --help` may take, and how much slower than usual a busy test machine may be.
START_S = 0.3
PATIENCE = 5

Function = ast.FunctionDef | ast.AsyncFunctionDef


def simctl_run(*arguments: str, before: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, with *before* first on the path."""
    code = "import sys, simctl; sys.exit(simctl.main())"
    if before is not None:
        code = f"import sys; sys.path.insert(0, {str(before)!r}); {code}"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_nobody_imports_the_command() -> None:
    for path in SOURCES[1:]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert "simctl" not in [name.partition(".")[0] for name in names], path


def test_every_command_has_help_and_a_home() -> None:
    assert list(simctl.HELP) == list(simctl.COMMANDS)
    targets = [*simctl.COMMANDS.values()]
    for group in simctl.SUBCOMMANDS.values():
        targets += group.values()
    for target in targets:
        module, _, attribute = target.partition(":")
        text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        assert f"def {attribute}(" in text, target


def test_help_starts_quickly_and_imports_nothing_heavy() -> None:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert simctl_run("--help").returncode == 0
        times.append(time.perf_counter() - start)
    assert min(times) < START_S * PATIENCE
    command = [sys.executable, "-X", "importtime", "-m", "simctl", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    heavy = {"numpy", "pandas", "pyarrow", "matplotlib", "jinja2", "simpy", "torch", "transformers"}
    assert "click" in imported
    assert not imported & {*heavy, *PACKAGES}


def test_an_unrelated_package_of_our_name_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "__init__.py").write_text("from nowhere import TimeSeries\n")
    done = simctl_run("hardware", before=tmp_path)
    assert done.returncode == 2
    assert f"'traces' was found at {tmp_path / 'traces'}, expected ours" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_package_of_ours_that_was_overwritten_is_noticed(tmp_path: Path) -> None:
    """Wheels of one name share a folder: the later one's ``__init__`` wins."""
    shutil.copy(ROOT / "simctl.py", tmp_path)
    for name in PACKAGES:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    done = simctl_run("hardware", before=tmp_path)
    assert done.returncode == 2
    assert "'traces' was overwritten" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_old_python_is_told_so(tmp_path: Path) -> None:
    if shutil.which("make") is None:
        pytest.skip("needs make")
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\necho 3.10\n")
    old.chmod(0o755)
    for python, message in ((old, "3.11 or newer is needed"), ("absent-python", "does not run")):
        command = ["make", "-C", str(ROOT), "run", f"PYTHON={python}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode != 0
        assert message in done.stderr


def pins() -> dict[str, list[Requirement]]:
    """What constraints.txt pins, by canonical name."""
    found: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            found.setdefault(canonicalize_name(pin.name), []).append(pin)
    return found


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_dependency_is_pinned_within_its_bounds(python: str) -> None:
    extras = PROJECT["optional-dependencies"]
    assert sorted(extras) == ["dev", "gpu", "tune"]
    pinned = pins()
    for line in [*PROJECT["dependencies"], *(need for extra in extras.values() for need in extra)]:
        need = Requirement(line)
        environment = {"python_version": python}
        versions = [
            str(pin.specifier).removeprefix("==")
            for pin in pinned[canonicalize_name(need.name)]
            if pin.marker is None or pin.marker.evaluate(environment)
        ]
        assert len(versions) == 1, need.name
        assert need.specifier.contains(versions[0]), need.name
    assert str(pinned["torch"][0].specifier) == "==2.13.0"


def test_data_files_lie_where_the_wheel_takes_them() -> None:
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert set(wheel["targets"]["wheel"]["only-include"]) == {*PACKAGES, "simctl.py"}
    for name in PACKAGES:
        assert (ROOT / name / "py.typed").exists()
        assert (ROOT / name / "__init__.py").exists()
    samples = list((ROOT / "traces" / "samples").glob("*.parquet"))
    assert len(samples) >= 2
    assert all(path.stat().st_size <= 2_000_000 for path in samples)
    predictors = list((ROOT / "traces" / "predictors").glob("*.safetensors"))
    assert {path.stem for path in predictors} == {path.stem for path in samples}
    assert sum(path.stat().st_size for path in predictors) <= 5_000_000


def test_nothing_of_the_packages_is_ignored_by_git() -> None:
    """Hatchling leaves out of the wheel what git ignores."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = "\n".join(f"{name}/__init__.py" for name in PACKAGES)
    command = ["git", "check-ignore", "--stdin"]
    done = subprocess.run(command, input=listed, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == ""


def functions(path: Path) -> Iterator[tuple[Function, bool]]:
    """Every function of a module, and whether it is public: no underscore on the way to it."""

    def walk(node: ast.AST, public: bool) -> Iterator[tuple[Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                shown = public and not child.name.startswith("_")
                yield child, shown
                yield from walk(child, False)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, public and not child.name.startswith("_"))
            else:
                yield from walk(child, public)

    yield from walk(ast.parse(path.read_text()), True)


def body_lines(function: Function) -> int:
    """Lines of a function less its docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function):
        first = function.body[0]
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def test_code_keeps_to_its_budgets() -> None:
    """The table of CONTRIBUTING.md."""
    bodies = {}
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, f"{path} is longer than 400 lines"
        for function, _ in functions(path):
            bodies[f"{path.relative_to(ROOT)}:{function.name}:{function.lineno}"] = body_lines(
                function
            )
    longest = max(bodies, key=bodies.__getitem__)
    assert bodies[longest] <= 60, longest
    assert statistics.median(bodies.values()) <= 8
    assert statistics.quantiles(bodies.values(), n=20)[-1] <= 35
    lengths = [len(path.read_text().splitlines()) for path in SOURCES]
    assert statistics.median(lengths) <= 180


def test_public_names_have_docstrings() -> None:
    overrides = re.compile(r"^(__\w+__|on_\w+|reset|victims|prefetch|serve|forecast)$")
    asked, answered = 0, 0
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        empty = path.name == "__init__.py" and not tree.body
        assert ast.get_docstring(tree) or empty, f"{path} has no docstring"
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"
        for function, public in functions(path):
            if public and not overrides.match(function.name):
                asked += 1
                answered += bool(ast.get_docstring(function))
    assert answered >= 0.85 * asked
