"""Calibration data in every form, and what a program does on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphopt
from graphopt.calibration import Calibration, calibration
from graphopt.capture import capture
from graphopt.errors import BadCalibration, BadLabels, BadSample, Exit, GraphoptError, ModuleMissing, SampleNotFound
from graphopt.observe import activations, gradients, watch
from graphopt.program import Program
from tests.models import TINY
from tests.programs import program_of, tiny

X = torch.arange(24.0).view(8, 3)
LABELS = torch.arange(8) % 4
DATA = "tests.graphopt.calibration_data"


def one() -> Program:
    """x: float32[2, 3] -> float32[2, 4]."""
    torch.manual_seed(0)
    return capture(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)), (torch.ones(2, 3),), name="one")


def two() -> Program:
    """ids: int64[1, 4], mask: float32[1, 4, 1] -> float32[1, 4, 3]."""
    torch.manual_seed(0)
    table = nn.Embedding(5, 3)
    return program_of(lambda net, ids, mask: net.table(ids) * mask, torch.ones(1, 4, dtype=torch.long),
                      torch.ones(1, 4, 1), table=table)  # fmt: skip


def flat(data: Calibration, name: str) -> Tensor:
    return torch.cat([batch[name] for batch in data])


# Forms ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        list(X.view(4, 2, 3)),
        list(X),
        [X],
        X,
        X.numpy(),
        {"input": X},
        X.view(4, 2, 3),
        (x for x in (X[:3], X[3:4], X[4:])),
        [(X[:5],), {"input": X[5:].numpy()}],
        DataLoader(TensorDataset(X), batch_size=3),
    ],
)
def test_samples_come_in_any_number(source: Any) -> None:
    """Exact, stacked, longer, shorter and single: they are cut and gathered into batches of the program's size."""
    data = calibration(source, one())
    assert len(data) == 4
    assert [batch["input"].shape for batch in data] == [(2, 3)] * 4
    assert torch.equal(flat(data, "input"), X)
    assert data.labels is None
    assert not data.is_example
    assert [len(list(data)) for _ in range(2)] == [4, 4]


@pytest.mark.parametrize(
    "source",
    [
        DataLoader(TensorDataset(X, LABELS), batch_size=3),
        list(zip(X, LABELS, strict=True)),
        [((X,), LABELS)],
        [({"input": X}, LABELS.int())],
        [{"input": X, "labels": LABELS}],
        {"input": X, "target": LABELS},
        [{"input": X.view(4, 2, 3), "labels": LABELS.view(4, 2)}],
        [(x, int(label)) for x, label in zip(X, LABELS, strict=True)],
    ],
)
def test_labels_come_along(source: Any) -> None:
    """In tuples, pairs and dicts; cut like the inputs."""
    data = calibration(source, one())
    assert torch.equal(flat(data, "input"), X)
    assert data.labels is not None
    assert [label.dtype for label in data.labels] == [torch.int64] * 4
    assert torch.equal(torch.cat(data.labels), LABELS)
    again = calibration(data, one())
    assert again.labels is not None
    assert torch.equal(torch.cat(again.labels), LABELS)


