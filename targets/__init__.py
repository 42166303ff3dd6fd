"""Targets: what devices are, how to link for them, and how to run on them.

`resolve("arm:cortex-a76")` finds a target. Each family is one module, named here, with a table `TARGETS` from what
follows the colon to a function that makes the `Target`, and a table `WARNINGS` from spec to what the user should know.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from graphopt.errors import ToolMissing, UnknownTarget
from graphopt.targets.runner import RUNNERS, Interface, Runner, open_named, runners_of, why_not
from graphopt.targets.target import Kind, Target
from graphopt.targets.zig import zig_installed

__all__ = [
    "FAMILIES",
    "Availability",
    "Interface",
    "Runner",
    "Target",
    "availability",
    "missing_for",
    "names",
    "open_runner",
    "resolve",
    "runners_of",
    "warning",
]

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


# Running and what it takes ------------------------------------------------------------------------------------------


def open_runner(
    folder: str | Path, model: Any, target: Target | None = None, *, threads: int = 0, runner: str | None = None
) -> Runner:
    """Open what runs the files that `toolchain.link` wrote to `folder`.

    Args:
        folder: a bundle, or where the artefact was linked.
        model: a Manifest or an Artefact: what has `name`, `inputs`, `outputs` and `workspace_bytes`.
        target: what it was built for; a Manifest knows.
        threads: how many a run may use, where the target has threads; 0 is one per processor.
        runner: one of `runners_of(target)`; the first of them where None.

    Raises:
        UnknownTarget: a manifest names a target that this version does not have.
        ToolMissing: nothing here can run the target; the hint says what to install.
        RunFailed: it cannot be loaded.
    """
    target = target or _built_for(model.target)
    if runner is None:
        possible = runners_of(target)
        runner = possible[0] if possible else RUNNERS[target.kind][-1]
    if reason := why_not(runner, target):
        raise ToolMissing(tool=runner, purpose=f"run {target} here", install=reason)
    return open_named(runner, Path(folder), model, target, threads)


def _built_for(described: Mapping[str, str]) -> Target:
    return resolve(described["spec"])


# Kind of target to what building for it takes: modules, each with the pip package that has it.
_BUILDING: dict[Kind, tuple[tuple[str, str], ...]] = {
    "cpu": (),
    "arm": (),
    "wasm": (),
    "cuda": (("nvidia.cu13", "'graphopt[cuda]'"),),
}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def missing_for(target: Target, *, run: bool) -> list[str]:
    """What has to be installed to build for `target`, and with `run` to run it here; empty where nothing has."""
    needed = (("tvm", "apache-tvm"), *_BUILDING[target.kind])
    missing = [f"pip install {package}" for module, package in needed if not _installed(module)]
    if not zig_installed():
        missing.append("pip install ziglang")
    if run and not runners_of(target):
        missing += [reason for name in RUNNERS[target.kind] if (reason := why_not(name, target)) not in missing][-1:]
    return missing


@dataclass(frozen=True)
class Availability:
    """One row of `graphopt targets`."""

    spec: str
    about: str  # the vector unit and where the facts come from
    builds: bool  # can be built for here
    runners: tuple[str, ...]  # what can run it here
    missing: tuple[str, ...]  # how to get what is not there


def availability() -> list[Availability]:
    """What can be built and run here, and what is missing for the rest: one row for each target, family by family."""
    rows = []
    for spec in names():
        try:
            target = resolve(spec)
        except UnknownTarget as error:  # `cpu` on a machine that is none of the known ones
            rows.append(Availability(spec, error.args[0], False, (), ()))
            continue
        to_build, to_run = missing_for(target, run=False), missing_for(target, run=True)
        about = f"{target.isa.name}, {target.isa.vector_bits} bits" if target.kind != "cuda" else target.arch
        rows.append(Availability(spec, about, not to_build, runners_of(target), tuple(to_run)))
    return rows
