"""A lowered Relax function as straight-line steps: kernels called on named buffers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tvm import relax
from tvm.ir import GlobalVar
from tvm.relax import ExternFunc

from graphopt.codegen.dataflow import Constant, dtype_of, is_tensor, op_of, shape_of
from graphopt.errors import UnsupportedOp
from graphopt.spec import dtype_bytes

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


@dataclass(eq=False)
class Buffer:
    """A dense tensor's bytes. Two values of the program that are views of each other share one buffer."""

    kind: Literal["input", "weight", "temporary"]
    nbytes: int
    index: int = 0  # which input or weight
    label: str = ""  # for dumps


@dataclass(frozen=True)
class Step:
    """One kernel call; `arguments` are what it reads, `results` what it writes, `scratch` what it may scribble on."""

    kernel: str  # name of a function in the lowered module, or of a template's call
    arguments: tuple[Buffer, ...]
    results: tuple[Buffer, ...]
    scratch: tuple[Buffer, ...] = ()


@dataclass(frozen=True)
class StepProgram:
    """Steps in order, and where the program's inputs, weights and outputs are."""

    steps: tuple[Step, ...]
    inputs: tuple[Buffer, ...]
    weights: tuple[np.ndarray, ...]
    outputs: tuple[Buffer, ...]  # an output may be an input or a weight, or stand here twice


def nbytes_of(expr: relax.Expr) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape_of(expr)) * dtype_bytes(dtype_of(expr))


class _Reader:
    def __init__(self, main: relax.Function) -> None:
        self.values: dict[relax.Var, tuple[Buffer, ...]] = {}
        self.weights: list[np.ndarray] = []
        self.by_content: dict[bytes, Buffer] = {}
        self.inputs = tuple(Buffer("input", nbytes_of(p), index=i, label=p.name) for i, p in enumerate(main.params))
        self.values.update((p, (b,)) for p, b in zip(main.params, self.inputs, strict=True))

    def buffers(self, expr: relax.Expr) -> tuple[Buffer, ...]:
        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return tuple(b for field in expr.fields for b in self.buffers(field))
        if isinstance(expr, relax.TupleGetItem):
            return (self.buffers(expr.tuple_value)[expr.index],)
        if isinstance(expr, Constant):
            return (self.weight(expr.value.numpy()),)
        raise UnsupportedOp(op=op_of(expr) or type(expr).__name__, where="the lowered program", reason="not a tensor")

    def weight(self, array: np.ndarray) -> Buffer:
        """The buffer of a constant; equal constants share one."""
        array = np.ascontiguousarray(array)
        key = hashlib.blake2b(array.reshape(-1).view(np.uint8).data).digest()
        if key not in self.by_content:
            self.by_content[key] = Buffer("weight", max(1, array.nbytes), index=len(self.weights))
            self.weights.append(array)
        return self.by_content[key]


def read_steps(
    main: relax.Function, constants: dict[str, tuple[np.ndarray, ...]], scratch: dict[str, tuple[int, ...]]
) -> StepProgram:
    """Turn `main` into steps.

    Args:
        main: straight-line; only calls of TIR functions, of external kernels, and reshapes.
        constants: per kernel, the packed weights that follow its run-time inputs.
        scratch: per kernel, the bytes of each scratch buffer that follows its results.

    Raises:
        UnsupportedOp: an operator that nothing has lowered.
    """
    reader = _Reader(main)
    steps = []
    for binding in (b for block in main.body.blocks for b in block.bindings):
        value = binding.value
        op = op_of(value)
        if op in ("relax.call_tir", "relax.call_dps_packed"):
            kernel = _callee(value.args[0])
            arguments = [b for a in value.args[1:] for b in reader.buffers(a)]
            arguments += [reader.weight(w) for w in constants.get(kernel, ())]
            results = tuple(Buffer("temporary", n, label=binding.var.name) for n in _sizes(binding.var))
            spare = tuple(Buffer("temporary", n, label=f"{kernel}.scratch") for n in scratch.get(kernel, ()))
            steps.append(Step(kernel, tuple(arguments), results, spare))
            reader.values[binding.var] = results
        elif op == "relax.reshape":
            reader.values[binding.var] = reader.buffers(value.args[0])
        elif op:
            raise UnsupportedOp(op=op, where="the lowered program", reason="TVM has no lowering for it")
        else:
            reader.values[binding.var] = reader.buffers(value)
    return StepProgram(tuple(steps), reader.inputs, tuple(reader.weights), reader.buffers(main.body.body))


def _callee(func: relax.Expr) -> str:
    assert isinstance(func, GlobalVar | ExternFunc), f"a call of {type(func).__name__}"
    return func.name_hint if isinstance(func, GlobalVar) else str(func.global_symbol)


def _sizes(var: relax.Var) -> Iterator[int]:
    if is_tensor(var):
        yield max(1, nbytes_of(var))
    else:
        for field in var.ty.fields:
            yield max(1, nbytes_of(relax.Var("field", field)))
