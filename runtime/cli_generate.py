"""The command ``generate``: text from a checkpoint whose experts are offloaded."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from runtime.cli import progress_bar, require_torch
from runtime.generate_summary import counted, summary
from traces.errors import InputError

if TYPE_CHECKING:
    from runtime.generate import Offloaded, Written
    from runtime.grouped import Arrangement, Grouped
    from runtime.sampling import Sampling

F = TypeVar("F", bound=Callable[..., Any])

SCHEMA = "simctl.generate/1"

#: Seconds between two updates of the line of statistics.
_PERIOD_S = 0.1

_OPTIONS = (
    click.option("--model", metavar="DIR|NAME", required=True, help="A folder, or a hub name."),
    click.option("--policy", default="lru", show_default=True, help="The caching policy."),
    click.option("--cache", metavar="25%", help="Budget as a share of all experts. [default: 50%]"),
    click.option("--slots", type=int, metavar="N", help="Budget as a number of experts."),
    click.option("--gpu-memory", metavar="8GiB", help="Budget as GPU memory, all included."),
    click.option("--prompt", metavar="TEXT", help="What to continue."),
    click.option(
        "--prompt-file",
        metavar="FILE|-",
        help='Prompts as JSON lines {"text"}; - reads one plain text from standard input.',
    ),
    click.option("--chat", is_flag=True, help="Put each prompt into the model's chat template."),
    click.option(
        "--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True,
        help="Tokens made at most for each prompt.",
    ),
    click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", type=int, default=0, show_default=True, help="0 keeps every token."),
    click.option("--top-p", type=float, default=1.0, show_default=True, help="1 keeps all tokens."),
    click.option("--seed", type=int, default=0, show_default=True, help="Of sampling and policy."),
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
    ),
    click.option(
        "--compute", type=click.Choice(["auto", "graph", "fused", "reference"]), default="auto",
        show_default=True, help="Our kernels or transformers'; auto: ours on CUDA.",
    ),
    click.option(
        "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto",
        show_default=True, help="auto: as stored.",
    ),
    click.option(
        "--compiled/--not-compiled", default=None,
        help="Compile decode steps before they are captured: a minute or more the first time.",
    ),
    click.option("--pageable", is_flag=True, help="Do not pin host memory: slower copies."),
    click.option(
        "--forecaster",
        help="Forecaster of policies that take one; routing-path:P.safetensors runs a predictor "
        "beside the model. [default: ahead]",
    ),
    click.option(
        "--hardware", default="auto", show_default=True,
        help="Hardware profile that policies reckon with: a name or a TOML file; auto: "
        "h100-captured on CUDA, else h200-pcie5.",
    ),
    click.option(
        "--pool", type=click.Choice(["global", "layer"]), default="global", show_default=True,
        help="One pool of slots, or an equal share for each layer.",
    ),
    click.option(
        "--batch", type=click.IntRange(min=1), default=1, show_default=True,
        help="Prompts that run together.",
    ),
    click.option(
        "--scheduler", default="none", show_default=True,
        help="Which prompts run together, also anew while they decode.",
    ),
    click.option("--train", metavar="FILE", help="Training trace for what learns offline."),
    click.option("--depth", default=2, show_default=True, help="Copies issued ahead on the link."),
    click.option("--json", "json_path", metavar="FILE|-", help="Write text and statistics."),
    click.option("--trace", "trace_path", metavar="FILE", help="Write the routing as a trace."),
)  # fmt: skip


def _options(command: F) -> F:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command()
@_options
def generate(**options: Any) -> None:
    """Continue prompts with a model whose experts stay in host memory, all but some.

    Text goes to standard output as it comes, statistics to standard error: one line that is
    kept up to date on a terminal, and a summary at the end. With `--json -` standard output
    holds the JSON alone, and the text goes to standard error.
    """
    _check_targets(options)
    texts = _texts(options)
    require_torch()

    from runtime.fullspeed import at_full_speed
    from runtime.generate import check_room, encode, open_offloaded
    from runtime.grouped import arranged
    from runtime.load import find_folder, load_tokenizer

    sampling = _sampling(options)
    names = ("batch", "scheduler", "forecaster", "train")
    arrangement = arranged(*(options[name] for name in names))
    folder = find_folder(options["model"])
    tokens = encode(load_tokenizer(folder), texts, chat=options["chat"])
    longest = check_room(folder, list(map(len, tokens)), options["max_new_tokens"])
    out = sys.stderr if options["json_path"] == "-" else sys.stdout
    with open_offloaded(
        options["model"],
        options["policy"],
        dtype=options["dtype"],
        record=bool(options["trace_path"]),
        progress=progress_bar,
        turns=arrangement.unit,
        **_offloading(options, longest),
    ) as opened:
        start = time.monotonic()
        written = []
        runner = opened.runner
        quick = at_full_speed(runner.engine.lanes.device)
        with quick as runner.cores, status_line(out) as show:
            note = _Live(opened, show)
            prompts = list(zip(texts, tokens, strict=True))
            writing, grouped = _writing(
                opened, prompts, arrangement, options, (out, note, sampling)
            )
            for item in writing:
                written.append(item)
                if grouped is not None:
                    out.write(item.text)
                _end_of_text(out, item, last=len(written) == len(prompts))
        facts = _facts(opened, options, written, time.monotonic() - start)
        if grouped is not None:
            facts["time"] |= grouped.rates()
            facts["schedule"] = grouped.to_dict(opened.spec.kv_bytes_per_token)
        if options["trace_path"]:
            _write_trace(opened, options, len(texts))
    _report(options["json_path"], facts)


def _writing(
    opened: Offloaded,
    prompts: Sequence[tuple[str, Sequence[int]]],
    arrangement: Arrangement,
    options: dict[str, Any],
    how: tuple[TextIO, _Live, Sampling],
) -> tuple[Iterator[Written], Grouped | None]:
    """What writes the texts: one after the other as they come, or in groups."""
    out, note, sampling = how
    most = options["max_new_tokens"]
    if arrangement.batch == 1 and options["scheduler"] == "none":
        from runtime.generate import write_on

        return write_on(opened, prompts, sampling, most, _writer(out), note), None
    from runtime.grouped import GroupedWriter

    writer = GroupedWriter(opened, prompts, sampling, most, arrangement, note)
    return iter(writer), writer.found


def _offloading(options: dict[str, Any], longest: int) -> dict[str, Any]:
    """The options of ``offload`` among those of the command."""
    names = (
        "cache", "slots", "gpu_memory", "device", "compute", "forecaster", "hardware", "pool",
        "train", "depth", "seed", "batch",
    )  # fmt: skip
    chosen = {name: options[name] for name in names}
    if options["compiled"] is not None:
        chosen["compiled"] = options["compiled"]
    return chosen | {"pin": not options["pageable"], "max_tokens": longest}


def _sampling(options: dict[str, Any]) -> Sampling:
    from runtime.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "seed")
    return Sampling(*(options[name] for name in names))


def _texts(options: dict[str, Any]) -> list[str]:
    """The prompts: that of the command line, those of a file, or standard input as one."""
    prompt, path = options["prompt"], options["prompt_file"]
    if (prompt is None) == (path is None):
        found = "both given" if prompt is not None else "none given"
        raise InputError(f"--prompt, --prompt-file: {found}, expected one of them")
    if path is not None and path != "-":
        from runtime.prompts import read_prompts

        return [item.text for item in read_prompts(Path(path))]
    text = prompt if prompt is not None else sys.stdin.read().rstrip("\n")
    if not text.strip():
        option = "--prompt" if prompt is not None else "--prompt-file -"
        raise InputError(f"{option}: no text found, expected some")
    return [text]


def _check_targets(options: dict[str, Any]) -> None:
    """Refuse before a long run what could not be written after it."""
    for option, path in (("--json", options["json_path"]), ("--trace", options["trace_path"])):
        if not path or (path == "-" and option == "--json"):
            continue
        target = Path(path)
        if path == "-" or target.is_dir() or not target.parent.is_dir():
            raise InputError(f"{option} {path}: cannot be written there, expected a file's name")


def _writer(out: TextIO) -> Callable[[str], None]:
    """Writes text to *out* at once."""

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    return write


def _end_of_text(out: TextIO, item: Written, *, last: bool) -> None:
    """End the line, and leave one empty between two texts."""
    out.write(("" if item.text.endswith("\n") else "\n") + ("" if last else "\n"))
    out.flush()


class _Live:
    """Shows what the expert cache did so far, as tokens come."""

    def __init__(self, opened: Offloaded, show: Callable[[str], None] | None) -> None:
        self._engine, self._show = opened.runner.engine, show
        self._next_s = 0.0

    def __call__(self, times_s: Sequence[float]) -> None:
        """A token has come; *times_s* are the times of all of this prompt."""
        if self._show is None or times_s[-1] < self._next_s:
            return
        self._next_s = times_s[-1] + _PERIOD_S
        self._show(self._text(times_s))

    def _text(self, times_s: Sequence[float]) -> str:
        engine, copier = self._engine, self._engine.copier
        missed = engine.planner.counts["missed"]
        hits = engine.accesses - missed - engine.late
        moved = copier.demand_bytes + copier.prefetch_bytes
        spent = times_s[-1] - times_s[0]
        rate = f"{(len(times_s) - 1) / spent:.1f} tokens/s" if spent else "first token"
        return (
            f"{rate}  hit {hits / max(engine.accesses, 1):.1%}  missed {missed:,}  "
            f"{moved / 1e9:.2f} GB moved"
        )


@contextmanager
def status_line(out: TextIO) -> Iterator[Callable[[str], None] | None]:
    """A function that shows one line on standard error and replaces the last one there.

    None where standard error is no terminal. Where *out* is written to the same terminal, its
    last row is set apart for the line, so that text and line do not overwrite each other.
    """
    err = sys.stderr
    if not err.isatty():
        yield None
        return
    size = shutil.get_terminal_size()
    apart = out.isatty() and size.lines > 2
    if apart:
        # Room below the text, the last row out of what scrolls, and back to the text.
        err.write(f"\n\x1b7\x1b[1;{size.lines - 1}r\x1b8\x1b[1A")

    def show(text: str) -> None:
        text = text[: size.columns - 1]
        row = f"\x1b7\x1b[{size.lines};1H\x1b[K{text}\x1b8" if apart else f"\r\x1b[K{text}"
        err.write(row)
        err.flush()

    try:
        yield show
    finally:
        out.flush()
        show("")
        if apart:
            err.write("\x1b7\x1b[r\x1b8")
        err.flush()


def _facts(
    opened: Offloaded, options: dict[str, Any], written: Sequence[Written], total_s: float
) -> dict[str, Any]:
    """Everything about the run, as it goes into the JSON."""
    from runtime.offloading import Options
    from runtime.peaks import host_peak_bytes, peak_bytes

    stats = opened.model.expert_cache.stats()
    memory = stats.pop("memory")
    decoded = sum(item.new_tokens - 1 for item in written)
    decode_s = sum(item.decode_s for item in written)
    names = ("temperature", "top_k", "top_p", "seed", "max_new_tokens", "chat")
    return {
        "schema": SCHEMA,
        "model": opened.spec.name,
        "policy": options["policy"],
        "device": opened.device.type,
        "hardware": Options(hardware=options["hardware"]).reckons_with(opened.device),
        "batch": options["batch"],
        "scheduler": options["scheduler"],
        "experts": opened.spec.total_experts,
        "sampling": {name: options[name] for name in names},
        "prompts": [item.to_dict() for item in written],
        "time": {
            "load_s": opened.load_s,
            "total_s": total_s,
            "first_token_s": sum(item.first_token_s for item in written) / len(written),
            "decode_s": decode_s,
            "tokens_per_s": decoded / decode_s if decode_s else 0.0,
        },
        "cache": stats,
        "memory": {
            **memory,
            "gpu_peak_bytes": peak_bytes(opened.device),
            "host_peak_bytes": host_peak_bytes(),
        },
    }


def _write_trace(opened: Offloaded, options: dict[str, Any], prompts: int) -> None:
    how = "greedily" if not options["temperature"] else f"at {options['temperature']:g}"
    source = f"routing of {opened.spec.name} on {counted(prompts)}, generated {how}"
    opened.write_trace(
        Path(options["trace_path"]),
        source,
        {name: options[name] for name in ("policy", "max_new_tokens", "batch", "scheduler")},
    )


def _report(json_path: str | None, facts: dict[str, Any]) -> None:
    """The summary to standard error, the JSON to where it was asked for."""
    text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    if json_path == "-":
        click.echo(text, nl=False)
    elif json_path:
        from traces.writing import replacing

        with replacing(Path(json_path)) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    click.echo(summary(facts), err=True)
