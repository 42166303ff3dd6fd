"""Capture: modules and files of every kind, good and bad."""

from __future__ import annotations

import io
import logging

import pytest
import torch
from torch import nn

from graphopt.capture import capture, parse_input_shape
from graphopt.errors import (
    BadInputShape,
    BadModelFactory,
    CaptureFailed,
    InputsNeeded,
    ScriptedModel,
    StateDictMismatch,
    StateDictNeedsModel,
    UnsafeModel,
    WrongInputs,
)
from graphopt.spec import TensorSpec
from tests.graphopt.small import Net, Words, X, write_files
from tests.programs import ops


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with one small model in every kind of file."""
    return write_files(tmp_path_factory.getbasetemp() / "files")


# Modules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [X, (X,), [X], {"x": X}])
def test_example_inputs_in_any_form(examples):
    """A tensor, a tuple, a list and a mapping by name all mean the same call."""
    program = capture(Net(), examples)
    assert [str(spec) for spec in program.inputs] == ["x: float32[2,3]"]
    assert torch.equal(program.example_inputs["x"], X)


def test_module_is_left_as_it_is():
    """Capture is in eval mode; the module's own modes, also mixed ones, are restored."""
    net = Net().train()
    net.head.eval()
    capture(net, X)
    assert net.training
    assert net.body[1].training
    assert not net.head.training


@pytest.mark.filterwarnings("error::UserWarning")
def test_recurrent_module_is_left_as_it_is():
    """nn.LSTM renews its list of weights when it is called; capture neither warns of that nor breaks the module."""
    module, x = nn.LSTM(3, 4, batch_first=True), torch.ones(2, 5, 3)
    wanted = module(x)[0]
    program = capture(module, x)
    torch.testing.assert_close(program(x)[0], wanted)
    module(x)[0].sum().backward()
    assert torch.equal(module(x)[0], wanted)
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_later_training_does_not_change_the_program():
    """The program has weights of its own, and tied ones stay tied."""
    net = Net()
    program = capture(net, X)
    before = program(X)
    with torch.no_grad():
        net.head.weight.zero_()
    assert torch.equal(program(X), before)


def test_high_level_operators_stay_and_updates_in_place_go():
    """linear stays whole; relu_ becomes relu."""
    assert ops(capture(Net(), X)) == ["linear", "clone", "relu", "linear"]


def test_optional_arguments_count_when_given():
    """An argument that is not given is no input; one that is given by name is."""
    program = capture(Net(), {"x": X, "bias": torch.ones(2)})
    assert [spec.name for spec in program.inputs] == ["x", "bias"]
    assert torch.equal(program(X, torch.ones(2)), program(X, torch.zeros(2)) + 1)


def test_input_shapes_make_seeded_examples():
    """Shapes by name stand in for example inputs; twice the same, and indices stay inside the table."""
    shapes = {"ids": parse_input_shape("ids=1x50:int64"), "mask": (1, 50)}
    first, second = (capture(Words(), input_shapes=shapes).example_inputs for _ in range(2))
    assert torch.equal(first["ids"], second["ids"])
    assert torch.equal(first["mask"], second["mask"])
    assert set(first["ids"].flatten().tolist()) <= set(range(5))
    assert len(set(first["ids"].flatten().tolist())) > 1


def test_module_without_inputs_says_which_are_needed():
    """The names come from forward."""
    with pytest.raises(InputsNeeded, match="ids, mask"):
        capture(Words())
    with pytest.raises(InputsNeeded, match="mask"):
        capture(Words(), input_shapes={"ids": (1, 2)})


def test_unknown_input_shape_names_the_known():
    """A misspelt name is refused."""
    with pytest.raises(BadInputShape, match="has no input y; it has x, bias"):
        capture(Net(), input_shapes={"x": (2, 3), "y": (1,)})


def test_module_that_cannot_be_exported():
    """Control flow on values is torch.export's to refuse; the reason comes in one line."""

    class Branching(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(CaptureFailed, match=r"Branching: .* could not capture it") as caught:
        capture(Branching(), X)
    assert "\n" not in caught.value.args[0]


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("x=1x3x224x224", TensorSpec("x", (1, 3, 224, 224), "float32")),
        ("ids=1x128:int64", TensorSpec("ids", (1, 128), "int64")),
        (" s=7 ", TensorSpec("s", (7,), "float32")),
        ("s=", TensorSpec("s", (), "float32")),
        ("s=:int32", TensorSpec("s", (), "int32")),
    ],
)
def test_parse_input_shape(text, spec):
    """name=AxBxC, with an optional dtype."""
    assert parse_input_shape(text) == spec


@pytest.mark.parametrize(
    "text", ["", "x", "=1x2", "x=1x", "x=ax2", "x=1,2", "x=1x-2", "x=0x2", "x=1x2:float33", "x=1:nn", "1x=2", "x=1 x2"]
)
def test_bad_input_shapes(text):
    """Everything else is refused with how it should look; no size may be 0."""
    with pytest.raises(BadInputShape) as caught:
        parse_input_shape(text)
    assert "name=1x3x224x224" in caught.value.way_out


# Good files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.pt2", "exported.pt"])
def test_exported_program_by_content(files, name):
    """An exported program is taken whatever its suffix; named after the file."""
    program = capture(files / name)
    assert program.name == name.partition(".")[0]
    assert torch.equal(program(X), torch.export.load(files / "net.pt2").module()(X))


