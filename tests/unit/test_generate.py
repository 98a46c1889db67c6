"""``simctl generate``: the text, the statistics, the files, and what goes wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the extra 'gpu' is not installed")
transformers = pytest.importorskip("transformers", reason="the extra 'gpu' is not installed")

import runtime.cli_generate  # noqa: E402
import runtime.generate  # noqa: E402
import simctl  # noqa: E402
from runtime.cli_generate import status_line, summary  # noqa: E402
from runtime.families import FAMILIES  # noqa: E402
from runtime.generate import encode  # noqa: E402
from runtime.offloading import Options, _generate_over_static_cache  # noqa: E402
from runtime.predictor.files import save_predictor  # noqa: E402
from runtime.predictor.model import Predictor  # noqa: E402
from tests.helpers_checkpoint import WORDS, tiny_checkpoint  # noqa: E402
from tests.helpers_predictor import small_spec  # noqa: E402
from tests.tiny_models import VOCABULARY  # noqa: E402
from traces.errors import InputError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny-olmoe", "olmoe")


@pytest.fixture(autouse=True)
def wired(monkeypatch):
    monkeypatch.setitem(simctl.COMMANDS, "generate", "runtime.cli_generate:generate")


def run(*words):
    return simctl.main(["generate", *map(str, words)])


def base(tiny, *words):
    return ["--model", tiny, "--device", "cpu", "--slots", 8, "--max-new-tokens", 6, *words]


def plain_text(folder, prompt, tokens=6):
    """What the model writes without any offloading."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    made = model.generate(**ids, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_text_comes_out_and_a_summary_beside_it(tiny, capsys):
    assert run(*base(tiny, "--prompt", "w5 w9 w33")) == 0
    printed = capsys.readouterr()
    assert printed.out == plain_text(tiny, "w5 w9 w33").strip() + "\n"
    lines = printed.err.splitlines()
    assert lines[0].startswith("tiny-olmoe, lru, 8 of 24 experts on the CPU: 6 tokens for one")
    assert [line.split()[0] for line in lines] == ["tiny-olmoe,", "first", "hit", "over", "host"]
    assert "\x1b" not in printed.err
    assert "\r" not in printed.err


def test_the_text_streams(tiny, monkeypatch):
    """Words are written while later ones are not yet made."""
    pieces = []

    class Out(io.StringIO):
        def write(self, text):
            pieces.append(text)
            return len(text)

    monkeypatch.setattr(sys, "stdout", Out())
    assert run(*base(tiny, "--prompt", "w5 w9 w33")) == 0
    assert len([piece for piece in pieces if piece.strip()]) >= 5


