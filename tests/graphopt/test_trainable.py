"""Programs as modules to train, and back."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.errors import NotFromProgram, StateMismatch, WrongInputs
from graphopt.passes import CANONICALISE
from graphopt.passes.base import run_passes
from graphopt.program import Program
from tests.convnets import conv_bn
from tests.models import TINY
from tests.programs import assert_same, ops, program_of, tiny
from tests.transformer_nets import Block


class Mixed(nn.Module):
    """Nested arguments and results, a constant argument, tied weights, buffers of both kinds and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("kept", torch.full((4,), 2.0))
        self.register_buffer("passing", torch.ones(4), persistent=False)
        self.constant = torch.arange(4.0)

    def forward(self, x: Tensor, extra: dict[str, Tensor], scale: int = 2, *, shift: Tensor | None = None):
        y = self.second(self.first(x)) * self.kept * self.passing + self.constant + extra["a"] * scale
        return {"y": y if shift is None else y + shift, "rest": [y.sum(), scale]}


def mixed() -> tuple[Mixed, Program, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    net = Mixed().eval()
    x, a, shift = torch.randn(2, 4), torch.randn(2, 4), torch.randn(4)
    exported = torch.export.export(net, (x, {"a": a}, 2), {"shift": shift})
    return net, capture(exported), (x, a, shift)


def convnet() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(conv_bn(3, 8, 3), conv_bn(8, 8, 3, stride=2), nn.Flatten(), nn.Linear(8 * 16, 4))
    return capture(net, (torch.randn(16, 3, 8, 8),), name="convnet")


def transformer() -> Program:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 16), Block(16, 2, pre=True), Block(16, 2, pre=True), nn.Flatten(), nn.Linear(80, 4)
    )
    return capture(net, (torch.randn(16, 5, 6),), name="transformer")


def trained(program: Program, module: nn.Module, steps: int = 40) -> list[float]:
    """The losses of `steps` steps on a fixed random task."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(program.inputs[0].shape, generator=generator)
    labels = torch.randint(0, 4, x.shape[:1], generator=generator)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(module(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# What the module is --------------------------------------------------------------------------------------------------


def test_takes_and_gives_what_the_original_does() -> None:
    """Positional or by keyword, by argument or by input name; the original structure comes back."""
    net, program, (x, a, shift) = mixed()
    module = program.to_module().eval()
    wanted = net(x, {"a": a}, shift=shift)
    for got in (
        module(x, {"a": a}, 2, shift),
        module(x, {"a": a}, shift=shift),
        module(shift=shift, extra={"a": a}, x=x, scale=2),
        module(x, shift=shift, **{program.inputs[1].name: a}),
    ):
        assert got.keys() == {"y", "rest"}
        assert torch.equal(got["y"], wanted["y"])
        assert isinstance(got["rest"], list)
        assert got["rest"][1] == 2


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (0, {}, "no tensor for x, extra_a, shift"),
        (5, {}, "got 5 positional arguments, takes 4"),
        (2, {"x": torch.zeros(2, 4)}, "x is given twice"),
        (2, {"extra_a": torch.zeros(2, 4)}, "extra_a is given twice"),
        (2, {"bias": 1}, "it has no input bias"),
        (2, {"shift": torch.zeros(5)}, r"shift has shape \[5\], wants \[4\]"),
        (2, {"shift": 1.0}, "shift is float, not a tensor"),
        (2, {"shift": torch.zeros(4), "scale": 3}, "scale has another value than 2"),
        (1, {"extra": [torch.zeros(2, 4)]}, "extra has not the structure it was captured with"),
    ],
)
def test_wrong_arguments(args: int, kwargs: dict, message: str) -> None:
    """Each is named, and what is taken is said."""
    _, program, (x, a, shift) = mixed()
    with pytest.raises(WrongInputs, match=message):
        program.to_module()(*(x, {"a": a}, 2, shift, 1)[:args], **kwargs)


def test_state_has_the_source_names() -> None:
    """The state_dict is the source model's; tied weights are one parameter; constants are buffers and not in it."""
    net, program, _ = mixed()
    module = program.to_module()
    assert set(module.state_dict()) == set(net.state_dict())
    module.load_state_dict(net.state_dict())
    assert [name for name, _ in module.named_parameters()] == ["first.weight"]
    assert module.get_parameter("second.weight") is module.get_parameter("first.weight")
    assert {name for name, _ in module.named_buffers()} == {"kept", "passing", "constant"}
    assert module.double().get_buffer("constant").dtype == torch.float64
    assert not set(copy.deepcopy(module).parameters()) & set(module.parameters())


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("canonical", [False, True])
def test_every_parameter_gets_a_gradient(name: str, canonical: bool) -> None:
    """In the zoo: exact in eval mode, gradients for all that the graph uses, an exact round trip."""
    program = tiny(name)
    program = run_passes(program, CANONICALISE) if canonical else program
    module = program.to_module().eval()
    inputs = program.example_inputs
    assert inputs is not None
    results = dict(zip(program.run(inputs), torch.utils._pytree.tree_leaves(module(**inputs)), strict=True))
    for key, wanted in program.run(inputs).items():
        assert torch.equal(results[key], wanted)
    sum(result.double().square().sum() for result in results.values()).backward()
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    for placeholder, target in module._stored.items():
        value = module.get_parameter(target) if target in dict(module.named_parameters()) else None
        if value is not None and placeholder in used:
            assert value.grad is not None, target
    assert Program.from_module(module) is program


