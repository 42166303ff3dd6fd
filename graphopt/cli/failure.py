"""From any exception to one clear message and a stable exit code."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

import typer

from graphopt.errors import Exit, GraphoptError


class Terminated(BaseException):
    """A signal asked us to end. Raised in the main thread, so that temporary folders are removed on the way out."""

    def __init__(self, number: int) -> None:
        self.number = number


# The signal that came. Python code called from C++, a weak reference's callback or a finalizer may swallow what the
# handler raises, so an alarm raises it again until it is on its way out, and steps ask as well.
_pending: list[int] = []
_AGAIN = 0.2  # seconds


def check_signals() -> None:
    """Raises Terminated where a signal came and was swallowed."""
    if _pending:
        raise Terminated(_pending[0])


def guarded(arguments: list[str], invoke: Callable[[list[str]], None]) -> int:
    """Call `invoke` and turn whatever it raises into an exit code, with one message on standard error.

    With --json among the arguments, the error stands on standard output as well, as {"error": {...}}.
    """
    as_json, debug = "--json" in arguments, "--debug" in arguments
    try:
        with _signals(), _verbosity(debug):
            invoke(arguments)
            sys.stdout.flush()
        return Exit.DONE
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(signal.SIGINT)
    except Terminated as error:
        return _interrupted(error.number)
    except BrokenPipeError:
        # Whoever read our output has gone, as in `graphopt inspect m | head`; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except BaseException as error:
        if debug:
            traceback.print_exc()
        # What C++ made of the signal is not its own fault.
        return _interrupted(_pending[0]) if _pending else _report(error, as_json)


def _report(error: BaseException, as_json: bool) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else Exit.INTERNAL
    code, message, hint, status = describe(error)
    with contextlib.suppress(OSError):
        print(f"error[{code}]: {message}" + (f"\n  hint: {hint}" if hint else ""), file=sys.stderr, flush=True)
    if as_json:
        with contextlib.suppress(OSError):
            print(json.dumps({"error": {"code": code, "message": message, "hint": hint}}, sort_keys=True), flush=True)
    return status


def describe(error: BaseException) -> tuple[str, str, str, int]:
    """Code, message, hint and exit code for an exception."""
    if isinstance(error, GraphoptError):
        return error.code, str(error.args[0]), error.way_out, error.exit
    if isinstance(error, typer.TyperException):
        text = error.format_message().strip()
        first, _, rest = text.partition("\n")
        if first.startswith("Usage:"):  # no arguments at all: the help is the answer
            return "usage", "a verb is needed", text, Exit.BAD_INPUT
        return "usage", f"{first}{' ' + rest.strip() if rest else ''}", "see --help", Exit.BAD_INPUT
    if isinstance(error, OSError):
        reason = error.strerror or str(error) or type(error).__name__
        where = f"{error.filename}: " if error.filename else ""
        return "io-failed", f"{where}{reason}", "", Exit.IO_FAILED
    if isinstance(error, MemoryError):
        return "out-of-memory", "this machine's memory does not suffice", "", Exit.IO_FAILED
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0][:300] if lines else "no message"
    return "internal", f"{type(error).__name__}: {first}", "run with --debug for the traceback", Exit.INTERNAL


def _interrupted(number: int) -> int:
    with contextlib.suppress(OSError):
        print("interrupted; nothing was written", file=sys.stderr, flush=True)
    return 128 + number


@contextlib.contextmanager
def _verbosity(debug: bool) -> Iterator[None]:
    """With --debug, what is usually kept quiet, such as torch's own logs, is shown."""
    logger = logging.getLogger("graphopt")
    before = logger.level
    if debug:
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    def end(number: int, _frame: FrameType | None) -> None:
        # A second signal must not cut the cleaning up short.
        signal.signal(number, signal.SIG_IGN)
        _pending.append(number)
        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)
        raise Terminated(number)

    def again(_number: int, _frame: FrameType | None) -> None:
        if sys.exception() is None:  # else something is on its way out, perhaps cleaning up
            raise Terminated(_pending[0])

    _pending.clear()
    alarm = signal.getsignal(signal.SIGALRM)
    try:
        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    except ValueError:  # not in the main thread, as when a program calls `execute` from one of its own
        yield
        return
    try:
        yield
    finally:
        if _pending:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
        for number, handler in before.items():
            signal.signal(number, handler)
