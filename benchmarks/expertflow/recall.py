"""How much of what is taken a predictor names: the paper's batch recall, beside simpler knowledge.

The predictors that ship, on the sample traces, whose texts neither they nor the models have seen.
Decoded tokens only. The token table is counted on other texts where they are given (*taught*);
else, for each half of the sample, on the other half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.expertflow.recall_rows import Row
from runtime.predictor import baselines
from runtime.predictor.data import Corpus, read_corpus
from runtime.predictor.evaluating import KNOWN, Evaluation, Measures, widths_of
from runtime.predictor.files import load_predictor
from runtime.predictor.scores import BatchRecall, groups

BATCHES = (1, 4, 16)


def rows(
    trace: str | Path, predictor: str | Path, taught: str | Path | None = None, device: str = "cpu"
) -> list[Row]:
    """The predictor and everything beside it, on decoded tokens of *trace*."""
    judged = load_predictor(Path(predictor), device)
    corpus = read_corpus(Path(trace), ("token", "ahead_1"))
    widths = widths_of(judged.spec.top_k, judged.spec.experts)
    measures = Measures(widths, BATCHES)
    evaluation = Evaluation(judged, corpus, measures)
    evaluation.predict(lambda _: None)
    table = "counted on other texts" if taught else "counted on the other half of the sample"
    evaluation.compare(read_corpus(Path(taught)) if taught else None, lambda _: None)
    if not taught:
        evaluation.ranks["token-table"] = crossed(corpus, widths[-1])
    found = evaluation.result()["methods"]
    tokens = sum(len(s) - s.prefill for s in corpus.sequences)
    return [
        Row(
            trace=Path(trace).stem,
            method=name,
            known=KNOWN[name],
            batch={b: v["recall"] for b, v in figures["decode"]["batch_recall"].items() if v},
            wider=_wider(evaluation, corpus, name, widths),
            by_layer=figures["decode"]["recall_by_layer"],
            domains={
                domain: part["batch_recall"]["1"]["recall"]
                for domain, part in figures["decode"].get("domains", {}).items()
            },
            tokens=tokens,
            table=table if name == "token-table" else "",
        )
        for name, figures in found.items()
        if figures["decode"].get("batch_recall")
    ]


def crossed(corpus: Corpus, width: int) -> list[baselines.Ranks]:
    """What a token table says of each sequence, counted on the half that it is not in.

    Each domain's texts are dealt out to the halves in turn.
    """
    half = [0] * len(corpus.sequences)
    for _, members in [*groups(corpus.domains)] or [("", list(range(len(half))))]:
        for place, i in enumerate(members):
            half[i] = place % 2
    tables = [
        baselines.TokenTable(
            replace(
                corpus,
                sequences=tuple(
                    s for s, h in zip(corpus.sequences, half, strict=True) if h != side
                ),
            )
        )
        for side in (0, 1)
    ]
    return [
        tables[side].ranks(sequence, width)
        for sequence, side in zip(corpus.sequences, half, strict=True)
    ]


def _wider(
    evaluation: Evaluation, corpus: Corpus, name: str, widths: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Batch recall of the predictor when more than top-k are named; nothing for others."""
    if name != "routing-path":
        return {}
    spec, sequences = evaluation.predictor.spec, corpus.sequences
    found: dict[str, dict[str, float]] = {}
    for width in widths[1:]:
        for batch in BATCHES:
            together = BatchRecall(spec.layers, spec.experts, batch)
            together.add(
                [
                    ranks[s.prefill :, :, :width]
                    for ranks, s in zip(evaluation.ranks[name], sequences, strict=True)
                ],
                [s.experts[s.prefill :] for s in sequences],
            )
            recall: dict[str, Any] = together.result()
            if recall:
                found.setdefault(str(width), {})[str(batch)] = recall["recall"]
    return found
