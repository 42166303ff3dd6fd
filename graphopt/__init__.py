"""Turns FLOPs reductions into wall-clock speed: a model goes in, a checked ahead-of-time bundle comes out.

    program = graphopt.capture(module, (x,))
    bundle = graphopt.compile(program, target="cpu", output="model.bundle")
    y = graphopt.load("model.bundle")(x)

The names below are imported when first used, so that `graphopt --help` need not wait for PyTorch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.annotate import annotate
    from graphopt.bundle import Bundle, load
    from graphopt.capture import capture
    from graphopt.optimize import optimize
    from graphopt.pipeline import compile
    from graphopt.program import Program
    from graphopt.shrink import shrink

__version__ = "0.1.0"

__all__ = ["Bundle", "Program", "__version__", "annotate", "capture", "compile", "load", "optimize", "shrink"]

_HOMES = {
    "Bundle": "graphopt.bundle",
    "Program": "graphopt.program",
    "annotate": "graphopt.annotate",
    "capture": "graphopt.capture",
    "compile": "graphopt.pipeline",
    "load": "graphopt.bundle",
    "optimize": "graphopt.optimize",
    "shrink": "graphopt.shrink",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the submodule graphopt.capture would put the module where the function of that name belongs.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
        value = getattr(import_module(_HOMES[name]), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
