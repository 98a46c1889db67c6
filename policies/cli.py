"""The command ``policies``: what can be run, and with which parameters."""

from __future__ import annotations

import json
from typing import Any

import click

from policies.registry import FORECASTERS, POLICIES, SCHEDULERS, Registry, parameters


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def policies(as_json: bool) -> None:
    """List policies, forecasters and schedulers with their parameters."""
    found = {
        "policies": _described(POLICIES),
        "forecasters": _described(FORECASTERS),
        "schedulers": _described(SCHEDULERS),
    }
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    for kind, plugins in found.items():
        click.secho(kind, bold=True)
        for plugin in plugins:
            click.echo(_paragraph(plugin))
        click.echo()
    click.echo("Yours: --policy path/to/file.py:Class, with parameters as in lfu or mixed:t1=0.5.")


def _described(registry: Registry[Any]) -> list[dict[str, Any]]:
    return [_describe(name, cls) for name, cls in registry.classes().items()]


def _describe(name: str, cls: type[Any]) -> dict[str, Any]:
    traits = []
    if not getattr(cls, "exact", True):
        traits.append("changes the output")
    if getattr(cls, "offline", False):
        traits.append("needs the future")
    if getattr(cls, "forecasts", False):
        traits.append("takes a forecaster")
    traits += [f"needs {need}" for need in getattr(cls, "needs", ()) if need != "popularity"]
    return {
        "name": name,
        "summary": (cls.__doc__ or "").strip().splitlines()[0],
        "traits": traits,
        "parameters": {
            key: {"default": field.default, **field.metadata}
            for key, field in parameters(cls).items()
        },
    }


def _paragraph(plugin: dict[str, Any]) -> str:
    traits = f" ({', '.join(plugin['traits'])})" if plugin["traits"] else ""
    lines = [f"  {plugin['name']:<14} {plugin['summary']}{traits}"]
    for key, about in plugin["parameters"].items():
        low, high = about.get("low"), about.get("high")
        bounds = f", {low} to {'any' if high is None else high}" if low is not None else ""
        lines.append(f"      {key}={about['default']}  {about.get('help', '')}{bounds}")
    return "\n".join(lines)