def test_the_program_is_left_alone() -> None:
    """Training changes copies: the program's tensors, its graph and its mode of running stay."""
    program = convnet()
    before, text = {name: tensor.clone() for name, tensor in program.tensors.items()}, str(program)
    trained(program, program.to_module(), steps=2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.tensors.items())
    assert str(program) == text


# Modes ---------------------------------------------------------------------------------------------------------------


def test_batch_norm_in_train_mode() -> None:
    """As in the source model: statistics of the batch, running ones updated; a sub-module's mode is its own."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU())
    x = torch.randn(4, 3, 6, 6) * 3 + 1
    module = capture(net, (x,)).to_module()
    assert module.training
    net.train()
    for _ in range(2):
        torch.testing.assert_close(module(x), net(x))
    for key, value in net.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value)
    module.get_submodule("1").eval()
    before = module.state_dict()["1.running_mean"].clone()
    torch.testing.assert_close(module(x), net.eval()(x))
    assert torch.equal(module.state_dict()["1.running_mean"], before)


def test_dropout_that_is_still_there() -> None:
    """A dropout in the graph is active in train mode only; capture leaves none."""
    program = program_of(lambda net, x: net.drop(x) * 2, torch.ones(1000), drop=nn.Dropout(0.5))
    module = program.to_module()
    assert torch.equal(module(torch.ones(1000)), torch.full((1000,), 2.0))
    edited = program.copy()
    (node,) = (node for node in edited.graph.nodes if str(node.target) == "aten.clone.default")
    node.target, node.args = torch.ops.aten.dropout.default, (node.args[0], 0.5, False)
    assert "dropout" in ops(edited)
    module = edited.to_module()
    assert 300 < (module(torch.ones(1000)) == 0).sum() < 700
    assert torch.equal(module.eval()(torch.ones(1000)), torch.full((1000,), 2.0))


def test_buffers_that_the_model_updates() -> None:
    """They are updated in the module, not in the program."""

    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            return x * self.seen

    program = capture(Counter(), (torch.ones(2),))
    module = program.to_module()
    assert [module(torch.ones(2))[0].item() for _ in range(3)] == [1, 2, 3]
    assert module.get_buffer("seen") == 3
    assert program(torch.ones(2))[0] == 1
    assert Program.from_module(module)(torch.ones(2))[0] == 4


# Back ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [convnet, transformer])
@pytest.mark.parametrize("canonical", [False, True])
def test_fine_tuning_lowers_the_loss(make, canonical: bool) -> None:
    """The loss falls to less than half; the program that comes back computes what the module does in eval mode."""
    program = run_passes(make(), CANONICALISE) if canonical else make()
    module = program.to_module()
    losses = trained(program, module)
    assert losses[-1] < losses[0] / 2
    after = Program.from_module(module)
    x = torch.randn(program.inputs[0].shape)
    assert torch.equal(module.eval()(x), after(x))
    assert not torch.equal(after(x), program(x))
    assert after.records[:-1] == program.records
    assert after.records[-1].name == "fine-tune"
    assert after.records[-1].total > 0
    trained(after, module, steps=1)
    assert not torch.equal(module.eval()(x), after(x))


@pytest.mark.parametrize("make", [convnet, transformer])
def test_a_fine_tuned_program_compiles(make, tmp_path: Path) -> None:
    """And agrees with PyTorch, which compiling checks; its record is in the manifest. It can be saved and read."""
    program = make()
    module = program.to_module()
    trained(program, module, steps=3)
    after = Program.from_module(module)
    bundle = graphopt.compile(after)
    assert bundle.manifest.verification.status == "passed"
    assert bundle.manifest.records[0].name == "fine-tune"
    assert_same(after, run_passes(after, CANONICALISE), tolerance=1e-4)
    after.save(tmp_path / "tuned.pt2")
    assert_same(after, capture(tmp_path / "tuned.pt2"))
    assert capture(tmp_path / "tuned.pt2").records == after.records


def test_tied_weights_stay_tied() -> None:
    """One tensor under two names is one tensor afterwards, even after a detour over another dtype."""
    _, program, (x, a, shift) = mixed()
    module = program.to_module().double()
    module(x.double(), {"a": a.double()}, shift=shift.double())["y"].square().sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    after = Program.from_module(module)
    assert after.exported.state_dict["first.weight"] is after.exported.state_dict["second.weight"]
    assert after.exported.state_dict["first.weight"].dtype == torch.float32
    assert after.parameters_bytes == program.parameters_bytes
    assert after.tensors["c_constant"] is program.tensors["c_constant"]


def test_folded_parameters_are_trained() -> None:
    """What constant folding made of a parameter is a parameter; what it made of constants is not."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, requires_grad=True))
            self.frozen = nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(x * self.weight.exp()) + torch.arange(3.0).cos()

    program = run_passes(capture(Net(), (torch.ones(2, 3),)), CANONICALISE)
    module = program.to_module()
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {
        "exp_folded", "frozen.weight", "frozen.bias",
    }  # fmt: skip
    assert [name for name, _ in module.named_buffers()] == ["cos_folded"]


