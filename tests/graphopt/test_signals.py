"""Signals: a run ends with their exit code, wherever they come."""

from __future__ import annotations

import os
import signal
import time
import weakref
from pathlib import Path

import pytest

from graphopt.cli.failure import guarded


class Thing:
    pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_is_swallowed_comes_again() -> None:
    """What a weak reference's callback raises is ignored by Python; the run ends all the same."""

    def invoke(_: list[str]) -> None:
        thing = Thing()
        reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        del thing
        assert reference() is None
        time.sleep(20)

    begun = time.monotonic()
    assert guarded([], invoke) == 128 + signal.SIGTERM
    assert time.monotonic() - begun < 10
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_cleaning_up_is_not_cut_short(tmp_path: Path) -> None:
    """While something is on its way out the signal does not come again."""

    def invoke(_: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(20)
        finally:
            time.sleep(0.7)
            (tmp_path / "clean").touch()

    assert guarded([], invoke) == 128 + signal.SIGTERM
    assert (tmp_path / "clean").exists()


def test_what_others_make_of_it_is_no_fault_of_theirs() -> None:
    """C++ that turns it into an error of its own does not hide that the run was ended."""

    def invoke(_: list[str]) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise RuntimeError("internal") from error

    assert guarded([], invoke) == 128 + signal.SIGTERM