@pytest.mark.parametrize("name", ["weights.pt", "checkpoint.pth", "legacy.pt"])
def test_state_dict_with_a_factory(files, name):
    """Weights, bare, in a checkpoint and in the old format, fill the module that the factory builds."""
    program = capture(files / name, X, model_factory="tests.graphopt.small:Net")
    assert torch.equal(program(X), capture(files / "net.pt2")(X))


@pytest.mark.parametrize("name", ["module.pt", "legacy_module.pt"])
def test_pickled_module_only_when_asked(files, name):
    """A pickled module is refused with the reason, and loaded with unsafe_load."""
    with pytest.raises(UnsafeModel, match=r"small\.Net.*unpickling runs code") as caught:
        capture(files / name, X)
    assert "--unsafe-load" in caught.value.way_out
    assert torch.equal(capture(files / name, X, unsafe_load=True)(X), capture(files / "net.pt2")(X))


def test_dynamic_sizes_are_fixed_with_a_warning(tmp_path, caplog):
    """A dynamic batch takes the size of the example, or the one asked for, and says so."""
    program = torch.export.export(Net().eval(), (X,), dynamic_shapes={"x": {0: torch.export.Dim("b", max=64)}})
    torch.export.save(program, tmp_path / "dynamic.pt2")
    with caplog.at_level(logging.WARNING, "graphopt"):
        assert capture(tmp_path / "dynamic.pt2").inputs[0].shape == (2, 3)
    assert "dynamic: dynamic sizes are fixed to x=2x3; choose others with --input-shape" in caplog.text
    wider = capture(tmp_path / "dynamic.pt2", input_shapes={"x": (5, 3)})
    assert wider.inputs[0].shape == wider.example_inputs["x"].shape == (5, 3)
    assert capture(tmp_path / "dynamic.pt2", torch.ones(7, 3)).inputs[0].shape == (7, 3)


# Bad files -----------------------------------------------------------------------------------------------------------


def test_input_shape_against_a_fixed_file(files):
    """A file with fixed shapes takes no others; an unknown name is refused."""
    with pytest.raises(BadInputShape, match=r"input x: float32\[2,3\] is fixed, and --input-shape says"):
        capture(files / "net.pt2", input_shapes={"x": (4, 3)})
    with pytest.raises(BadInputShape, match="has no input y; it has x"):
        capture(files / "net.pt2", input_shapes={"y": (4, 3)})
    with pytest.raises(WrongInputs, match=r"got x: float32\[5,3\]"):
        capture(files / "net.pt2", torch.ones(5, 3))


def test_bare_state_dict_needs_a_factory(files):
    """The hint names the option."""
    with pytest.raises(StateDictNeedsModel) as caught:
        capture(files / "weights.pt", X)
    assert "--model package.module:factory" in caught.value.way_out


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("nonsense", "not of the form"),
        ("tests.graphopt.small:nothing", "AttributeError"),
        ("tests.graphopt.small:no_module", "gave a int"),
        ("graphopt.capture:capture", "TypeError"),
    ],
)
def test_bad_factories(files, factory, reason):
    """Each way in which a factory can be none says so."""
    with pytest.raises(BadModelFactory, match=reason):
        capture(files / "weights.pt", X, model_factory=factory)


def test_state_dict_that_does_not_fit(files, tmp_path):
    """Sizes that differ, keys that are missing and keys that nobody knows are named."""
    with pytest.raises(StateDictMismatch, match=r"size mismatch for body\.0\.weight"):
        capture(files / "weights.pt", X, model_factory="tests.graphopt.small:wide")
    weights = torch.load(files / "weights.pt", weights_only=True)
    weights["tail.weight"] = weights.pop("head.weight")
    torch.save(weights, tmp_path / "renamed.pt")
    with pytest.raises(StateDictMismatch, match=r"missing head\.weight; unexpected tail\.weight"):
        capture(tmp_path / "renamed.pt", X, model_factory="tests.graphopt.small:Net")


def test_torchscript_has_a_way_out(files):
    """TorchScript is named, and the hint is code."""
    with pytest.raises(ScriptedModel) as caught:
        capture(files / "script.pt", X)
    assert "torch.export.save" in caught.value.way_out


def test_torch_does_not_log_what_it_raises(files):
    """The error has the reason; the traceback that torch logs besides is for those who ask."""
    said = io.StringIO()
    handler = logging.StreamHandler(said)
    logging.getLogger("torch._subclasses.fake_tensor").addHandler(handler)
    try:
        for level, shown in ((logging.NOTSET, False), (logging.DEBUG, True)):
            logging.getLogger("graphopt").setLevel(level)
            with pytest.raises(CaptureFailed, match="must have same reduction dim"):
                capture(files / "weights.pt", model_factory="tests.graphopt.small:Net", input_shapes={"x": (2, 7)})
            assert bool(said.getvalue()) == shown
    finally:
        logging.getLogger("graphopt").setLevel(logging.NOTSET)
        logging.getLogger("torch._subclasses.fake_tensor").removeHandler(handler)


@pytest.mark.parametrize("text", ["x=99999999x3x999999x9999", "x=99999999999999999999x3", "x=" + "9" * 5000])
def test_sizes_beyond_any_memory(text):
    """Refused before memory is asked for, however many digits they have."""
    with pytest.raises(BadInputShape, match=r"this machine has|digits"):
        parse_input_shape(text)
