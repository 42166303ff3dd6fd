"""Where a node comes from, in the user's names."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

from torch.fx import Node

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
# Frames of installed packages are not the user's own code, so they are named only where nothing else is.
_INSTALLED = tuple(sysconfig.get_paths()[key] for key in ("purelib", "platlib", "stdlib"))


def module_path(node: Node) -> str:
    """The path of the innermost module that made the node, such as `layer3.0.conv2`; "" for the root or if unknown."""
    stack = node.meta.get("nn_module_stack") or {}
    # A module that is called twice gets a path such as `conv@1` the second time.
    return re.sub(r"@\d+", "", list(stack.values())[-1][0]) if stack else ""


def source_line(node: Node) -> str:
    """`model.py:41`, the innermost line of the user's own code that made the node; "" if unknown."""
    found = _FRAME.findall(node.meta.get("stack_trace") or "")
    frames = [frame for frame in found if not frame[0].startswith("<")]  # <eval_with_key>: generated code
    own = [frame for frame in frames if not frame[0].startswith(_INSTALLED)]
    if not frames:
        return ""
    file, line = (own or frames)[-1]
    return f"{Path(file).name}:{line}"


def place(node: Node) -> str:
    """The node in the user's names: `layer3.0.conv2 (resnet.py:41)`; the node's own name where nothing is known."""
    path, line = module_path(node), source_line(node)
    if path and line:
        return f"{path} ({line})"
    return path or (f"{node.name} ({line})" if line else node.name)
