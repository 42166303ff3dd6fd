"""Program: names, running, copying, saving, listing."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn

from graphopt.capture import capture
from graphopt.errors import CannotWrite, Decline, Exit, WrongInputs
from graphopt.passes.base import Record
from graphopt.place import place
from graphopt.spec import TensorSpec, identifier
from tests.models import TINY
from tests.programs import program_of, tiny


@pytest.mark.parametrize("name", TINY)
def test_program_computes_what_the_module_does(name):
    """Every model of the zoo, captured, gives bit for bit what eager PyTorch gives."""
    module, inputs = TINY[name]()
    with torch.inference_mode():
        wanted = module(**inputs)
    wanted = wanted if isinstance(wanted, dict) else {"output": wanted}
    got = tiny(name).run(inputs)
    assert list(got) == list(wanted)
    for key in wanted:
        torch.testing.assert_close(got[key], wanted[key])


def test_inputs_have_the_argument_names():
    """Inputs are named as in forward, with shape and dtype."""
    assert [str(spec) for spec in tiny("bert").inputs] == ["input_ids: int64[1,16]", "attention_mask: int64[1,16]"]


Pair = namedtuple("Pair", "mean spread")


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda s, x: x + 1, ["output"]),
        (lambda s, x: (x + 1, x + 2), ["output_0", "output_1"]),
        (lambda s, x: [x + 1], ["output_0"]),
        (lambda s, x: {"a": x + 1, "b c": x + 2}, ["a", "b_c"]),
        (lambda s, x: {"a b": x + 1, "a_b": x + 2}, ["a_b", "a_b_2"]),
        (lambda s, x: Pair(x + 1, x * 2), ["mean", "spread"]),
        (lambda s, x: {"hidden": (x + 1, x + 2), "none": None}, ["hidden_0", "hidden_1"]),
        (lambda s, x: (x + 1, None, 3), ["output_0"]),
    ],
)
def test_outputs_are_named(function, names):
    """By key or field where there is one, else output or output_0...; all different; only tensors count."""
    program = program_of(function, torch.ones(2))
    assert [spec.name for spec in program.outputs] == names
    assert list(program.run({program.inputs[0].name: torch.ones(2)})) == names


def test_mutated_buffers_are_no_outputs_and_stay(tmp_path):
    """A model that counts its calls has one output, and running it twice gives the same twice."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls += 1
            return x * self.calls

    program = capture(Counting(), torch.ones(2))
    assert [str(spec) for spec in program.outputs] == ["output: float32[2]"]
    assert program(torch.ones(2)).tolist() == program(torch.ones(2)).tolist() == [1, 1]
    program.save(tmp_path / "m.pt2")
    assert capture(tmp_path / "m.pt2")(torch.ones(2)).tolist() == [1, 1]


def test_calling_with_positions_and_with_names_agree():
    """Positional tensors are in the order of `inputs`; one output comes bare, several as a tuple."""
    program = tiny("bert")
    examples = program.example_inputs
    hidden, embedding = program(*examples.values())
    by_name = program.run(dict(reversed(examples.items())))
    assert torch.equal(hidden, by_name["last_hidden_state"])
    assert torch.equal(embedding, by_name["embedding"])
    assert isinstance(tiny("resnet18")(torch.zeros(1, 3, 64, 64)), torch.Tensor)


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        ({}, "no tensor for x"),
        ({"x": torch.zeros(1, 3, 64, 64), "y": torch.zeros(1)}, "it has no input y"),
        ({"x": torch.zeros(1, 3, 32, 64)}, r"got x: float32\[1,3,32,64\], wants x: float32\[1,3,64,64\]"),
        ({"x": torch.zeros(1, 3, 64, 64).double()}, "got x: float64"),
        ({"x": 3}, "x is int, not a tensor"),
    ],
)
def test_wrong_inputs_are_named(inputs, what):
    """A missing, unknown, misshapen or mistyped input is refused with what was met and what is wanted."""
    with pytest.raises(WrongInputs, match=what) as caught:
        tiny("resnet18").run(inputs)
    assert caught.value.exit is Exit.BAD_INPUT
    assert "x: float32[1,3,64,64]" in caught.value.way_out


def test_wrong_number_of_positional_inputs():
    """As many tensors as there are inputs."""
    with pytest.raises(WrongInputs, match="got 2 tensors, wants 1"):
        tiny("resnet18")(torch.zeros(1), torch.zeros(1))


