"""The user's own modules: what --import and --model name, and where the classes in a model file come from."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import (
    BadModelFactory,
    ClassMissing,
    GraphoptError,
    ImportFailed,
    ModuleMissing,
    UnregisteredClass,
)

if TYPE_CHECKING:
    from torch import nn

_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_NO_ATTRIBUTE = re.compile(r"Can't get attribute '(?P<name>[^']+)' on <module '(?P<module>[^']+)'")


def see_working_directory() -> None:
    """Let modules be found in the working directory first, as `python -m` does and the `graphopt` script does not."""
    with contextlib.suppress(OSError):  # it may have been removed
        here = os.getcwd()
        if here not in sys.path and "" not in sys.path:
            sys.path.insert(0, here)


def import_modules(names: Iterable[str]) -> None:
    """Import modules for what that does besides, such as telling PyTorch of classes.

    Raises:
        ModuleMissing: there is no such module, or it needs one that is not there.
        ImportFailed: its code raised something.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise module_missing(f"--import {name}", error) from error
        except Exception as error:  # foreign code: anything may come out
            raise ImportFailed(module=name, reason=f"{type(error).__name__}: {error}") from error


def names_function(text: str) -> bool:
    """Whether a text is of the form package.module:function."""
    return _FUNCTION.fullmatch(text) is not None


def build(factory: str) -> nn.Module:
    """The module that "package.module:function" builds.

    Raises:
        ModuleMissing: there is no such module, or it needs one that is not there.
        BadModelFactory: there is no such function, or it gives something else.
    """
    from torch import nn

    def refuse(reason: str) -> BadModelFactory:
        return BadModelFactory(factory=factory, reason=reason)

    module = call(factory, f"--model {factory}", refuse)
    if not isinstance(module, nn.Module):
        raise refuse(f"gave a {type(module).__name__}, not an nn.Module")
    return module


def call(text: str, what: str, refuse: Callable[[str], GraphoptError]) -> Any:
    """What "package.module:function" returns, called without arguments.

    Args:
        text: names the function.
        what: needs it, for the error where the module is missing.
        refuse: makes the error for anything else.

    Raises:
        ModuleMissing: there is no such module, or it needs one that is not there.
        GraphoptError: what `refuse` made.
    """
    if not names_function(text):
        raise refuse("is not of the form package.module:function")
    module, _, function = text.partition(":")
    try:
        return getattr(importlib.import_module(module), function)()
    except ModuleNotFoundError as error:
        raise module_missing(what, error) from error
    except Exception as error:  # the user's own code runs here
        raise refuse(f"{type(error).__name__}: {error}") from error


def module_missing(what: object, error: ModuleNotFoundError) -> ModuleMissing:
    """The error for a module that `what` needs."""
    return ModuleMissing(what=what, module=error.name or error)


def check_unpickled(file: Path, error: Exception) -> None:
    """Raises ModuleMissing or ClassMissing where unpickling ended because the file's classes are not to be had here."""
    if isinstance(error, ModuleNotFoundError):
        raise module_missing(file, error) from error
    if found := _NO_ATTRIBUTE.search(str(error)):
        raise ClassMissing(file=file, name=found["name"], module=found["module"]) from error


def check_registered(file: Path, specs: Iterable[str]) -> None:
    """Raises UnregisteredClass where a saved tree of inputs or outputs (a TreeSpec as text) has a class in it that
    PyTorch cannot take apart: usually its module registers it when it is imported, and nobody did."""
    from torch.utils import _pytree as pytree

    for text in specs:
        try:
            names = list(_classes(json.loads(text)))
        except (ValueError, TypeError, KeyError, IndexError, RecursionError):
            continue  # damaged, and not for this reason
        for name in names:
            if name not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE:
                raise UnregisteredClass(file=file, name=name, way_out=_way_out(name))


def _classes(tree: Any) -> Iterator[str]:
    """The names of all classes in a saved TreeSpec: [version, {"type", "context", "children_spec"}]."""
    stack = [tree[1]]
    while stack:
        node = stack.pop()
        if node["type"] is not None:
            # A named tuple's class stands where the keys of others do.
            yield str(node["context"] if node["type"] == "collections.namedtuple" else node["type"])
        stack.extend(node["children_spec"])


def _way_out(name: str) -> str:
    # By convention modules begin with a small letter and classes with a capital one; nothing is imported to find out
    # which is which, since it is the file that says the name.
    parts = name.split(".")
    module = ".".join(parts[: next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)])
    if module in ("", "__main__"):
        return "put the class into a module that registers it when it is imported, export again, and --import that"
    if module in sys.modules:
        return (
            f"importing {module} does not register it: --import a module of yours that calls "
            "torch.utils._pytree.register_pytree_node for it, or export a model that takes and gives plain tensors"
        )
    return f"import the module that registers it first: --import {module}"
