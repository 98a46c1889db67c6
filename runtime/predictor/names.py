"""Forecasters that are a predictor's file: in the runtime it runs, elsewhere its forecasts do."""

from __future__ import annotations

from pathlib import Path

from policies.forecasters.routing_path import RoutingPath
from traces.errors import InputError

#: How the file of a predictor ends, as ``simctl predictor train`` wants it.
ENDING = ".safetensors"


def _items(text: str) -> list[tuple[str, str]]:
    """The parameters of a forecaster as it is asked for, none for other forecasters."""
    name, _, rest = text.partition(":")
    if name != RoutingPath.name:
        return []
    pairs = (item.partition("=") for item in rest.split(",") if item)
    return [
        (key.strip(), value.strip()) if equals else (RoutingPath.leading, key.strip())
        for key, equals, value in pairs
    ]


def is_live(forecaster: str | None) -> bool:
    """Whether *forecaster* (``routing-path:p.safetensors``) names a predictor, not forecasts."""
    items = dict(_items(forecaster or ""))
    return items.get(RoutingPath.leading, "").endswith(ENDING)


def check_runs_live(forecaster: str | None) -> None:
    """Raise :class:`InputError` where *forecaster* names forecasts, which no new text has."""
    file = dict(_items(forecaster or "")).get(RoutingPath.leading)
    if file and not file.endswith(ENDING):
        raise InputError(
            f"forecaster {RoutingPath.name!r}: {file}: forecasts are of a recorded trace, expected "
            f"a predictor ({ENDING}), which runs beside the model"
        )


def forecasts_beside(trace: Path) -> Path:
    """Where the forecasts of a recorded *trace* lie: ``x.forecast.npz`` for ``x.parquet``."""
    return trace.with_suffix(".forecast.npz")


def replayed(forecaster: str | None, trace: Path) -> str | None:
    """*forecaster* of a live run as the simulation of the *trace* that it recorded needs it.

    A predictor gives way to the forecasts that it made, with the same parameters; to none where
    there are none, because the run's policy takes no forecaster.
    """
    if not is_live(forecaster):
        return forecaster
    recorded = forecasts_beside(trace)
    if not recorded.is_file():
        return None
    items = dict(_items(forecaster or "")) | {RoutingPath.leading: str(recorded)}
    return f"{RoutingPath.name}:" + ",".join(f"{key}={value}" for key, value in items.items())
