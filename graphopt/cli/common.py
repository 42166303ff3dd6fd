"""What the verbs share: options, and where they write."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.failure import check_signals

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

VERBS = ("compile", "optimize", "run", "inspect", "bench", "passes", "explain", "targets")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A .pt2 file, or a .pt file with an exported program.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors, and what --json asks for.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Print each step as it begins.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.")]
UnsafeLoad = Annotated[
    bool, typer.Option("--unsafe-load", help="Unpickle a whole module. This runs code that the file brings along.")
]
Imports = Annotated[
    list[str] | None,
    typer.Option(
        "--import",
        metavar="MODULE",
        help="Import a Python module before the file is read, for classes that the model takes or gives. Repeatable.",
    ),
]
Factory = Annotated[
    str | None,
    typer.Option("--model", metavar="PACKAGE.MODULE:FACTORY", help="Builds the module that a state_dict belongs to."),
]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="NAME=1x3x224x224[:DTYPE]",
        help="An input's shape, where the file has no example inputs. Repeat for each input.",
    ),
]
Threads = Annotated[int, typer.Option("--threads", min=0, max=1024, help="Threads to run with; 0: all processors.")]


@dataclass
class Output:
    """Where a verb writes: its result to standard output, progress and notes to standard error."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False
    _status: Status | None = field(default=None, repr=False)

    @property
    def silent(self) -> bool:
        """Whether nobody sees the result."""
        return self.quiet and not self.as_json

    def result(self, data: dict[str, Any], human: Callable[[Console], None]) -> None:
        """Print `data` as JSON, or let `human` print it; with --quiet only the JSON."""
        if self.as_json:
            print(json.dumps(data, sort_keys=True, indent=1, allow_nan=False, default=str))
        elif not self.quiet:
            human(stdout())

    def step(self, text: str) -> None:
        """Say what is done now. Raises Terminated where a signal asked us to end."""
        check_signals()
        if self._status is not None:
            self._status.update(text)
        elif self.verbose and not self.quiet:
            print(f"graphopt: {text}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Say something worth knowing that is no error."""
        if not self.quiet:
            print(f"note: {text}", file=sys.stderr, flush=True)

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Show that work goes on: a spinner on a terminal, else a line per step with --verbose.

        Log records of graphopt become notes. Warnings of PyTorch about its own inner workings are left out: nobody who
        compiles a model can do anything about them.
        """
        handler = _Notes(self)
        logger = logging.getLogger("graphopt")
        logger.addHandler(handler)
        propagated, logger.propagate = logger.propagate, False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if self.verbose or self.quiet or not sys.stderr.isatty():
                    self.step(text)
                    yield
                else:
                    from rich.console import Console

                    with Console(stderr=True).status(text) as self._status:
                        yield
        finally:
            self._status = None
            logger.propagate = propagated
            logger.removeHandler(handler)


class _Notes(logging.Handler):
    def __init__(self, output: Output) -> None:
        super().__init__(logging.WARNING)
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        self._output.note(record.getMessage())


def stdout() -> Console:
    """Rich's console on standard output; wide where that is no terminal, so that nothing is cut off."""
    from rich.console import Console

    class Standard(Console):
        def on_broken_pipe(self) -> None:
            """Rich would end with 1, which says that a check failed; whoever runs the verb knows better."""
            raise BrokenPipeError

    return Standard(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)


def input_shapes(texts: list[str] | None) -> dict[str, Any]:
    """--input-shape texts by input name. Raises BadInputShape; BadOption where a name comes twice."""
    from graphopt.capture import parse_input_shape
    from graphopt.errors import BadOption

    shapes: dict[str, Any] = {}
    for text in texts or []:
        spec = parse_input_shape(text)
        if spec.name in shapes:
            raise BadOption(what=f"--input-shape {spec.name} is given twice", way_out="give each input one shape")
        shapes[spec.name] = spec
    return shapes


def user_code(imports: list[str] | None, *, needed: bool) -> None:
    """Import what --import names. Where that or another option needs modules of the user's, the working directory is
    searched for them; else nothing that lies there is run.

    Raises:
        ModuleMissing, ImportFailed: as `import_modules`.
    """
    from graphopt.user_code import import_modules, see_working_directory

    if imports or needed:
        see_working_directory()
    import_modules(imports or [])


def amount(value: float, unit: str = "") -> str:
    """1234567 -> "1.23 M" with `unit` behind; for people, never for JSON."""
    for prefix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()
