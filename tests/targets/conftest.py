"""Artefacts that are linked once for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from graphopt.codegen.artefact import Artefact
from graphopt.targets import resolve
from graphopt.targets.toolchain import link
from tests.targets.artefacts import artefact

Linked = Callable[[str], tuple[Path, Artefact]]


@pytest.fixture(scope="session")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Linked:
    """The folder and the artefact of the hand-made model for a target."""
    known: dict[str, tuple[Path, Artefact]] = {}

    def get(spec: str) -> tuple[Path, Artefact]:
        if spec not in known:
            target = resolve(spec)
            made = artefact(target)
            folder = tmp_path_factory.mktemp("linked")
            link(made, target, "bundle", folder)
            known[spec] = folder, made
        return known[spec]

    return get
