"""Commands on trace files: ``simctl trace info | import | synth | split``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from traces.errors import InputError
from traces.model import DTYPE_BYTES

if TYPE_CHECKING:
    from traces.trace import TokenSequence

FILE = click.Path(path_type=Path)


def _span(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, int]:
    """A number of tokens, or LEAST-MOST of them."""
    low, _, high = value.partition("-")
    if not low.isdecimal() or (high and not high.isdecimal()) or int(high or low) < int(low):
        raise InputError(
            f"{param.opts[0]} {value!r}, expected a number or LEAST-MOST, such as 64 or 32-128"
        )
    return int(low), int(high or low)


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...]:
    """Numbers separated by commas."""
    try:
        return tuple(float(part) for part in value.split(",")) if value else ()
    except ValueError:
        text = f"{param.opts[0]} {value!r}, expected numbers and commas, such as 0.9,0.8"
        raise InputError(text) from None


@contextmanager
def progress_bar(label: str, length: int | None) -> Iterator[Callable[[int], None]]:
    """A function to call with each advance: a bar on a terminal, nothing in a pipe."""
    if not sys.stderr.isatty() or length is None:
        yield lambda steps: None
        return
    with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
        yield bar.update


def _counted(
    sequences: Iterable[TokenSequence], advance: Callable[[int], None]
) -> Iterator[TokenSequence]:
    for sequence in sequences:
        yield sequence
        advance(1)


@click.group()
def trace() -> None:
    """Inspect, import, capture, synthesise and split traces."""


@trace.command()
@click.argument("path", type=FILE)
@click.option("--json", "target", metavar="FILE|-", help="Write all figures as JSON; - is stdout.")
def info(path: Path, target: str | None) -> None:
    """What a trace holds: model, sizes, popularity, locality, reuse, predictability."""
    from traces.report import describe, facts
    from traces.statistics import measure, outline
    from traces.store import open_trace

    stored = open_trace(path)
    seen = outline(stored)
    with progress_bar("measuring", seen.tokens) as advance:
        figures = {**facts(stored), **measure(stored, seen, advance)}
    text = json.dumps(figures, indent=2)
    if target == "-":
        click.echo(text)
        return
    if target is not None:
        try:
            Path(target).write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise InputError(f"{target}: cannot be written: {error.strerror}") from None
    click.echo("\n".join(describe(figures)))


@trace.command("import")
@click.argument("recording", type=FILE)
@click.argument("out", type=FILE)
@click.option(
    "--format",
    "form",
    type=click.Choice(["npz", "npy", "base64", "responses", "jsonl", "csv"]),
    help="Form of the recording, where its suffix does not tell.",
)
@click.option("--model-spec", type=FILE, help="JSON or TOML file with all fields of the model.")
@click.option("--sizes", help="Take dimensions from a published model, such as mixtral-8x7b.")
@click.option("--name", help="Name of the model. Default: the recording's name.")
@click.option("--layers", type=int, help="MoE layers, where the recording does not tell.")
@click.option("--experts", type=int, help="Experts per layer, where the recording does not tell.")
@click.option("--top-k", type=int, help="Experts per token, where the recording does not tell.")
@click.option("--hidden", type=int, help="Hidden size. Default: 2048.")
@click.option("--intermediate", type=int, help="Inner size of an expert. Default: 2048.")
@click.option(
    "--expert-params", type=int, help="Weights of one expert. Default: 3 x hidden x intermediate."
)
@click.option(
    "--dense-params",
    type=int,
    help="Weights that are no routed expert. Default: layers x (4 hidden^2 + hidden x experts).",
)
@click.option(
    "--kv-bytes",
    "kv_bytes_per_token",
    type=int,
    help="Key-value cache of one token in bytes. Default: two hidden vectors per layer.",
)
@click.option("--dtype", type=click.Choice(list(DTYPE_BYTES)), help="Default: bfloat16.")
@click.option("--source", help="Where the recording comes from, in words.")
@click.option("--license", help="Under which terms it may be used. Default: unknown.")
def import_(
    recording: Path,
    out: Path,
    form: str | None,
    model_spec: Path | None,
    source: str | None,
    license: str | None,
    **said: Any,
) -> None:
    """Convert the RECORDING of another program into the trace OUT.

    \b
    .npz          experts [token, layers, k], seq_offsets, optional weights, first_pos, ...
    .npy          routed experts [tokens, layers, k] of one sequence (SGLang, vLLM)
    .b64          the same as base64 text of little-endian int32
    .json(l)      responses with a routed_experts field, one sequence each
    .jsonl        one object per (token, layer): layer, experts, ...
    .csv          layer, experts; a new token begins where the layer does not grow
    """
    from traces.importers import SpecOptions, import_recording
    from traces.store import write_trace

    found = import_recording(recording, SpecOptions(file=model_spec, **said), form)
    with progress_bar("importing", found.count) as advance:
        stored = write_trace(
            out,
            found.model,
            _counted(found.sequences, advance),
            source=source or found.source,
            license=license or found.license,
            extra=found.extra,
        )
    _say_written(stored)


@trace.command()
@click.argument("out", type=FILE)
@click.option("--layers", type=int, default=24, show_default=True, help="MoE layers.")
@click.option("--experts", type=int, default=32, show_default=True, help="Experts per layer.")
@click.option("--top-k", type=int, default=4, show_default=True, help="Experts per token.")
@click.option("--sequences", type=int, default=64, show_default=True)
@click.option(
    "--prompt",
    callback=_span,
    metavar="N|LEAST-MOST",
    default="64",
    show_default=True,
    help="Prompt tokens.",
)
@click.option(
    "--decode",
    callback=_span,
    metavar="N|LEAST-MOST",
    default="192",
    show_default=True,
    help="Decoded tokens.",
)
@click.option(
    "--skew",
    type=float,
    default=0.1,
    show_default=True,
    help="0 all experts wanted alike, 1 always the same: agreement of unrelated tokens.",
)
@click.option(
    "--repetition",
    type=float,
    default=0.3,
    show_default=True,
    help="Share of a token's experts kept from the token before, beyond chance.",
)
@click.option(
    "--correlation",
    type=float,
    default=0.3,
    show_default=True,
    help="Share of a layer's experts whose partner in the next is taken too, beyond chance.",
)
@click.option(
    "--domains",
    type=int,
    default=1,
    show_default=True,
    help="Each with a popularity of its own; sequences take turns.",
)
@click.option(
    "--token-information",
    type=float,
    help="Write token ids; this share of them names the first expert of layer 0.",
)
@click.option(
    "--ahead",
    callback=_numbers,
    metavar="X,...",
    help="Recall at k of the predictions at +1,+2,+3.",
)
@click.option("--ahead-width", type=int, help="Experts in one prediction.  [default: top-k]")
@click.option("--weights/--no-weights", default=True, show_default=True, help="Gate weights.")
@click.option("--sizes", default=None, help="Take dimensions from a published model.")
@click.option("--seed", type=int, default=0, show_default=True)
def synth(out: Path, sizes: str | None, **said: Any) -> None:
    """Write a synthetic trace whose settings `trace info` measures back."""
    from traces.importers.spec import Found, SpecOptions, resolve
    from traces.store import write_trace
    from traces.synth import SynthSettings, synthesise

    settings = SynthSettings(**said)
    known = SpecOptions(
        sizes=sizes,
        name=None if sizes else "synthetic",
        layers=settings.layers,
        experts=settings.experts,
        top_k=settings.top_k,
    )
    model = resolve(known, Found(out))
    with progress_bar("drawing", settings.sequences) as advance:
        stored = write_trace(
            out,
            model,
            _counted(synthesise(settings), advance),
            source=f"synthetic: skew {settings.skew:g}, repetition {settings.repetition:g}, "
            f"correlation {settings.correlation:g}, {settings.domains} domains, "
            f"seed {settings.seed}",
            license="CC0-1.0",
            extra=settings.notes(),
        )
    _say_written(stored)


@trace.command()
@click.argument("path", type=FILE)
@click.argument("out", type=FILE)
@click.argument("rest", type=FILE, required=False)
@click.option("--share", type=click.FloatRange(0, 1), help="Share of the sequences for OUT.")
@click.option("--sequences", type=click.IntRange(1), help="Instead: the first N sequences.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Of the draw by --share.",
)
def split(
    path: Path, out: Path, rest: Path | None, share: float | None, sequences: int | None, seed: int
) -> None:
    """Divide PATH by sequences: a share of them, 0.5 by default, to OUT and the others to REST.

    The draw is by domain where the trace tells domains. With --sequences OUT gets the first N.
    """
    from traces.split import divide, write_part
    from traces.statistics import outline
    from traces.store import open_trace

    if share is not None and sequences is not None:
        raise InputError("--share and --sequences were both given, expected one of them")
    stored = open_trace(path)
    count = len(outline(stored).lengths)
    if sequences is not None:
        if sequences > count:
            raise InputError(f"{path}: has {count} sequences, expected at least {sequences}")
        chosen, part = [i < sequences for i in range(count)], f"first {sequences} sequences"
    else:
        share = 0.5 if share is None else share
        chosen, part = divide(stored, count, share, seed), f"{share:g} of it, seed {seed}"
    _say_written(write_part(stored, out, chosen, part))
    if rest is not None:
        others = [not taken for taken in chosen]
        if not any(others):
            raise InputError(f"{path}: no sequences are left for {rest}")
        _say_written(write_part(stored, rest, others, f"without {part}"))


def _say_written(stored: Any) -> None:
    model = stored.model
    click.echo(
        f"{stored.path}: {stored.tokens} tokens, {model.layers} layers, "
        f"top-{model.top_k} of {model.experts} experts, {model.name}"
    )
