"""The command line: a lazy click group, so that nothing heavy is imported before it is needed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import click

#: Command -> "module:attribute", imported when the command is asked for.
COMMANDS = {
    "run": "reports.cli:run",
    "compare": "reports.cli:compare",
    "report": "reports.cli:report",
    "trace": "traces.cli:trace",
    "predictor": "runtime.cli_predictor:predictor",
    "policies": "policies.cli:policies",
    "hardware": "sim.cli:hardware",
    "generate": "runtime.cli_generate:generate",
    "validate": "reports.cli_validate:validate",
    "calibrate": "runtime.cli_calibrate:calibrate",
    "doctor": "runtime.cli:doctor",
}

#: Commands that live in a group of a package that may not import their home.
SUBCOMMANDS = {"trace": {"capture": "runtime.cli:capture"}}

#: Our packages, and what only our own ``__init__`` says: wheels of the same name merge.
PACKAGES = {"traces": "ModelSpec", "policies": "", "sim": "", "runtime": "", "reports": ""}

HELP = {
    "run": "Simulate one policy on a trace.",
    "compare": "Several policies and budgets on one trace, with Belady and the bounds.",
    "report": "Results to one HTML page with figures.",
    "trace": "Inspect, import, capture, synthesise and split traces.",
    "predictor": "Train, judge and use a predictor of a model's routing.",
    "policies": "What policies and forecasters there are, with their parameters.",
    "hardware": "What hardware profiles and model sizes there are, with their sources.",
    "generate": "Write text with a model whose experts are offloaded.",
    "validate": "The same runs simulated and on the device, compared and judged.",
    "calibrate": "Measure this machine into a hardware profile.",
    "doctor": "What this machine can do.",
}


def _load(target: str) -> click.Command:
    module, attribute = target.split(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    return command


class LazyGroup(click.Group):
    """Imports a command's module when the command is used, not before."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        _refuse_shadowed_packages()
        command = _load(COMMANDS[cmd_name])
        if isinstance(command, click.Group):
            for name, target in SUBCOMMANDS.get(cmd_name, {}).items():
                command.add_command(_load(target), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, HELP[name]) for name in COMMANDS])


def _refuse_shadowed_packages() -> None:
    """PyPI has unrelated packages of our names: say so instead of a lost import."""
    home = Path(__file__).resolve().parent
    for package, mark in PACKAGES.items():
        ours = home / package / "__init__.py"
        spec = importlib.util.find_spec(package)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found == ours and mark in ours.read_text(encoding="utf-8"):
            continue
        how = f"was found at {found.parent}" if found else "was not found"
        raise click.ClickException(
            f"the package '{package}' {'was overwritten' if found == ours else how}, expected ours "
            f"at {ours.parent}: an unrelated '{package}' from PyPI is in the way; use a fresh "
            "virtual environment"
        )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="expertflow-lab", prog_name="simctl")
def cli() -> None:
    """Which expert-caching policy, with how much memory, on which hardware, is how fast?"""


def main(argv: list[str] | None = None) -> Any:
    """Entry point: bad input ends in one line and exit code 2, never in a traceback."""
    try:
        return cli.main(args=argv, prog_name="simctl", standalone_mode=False) or 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        click.echo("interrupted", err=True)
        return 130
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            _complain(error.format_message(), getattr(error, "ctx", None))
        return 2
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        return 130
    except Exception as error:
        if not _is_input_error(error):
            raise
        _complain(str(error))
        return 2


def _is_input_error(error: Exception) -> bool:
    """Whether *error* is an InputError or a kind of it, told without importing it."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(error).__mro__}
    return ("traces.errors", "InputError") in kinds


def _complain(text: str, ctx: click.Context | None = None) -> None:
    """One line on stderr, whatever *text* holds; *ctx* is the command that was misused."""
    command = ctx.command_path if ctx else "simctl"
    more = f" (see {command} --help)" if ctx else ""
    click.echo(f"{command}: {' '.join(text.splitlines())}{more}", err=True)


if __name__ == "__main__":
    sys.exit(main())