@pytest.mark.parametrize("policy", ["lru", "predictive", "mixed:low_bits=8"])
def test_the_trace_is_one_that_run_takes_and_decides_alike(tiny, capsys, tmp_path, policy):
    out, facts = tmp_path / "x.parquet", tmp_path / "x.json"
    words = base(tiny, "--prompt", "w5 w9 w33", "--policy", policy, "--trace", out, "--json", facts)
    assert run(*words) == 0
    capsys.readouterr()
    slots = ["--slots", "8"]
    assert simctl.main(["run", "--trace", str(out), "--policy", policy, *slots, "--json", "-"]) == 0
    simulated = json.loads(capsys.readouterr().out)
    found = json.loads(facts.read_text())
    assert simulated["decisions_sha256"] == found["cache"]["decisions_sha256"]
    assert simulated["missed"] == found["cache"]["missed"] > 0
    assert simulated["bytes"]["demand"] == found["cache"]["bytes"]["demand"]
    assert simulated["bounds"]["belady_missed"] == found["cache"]["belady_missed"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.parquet"]


def test_a_predictor_runs_beside_it_and_its_forecasts_are_replayed(tiny, capsys, tmp_path):
    out, facts = tmp_path / "x.parquet", tmp_path / "x.json"
    predictor = tmp_path / "p.safetensors"
    torch.manual_seed(0)
    model = Predictor(small_spec(vocabulary=VOCABULARY))
    torch.nn.init.normal_(model.now.bias)
    save_predictor(predictor, model, {}, "float16")
    asked = f"routing-path:{predictor}"
    words = base(tiny, "--prompt", "w5 w9 w33", "--policy", "predictive", "--forecaster", asked)
    assert run(*words, "--trace", out, "--json", facts) == 0
    printed = capsys.readouterr()
    assert printed.out == plain_text(tiny, "w5 w9 w33").strip() + "\n"
    (line,) = (line for line in printed.err.splitlines() if "predictor" in line)
    assert re.fullmatch(r"predictor \d+\.\d{3} s on the host, .* of decoding", line)
    assert facts.with_name("x.forecast.npz").exists()
    found = json.loads(facts.read_text())
    assert found["cache"]["predictor"]["decode"]["passes"] == 5
    words = ["run", "--trace", out, "--policy", "predictive", "--slots", 8, "--json", "-"]
    words += ["--forecaster", f"routing-path:{tmp_path / 'x.forecast.npz'}"]
    assert simctl.main([*map(str, words)]) == 0
    simulated = json.loads(capsys.readouterr().out)
    assert simulated["decisions_sha256"] == found["cache"]["decisions_sha256"]
    # A predictor itself is not what a simulation replays.
    words[-1] = asked
    assert simctl.main([*map(str, words)]) == 2
    assert "p.safetensors: not a file of forecasts" in capsys.readouterr().err


def test_json_alone_on_standard_output(tiny, capsys, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"text": "w5 w9"}\n{"text": "w40 w3 w8"}\n')
    assert run(*base(tiny, "--prompt-file", prompts, "--json", "-")) == 0
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert facts["schema"] == "simctl.generate/1"
    texts = [item["text"] for item in facts["prompts"]]
    assert [text.strip() for text in texts] == [
        plain_text(tiny, text).strip() for text in ("w5 w9", "w40 w3 w8")
    ]
    assert printed.err.startswith(f"{texts[0].strip()}\n\n{texts[1].strip()}\n")
    assert facts["time"]["first_token_s"] > 0
    assert facts["time"]["tokens_per_s"] > 0
    cache = facts["cache"]
    assert cache["hit"] + cache["late"] + cache["missed"] == cache["accesses"]
    assert cache["tokens"] == 2 + 3 + 2 * 5
    assert facts["memory"]["host_peak_bytes"] > facts["memory"]["host_bytes"] > 0
    assert summary(facts) in printed.err


def test_standard_input_is_one_prompt(tiny, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w5\nw9 w33\n"))
    assert run(*base(tiny, "--prompt-file", "-")) == 0
    assert capsys.readouterr().out == plain_text(tiny, "w5 w9 w33").strip() + "\n"


def test_sampling_follows_its_seed(tiny, capsys):
    texts = []
    for seed in (1, 1, 2):
        words = base(tiny, "--prompt", "w5", "--temperature", 1.5, "--seed", seed, "--top-k", 40)
        assert run(*words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_chat_template_is_applied(tiny, capsys, tmp_path):
    assert run(*base(tiny, "--prompt", "w5", "--chat")) == 2
    assert "--chat: the tokenizer has no chat template" in capsys.readouterr().err
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "w20 {{ messages[0]['content'] }} w21"
    assert encode(tokenizer, ["w5"], chat=True) == [[WORDS.index(w) for w in ("w20", "w5", "w21")]]
    tokenizer.chat_template = "{{ raise_exception('no\nuser') }}"
    with pytest.raises(InputError, match="--chat: the chat template failed: no"):
        encode(tokenizer, ["w5"], chat=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "--prompt, --prompt-file: none given"),
        (("--prompt", "w5", "--prompt-file", "-"), "--prompt, --prompt-file: both given"),
        (("--prompt", " "), "--prompt: no text found"),
        (("--prompt-file", "absent.jsonl"), "absent.jsonl: No such file"),
        (("--prompt", "w5", "--cache", "50%"), "several given, expected one"),
        (("--prompt", "w5", "--slots", "1"), "--slots 1: is 1 slots, expected at least top_k"),
        (("--prompt", "w5", "--policy", "lur"), "lur"),
        (("--prompt", "w5", "--policy", "belady"), "needs the future"),
        (("--prompt", "w5", "--model", "absent"), "absent: not found"),
        (("--prompt", "w5", "--temperature", "-1"), "temperature is -1"),
        (("--prompt", "w5", "--max-new-tokens", "64"), "prompt 1: 1 tokens and 64 new ones"),
        (("--prompt", "w5", "--json", "no/x.json"), "--json no/x.json: cannot be written"),
        (("--prompt", "w5", "--trace", "-"), "--trace -: cannot be written"),
        (("--prompt", "w5", "--hardware", "none-such"), "none-such"),
        (
            (
                "--prompt",
                "w5",
                "--policy",
                "predictive",
                "--forecaster",
                "routing-path:x.safetensors",
            ),
            "x.safetensors: no such file, expected a predictor",
        ),
    ],
)
def test_bad_input_is_one_line(tiny, capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    assert run(*base(tiny, *words)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(tiny, capsys):
    assert run(*base(tiny, "--prompt", "w5", "--device", "cuda")) == 2
    assert "--device cuda: no CUDA device found" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_one_line(tiny, capsys, tmp_path):
    for file in tiny.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert run(*base(tmp_path, "--prompt", "w5")) == 2
    error = capsys.readouterr().err
    assert "model.safetensors" in error
    assert error.count("\n") == 1


def test_a_policy_that_raises_is_one_line_and_frees_everything(tiny, capsys, tmp_path, monkeypatch):
    source = tmp_path / "mine.py"
    source.write_text(
        "from policies.builtin.lru import LRU\n"
        "class Mine(LRU):\n"
        "    def on_route(self, routing):\n"
        "        if routing.event == 7:\n"
        "            raise KeyError('lost')\n"
        "        super().on_route(routing)\n"
    )
    opened = _remember(monkeypatch)
    words = base(tiny, "--prompt", "w5", "--policy", f"{source}:Mine")
    assert run(*words, "--trace", tmp_path / "x.parquet", "--json", tmp_path / "x.json") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "KeyError" in error
    assert "event 7" in error
    _assert_freed(opened, tmp_path)


def test_an_interruption_frees_everything_and_leaves_no_file(tiny, capsys, tmp_path, monkeypatch):
    def interrupt(self, times_s):
        if len(times_s) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(runtime.cli_generate._Live, "__call__", interrupt)
    opened = _remember(monkeypatch)
    words = base(tiny, "--prompt", "w5 w9")
    assert run(*words, "--trace", tmp_path / "x.parquet", "--json", tmp_path / "x.json") == 130
    assert "interrupted" in capsys.readouterr().err
    _assert_freed(opened, tmp_path)


def _remember(monkeypatch):
    """A list to which every opened model is added."""
    opened, original = [], runtime.generate.open_offloaded

    def opening(*arguments, **options):
        opened.append(original(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(runtime.generate, "open_offloaded", opening)
    return opened


def _assert_freed(opened, folder):
    engine = opened[0].runner.engine
    assert engine.store.size_bytes == 0
    assert not list(folder.glob("x.*"))
    assert not list(folder.glob(".*"))


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_in_mid_text(tiny, tmp_path):
    """A real signal to a real process: exit code 130, one word, no file."""
    code = (
        "import sys, simctl; simctl.COMMANDS['generate'] = 'runtime.cli_generate:generate'; "
        "sys.exit(simctl.main(sys.argv[1:]))"
    )
    words = base(tiny, "--prompt", "w5 w9", "--max-new-tokens", 60, "--policy", _slow(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", code, "generate", *map(str, words), "--trace", str(tmp_path / "x")],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout.read(1)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, error
    assert error.splitlines()[-1] == "interrupted"
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()


def _slow(folder):
    """A policy that takes its time, so that an interruption meets it in the middle."""
    (folder / "slow.py").write_text(
        "import time\n"
        "from policies.builtin.lru import LRU\n"
        "class Slow(LRU):\n"
        "    def on_route(self, routing):\n"
        "        time.sleep(0.05)\n"
        "        super().on_route(routing)\n"
    )
    return f"{folder / 'slow.py'}:Slow"


PAGE = (ROOT / "docs/runtime.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_examples_of_the_documentation_run(tiny, number, capsys):
    space: dict[str, object] = {}
    exec(EXAMPLES[number].replace("FOLDER", str(tiny)), space)
    model = space["model"]
    stats = model.expert_cache.stats()
    assert stats["slots"] == (24 if number == 0 else 12)
    model.expert_cache.close()
    if number == 0:
        assert "'hit_ratio'" in capsys.readouterr().out
        assert len(space["text"].split()) == 36


def test_the_documentation_names_every_option():
    table = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", PAGE, re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(Options)}
    assert set(fields) | {"policy"} <= set(table)
    for name, default in fields.items():
        said = table[name].strip('`"')
        if default is not None and said != str(default).lower():
            raise AssertionError(f"{name} is {default!r}, the page says {said}")


def test_the_documentation_names_every_family():
    assert ", ".join(FAMILIES) in " ".join(PAGE.split())


def test_decode_graphs_get_the_cache_they_need_unless_another_was_chosen():
    config = transformers.GenerationConfig()
    _generate_over_static_cache(config)
    assert (config.cache_implementation, config.disable_compile) == ("static", True)
    config = transformers.GenerationConfig(cache_implementation="dynamic")
    _generate_over_static_cache(config)
    assert config.cache_implementation == "dynamic"
    assert not config.disable_compile


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_line_is_kept_up_to_date_on_a_terminal(tiny, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(runtime.cli_generate, "_PERIOD_S", 0.0)
    assert run(*base(tiny, "--prompt", "w5 w9")) == 0
    shown = terminal.getvalue().split("\r\x1b[K")
    live = [line for line in shown if "tokens/s  hit " in line]
    assert len(live) == 5
    assert "GB moved" in live[-1]


def test_a_shared_terminal_has_its_last_row_set_apart(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((20, 10)))

    def interrupted():
        with status_line(Terminal()) as show:
            show("a line that is longer than the terminal")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    written = terminal.getvalue()
    assert written.startswith("\n\x1b7\x1b[1;9r\x1b8\x1b[1A")
    assert "\x1b7\x1b[10;1H\x1b[Ka line that is long\x1b8" in written
    assert written.endswith("\x1b7\x1b[r\x1b8")
