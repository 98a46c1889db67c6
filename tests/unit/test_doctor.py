"""What the doctor finds, says and writes, with and without torch and a GPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

import runtime.cli
import runtime.doctor
from traces.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bare(monkeypatch):
    """A machine without the extra packages."""
    absent = {"torch", "transformers", "safetensors", "nvidia-ml-py", "pynvml", "optuna"}
    find, version = importlib.util.find_spec, importlib.metadata.version

    def no_version(name):
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    monkeypatch.setattr(importlib.metadata, "version", no_version)


class FakeNvml(types.ModuleType):
    """nvidia-ml-py on a machine with one GPU, whose link width is not supported."""

    class NVMLError(Exception):
        pass

    def __getattr__(self, name):
        answers = {
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetName": "Some GPU",
            "nvmlDeviceGetMemoryInfo": types.SimpleNamespace(total=24 * 2**30),
            "nvmlDeviceGetCurrPcieLinkGeneration": 1,
            "nvmlDeviceGetMaxPcieLinkGeneration": 5,
            "nvmlDeviceGetMaxPcieLinkWidth": 16,
            "nvmlSystemGetDriverVersion": "570.1",
            "nvmlInit": None,
            "nvmlShutdown": None,
        }
        if name == "nvmlDeviceGetCurrPcieLinkWidth":
            return self.unsupported
        if name not in answers:
            raise AttributeError(name)
        return lambda *args: answers[name]

    def unsupported(self, handle):
        raise self.NVMLError


def invoke(*words):
    return CliRunner().invoke(runtime.cli.doctor, [str(word) for word in words])


def test_says_plainly_that_there_is_no_gpu_and_leaves_with_zero(bare):
    result = invoke()
    assert result.exit_code == 0, result.output
    assert "gpu        none found" in result.stdout
    assert "cuda       unknown: torch is not installed" in result.stdout
    assert "pip install -e '.[gpu]'" in result.stdout
    assert "pip install -e '.[tune]'" in result.stdout


def test_json_to_the_standard_output_is_json_alone(bare):
    facts = json.loads(invoke("--json", "-").stdout)
    assert facts["python"] == sys.version.split()[0]
    assert facts["extras_absent"]["tune"] == ["optuna"]
    assert facts["traces"]["ours"] is True
    assert facts["cores"] >= 1
    assert 0 < facts["memory"]["available_bytes"] <= facts["memory"]["total_bytes"]
    assert facts["gpu"]["available"] is False
    assert facts["packages"]["numpy"] == importlib.metadata.version("numpy")
    assert facts["packages"]["torch"] is None


def test_json_to_a_file(bare, tmp_path):
    result = invoke("--json", tmp_path / "facts.json")
    assert "python" in result.stdout
    assert json.loads((tmp_path / "facts.json").read_text())["gpu"]["gpus"] == []


def test_a_file_that_cannot_be_written_is_named(bare, tmp_path):
    result = invoke("--json", tmp_path / "absent" / "facts.json")
    assert isinstance(result.exception, InputError)
    assert "facts.json: No such file" in str(result.exception)


def test_a_gpu_is_described_with_its_link(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml("pynvml"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: object() if name == "pynvml" else None if name == "torch" else find(name),
    )
    driver, gpus = runtime.doctor._gpus()
    link = {"generation": 1, "width": None, "max_generation": 5, "max_width": 16}
    assert driver == "570.1"
    assert gpus == [{"name": "Some GPU", "memory_bytes": 24 * 2**30, "pcie": link}]
    text = "\n".join(runtime.doctor.lines(runtime.doctor.examine()))
    assert "Some GPU, 24.0 GiB, PCIe 1 x? now, 5 x16 at best" in text


def test_a_driver_that_does_not_answer_is_no_gpu(monkeypatch):
    nvml = FakeNvml("pynvml")
    nvml.nvmlInit = lambda: nvml.unsupported(None)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: object() if name == "pynvml" else find(name)
    )
    assert runtime.doctor._gpus() == (None, [])


def test_another_package_called_traces_is_noticed(monkeypatch, bare, tmp_path):
    (tmp_path / "__init__.py").touch()
    found = importlib.util.spec_from_file_location("traces", tmp_path / "__init__.py")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found if name == "traces" else find(name)
    )
    result = invoke()
    assert f"traces     found at {tmp_path}, not this project's" in result.stdout


def test_the_packages_asked_for_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements):
        return tuple(text.split(">")[0] for text in requirements)

    assert names(project["dependencies"]) == runtime.doctor.REQUIRED
    extras = project["optional-dependencies"]
    assert {e: names(extras[e]) for e in runtime.doctor.EXTRAS} == runtime.doctor.EXTRAS
    assert set(extras) - set(runtime.doctor.EXTRAS) == {"dev"}


def test_torch_is_not_imported_where_it_is_absent():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name: None if name == 'torch' else find(name)\n"
        "from runtime.doctor import examine; examine()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
