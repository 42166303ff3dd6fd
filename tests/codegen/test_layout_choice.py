"""What is said of layers whose weights have zeros: which have an entry, what is picked, and that it is what happens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.codegen.artefact import Artefact
from graphopt.codegen.lower import compile_program
from graphopt.codegen.prepare import prepare
from graphopt.codegen.sparse_weights import SparseWeight
from graphopt.passes import CANONICALISE
from graphopt.passes.base import run_passes
from graphopt.passes.sparsify_magnitude import SparsifyMagnitude
from graphopt.program import Program
from graphopt.targets import resolve
from graphopt.targets.speed import speed_of
from tests.programs import program_of, tiny

# The same on every machine, and quick to think about: vectors of four.
WASM = resolve("wasm")
SPARSE = {"spmm", "spmv"}


def blocks(layer: nn.Module, keep: float, rows: int = 8) -> nn.Module:
    """The layer with only this share of its blocks of `rows` outputs."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    chosen = torch.rand(-(-weight.shape[0] // rows), *weight.shape[1:], generator=torch.manual_seed(3)) < keep
    weight.data *= chosen.repeat_interleave(rows, 0)[: weight.shape[0]]
    return layer


def linear(ins: int, outs: int, keep: float = 1.0) -> nn.Module:
    """A linear layer."""
    torch.manual_seed(ins + outs)
    return blocks(nn.Linear(ins, outs), keep)


def mlp(keep: float, **more: nn.Module) -> Program:
    """64 tokens through linear a, ReLU, linear b; a has zeros."""
    layers = {"a": linear(128, 256, keep), "b": linear(256, 64), **more}
    return program_of(lambda net, x: net.b(net.a(x).relu()), torch.randn(64, 128), **layers)


def convnet(keep: float, *, sparse: tuple[str, ...] = ("one", "two")) -> Program:
    """A stem, a depthwise convolution, two more with zeros, and a head; 16 x 16 pixels."""
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {
        "stem": nn.Conv2d(3, 64, 3, padding=1),
        "depthwise": nn.Conv2d(64, 64, 3, padding=1, groups=64),
        "one": nn.Conv2d(64, 128, 1),
        "two": nn.Conv2d(128, 64, 3, padding=1),
        "head": nn.Linear(64, 10),
    }
    for name in sparse:
        blocks(layers[name], keep)

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net.one(net.depthwise(net.stem(x).relu()).relu()).relu()
        return net.head(net.two(x).relu().mean((2, 3)))

    return program_of(forward, torch.randn(1, 3, 16, 16), **layers)


def entries(program: Program, spec: str = "wasm") -> dict[str, SparseWeight]:
    """By the name of the weight."""
    found = prepare(program, resolve(spec))[1]
    assert len({entry.weight for entry in found}) == len(found)
    return {entry.weight: entry for entry in found}


def templates(artefact: Artefact) -> list[str]:
    """The kernels' families, in order."""
    return [kernel.template for kernel in artefact.kernels]


# The picture ----------------------------------------------------------------------------------------------------------


def test_an_entry_for_each_weight_with_zeros() -> None:
    """By the user's names though kernels see them transposed, with what annotation and values say."""
    found = entries(mlp(0.1))
    assert list(found) == ["a.weight"]
    entry = found["a.weight"]
    assert (entry.operator, entry.format, entry.eligible, entry.picked) == ("linear", "8x1", True, True)
    assert 0.05 < entry.density < 0.15
    assert entry.reason.endswith("times as fast")
    assert entry.dense_cycles is not None
    assert entry.sparse_cycles is not None
    assert entry.sparse_cycles < entry.dense_cycles
    assert entry.dense_us == pytest.approx(entry.dense_cycles / speed_of(WASM).clock_hz * 1e6, rel=1e-2)


def test_convolutions_are_weighed_as_one() -> None:
    """Each entry has its own estimates, and says what the layout took for the network as a whole."""
    found = entries(convnet(0.05))
    assert list(found) == ["one.weight", "two.weight"]
    assert all(entry.picked and entry.operator == "conv2d" for entry in found.values())
    (reason,) = {entry.reason for entry in found.values()}
    assert reason.startswith("the network's images are NCHW: ")
    assert " beats " in reason


def test_picked_is_what_runs() -> None:
    """As many sparse kernels as entries picked, where no layer without zeros has one."""
    program = program_of(
        lambda net, x: net.c(net.b(net.a(x).relu()).relu()),
        torch.randn(64, 128),
        a=linear(128, 256, 0.1),
        b=linear(256, 128, 0.9),
        c=linear(128, 64, 0.1),
    )
    artefact = compile_program(program, WASM)
    assert [entry.weight for entry in artefact.sparse_weights] == ["a.weight", "b.weight", "c.weight"]
    picked = [entry.picked for entry in artefact.sparse_weights]
    assert picked[0]
    assert picked[2]
    assert sum(name in SPARSE for name in templates(artefact)) == sum(picked)


