"""Methods that reduce tokens in several ways, one behind the other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.passes.base import Combined
from graphopt.passes.tokens.base import TokenReduction
from graphopt.program import Program


@dataclass(frozen=True)
class TokenSequence(Combined):
    """Passes that are planned on the program as it comes, and run in order. Lossy; each leaves its own record."""

    tokens: str | None = None

    @abstractmethod
    def steps(self, program: Program) -> Sequence[TokenReduction]:
        """The passes for a program. Raises as they do."""

    def __call__(self, program: Program) -> Program:
        """The program after all steps, with their records."""
        for step in self.steps(program):
            program = step(program)
        return program