def test_zeros_are_kept() -> None:
    """With keep_zeros a sparse weight stays sparse, whatever the optimiser does; zero biases are trained."""
    torch.manual_seed(0)
    net = nn.Linear(8, 4)
    with torch.no_grad():
        net.weight[:, ::2] = 0
        net.bias.zero_()
    program = capture(net, (torch.randn(16, 8),))
    for keep in (True, False):
        module = program.to_module(keep_zeros=keep)
        assert set(module.state_dict()) == {"weight", "bias"}
        trained(program, module, steps=3)
        after = Program.from_module(copy.deepcopy(module))
        assert bool((after.tensors["p_weight"][:, ::2] == 0).all()) is keep
        assert after.tensors["p_bias"].all()
        x = torch.randn(16, 8)
        assert torch.equal(after(x), module(x))


def test_modules_around_it() -> None:
    """A module that wraps it will do; one without it, or with two, is refused; so is one whose shapes changed."""
    program = convnet()
    module = program.to_module()
    assert Program.from_module(nn.Sequential(module, nn.ReLU())) is program
    with pytest.raises(NotFromProgram, match="Linear: has none"):
        Program.from_module(nn.Linear(1, 1))
    with pytest.raises(NotFromProgram, match="ModuleList: has 2"):
        Program.from_module(nn.ModuleList([module, program.to_module()]))
    module.get_submodule("3").bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(StateMismatch, match=r"convnet: 3.bias is float32\[5\] in the module and float32\[4\]"):
        Program.from_module(module)


def test_parametrised_modules() -> None:
    """What torch.nn.utils puts on a parameter is computed in, so what is trained is what comes back."""
    program = convnet()
    module = program.to_module().eval()
    torch.nn.utils.parametrizations.weight_norm(module.get_submodule("3"))
    trained(program, module, steps=2)
    x = torch.randn(16, 3, 8, 8)
    assert torch.equal(Program.from_module(module)(x), module.eval()(x))