# When dense is picked -------------------------------------------------------------------------------------------------


def test_dense_wins_where_there_are_few_zeros() -> None:
    """Eligible, weighed, and not picked: one zero in ten does not pay for transposes of small layers."""
    program = program_of(lambda net, x: net.a(x), torch.randn(64, 16), a=blocks(nn.Linear(16, 64), 0.85, rows=1))
    entry = entries(program)["a.weight"]
    assert (entry.eligible, entry.picked) == (True, False)
    assert "dense" in entry.reason
    assert "gemm" in templates(compile_program(program, WASM))


def test_a_network_that_stays_in_nhwc_says_what_it_took() -> None:
    """A small layer full of zeros does not turn the images of a whole network."""
    wide = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3)), blocks(nn.Conv2d(64, 8, 1), 0.1))
    program = program_of(lambda net, x: net.wide(x), torch.randn(1, 64, 16, 16), wide=wide)
    program = graphopt.annotate(program, {f"wide.{layer}.weight": "dense" for layer in range(3)})
    entry = entries(program)["wide.3.weight"]
    assert (entry.eligible, entry.picked) == (True, False)
    assert entry.reason.startswith("the network's images are NHWC: ")
    assert entry.dense_us is not None
    assert entry.sparse_us is not None


# "dense" --------------------------------------------------------------------------------------------------------------


def test_dense_keeps_the_sparse_kernel_off_a_linear_layer() -> None:
    """Its zeros would pay, and its annotation says no."""
    program = graphopt.annotate(mlp(0.1), {"a.weight": "dense"})
    entry = entries(program)["a.weight"]
    assert (entry.format, entry.eligible, entry.picked, entry.reason) == ("dense", False, False, 'annotated "dense"')
    assert entry.sparse_us is None
    assert SPARSE.isdisjoint(templates(compile_program(program, WASM)))


def test_dense_counts_as_all_kept_when_images_are_laid_out() -> None:
    """With all convolutions annotated so, the images of a network full of zeros stay as dense kernels want them."""
    program = graphopt.annotate(convnet(0.05), {"*": "dense"})
    found = entries(program)
    assert list(found) == ["stem.weight", "depthwise.weight", "one.weight", "two.weight", "head.weight"]
    assert not any(entry.picked for entry in found.values())
    assert {entry.reason for entry in found.values()} == {'annotated "dense"'}
    assert SPARSE.isdisjoint(templates(compile_program(program, WASM)))


def test_one_dense_convolution_in_a_network_in_nchw() -> None:
    """It runs between two transposes, in a dense kernel; the others keep their sparse ones, and the result is right."""
    program = graphopt.annotate(convnet(0.05), {"one.weight": "dense"})
    with graphopt.compile(program, target="cpu") as bundle:
        found = {entry["weight"]: entry["picked"] for entry in bundle.manifest.sparse_weights}
        assert found == {"one.weight": False, "two.weight": True}
        kernels = [kernel["template"] for kernel in bundle.manifest.kernels]
        assert kernels.count("spmm") == 2  # the stem and `two`
        assert {"gemm", "conv2d"} & set(kernels)
        assert bundle.manifest.verification.passed


def test_convolutions_without_a_kernel_in_nchw_keep_theirs() -> None:
    """In a network whose images are NCHW, a transposed convolution is a matrix product still, between transposes."""
    layers = {"one": blocks(nn.Conv2d(16, 64, 3, padding=1), 0.05), "up": nn.ConvTranspose2d(64, 8, 2, 2)}
    program = program_of(lambda net, x: net.up(net.one(x).relu()), torch.randn(1, 16, 16, 16), **layers)
    with graphopt.compile(program, target="cpu") as bundle:
        assert [entry["picked"] for entry in bundle.manifest.sparse_weights] == [True]
        kernels = [kernel["template"] for kernel in bundle.manifest.kernels]
        assert [name for name in kernels if name not in ("transpose", "tvm")] == ["spmm", "gemm"]
        assert not any("conv2d_transpose" in kernel["where"] for kernel in bundle.manifest.kernels)
        assert bundle.manifest.verification.passed


@pytest.mark.parametrize("annotation", ["8x1", "dense"])
def test_a_weight_in_front(annotation: str) -> None:
    """torch.mm(W, x) is what the sparse kernel does anyway; "dense" has it multiplied the other way round."""
    torch.manual_seed(0)
    layer = blocks(nn.Linear(96, 64, bias=False), 0.2)
    program = program_of(lambda net, x: net.layer.weight @ x, torch.randn(96, 20), layer=layer)
    program = graphopt.annotate(program, {"layer.weight": annotation})
    with graphopt.compile(program, target="cpu") as bundle:
        (entry,) = bundle.manifest.sparse_weights
        assert entry["weight"] == "layer.weight"
        assert entry["picked"] == (annotation != "dense")
        assert entry["picked"] == bool(SPARSE & {kernel["template"] for kernel in bundle.manifest.kernels})
        assert bundle.manifest.verification.passed


