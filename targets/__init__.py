"""Targets: what devices are, how to link for them, and how to run on them.

`resolve("arm:cortex-a76")` finds a target. Each family is one module, named here, with a table `TARGETS` from what
follows the colon to a function that makes the `Target`, and a table `WARNINGS` from spec to what the user should know.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from types import ModuleType

from graphopt.errors import UnknownTarget
from graphopt.targets.target import Target

# Family to what it is, in the order in which `graphopt targets` lists them; the module has the family's name.
FAMILIES = {
    "cpu": "x86-64 under Linux; `cpu` alone is this machine",
    "arm": "64-bit ARM under Linux",
    "wasm": "WebAssembly with SIMD: browsers, Node, wasmtime",
    "cuda": "NVIDIA GPUs, by compute capability",
}


def _module(family: str) -> ModuleType | None:
    try:
        return import_module(f"graphopt.targets.{family}")
    except ModuleNotFoundError as error:
        if error.name != f"graphopt.targets.{family}":
            raise
        return None


def names() -> list[str]:
    """Every target that `resolve` takes: `cpu`, `cpu:haswell`, ..."""
    return [
        f"{family}:{name}" if name else family
        for family in FAMILIES
        if (module := _module(family)) is not None
        for name in module.TARGETS
    ]


def resolve(spec: str) -> Target:
    """The target that the user names, as FAMILY or FAMILY:NAME.

    Raises:
        UnknownTarget: there is none; the message has the nearest name.
    """
    family, colon, name = spec.strip().lower().partition(":")
    module = _module(family) if family in FAMILIES else None
    make = module.TARGETS.get(name) if module is not None and bool(name) == bool(colon) else None
    if make is None:
        raise UnknownTarget(target=spec, near=_near(family, name))
    target = make()
    assert isinstance(target, Target), f"{spec}: not a target: {target!r}"
    return target


def warning(target: Target) -> str:
    """What the user of `target` should know, or nothing."""
    module = _module(target.spec.partition(":")[0])
    return "" if module is None else module.WARNINGS.get(target.spec, "")


def _near(family: str, name: str) -> str:
    known = names()
    # A bare processor name is a common slip: haswell for cpu:haswell.
    exact = [spec for spec in known if spec.partition(":")[2] == family]
    asked = f"{family}:{name}" if name else family
    near = exact or difflib.get_close_matches(asked.replace("_", "-"), known, n=1, cutoff=0.5)
    if not near and name and family in FAMILIES:
        near = difflib.get_close_matches(name, [k for k in known if k.startswith(f"{family}:")], n=1, cutoff=0.3)
    return f"; did you mean {near[0]}?" if near else ""
