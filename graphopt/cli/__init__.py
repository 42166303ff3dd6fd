"""The command line: `graphopt VERB ...`. Results go to standard output, everything else to standard error.

Nothing slow is imported before a verb needs it, so that --help answers at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import typer

from graphopt.cli.common import VERBS
from graphopt.cli.failure import guarded

EPILOG = (
    "Exit codes: 0 done, 1 a check failed, 2 bad input or usage, 3 target or tool unavailable, "
    "5 input/output failed, 70 internal error."
)


def make_app() -> typer.Typer:
    """The application with all its verbs."""
    app = typer.Typer(
        name="graphopt",
        help="Compile PyTorch models ahead of time into checked bundles for cpu, wasm, arm and cuda.",
        epilog=EPILOG,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_top)
    for verb in VERBS:
        module = importlib.import_module(f"graphopt.cli.{verb}")
        app.command(name=verb, epilog=EPILOG)(getattr(module, verb))
    return app


def _top(version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True)) -> None:
    """Compile PyTorch models ahead of time into checked bundles for cpu, wasm, arm and cuda."""


def execute(arguments: Sequence[str]) -> int:
    """Carry out a command line (without the program's name) and return its exit code; nothing is raised.

    It is not called `run`: that is a verb, whose module becomes an attribute of this package once it is imported.
    """
    return guarded(list(arguments), _invoke)


def _invoke(arguments: list[str]) -> None:
    if arguments == ["--version"]:
        from graphopt import __version__

        typer.echo(f"graphopt {__version__}")
        return
    command = typer.main.get_command(make_app())
    with command.make_context("graphopt", arguments) as context:
        command.invoke(context)


def main() -> None:
    """The entry point of the `graphopt` script."""
    sys.exit(execute(sys.argv[1:]))
