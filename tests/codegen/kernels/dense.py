"""Programs of one product or convolution with an elementwise tail, in Relax and in PyTorch, for the dense kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, settings
from tvm import relax

from graphopt.codegen.dataflow import Dataflow
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.targets.target import Target
from tests.codegen.kernels.harness import HOST, Library, fenced, match, relax_main

Emit = Callable[[Any], relax.Var]
op = relax.op

# An example is a list of cases in one library. Shrinking would build hundreds of libraries, so failures stay as drawn.
QUICK = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def const(value: Any) -> relax.Expr:
    """A float32 constant."""
    return relax.const(np.asarray(value, np.float32))


@dataclass
class Program:
    """One anchor with its tail, and the tensors it needs."""

    seed: int
    params: list[relax.Var] = field(default_factory=list)
    arrays: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """A float32 array."""
        return (self.rng.standard_normal(shape) * scale).astype(np.float32)

    def input(self, *shape: int) -> tuple[relax.Var, torch.Tensor]:
        """A run-time tensor: its variable, and its value in float64."""
        var = relax.Var(f"p{len(self.params)}", relax.TensorType(shape, "float32"))
        array = self.normal(*shape)
        self.params.append(var)
        self.arrays.append(array)
        return var, torch.from_numpy(array).double()


Pair = tuple[relax.Expr, torch.Tensor]


def _hardswish(e: Emit, y: relax.Expr) -> relax.Expr:
    # As TVM's importer spells it.
    return e(op.multiply(y, e(op.divide(e(op.clip(e(op.add(y, const(3.0))), 0, 6)), const(6.0)))))


def _bias(p: Program, e: Emit, y: Pair) -> Pair:
    b = p.normal(y[1].shape[-1])
    return e(op.add(const(b), y[0])), y[1] + torch.from_numpy(b).double()


def _scale_bias(p: Program, e: Emit, y: Pair) -> Pair:
    s = p.normal(*[1] * (y[1].ndim - 1), y[1].shape[-1])
    return _bias(p, e, (e(op.multiply(y[0], const(s))), y[1] * torch.from_numpy(s).double()))


def _residual_relu(p: Program, e: Emit, y: Pair) -> Pair:
    r, value = p.input(*y[1].shape)
    return e(op.nn.relu(e(op.add(r, y[0])))), F.relu(y[1] + value)


def _gate(p: Program, e: Emit, y: Pair) -> Pair:
    """Squeeze and excite: one factor per image and channel."""
    shape = [y[1].shape[0], *[1] * (y[1].ndim - 2), y[1].shape[-1]]
    g, value = p.input(*shape)
    return e(op.multiply(y[0], g)), y[1] * value


def _row_gate(p: Program, e: Emit, y: Pair) -> Pair:
    g, value = p.input(*y[1].shape[:-1], 1)
    return e(op.multiply(y[0], g)), y[1] * value


def _table(p: Program, e: Emit, y: Pair) -> Pair:
    """A constant for each position, as a position table."""
    t = p.normal(*y[1].shape[1:])
    return e(op.add(y[0], const(t))), y[1] + torch.from_numpy(t).double()


def _flat_residual(p: Program, e: Emit, y: Pair) -> Pair:
    """Through a view that keeps the last axis."""
    rows, cols = y[1].numel() // y[1].shape[-1], y[1].shape[-1]
    r, value = p.input(rows, cols)
    flat = e(op.reshape(y[0], (rows, cols)))
    return e(op.subtract(e(op.nn.relu(flat)), r)), F.relu(y[1].reshape(rows, cols)) - value


def plain(on_relax: Callable[[Emit, relax.Expr], relax.Expr], on_torch: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A tail without operands."""
    return lambda p, e, y: (on_relax(e, y[0]), on_torch(y[1]))


TAILS: dict[str, Callable[[Program, Emit, Pair], Pair]] = {
    "none": lambda p, e, y: y,
    "bias": _bias,
    "scale_bias": _scale_bias,
    "residual_relu": _residual_relu,
    "gate": _gate,
    "row_gate": _row_gate,
    "table": _table,
    "flat_residual": _flat_residual,
    "relu": plain(lambda e, y: e(op.nn.relu(y)), F.relu),
    "relu6": plain(lambda e, y: e(op.clip(y, 0, 6)), F.relu6),
    "clip": plain(lambda e, y: e(op.clip(y, -0.5, 0.25)), lambda y: y.clamp(-0.5, 0.25)),
    "leaky": plain(lambda e, y: e(op.nn.leakyrelu(y, 0.1)), lambda y: F.leaky_relu(y, 0.1)),
    "gelu": plain(lambda e, y: e(op.nn.gelu(y)), F.gelu),
    "gelu_tanh": plain(lambda e, y: e(op.nn.gelu_tanh(y)), lambda y: F.gelu(y, approximate="tanh")),
    "silu": plain(lambda e, y: e(op.nn.silu(y)), F.silu),
    "swish": plain(lambda e, y: e(op.multiply(y, e(op.sigmoid(y)))), F.silu),
    "tanh": plain(lambda e, y: e(op.tanh(y)), torch.tanh),
    "hardswish": plain(_hardswish, F.hardswish),
}


