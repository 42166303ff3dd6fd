"""The command line as a process: entered again, and with its output cut off."""

from __future__ import annotations

import inspect
import signal
import subprocess
import sys
from pathlib import Path

import graphopt


def test_main_may_be_called_again() -> None:
    """A program that uses the entry point itself, more than once."""
    probe = """
        import sys
        from graphopt.cli import main
        for line in ("--version", "targets -q", "--version"):
            sys.argv = ["graphopt", *line.split()]
            try:
                main()
            except SystemExit as end:
                print(end.code)
    """
    done = subprocess.run([sys.executable, "-c", inspect.cleandoc(probe)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["graphopt", graphopt.__version__, "0", "0", "graphopt", graphopt.__version__, "0"]


def test_output_that_nobody_reads(model_file: Path) -> None:
    """`graphopt inspect m | true` ends quietly, as a process does whose pipe breaks; not with 1: no check failed."""
    command = f"{sys.executable} -m graphopt.cli inspect {model_file} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 128 + signal.SIGPIPE)
