"""graphopt targets: what can be built and run here, and what is missing for the rest."""

from __future__ import annotations

from graphopt.cli.common import Debug, Json, Output, Quiet, Verbose


def targets(json: Json = False, quiet: Quiet = False, verbose: Verbose = False, debug: Debug = False) -> None:
    """List the targets: what can be built and run here, and what is missing for the rest."""
