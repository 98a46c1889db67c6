"""A predictor judged on a trace it has not seen, beside simpler knowledge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.predictor import baselines
from runtime.predictor.baselines import Ranks, padded
from runtime.predictor.data import Corpus
from runtime.predictor.files import StoredPredictor
from runtime.predictor.forecasting import check_fits
from runtime.predictor.inference import Scored, ranked, score
from runtime.predictor.scores import (
    BatchRecall,
    Calibration,
    Recall,
    WindowRecall,
    groups,
    hot,
    used_within,
)
from traces.trace import TokenSequence

PHASES = ("prompt", "decode")

#: When each method knows what it says of a layer: what a comparison must not mix.
KNOWN = {
    "routing-path": "before the step",
    "previous": "before the step",
    "token-table": "before the step",
    "markov": "before the step",
    "markov-1": "one layer ahead",
    "ahead-1": "one layer ahead",
}


@dataclass(frozen=True)
class Measures:
    """At how many experts and in which batches forecasts are judged."""

    widths: tuple[int, ...]
    batches: tuple[int, ...] = (1, 4, 16)


def widths_of(top_k: int, experts: int) -> tuple[int, ...]:
    """1, 1.5 and 2 times *top_k*, as ExpertFlow's code evaluates; at most all experts."""
    wanted = (top_k, -(-3 * top_k // 2), 2 * top_k)
    return tuple(sorted({min(width, experts) for width in wanted}))


class _Reuse:
    """The second head in one phase, by window: its recall, its calibration, and an LRU's recall."""

    def __init__(self, windows: Sequence[int], experts: int) -> None:
        self._windows, self._experts = windows, experts
        self._head = [WindowRecall() for _ in windows]
        self._recent = [WindowRecall() for _ in windows]
        self._calibration = [Calibration() for _ in windows]

    def add(self, found: Scored, part: slice) -> None:
        """Take the tokens *part* of a sequence, whose next tokens may lie beyond it."""
        true = hot(found.sequence.experts, self._experts)
        recent = baselines.recency(found.sequence, self._experts)
        for i, window in enumerate(self._windows):
            used = used_within(true, window)[part]
            said = found.again[part, i][: len(used)]
            self._head[i].add(said, used)
            self._recent[i].add(recent[part][: len(used)], used)
            self._calibration[i].add(said, used)

    def result(self) -> dict[str, Any]:
        """Figures by window."""
        return {
            str(window): {
                "recall": self._head[i].result(),
                "recency_recall": self._recent[i].result(),
                "calibration_error": self._calibration[i].result().get("error"),
            }
            for i, window in enumerate(self._windows)
        }


class Evaluation:
    """Everything that is measured of one predictor on one trace."""

    def __init__(self, predictor: StoredPredictor, corpus: Corpus, measures: Measures) -> None:
        check_fits(predictor, corpus)
        self.predictor, self.corpus, self.measures = predictor, corpus, measures
        self.ranks: dict[str, list[Ranks]] = {}
        self._sides: dict[str, dict[str, Any]] = {}

    def predict(self, advance: Callable[[int], None]) -> None:
        """Ask the predictor about every sequence."""
        spec, width = self.predictor.spec, self.measures.widths[-1]
        calibration = {phase: Calibration() for phase in PHASES}
        reuse = {phase: _Reuse(spec.windows, spec.experts) for phase in PHASES}
        own = self.ranks["routing-path"] = []
        for found in score(self.predictor.model, self.corpus.sequences):
            true = hot(found.sequence.experts, spec.experts)
            own.append(ranked(found.now, width))
            for phase, part in _parts(found.sequence):
                calibration[phase].add(found.now[part], true[part])
                reuse[phase].add(found, part)
            advance(1)
        self._sides = {
            phase: {"calibration": calibration[phase].result(), "reuse": reuse[phase].result()}
            for phase in PHASES
        }

    def compare(self, train: Corpus | None, advance: Callable[[int], None]) -> None:
        """Ask the baselines: the token table wants *train*, ``ahead`` its columns in the trace."""
        width, sequences = self.measures.widths[-1], self.corpus.sequences
        self.ranks["previous"] = [padded(baselines.previous(s), width) for s in sequences]
        if train is not None:
            self.predictor.spec.check_model(train.model, train.name)
            train.check_vocabulary(self.predictor.spec.vocabulary)
            table = baselines.TokenTable(train)
            self.ranks["token-table"] = [table.ranks(s, width) for s in sequences]
        early, late = zip(*baselines.markov(self.corpus, width, advance), strict=True)
        self.ranks["markov"], self.ranks["markov-1"] = list(early), list(late)
        guesses = [baselines.ahead(s) for s in sequences]
        if all(guess is not None for guess in guesses):
            self.ranks["ahead-1"] = [padded(g, width) for g in guesses if g is not None]

    def result(self) -> dict[str, Any]:
        """All figures, as plain values."""
        spec, corpus = self.predictor.spec, self.corpus
        prompt = sum(sequence.prefill for sequence in corpus.sequences)
        return {
            "schema": "simctl.predictor/1",
            "predictor": {
                **self.predictor.about,
                "bytes": self.predictor.size_bytes,
                "spec": spec.to_dict(),
                "training": dict(self.predictor.training),
            },
            "trace": corpus.name,
            "tokens": {"prompt": prompt, "decode": corpus.tokens - prompt},
            "top_k": spec.top_k,
            "methods": {name: self._judged(name) for name in self.ranks},
            **self._sides,
        }

    def _judged(self, name: str) -> dict[str, Any]:
        """One method, in both phases, as a whole and by domain."""
        figures: dict[str, Any] = {"known": KNOWN[name]}
        everything = list(range(len(self.corpus.sequences)))
        for phase in PHASES:
            figures[phase] = self._measured(name, phase, everything)
            domains = {
                domain: self._measured(name, phase, members)
                for domain, members in groups(self.corpus.domains)
            }
            if domains:
                figures[phase]["domains"] = domains
        return figures

    def _measured(self, name: str, phase: str, members: Sequence[int]) -> dict[str, Any]:
        """One method on the *members* among the sequences."""
        spec, sequences = self.predictor.spec, self.corpus.sequences
        recall = Recall(spec.layers, spec.experts, self.measures.widths)
        ranks, truth = [], []
        for i in members:
            part = dict(_parts(sequences[i]))[phase]
            ranks.append(self.ranks[name][i][part])
            truth.append(sequences[i].experts[part])
            recall.add(ranks[-1], truth[-1])
        batches = {}
        for batch in self.measures.batches:
            together = BatchRecall(spec.layers, spec.experts, batch)
            together.add([r[..., : spec.top_k] for r in ranks], truth)
            batches[str(batch)] = together.result()
        return {**recall.result(), "batch_recall": batches}


def _parts(sequence: TokenSequence) -> list[tuple[str, slice]]:
    """The two phases of a sequence."""
    return [("prompt", slice(0, sequence.prefill)), ("decode", slice(sequence.prefill, None))]


def evaluate(
    predictor: StoredPredictor,
    corpus: Corpus,
    train: Corpus | None,
    measures: Measures,
    advance: Callable[[int], None] = lambda sequences: None,
) -> dict[str, Any]:
    """All figures of *predictor* on *corpus*; *advance* is told of each sequence, twice."""
    evaluation = Evaluation(predictor, corpus, measures)
    evaluation.predict(advance)
    evaluation.compare(train, advance)
    return evaluation.result()