# Not eligible ---------------------------------------------------------------------------------------------------------


def _line() -> Program:
    return program_of(lambda net, x: net.a(x), torch.randn(1, 32, 20), a=blocks(nn.Conv1d(32, 32, 3), 0.2))


def _transposed() -> Program:
    layer = nn.ConvTranspose2d(32, 16, 3)
    layer.weight.data[:, ::2] = 0
    return program_of(lambda net, x: net.a(x), torch.randn(1, 32, 5, 5), a=layer)


def _double() -> Program:
    layer = blocks(nn.Linear(64, 64), 0.2).double()
    return program_of(lambda net, x: net.a(x), torch.randn(8, 64, dtype=torch.float64), a=layer)


def _double_image() -> Program:
    layer = blocks(nn.Conv2d(32, 32, 3), 0.2).double()
    return program_of(lambda net, x: net.a(x), torch.randn(1, 32, 6, 6, dtype=torch.float64), a=layer)


def _depthwise() -> Program:
    layer = nn.Conv2d(32, 32, 3, groups=32)
    layer.weight.data[:, :, ::2] = 0
    return program_of(lambda net, x: net.a(x), torch.randn(1, 32, 6, 6), a=layer)


def _few() -> Program:
    layer = nn.Linear(64, 64)
    layer.weight.data[:3] = 0
    return program_of(lambda net, x: net.a(x), torch.randn(8, 64), a=layer)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_transposed, "there is no sparse kernel for conv2d_transpose"),
        (_double, "float64 times float64: sparse kernels are for float32"),
        (_double_image, "float64"),
        (_depthwise, "depthwise: with so few taps there is nothing to gain from zeros"),
        (_few, "5% zeros, of use from 10% on"),
    ],
)
def test_why_not(make: Callable[[], Program], reason: str) -> None:
    """A layer that no sparse kernel takes is listed with the reason, and is not picked."""
    entry = entries(make())["a.weight"]
    assert (entry.eligible, entry.picked, entry.sparse_us) == (False, False, None)
    assert reason in entry.reason


@pytest.mark.parametrize("make", [lambda: mlp(0.1), lambda: convnet(0.05), _line])
def test_cuda_has_none_yet(make: Callable[[], Program]) -> None:
    """Entries for the same layers, each of which says so."""
    program = make()
    found = entries(program, "cuda:sm_90")
    assert list(found) == list(entries(program))
    assert {entry.reason for entry in found.values()} == {"there are no sparse kernels for CUDA yet"}
    assert not any(entry.eligible or entry.picked for entry in found.values())


# Names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenet_v2", "deit_s", "llama", "crnn"])
def test_every_annotated_weight_is_listed(name: str) -> None:
    """However lowering rearranges, splits or shares the weights of whole models, each is found by its values."""
    program = run_passes(SparsifyMagnitude(keep=0.2)(tiny(name)), CANONICALISE)
    assert program.annotations
    assert list(entries(program)) == list(program.annotations)


def test_a_weight_of_two_layers_has_two_entries() -> None:
    """One per layer: their tokens, and so their times, may differ."""
    program = program_of(
        lambda net, x, y: (net.a(x), net.a(y)), torch.randn(64, 128), torch.randn(2, 128), a=linear(128, 128, 0.1)
    )
    found = prepare(program, WASM)[1]
    assert [entry.weight for entry in found] == ["a.weight"] * 2
    assert found[0].dense_cycles != found[1].dense_cycles


def test_names_without_annotations() -> None:
    """Zeros are made use of without canonicalisation, too, and the layer has its name then; the format is not known."""
    entry = entries(graphopt.annotate(mlp(0.1), {"*": None}))["a.weight"]
    assert entry.format is None
    assert entry.picked


def test_names_behind_a_folded_batch_norm() -> None:
    """A weight that canonicalisation scaled keeps its name."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(64)
    norm.weight.data.uniform_(0.5, 2)
    module = nn.Sequential(blocks(nn.Conv2d(32, 64, 1), 0.1), norm).eval()
    program = run_passes(graphopt.capture(module, (torch.randn(1, 32, 16, 16),)), CANONICALISE)
    entry = entries(program)["0.weight"]
    assert (entry.format, entry.picked) == ("8x1", True)


def test_a_constant_that_is_no_weight() -> None:
    """What is computed from several weights has none's name, and its zeros are made use of all the same."""
    a, b = linear(128, 128, 0.05), linear(128, 128, 0.05)
    program = program_of(lambda net, x: x @ (net.a.weight + 2 * net.b.weight).t(), torch.randn(64, 128), a=a, b=b)
    (entry,) = entries(program).values()
    assert (entry.weight, entry.format, entry.picked) == ("a 128x128 constant", None, True)


def test_entries_are_the_same_every_time() -> None:
    """Equal programs and targets give equal entries."""
    first, second = (prepare(convnet(0.05), WASM)[1] for _ in range(2))
    assert first == second
