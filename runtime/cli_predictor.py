"""The commands ``simctl predictor train``, ``evaluate`` and ``forecast``."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from runtime.cli import progress_bar, require_torch
from traces.errors import InputError

if TYPE_CHECKING:
    from runtime.predictor.data import Corpus
    from runtime.predictor.spec import PredictorSpec
    from runtime.predictor.training import Trainer, TrainSettings

FILE = click.Path(path_type=Path)
POSITIVE = click.IntRange(min=1)
DEVICES = click.Choice(["auto", "cpu", "cuda"])

#: Seconds after which an unfinished training is written down again.
KEEP_S = 60.0


@click.group()
def predictor() -> None:
    """Train, judge and use a predictor of a model's routing."""


def checkpoint_of(out: Path) -> Path:
    """Where the training of *out* lies while it is unfinished."""
    return out.with_name(out.name + ".checkpoint")


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
    """A function that says whether the user wants to stop; a second request is not waited for."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    kinds = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        kinds = ()  # type: ignore[assignment]
    before = {kind: signal.signal(kind, note) for kind in kinds}
    try:
        yield lambda: bool(asked)
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@predictor.command()
@click.option("--trace", "traces", type=FILE, multiple=True, required=True, help="May be repeated.")
@click.option("--out", type=FILE, required=True, help="The predictor: a .safetensors file.")
@click.option(
    "--epochs", type=POSITIVE, default=10, show_default=True, help="Times every sequence."
)
@click.option("--steps", type=POSITIVE, help="Batches in all, instead of --epochs.")
@click.option("--batch", type=POSITIVE, default=16, show_default=True, help="Sequences of a step.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=5e-3, show_default=True)
@click.option("--dropout", type=click.FloatRange(0, 0.9), default=0.0, show_default=True)
@click.option(
    "--pos-weight",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Weight of a used expert in the loss; probabilities stay probabilities.",
)
@click.option(
    "--reuse-weight",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    help="Weight of the second head's loss.",
)
@click.option("--max-tokens", type=POSITIVE, default=512, show_default=True, help="Of a sequence.")
@click.option("--d-model", type=POSITIVE, default=32, show_default=True)
@click.option("--d-ff", type=POSITIVE, default=2048, show_default=True)
@click.option("--heads", type=POSITIVE, default=8, show_default=True)
@click.option("--d-kv", type=POSITIVE, default=16, show_default=True, help="Width of a head.")
@click.option("--blocks", type=POSITIVE, default=6, show_default=True, help="Of each stack.")
@click.option(
    "--tail",
    type=click.IntRange(min=0),
    default=16,
    show_default=True,
    help="Tokens of the prompt that the decoder reads, too.",
)
@click.option(
    "--vocabulary", type=POSITIVE, help="Token ids of the model; default from the traces."
)
@click.option(
    "--dtype",
    type=click.Choice(["float16", "bfloat16", "float32"]),
    default="float16",
    show_default=True,
    help="Of the weights in the file.",
)
@click.option("--device", type=DEVICES, default="auto", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--resume", type=FILE, help="Go on from this OUT.checkpoint.")
@click.option("--restart", is_flag=True, help="Replace the file, drop an unfinished training.")
def train(**options: Any) -> None:
    """Train a predictor on traces with token ids.

    An interrupted training leaves OUT.checkpoint, from which --resume goes on.
    """
    check_out(options["out"], options["resume"], options["restart"])
    require_torch()

    from runtime.load import pick_device
    from runtime.predictor.data import joined, read_corpus
    from runtime.predictor.training import Trainer

    corpus = joined([read_corpus(path) for path in options["traces"]])
    spec, settings = _spec(options, corpus), _settings(options)
    trainer = Trainer(spec, settings, corpus, pick_device(options["device"]))
    if options["resume"] is not None:
        trainer.resume(options["resume"])
    start = time.monotonic()
    _run(trainer, options["out"])
    _finish(trainer, corpus, options, time.monotonic() - start)


def check_out(out: Path, resume: Path | None, restart: bool) -> None:
    """Refuse to lose a predictor or an unfinished training, before anything is read."""
    unfinished = checkpoint_of(out)
    if out.suffix != ".safetensors":
        raise InputError(f"--out {out}: expected a name that ends in .safetensors")
    if not out.resolve().parent.is_dir():
        raise InputError(f"--out {out}: no folder {out.parent}, expected one to write to")
    if resume is not None and not resume.is_file():
        raise InputError(f"--resume {resume}: no such file, expected one named {unfinished.name}")
    if restart or resume is not None:
        return
    if out.exists():
        raise InputError(f"--out {out}: exists, expected a new file; --restart replaces it")
    if unfinished.exists():
        raise InputError(
            f"{unfinished}: left by an interrupted training; --resume {unfinished} goes on, "
            "--restart drops it"
        )


def _spec(options: dict[str, Any], corpus: Corpus) -> PredictorSpec:
    from runtime.predictor.data import rounded_vocabulary
    from runtime.predictor.spec import PredictorSpec

    vocabulary = options["vocabulary"] or corpus.vocabulary or rounded_vocabulary(corpus.highest)
    corpus.check_vocabulary(vocabulary)
    model = corpus.model
    sizes = {name: options[name] for name in ("d_model", "d_ff", "heads", "d_kv", "blocks", "tail")}
    return PredictorSpec(model.name, model.layers, model.experts, model.top_k, vocabulary, **sizes)


def _settings(options: dict[str, Any]) -> TrainSettings:
    from runtime.predictor.training import TrainSettings

    names = ("steps", "epochs", "batch", "lr", "dropout", "pos_weight", "max_tokens", "seed")
    return TrainSettings(again=options["reuse_weight"], **{name: options[name] for name in names})


def _run(trainer: Trainer, out: Path) -> None:
    """Train; an interrupt writes the checkpoint and leaves as interrupts do."""
    unfinished, due = checkpoint_of(out), [time.monotonic() + KEEP_S]

    def keep() -> None:
        if time.monotonic() > due[0]:
            trainer.save(unfinished)
            due[0] = time.monotonic() + KEEP_S

    with stoppable() as stop, progress_bar("train", trainer.total) as advance:
        done = trainer.run(advance, stop, keep)
    if not done:
        trainer.save(unfinished)
        click.echo(
            f"stopped after step {trainer.step} of {trainer.total}; go on with "
            f"--resume {unfinished}",
            err=True,
        )
        raise KeyboardInterrupt


def _finish(trainer: Trainer, corpus: Corpus, options: dict[str, Any], seconds: float) -> None:
    """Write the predictor, drop the checkpoint, say what came out."""
    import dataclasses

    from runtime.predictor.files import save_predictor, stored_bytes

    out, dtype = options["out"], options["dtype"]
    now, again = trainer.losses
    facts = {
        "traces": [path.name for path in options["traces"]],
        "sequences": len(corpus.sequences),
        "tokens": corpus.tokens,
        "data": corpus.fingerprint(),
        "steps": trainer.step,
        "loss": round(now, 4),
        "reuse_loss": round(again, 4),
        "device": trainer.device.type,
        "settings": dataclasses.asdict(trainer.settings),
    }
    save_predictor(out, trainer.model, facts, dtype)
    checkpoint_of(out).unlink(missing_ok=True)
    click.echo(
        f"{out}: {stored_bytes(trainer.model, dtype) / 1e6:.2f} MB of weights for "
        f"{corpus.model.name}, {trainer.step} steps on {corpus.tokens} tokens of "
        f"{len(corpus.sequences)} sequences in {seconds:.0f} s, loss {now:.3f}, reuse {again:.3f}"
    )


@predictor.command()
@click.option("--predictor", "file", type=FILE, required=True, help="What train wrote.")
@click.option("--trace", type=FILE, required=True, help="A trace that it was not trained on.")
@click.option(
    "--train", "train_traces", type=FILE, multiple=True, help="Teaches the token table; repeatable."
)
@click.option(
    "--batch", "batches", type=POSITIVE, multiple=True, help="Of batch recall. [default: 1, 4, 16]"
)
@click.option("--by-layer", is_flag=True, help="Print each layer's recall, too.")
@click.option("--device", type=DEVICES, default="auto", show_default=True)
@click.option("--json", "json_target", metavar="FILE|-", help="Write all figures as JSON.")
def evaluate(**options: Any) -> None:
    """Judge a predictor on a trace, beside simpler knowledge."""
    require_torch()

    from runtime.load import pick_device
    from runtime.predictor import evaluating
    from runtime.predictor.data import joined, read_corpus
    from runtime.predictor.files import load_predictor
    from runtime.predictor.table import table

    judged = load_predictor(options["file"], pick_device(options["device"]))
    corpus = read_corpus(options["trace"], ("token", "ahead_1"))
    known = [read_corpus(path) for path in options["train_traces"]]
    widths = evaluating.widths_of(judged.spec.top_k, judged.spec.experts)
    measures = evaluating.Measures(widths, options["batches"] or evaluating.Measures(()).batches)
    with progress_bar("evaluate", 2 * len(corpus.sequences)) as advance:
        train = joined(known) if known else None
        found = evaluating.evaluate(judged, corpus, train, measures, advance)
    text = json.dumps(found, indent=1) + "\n"
    target = options["json_target"]
    if target == "-":
        click.echo(text, nl=False)
        return
    if target is not None:
        _write(Path(target), text)
    click.echo(table(found, by_layer=options["by_layer"]))


def _write(path: Path, text: str) -> None:
    from traces.writing import replacing

    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


@predictor.command()
@click.option("--predictor", "file", type=FILE, required=True, help="What train wrote.")
@click.option("--trace", type=FILE, required=True, help="The trace that will be run.")
@click.option("--out", type=FILE, required=True, help="The forecasts: a .npz file.")
@click.option("--top", type=POSITIVE, help="Experts of each token and layer. [default: 2 x top-k]")
@click.option(
    "--windows",
    default="all",
    show_default=True,
    help="Spans of reuse to keep, as in 1,8; or none.",
)
@click.option("--device", type=DEVICES, default="auto", show_default=True)
def forecast(**options: Any) -> None:
    """Write the forecasts of a trace for --forecaster routing-path:FILE."""
    out: Path = options["out"]
    if out.suffix != ".npz":
        raise InputError(f"--out {out}: expected a name that ends in .npz")
    require_torch()

    from runtime.load import pick_device
    from runtime.predictor.data import read_corpus
    from runtime.predictor.files import load_predictor
    from runtime.predictor.forecasting import forecast as run

    made_by = load_predictor(options["file"], pick_device(options["device"]))
    corpus = read_corpus(options["trace"])
    windows = _windows(options["windows"], made_by.spec.windows)
    width = options["top"] or min(2 * made_by.spec.top_k, made_by.spec.experts)
    with progress_bar("forecast", len(corpus.sequences)) as advance:
        run(made_by, corpus, out, width, windows, advance)
    click.echo(
        f"{out}: {width} experts a layer for {corpus.tokens} tokens of {len(corpus.sequences)} "
        f"sequences, {out.stat().st_size / 2**20:.2f} MiB; use --forecaster routing-path:{out}"
    )


def _windows(text: str, known: tuple[int, ...]) -> tuple[int, ...]:
    """The spans that *text* names."""
    if text in ("all", "none"):
        return known if text == "all" else ()
    try:
        found = tuple(int(word) for word in text.split(","))
    except ValueError:
        found = ()
    if not found or list(found) != sorted(set(found)):
        raise InputError(f"--windows {text}: expected all, none or rising numbers as in 1,8")
    return found
