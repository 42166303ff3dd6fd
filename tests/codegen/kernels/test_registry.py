"""Every kernel family that is registered has a file that says what it computes, a class of it, and tests."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from graphopt.codegen.kernels import TEMPLATES, templates
from graphopt.codegen.kernels.template import Template

TESTS = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))


@pytest.mark.parametrize("file", TEMPLATES)
def test_file_class_and_tests(file):
    """Names agree, the docstrings are there, and some test here imports the file."""
    module = import_module(f"graphopt.codegen.kernels.{file}")
    template = getattr(module, TEMPLATES[file])
    assert issubclass(template, Template)
    assert template.name.replace("-", "_") == file
    assert module.__doc__
    assert template.__doc__
    assert template.anchors
    assert all(anchor.startswith("relax.") for anchor in template.anchors)
    assert re.search(rf"graphopt\.codegen\.kernels(\.{file} import| import .*\b{file}\b)", TESTS)


def test_every_template_is_registered():
    """No class of a family is forgotten in the table."""
    folder = Path(import_module("graphopt.codegen.kernels").__path__[0])
    for path in folder.glob("*.py"):
        if re.search(r"^class \w+\(Template\)", path.read_text(), re.M):
            assert path.stem in TEMPLATES
    assert len(templates()) == len(TEMPLATES)