def test_copy_has_its_own_graph_and_shares_weights():
    """Erasing a node of the copy leaves the original whole; no weight is copied."""
    program = tiny("crnn")
    before = str(program)
    copy = program.copy()
    assert str(copy) == before
    for mine, other in zip(program.tensors.values(), copy.tensors.values(), strict=True):
        assert mine.data_ptr() == other.data_ptr()
    output = copy.graph.output_node()
    output.args = ((output.all_input_nodes[0].args[0],),)
    copy.graph.eliminate_dead_code()
    assert str(program) == before
    program.run(program.example_inputs)


def test_saving_round_trips_everything(tmp_path):
    """Graph, weights, example inputs, name and records come back; the file is also a plain torch.export archive."""
    record = Record("some-pass", {"calls": 2}, (Decline("head", "no"),), 10, 5, 4, 3, 16, 12, 1e-6, seconds=2.5)
    program = tiny("bert").replace(name="my model 2", records=[record])
    program.save(tmp_path / "saved.pt2")
    loaded = capture(tmp_path / "saved.pt2")
    assert (loaded.name, str(loaded), loaded.inputs) == ("my_model_2", str(program), program.inputs)
    assert loaded.records == (record,)
    assert loaded.records[0].seconds == 0  # times differ from run to run and are not written
    for key, value in program.run(program.example_inputs).items():
        assert torch.equal(loaded.run(loaded.example_inputs)[key], value)
    plain = torch.export.load(tmp_path / "saved.pt2")
    assert plain.module()(**program.example_inputs)["embedding"].shape == (1, 32)


def test_saving_twice_gives_the_same_bytes(tmp_path):
    """The same program saved twice is the same file, byte for byte, whatever the file is called."""
    for name in ("a.pt2", "b.pt2"):
        tiny("crnn").save(tmp_path / name)
    assert (tmp_path / "a.pt2").read_bytes() == (tmp_path / "b.pt2").read_bytes()


def test_saving_where_it_cannot_be_leaves_nothing(tmp_path, monkeypatch):
    """A missing folder and a failing disk each give one error with exit 5, and no file, whole or partial."""
    with pytest.raises(CannotWrite) as caught:
        tiny("crnn").save(tmp_path / "missing" / "m.pt2")
    assert caught.value.exit is Exit.IO_FAILED

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    (tmp_path / "m.pt2").write_text("the old one")
    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(CannotWrite, match="No space left"):
        tiny("crnn").save(tmp_path / "m.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["m.pt2"]
    assert (tmp_path / "m.pt2").read_text() == "the old one"


def test_listing():
    """The text names tensors as the user does, says shapes and dtypes, and has no addresses."""
    torch.manual_seed(0)
    program = program_of(lambda s, x: s.fc(x).relu(), torch.ones(1, 3), fc=nn.Linear(3, 2))
    assert str(program) == (
        "program Net\n"
        f"  input   {program.inputs[0].name}: float32[1,3]\n"
        "  output  output: float32[1,2]\n"
        f"  linear = aten.linear({program.inputs[0].name}, fc.weight, fc.bias)  float32[1,2]\n"
        "  relu = aten.relu(linear)  float32[1,2]"
    )


def test_place_is_in_the_users_names():
    """A node says the path of its module and the line of the user's code, not of PyTorch's."""
    conv = next(node for node in tiny("resnet18").graph.nodes if node.name == "conv2d_1")
    assert place(conv).startswith("stages.0.0.body.0.0 (convnets.py:")


def test_parameters_bytes_count_tied_weights_once():
    """GPT-2's head is its embedding: one tensor under two names."""
    program = tiny("gpt2")
    module, _ = TINY["gpt2"]()
    assert program.parameters_bytes == sum(p.numel() for p in module.parameters()) * 4


@pytest.mark.parametrize(
    ("text", "name"),
    [("resnet-50.v2", "resnet_50_v2"), ("3d net", "_3d_net"), ("", "model"), ("../..", "model"), ("class", "_class")],
)
def test_identifier(text, name):
    """Any text becomes a name that C, Python and a file system take."""
    assert identifier(text) == name


def test_tensor_spec_is_readable():
    """Name, dtype and shape in one line."""
    assert str(TensorSpec("x", (1, 2), "float16")) == "x: float16[1,2]"
    assert TensorSpec("x", (), "int64").torch_dtype is torch.int64
