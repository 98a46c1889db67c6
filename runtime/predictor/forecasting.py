"""The forecasts of a trained predictor for a whole trace, into the file that a run replays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from policies.sidecar import quantised, trace_fingerprint, write_sidecar
from runtime.predictor.data import Corpus, ids_of
from runtime.predictor.files import StoredPredictor
from runtime.predictor.inference import Scored, ranked, score
from traces.errors import InputError
from traces.trace import TokenSequence


def check_fits(predictor: StoredPredictor, corpus: Corpus) -> None:
    """Raise :class:`InputError` unless *predictor* can forecast the routing in *corpus*."""
    predictor.spec.check_model(corpus.model, corpus.name)
    corpus.check_vocabulary(predictor.spec.vocabulary)


def check_windows(predictor: StoredPredictor, windows: Sequence[int]) -> None:
    """Raise :class:`InputError` unless *predictor* forecasts reuse over all of *windows*."""
    for window in windows:
        if window not in predictor.spec.windows:
            known = ", ".join(map(str, predictor.spec.windows))
            raise InputError(f"--windows {window}: expected any of {known}, as it was trained for")


def forecast(
    predictor: StoredPredictor,
    corpus: Corpus,
    out: Path,
    width: int,
    windows: Sequence[int],
    advance: Callable[[int], None] = lambda sequences: None,
) -> None:
    """Write the best *width* experts of each token and layer, and reuse over *windows*, to *out*.

    The forecast of a token depends on its own id and those before it (of a prompt, on all of the
    prompt), never on what the gates chose.
    """
    check_fits(predictor, corpus)
    check_windows(predictor, windows)
    if not 1 <= width <= predictor.spec.experts:
        raise InputError(f"--top {width}: expected 1 to {predictor.spec.experts} experts")
    chosen = [predictor.spec.windows.index(window) for window in windows]
    parts = []
    for found in score(predictor.model, corpus.sequences):
        parts.append(_packed(found, width, chosen))
        advance(1)
    names = ("tokens", "experts", "scores", "reuse")
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in names}
    header = header_of(predictor, corpus, windows)
    write_sidecar(out, header, arrays | index_of(corpus.sequences))


def index_of(sequences: Sequence[TokenSequence]) -> dict[str, Any]:
    """The arrays that say which rows belong to which of *sequences*."""
    counts = [len(sequence) for sequence in sequences]
    return {
        "sequences": np.array([s.id for s in sequences], np.int32),
        "starts": np.append(0, np.cumsum(counts)).astype(np.int64),
        "first_positions": np.array([s.positions[0] for s in sequences], np.int32),
    }


def header_of(predictor: StoredPredictor, corpus: Corpus, windows: Sequence[int]) -> dict[str, Any]:
    """What a file of forecasts says of its trace and its predictor."""
    model = corpus.model
    return {
        "model": {
            "name": model.name,
            "layers": model.layers,
            "experts": model.experts,
            "top_k": model.top_k,
        },
        "trace": {
            "name": Path(corpus.name).name,
            "fingerprint": trace_fingerprint(model, corpus.sequences),
        },
        "predictor": predictor.about,
        "windows": list(windows),
    }


def _packed(found: Scored, width: int, windows: Sequence[int]) -> dict[str, Any]:
    """The arrays of one sequence."""
    experts = ranked(found.now, width)
    scores = np.take_along_axis(found.now, experts.astype(np.intp), axis=-1)
    return {
        "tokens": ids_of(found.sequence).astype(np.int32),
        "experts": experts,
        "scores": quantised(scores),
        "reuse": quantised(found.again[:, list(windows)]),
    }