@dataclass(frozen=True)
class Case:
    """A program, the kernel chosen for it, and what it must compute."""

    call: KernelCall
    flow: Dataflow
    inputs: tuple[np.ndarray, ...]
    expected: np.ndarray


def case_of(p: Program, emit: Callable[[Emit], Pair], template: Template, target: Target = HOST) -> Case:
    """Build the program that `emit` writes, and the kernel that the template makes of it."""
    seen: list[torch.Tensor] = []

    def body(builder: relax.BlockBuilder) -> relax.Expr:
        out, value = emit(builder.emit)
        seen.append(value)
        return out

    # The tail makes parameters while it emits, so the program is built twice: for them, then for good.
    scratch = relax.BlockBuilder()
    state = p.rng.bit_generator.state
    with scratch.function("main", list(p.params)):
        with scratch.dataflow():
            scratch.emit_output(body(scratch))
        scratch.emit_func_output(relax.Tuple([]))
    known = list(p.params)
    p.rng.bit_generator.state = state
    p.arrays, fresh = [], iter(known)

    def again(*shape: int) -> tuple[relax.Var, torch.Tensor]:
        array = p.normal(*shape)
        p.arrays.append(array)
        return next(fresh), torch.from_numpy(array).double()

    p.input = again  # type: ignore[method-assign]
    flow = relax_main(body, known)
    call = match(flow, template, target)
    assert isinstance(call, KernelCall), call
    values = dict(zip(known, p.arrays, strict=True))
    expected = seen[-1].numpy()
    return Case(call, flow, tuple(values[v] for v in call.inputs), expected)


def linear(shape: Sequence[int], n: int, tail: str, template: Template, seed: int = 0) -> Case:
    """x [.., k] times a constant (k, n)."""
    p = Program(seed)

    def emit(e: Emit) -> Pair:
        x, xv = p.input(*shape)
        w = p.normal(shape[-1], n, scale=shape[-1] ** -0.5)
        y = e(op.matmul(x, const(w))), xv @ torch.from_numpy(w).double()
        return TAILS[tail](p, e, y)

    return case_of(p, emit, template)


def product(a: Sequence[int], b: Sequence[int], tail: str, template: Template, seed: int = 0) -> Case:
    """Two run-time tensors."""
    p = Program(seed)

    def emit(e: Emit) -> Pair:
        x, xv = p.input(*a)
        y, yv = p.input(*b)
        return TAILS[tail](p, e, (e(op.matmul(x, y)), xv @ yv))

    return case_of(p, emit, template)


@dataclass(frozen=True)
class Shape:
    """A convolution; padding as (top, left, bottom, right)."""

    size: tuple[int, int]
    cin: int
    cout: int
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1
    batch: int = 1


def convolution(s: Shape, tail: str, template: Template, seed: int = 0) -> Case:
    """A convolution in NHWC with constant weights."""
    p = Program(seed)

    def emit(e: Emit) -> Pair:
        x, xv = p.input(s.batch, *s.size, s.cin)
        fan = s.cin // s.groups * s.kernel[0] * s.kernel[1]
        w = p.normal(s.cout, *s.kernel, s.cin // s.groups, scale=fan**-0.5)
        y = e(
            op.nn.conv2d(
                *(x, const(w)),
                strides=s.strides,
                padding=s.padding,
                dilation=s.dilation,
                groups=s.groups,
                data_layout="NHWC",
                kernel_layout="OHWI",
            )
        )
        top, left, bottom, right = s.padding
        xv = F.pad(xv.permute(0, 3, 1, 2), (left, right, top, bottom))
        wv = torch.from_numpy(w).double().permute(0, 3, 1, 2)
        yv = F.conv2d(xv, wv, None, s.strides, 0, s.dilation, s.groups).permute(0, 2, 3, 1)
        return TAILS[tail](p, e, (y, yv))

    return case_of(p, emit, template)


def check(cases: Sequence[Case], whole: bool = True) -> None:
    """Build all kernels into one library and compare each with PyTorch in float64.

    Args:
        whole: the kernel must have taken the whole tail.
    """
    kernels = {f"k{i}": c.call.kernel for i, c in enumerate(cases)}
    # A folder of its own: a library that is written over an open one is not loaded again.
    with TemporaryDirectory() as folder:
        lib = Library(kernels, Path(folder))
    for i, case in enumerate(cases):
        if whole:
            assert case.call.output.same_as(case.flow.function.body.body), f"{case.call.name} stops before the end"
        # NaN spoils every result where the kernel reads what it has not written, or what is no part of its operands.
        written = [np.full(case.expected.shape, np.nan, np.float32)]
        written += [np.full(n // 4, np.nan, np.float32) for n in case.call.scratch_bytes]
        arrays, fences = zip(*(fenced(a) for a in (*case.inputs, *case.call.constants, *written)), strict=True)
        lib(f"k{i}", *arrays)
        assert all(intact() for intact in fences), f"{case.call.name} writes outside"
        out = arrays[len(case.inputs) + len(case.call.constants)]
        np.testing.assert_allclose(
            out, case.expected, rtol=2e-5, atol=2e-5, err_msg=f"{case.call.name} {case.call.key}"
        )


__all__ = ["HOST", "QUICK", "TAILS", "Case", "Shape", "case_of", "check", "convolution", "linear", "product"]
