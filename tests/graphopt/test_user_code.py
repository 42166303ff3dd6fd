"""The user's own modules: found in the working directory where an option asks for one, named where they are missing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graphopt.errors import Exit, UnregisteredClass
from graphopt.user_code import check_registered

Cli = Callable[..., tuple[int, str, str]]

# The names must be no other test's: a module that was imported once is found again from anywhere.
MODELS = """
import torch

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)
    def forward(self, x):
        return self.linear(x)
"""
OUTPUTS = """
from dataclasses import dataclass
import torch

@dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor

torch.export.register_dataclass(Pair, serialized_type_name="outputs_of_theirs.Pair")

class Both(torch.nn.Module):
    def forward(self, x):
        return Pair(x + 1, x * 2)

def save(path):
    torch.export.save(torch.export.export(Both(), (torch.ones(2, 3),)), path)
"""
SHAPE = ("--input-shape", "x=1x4")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with modules; what was imported from it, and the path to it, are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    (tmp_path / "models_of_theirs.py").write_text(MODELS)
    (tmp_path / "outputs_of_theirs.py").write_text(OUTPUTS)
    yield tmp_path
    for name in ("models_of_theirs", "outputs_of_theirs"):
        sys.modules.pop(name, None)


def pickled(folder: Path) -> None:
    """tiny.pt with a whole module and weights.pt with its weights, written by another process."""
    code = (
        "import torch, models_of_theirs as m; torch.save(m.Tiny(), 'tiny.pt'); "
        "torch.save(m.Tiny().state_dict(), 'weights.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)


def test_modules_of_the_working_directory_are_found(cli: Cli, here: Path) -> None:
    """--model and --unsafe-load see them; without these options nothing in the folder is run."""
    pickled(here)
    code, _, err = cli("inspect", "weights.pt", *SHAPE)
    assert code == Exit.BAD_INPUT, err
    assert str(here) not in sys.path
    assert cli("inspect", "weights.pt", *SHAPE, "--model", "models_of_theirs:Tiny")[::2] == (0, "")
    sys.path.remove(str(here))
    del sys.modules["models_of_theirs"]
    assert cli("inspect", "tiny.pt", *SHAPE, "--unsafe-load")[::2] == (0, "")


def test_a_missing_module_is_named(cli: Cli, here: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever needs it; the hint says where it is looked for. The file is not called damaged."""
    pickled(here)
    (here / "models_of_theirs.py").rename(tmp_path_factory.mktemp("elsewhere") / "models_of_theirs.py")
    (here / "needs_more.py").write_text("import package_that_nobody_has\n")
    for arguments, module in (
        (("tiny.pt", "--unsafe-load"), "models_of_theirs"),
        (("weights.pt", "--model", "models_of_theirs:Tiny"), "models_of_theirs"),
        (("weights.pt", "--model", "needs_more:Tiny"), "package_that_nobody_has"),
        (("weights.pt", "--import", "models_of_theirs.parts"), "models_of_theirs"),
    ):
        code, _, err = cli("inspect", *arguments, *SHAPE)
        assert code == Exit.BAD_INPUT
        assert "error[module-not-found]" in err
        assert f"there is no Python module {module}\n" in err
        assert "PYTHONPATH" in err


def test_a_class_that_its_module_lacks_is_named(cli: Cli, here: Path) -> None:
    """As where a script pickled a class of its own, which is in __main__ there."""
    pickled(here)
    (here / "models_of_theirs.py").write_text("")
    code, _, err = cli("inspect", "tiny.pt", *SHAPE, "--unsafe-load")
    assert code == Exit.BAD_INPUT
    assert "error[class-not-found]: tiny.pt: holds an object of the class Tiny, and the module models_of_theirs" in err


def test_a_class_that_nobody_registered(cli: Cli, here: Path) -> None:
    """The file is not called damaged: the class is named, and the --import that the hint gives is the way out."""
    subprocess.run([sys.executable, "-c", "import outputs_of_theirs as o; o.save('both.pt2')"], cwd=here, check=True)
    code, _, err = cli("inspect", "both.pt2")
    assert code == Exit.BAD_INPUT
    assert "error[unregistered-class]: both.pt2: the model takes or gives outputs_of_theirs.Pair" in err
    assert err.endswith("--import outputs_of_theirs\n")
    for verb, *more in (("inspect",), ("compile", "--dry-run")):
        code, out, err = cli(verb, "both.pt2", *more, "--import", "outputs_of_theirs")
        assert (code, err) == (0, "")
        assert "x: float32[2,3]" in out


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("net.parts.Outer.Inner", "--import net.parts$"),
        ("torch.nn.Lost", "importing torch.nn does not register it"),
        ("__main__.Pair", "put the class into a module"),
        ("Pair", "put the class into a module"),
    ],
)
def test_the_way_out_for_a_class(name: str, words: str) -> None:
    """By the class's name: nothing is imported because a file says so. Named tuples are found as well."""
    leaf = '{"type": null, "context": null, "children_spec": []}'
    for kind, context in ((name, "[]"), ("collections.namedtuple", name)):
        tree = f'[1, {{"type": "builtins.tuple", "context": "null", "children_spec": [{leaf}, '
        tree += f'{{"type": "{kind}", "context": "{context}", "children_spec": [{leaf}]}}]}}]'
        with pytest.raises(UnregisteredClass, match=name) as caught:
            check_registered(Path("x.pt2"), ["no json", "[1]", tree])
        assert re.search(words, caught.value.way_out)


def test_the_hint_registers_the_classes_of_transformers() -> None:
    """`import transformers` alone would not; the module that the hint gives for BertModel's outputs does."""
    pytest.importorskip("transformers")
    name = "transformers.modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions"
    code = f"""
import transformers
from torch.utils import _pytree as pytree
from graphopt.user_code import _way_out, import_modules
assert {name!r} not in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
import_modules([_way_out({name!r}).split()[-1]])
assert {name!r} in pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
"""
    subprocess.run([sys.executable, "-c", code], check=True)
