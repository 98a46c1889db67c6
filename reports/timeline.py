"""Timelines in Chrome's trace event format, for ui.perfetto.dev.

Each run is a process with the lanes host, GPU, H2D, D2H and CPU, and counters for the slots
in use and the queue; several runs lie under each other on one clock, each from its own 0.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from policies.recording import Recording, Span
from policies.result import Result
from reports.files import write_file
from reports.labels import budget_text, policy_label, sizes_note

#: Lanes from top to bottom; a lane that is not named here comes after these.
LANES = ("host", "GPU", "H2D", "D2H", "CPU")

Event = dict[str, Any]


def write_timeline(path: Path, recording: Recording, result: Result) -> None:
    """Write the timeline of one run to *path*, gzipped; :class:`InputError` if that fails."""
    where = "simulated" if result.world == "sim" else "measured"
    name = f"{policy_label(result)}, {budget_text(result)} of experts ({where})"
    write_timelines(path, {name: recording}, {name: result})


def write_timelines(
    path: Path, recordings: Mapping[str, Recording], results: Mapping[str, Result] | None = None
) -> None:
    """Write several runs under each other to *path*, gzipped, event by event."""
    head = json.dumps(_head(recordings, results or {}))

    def write(file: BinaryIO) -> None:
        # Neither a name nor a time in the header: the same runs give the same bytes.
        with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=file, mtime=0) as out:
            out.write(head[:-1].encode() + b', "traceEvents": [\n')
            for i, event in enumerate(events_of(recordings)):
                text = json.dumps(event, separators=(",", ":"))
                out.write(((",\n" if i else "") + text).encode())
            out.write(b"\n]}\n")

    write_file(path, write)


def timeline_of(
    recordings: Mapping[str, Recording], results: Mapping[str, Result] | None = None
) -> dict[str, Any]:
    """The whole timeline as one object: what :func:`write_timelines` writes."""
    return {**_head(recordings, results or {}), "traceEvents": list(events_of(recordings))}


def events_of(recordings: Mapping[str, Recording]) -> Iterator[Event]:
    """All events of *recordings*, one process each, in the order given."""
    for process, (name, recording) in enumerate(recordings.items(), start=1):
        lanes = _lanes(recording.spans)
        yield from _names(process, name, lanes)
        yield from _bars(process, recording.spans, lanes)
        yield from _counters(process, recording)


def _head(recordings: Mapping[str, Recording], results: Mapping[str, Result]) -> dict[str, Any]:
    runs = []
    for name, recording in recordings.items():
        run: dict[str, Any] = {"name": name, "spans": len(recording.spans)}
        run["dropped_spans"] = recording.dropped_spans
        if recording.dropped_spans:
            run["note"] = f"the last {recording.dropped_spans} spans of the run are left out"
        if name in results:
            run |= _about(results[name])
        runs.append(run)
    return {"displayTimeUnit": "ms", "otherData": {"producer": "simctl", "runs": runs}}


def _about(result: Result) -> dict[str, Any]:
    return {
        "trace": result.trace,
        "policy": result.policy["name"],
        "slots": result.slots,
        "batch": result.batch,
        "hardware": f"{result.hardware['name']} ({result.hardware['kind']})",
        "world": result.world,
        "sizes": sizes_note(result),
        "decisions_sha256": result.decisions_sha256,
    }


def _lanes(spans: Iterable[Span]) -> dict[str, int]:
    """Lane -> thread number: the known ones always, others after them by name."""
    others = sorted({span.lane for span in spans} - set(LANES))
    return {lane: number for number, lane in enumerate(chain(LANES, others), start=1)}


def _names(process: int, name: str, lanes: Mapping[str, int]) -> Iterator[Event]:
    yield _about_process(process, 0, "process_name", {"name": name})
    yield _about_process(process, 0, "process_sort_index", {"sort_index": process})
    for lane, thread in lanes.items():
        yield _about_process(process, thread, "thread_name", {"name": lane})
        yield _about_process(process, thread, "thread_sort_index", {"sort_index": thread})


def _about_process(process: int, thread: int, what: str, values: dict[str, Any]) -> Event:
    return {"ph": "M", "pid": process, "tid": thread, "name": what, "args": values}


def _bars(process: int, spans: Iterable[Span], lanes: Mapping[str, int]) -> Iterator[Event]:
    """Bars lane by lane, each lane in the order of time."""
    for span in sorted(spans, key=lambda span: (lanes[span.lane], span.start_s, span.end_s)):
        start, end = _nanoseconds(span.start_s), _nanoseconds(span.end_s)
        yield {
            "ph": "X",
            "pid": process,
            "tid": lanes[span.lane],
            "name": span.name,
            "cat": span.name.split(" ", 1)[0],
            "ts": start / 1000,
            "dur": (end - start) / 1000,
        }


def _counters(process: int, recording: Recording) -> Iterator[Event]:
    """Samples at which a counter changes, no later than the last bar if bars are left out."""
    last = float("inf")
    if recording.dropped_spans:
        last = max((span.end_s for span in recording.spans), default=0.0)
    for name, unit, samples in (
        ("slots", "used", recording.slots_used),
        ("queue", "moves", recording.queue),
    ):
        before = None
        for at, value in samples:
            if value == before or at > last:
                continue
            before = value
            yield {
                "ph": "C",
                "pid": process,
                "name": name,
                "ts": _nanoseconds(at) / 1000,
                "args": {unit: int(value)},
            }


def _nanoseconds(seconds: float) -> int:
    """Whole nanoseconds: bars that touch still do after rounding."""
    return round(seconds * 1e9)