@pytest.mark.parametrize("shape", [(8, 3), (4, 2, 3)])
def test_npz(tmp_path: Path, shape: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    """By name, labels too; what is neither is said to be unused."""
    file = tmp_path / "samples.npz"
    np.savez(file, input=X.view(shape).numpy(), labels=LABELS.numpy().astype(np.int32), y=np.ones(3))
    for source in (file, str(file)):
        data = calibration(source, one())
        assert torch.equal(flat(data, "input"), X)
        assert torch.equal(torch.cat(data.labels or ()), LABELS)
    assert "y is no input of the model" in caplog.text
    np.save(tmp_path / "x.npy", X.numpy())
    assert torch.equal(flat(calibration(tmp_path / "x.npy", one()), "input"), X)


def test_several_inputs() -> None:
    """A tuple in their order; one more is the labels; left-over samples are dropped."""
    ids, mask = torch.arange(12).view(3, 4) % 5, torch.ones(3, 4, 1)
    names = [spec.name for spec in two().inputs]
    for item in ((ids, mask), ((ids, mask), torch.zeros(3, 4)), (ids.int(), mask.half(), torch.zeros(3, 4))):
        data = calibration([item], two())
        assert torch.equal(flat(data, names[0]), ids)
        assert torch.equal(flat(data, names[1]), mask)
        assert [label.shape for label in data.labels or ()] == (
            [] if len(item) == 2 and item[1] is mask else [(1, 4)] * 3
        )
    assert len(calibration([X[:7]], one())) == 3


def test_half_precision_survives() -> None:
    """bfloat16, which numpy has not, comes through unchanged."""
    program = program_of(lambda net, x: x * 2, torch.ones(2, 3, dtype=torch.bfloat16))
    x = torch.randn(2, 3).bfloat16()
    assert torch.equal(calibration([x], program)[0][program.inputs[0].name], x)


def test_nothing_given_is_the_example() -> None:
    """And says so."""
    program = one()
    data = calibration(None, program)
    assert data.is_example
    assert torch.equal(data[0]["input"], torch.ones(2, 3))
    assert calibration(data, program).is_example


def test_functions_and_generators_without_end() -> None:
    """`module:function` is called; no more than `limit` samples are taken."""
    data = calibration(f"{DATA}:batches", one(), limit=10)
    assert len(data) == 5
    assert data.origin == f"{DATA}:batches"
    assert len(calibration(f"{DATA}:batches", one(), limit=1)) == 1


def test_samples_are_copies() -> None:
    """A loader that fills the same buffer again and again does no harm."""
    buffer = torch.zeros(2, 3)

    def loader():
        for count in range(3):
            yield buffer.fill_(count)

    assert [batch["input"][0, 0].item() for batch in calibration(loader(), one())] == [0, 1, 2]


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ([], BadCalibration, "has no samples"),
        ([X[:0]], BadCalibration, "has no samples"),
        ([X[:1]], BadCalibration, "has 1 samples, a batch takes 2"),
        ([{"image": X}], BadCalibration, "the model has no input image"),
        ([{"labels": LABELS}], BadCalibration, "has no array input; it has none"),
        ([X[:, :2]], BadCalibration, r"input has shape \[8, 2\]; wanted \[2, 3\]"),
        ([X.double()], BadCalibration, "input is float64, the model takes float32"),
        ([(X, LABELS, X)], BadCalibration, "gave 3 tensors at once, and the model has 1 inputs"),
        ([(X, LABELS[:7])], BadCalibration, r"labels have shape \[7\]; wanted 8 in front"),
        ([(X, LABELS), X], BadCalibration, "has labels for some samples only"),
        ([X[:1], (X, LABELS)], BadCalibration, "has labels for some samples only"),
        ([(X[:1], LABELS[:1]), (X, X)], BadCalibration, r"labels of shape \[3\] come after some of shape \[\]"),
        (
            [X, torch.full((2, 3), torch.nan)],
            BadCalibration,
            "input has 6 of 6 numbers NaN or infinite in batch 5 of 5",
        ),
        (["text"], BadCalibration, "input is a str, not a tensor"),
        (3, BadCalibration, "a int gives no samples"),
        (f"{DATA}:nothing", BadCalibration, f"{DATA}:nothing: returned None"),
        (f"{DATA}:breaks", BadCalibration, "raised KeyError: 'image_7'"),
        (f"{DATA}:missing", BadCalibration, "AttributeError: .*missing"),
        ("no_such_module:f", ModuleMissing, "no Python module no_such_module"),
        ("none.npz", SampleNotFound, "none.npz"),
    ],
)
def test_bad_input(source: Any, error: type[GraphoptError], message: str) -> None:
    """Each mistake has an error that says where and what, and that has a way out."""
    with pytest.raises(error, match=message) as caught:
        calibration(source, one())
    assert "hint: " in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.zeros((2, 4), np.int64)}, "has no array mask; it has ids"),
        ({"ids": np.zeros((2, 4), np.int64), "mask": np.zeros((3, 4, 1), np.float32)}, "different numbers of samples"),
        ({"ids": np.zeros((0, 4), np.int64), "mask": np.zeros((0, 4, 1), np.float32)}, "has no samples"),
        ({"ids": np.zeros((1, 4), np.int64), "mask": np.full((1, 4, 1), np.inf, "f4")}, "mask has 4 of 4"),
    ],
)
def test_bad_files(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    """A file's mistakes are those of samples in a file."""
    names = dict(zip(("ids", "mask"), (spec.name for spec in two().inputs), strict=True))
    np.savez(tmp_path / "bad.npz", **{names[name]: array for name, array in arrays.items()})
    message = message.replace("mask", names["mask"]).replace("ids", names["ids"])
    with pytest.raises(BadSample, match=message):
        calibration(tmp_path / "bad.npz", two())


def test_no_examples_and_nothing_given() -> None:
    """Is refused."""
    program = Program(one().exported, name="one")
    program._examples = None
    with pytest.raises(BadCalibration, match="one: has no example inputs"):
        calibration(None, program)


# Compiling -----------------------------------------------------------------------------------------------------------


def test_compiling_takes_all_forms(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """The check runs on what was given, from Python and from the command line."""
    bundle = graphopt.compile(one(), calibration=DataLoader(TensorDataset(X, LABELS), batch_size=4))
    assert bundle.manifest.verification.inputs == "4 sets of calibration inputs"
    one().save(tmp_path / "one.pt2")
    arguments = ("compile", tmp_path / "one.pt2", "-o", tmp_path / "one.bundle", "--dry-run")
    code, out, _ = cli(*arguments, "--calib", f"{DATA}:batches")
    assert (code, "run on 4 sets of calibration inputs" in out) == (Exit.DONE, True)
    code, _, err = cli(*arguments, "--calib", f"{DATA}:nothing")
    assert (code, "error[bad-calibration]" in err) == (Exit.BAD_INPUT, True)


# Values --------------------------------------------------------------------------------------------------------------


def test_activations() -> None:
    """The values of the wanted nodes, once a batch, or what is made of them."""
    program = one()
    data = calibration(X, program)
    outputs = [program.run(batch)["output"] for batch in data]
    assert all(map(torch.equal, activations(program, data, ["linear_1"])["linear_1"], outputs))
    node = next(node for node in program.graph.nodes if node.name == "tanh")
    sums = activations(program, data, [node], lambda value: value.square().sum(0))["tanh"]
    hidden = torch.tanh(X @ program.tensors["p_0_weight"].T + program.tensors["p_0_bias"])
    torch.testing.assert_close(sum(sums), hidden.square().sum(0))
    assert activations(program, data, []) == {}
    with pytest.raises(KeyError, match="one has no node tahn"):
        activations(program, data, ["tahn"])


def test_watching_stops_after_the_last_wanted_value() -> None:
    """What comes behind is not computed, and values come in the order of the graph."""
    program = program_of(lambda net, x: torch.linalg.inv(torch.relu(x).split(2)[0] * 0), torch.ones(4, 2))
    seen = []
    with pytest.raises(RuntimeError, match="singular"):
        program(torch.ones(4, 2))
    watch(program, calibration(None, program), ["split", "relu"], lambda name, value: seen.append((name, type(value))))
    assert [name for name, _ in seen] == ["relu", "split"]
    assert issubclass(seen[1][1], (tuple, list))


# Gradients -----------------------------------------------------------------------------------------------------------


def reference(program: Program, x: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    module = program.to_module().eval()
    loss(module(x)).backward()
    return {f"p_{name.replace('.', '_')}": parameter.grad for name, parameter in module.named_parameters()}


def test_gradients_against_labels() -> None:
    """Cross-entropy where there are labels; for each batch, or for each sample of it."""
    program = one()
    data = calibration([(X / 10, LABELS)], program)
    steps = list(gradients(program, data))
    assert len(steps) == 4
    single = list(gradients(program, data, per_sample=True))
    assert len(single) == 8
    for place, step in enumerate(steps):
        x, labels = data[place]["input"], data.labels[place]
        wanted = reference(program, x, lambda y, labels=labels: F.cross_entropy(y, labels))
        assert step.of.keys() == wanted.keys() == program.tensors.keys()
        pair = single[2 * place : 2 * place + 2]
        for name, grad in wanted.items():
            torch.testing.assert_close(step.of[name], grad)
            torch.testing.assert_close((pair[0].of[name] + pair[1].of[name]) / 2, grad)
        assert step.loss == pytest.approx((pair[0].loss + pair[1].loss) / 2)
    assert not any(tensor.requires_grad for tensor in program.tensors.values())


def test_gradients_of_a_loss_of_ones_own() -> None:
    """A function of the outputs by name and the labels; only what is wanted; values inside the graph, too."""
    program = one()
    data = calibration(X / 10, program)
    wanted = ["tanh", "input", "p_2_weight"]
    with torch.inference_mode():
        step = next(iter(gradients(program, data, lambda outputs, labels: outputs["output"].sum(), wanted=wanted)))
    assert list(step.of) == wanted
    torch.testing.assert_close(step.of["tanh"], program.tensors["p_2_weight"].sum(0).expand(2, 5))
    torch.testing.assert_close(step.values["tanh"], activations(program, data, ["tanh"])["tanh"][0])
    assert step.values.keys() == {"tanh", "input"}
    with pytest.raises(ValueError, match="one number for each sample"):
        next(iter(gradients(program, data, lambda outputs, labels: outputs["output"].sum(), per_sample=True)))


def test_distilling_measures_relative_change() -> None:
    """The expected squared product of the gradient with a change is the relative squared change of the output."""
    program = one()
    data = Calibration(({"input": torch.randn(2, 3, generator=torch.Generator().manual_seed(0))},))
    change = torch.zeros(4, 5)
    change[1] = 1e-3
    squares = []
    for seed in range(300):
        for step in gradients(program, data, "distill", wanted=["p_2_weight"], per_sample=True, seed=seed):
            squares.append((step.of["p_2_weight"] * change).sum().square())
    hidden = activations(program, data, ["tanh", "linear_1"])
    moved, size = (hidden["tanh"][0] @ change.T).square(), hidden["linear_1"][0].square().mean()
    wanted = (moved.sum(1) / (4 * size)).mean()
    assert torch.stack(squares).mean() == pytest.approx(float(wanted), rel=0.25)


def test_the_fisher_information() -> None:
    """Labels drawn from the model's own softmax: the mean squared gradient of the last bias is p (1 - p)."""
    program = one()
    data = calibration((X / 10).view(4, 2, 3), program)
    squares = torch.stack(
        [
            step.of["p_2_bias"].square()
            for seed in range(100)
            for step in gradients(program, data, "fisher", wanted=["p_2_bias"], per_sample=True, seed=1000 * seed)
        ]
    )
    p = torch.cat([program.run(batch)["output"] for batch in data]).softmax(-1)
    torch.testing.assert_close(squares.mean(0), (p * (1 - p)).mean(0), rtol=0.2, atol=0.02)


def test_other_labels() -> None:
    """Classes of each position, behind a softmax, and numbers of the output's shape."""
    x = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    program = program_of(lambda net, x: net.last(x), x, last=nn.Linear(3, 4))
    soft = program_of(lambda net, x: net.last(x).softmax(-1), x, last=nn.Linear(3, 4))
    for own in (program, soft):
        bias = next(name for name in own.tensors if name.endswith("bias"))
        labels = torch.arange(12).view(2, 6) % 4
        (step,) = gradients(own, calibration([(x, labels)], own))
        p = own(x) if own is soft else own(x).softmax(-1)
        torch.testing.assert_close(step.of[bias], (p - F.one_hot(labels, 4)).mean((0, 1)), rtol=1e-4, atol=1e-6)
    images = program_of(lambda net, x: x.transpose(1, 2) * 2, x)
    (step,) = gradients(
        images,
        calibration([(x, torch.ones(2, 6, dtype=torch.long))], images),
        wanted=[images.inputs[0].name],
    )
    assert step.loss == pytest.approx(float(F.cross_entropy(2 * x.transpose(1, 2), torch.ones(2, 6, dtype=torch.long))))
    numbers = torch.zeros(2, 6, 4)
    (step,) = gradients(program, calibration([(x, numbers)], program))
    assert step.loss == pytest.approx(float(program(x).square().mean()))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((8,), 4), "there is a label 4, and the output output has 4 classes"),
        (torch.full((8,), -1), "there is a label -1; classes are counted from 0"),
        (torch.zeros(8, 3), r"labels of shape \[2, 3\] are numbers, not \[2, 4\] of them"),
        (torch.zeros(8, 3, dtype=torch.long), r"labels of shape \[2, 3\] do not fit"),
        (None, "has no labels"),
    ],
)
def test_labels_that_do_not_fit(labels: Tensor | None, message: str) -> None:
    """Are refused, with what would fit."""
    program = one()
    data = calibration(X if labels is None else [(X, labels)], program)
    with pytest.raises(BadLabels, match=message) as caught:
        next(iter(gradients(program, data, "labels")))
    assert "output: [2, 4]" in str(caught.value)


@pytest.mark.parametrize("name", TINY)
def test_gradients_in_the_zoo(name: str) -> None:
    """Without labels every tensor that matters gets a gradient that is not zero; the same seed gives the same."""
    program = tiny(name)
    data = calibration(None, program)
    (step,) = gradients(program, data)
    used = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    weights = [n for n, t in program.tensors.items() if t.ndim > 1 and t.is_floating_point() and n.startswith("p_")]
    assert weights
    for weight in weights:
        assert weight not in used or step.of[weight].any(), weight
        assert step.of[weight].isfinite().all()
    (again,) = gradients(program, data)
    assert all(torch.equal(again.of[key], grad) for key, grad in step.of.items())
