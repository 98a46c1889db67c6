"""Commands of the real world: ``simctl trace capture`` and ``simctl doctor``."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from traces.errors import InputError

if TYPE_CHECKING:
    from runtime.capture import CaptureSettings, Origin, TokenPrompt
    from runtime.prompts import Prompt

FOLDER = click.Path(path_type=Path)


def require_torch() -> None:
    """Raise :class:`InputError` unless torch and transformers are installed."""
    absent = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if absent:
        raise InputError(
            f"{' and '.join(absent)} not installed, expected the extra 'gpu': "
            "pip install -e '.[gpu]'"
        )


@contextmanager
def progress_bar(label: str, length: int) -> Iterator[Callable[[int], None]]:
    """A function to call with each advance: a bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty():
        yield lambda steps: None
        return
    with click.progressbar(length=length, label=label, file=sys.stderr, show_pos=True) as bar:
        yield bar.update


def _chosen_prompts(options: dict[str, Any]) -> list[Prompt]:
    from runtime.prompts import balanced, read_prompts

    path, wanted = options["prompts"], options["sequences"]
    prompts = read_prompts(path)
    if options["per_domain"] == "balanced":
        prompts = balanced(prompts)
    if wanted is not None and wanted > len(prompts):
        raise InputError(
            f"--sequences {wanted}: {path} has {len(prompts)} prompts, expected at least as many"
        )
    return prompts[:wanted]


def _settings(options: dict[str, Any]) -> CaptureSettings:
    from runtime.capture import CaptureSettings
    from runtime.sampling import Sampling

    return CaptureSettings(
        max_new_tokens=options["max_new_tokens"],
        sampling=Sampling(
            options["temperature"], options["top_k"], options["top_p"], options["seed"]
        ),
        ahead=options["ahead"],
        ahead_width=options["ahead_width"],
        batch=options["batch"],
    )


def _sampling_text(options: dict[str, Any]) -> str:
    if not options["temperature"]:
        return "greedily"
    words = [f"at temperature {options['temperature']:g}"]
    if options["top_k"]:
        words.append(f"top-k {options['top_k']}")
    if options["top_p"] < 1:
        words.append(f"top-p {options['top_p']:g}")
    return ", ".join([*words, f"seed {options['seed']}"])


def _origin(options: dict[str, Any], model_type: str, prompts: list[Prompt]) -> Origin:
    """Provenance in words; folders stay out of it, they mean nothing elsewhere."""
    from runtime.capture import Origin

    name, file = options["model"].resolve().name, options["prompts"].name
    domains = len({prompt.domain for prompt in prompts})
    order = f", balanced over {domains} domains" if options["per_domain"] == "balanced" else ""
    source = (
        f"routing of {name} ({model_type}) on {len(prompts)} prompts of {file}{order}: the first "
        f"{options['max_prompt_tokens']} tokens of each, then up to {options['max_new_tokens']} "
        f"sampled {_sampling_text(options)}"
    )
    extra = {"prompts": file, "max_prompt_tokens": options["max_prompt_tokens"]}
    return Origin(name, options["source"] or source, options["license"], extra)


def _token_prompts(folder: Path, prompts: list[Prompt], longest: int) -> list[TokenPrompt]:
    from runtime.capture import TokenPrompt
    from runtime.load import load_tokenizer

    tokenizer = load_tokenizer(folder)
    encoded = (tokenizer(prompt.text)["input_ids"][:longest] for prompt in prompts)
    return [
        TokenPrompt(tuple(tokens), prompt.domain)
        for tokens, prompt in zip(encoded, prompts, strict=True)
    ]


def _summary(out: Path, seconds: float) -> str:
    from traces.store import open_trace

    trace = open_trace(out)
    lengths = [(len(s), s.prefill) for s in trace.sequences(columns=())]
    prefill = sum(length for _, length in lengths)
    return (
        f"{out}: {len(lengths)} sequences, {trace.tokens} tokens ({prefill} prefill, "
        f"{trace.tokens - prefill} decode), {out.stat().st_size / 2**20:.2f} MiB, {seconds:.0f} s"
    )


@click.command()
@click.option("--model", type=FOLDER, required=True, help="Folder of a transformers model.")
@click.option("--prompts", type=FOLDER, required=True, help='JSON lines {"domain"?, "text"}.')
@click.option("--out", type=FOLDER, required=True, help="Trace file to write.")
@click.option("--sequences", type=click.IntRange(min=1), help="How many prompts; default all.")
@click.option(
    "--per-domain",
    type=click.Choice(["file", "balanced"]),
    default="file",
    show_default=True,
    help="Order of the prompts: the file's, or one of each domain in turn.",
)
@click.option("--max-prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--max-new-tokens", type=click.IntRange(min=0), default=64, show_default=True)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0 keeps every token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="1 keeps every token.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--ahead", type=click.IntRange(0, 3), default=3, show_default=True, help="Gates asked ahead."
)
@click.option("--ahead-width", type=int, help="Experts kept per gate ahead; default 2 x top-k.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: as stored.",
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
@click.option("--source", default="", help="Provenance in words; default from model and prompts.")
@click.option("--license", default="unstated", show_default=True, help="Terms of the trace.")
@click.option("--restart", is_flag=True, help="Drop the file and what an earlier run left of it.")
def capture(**options: Any) -> None:
    """Record the routing of a model while it reads prompts and writes on.

    An interrupted capture continues where it stopped when the same command is run again.
    """
    require_torch()
    prompts = _chosen_prompts(options)

    from runtime.capture import capture as run
    from runtime.load import fitting, load_model
    from runtime.parts import discard

    settings = _settings(options)
    out: Path = options["out"]
    if options["restart"]:
        discard(out)
    model = load_model(options["model"], options["dtype"], options["device"])
    inputs = _token_prompts(options["model"], prompts, options["max_prompt_tokens"])
    origin = _origin(options, model.config.model_type, prompts)
    start = time.monotonic()
    with fitting(model.device), progress_bar("capture", len(inputs)) as advance:
        run(model, inputs, out, settings, origin, advance)
    click.echo(_summary(out, time.monotonic() - start))


@click.command()
@click.option("--json", "json_target", metavar="FILE|-", help="Write the facts as JSON.")
def doctor(json_target: str | None) -> None:
    """What this machine can do."""
    from runtime.doctor import examine, lines

    facts = examine()
    text = json.dumps(facts, indent=2) + "\n"
    if json_target == "-":
        click.echo(text, nl=False)
        return
    if json_target is not None:
        try:
            Path(json_target).write_text(text)
        except OSError as error:
            raise InputError(
                f"--json {json_target}: {error.strerror}, expected a writable file"
            ) from None
    click.echo("\n".join(lines(facts)))
