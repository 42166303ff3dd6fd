"""Chains of reshapes and transposes keep their meaning and lose their length."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.dataflow import Dataflow, op_of, shape_of
from graphopt.codegen.simplify_views import simplify_views

UNARY = {"relax.negative": np.negative, "relax.nn.relu": lambda x: np.maximum(x, 0)}


def interpret(module: IRModule, x: np.ndarray) -> np.ndarray:
    """Run a function of reshapes, transposes and a few unary operators in numpy."""
    flow = Dataflow(module["main"])
    known = {flow.function.params[0]: x}
    for binding in flow.bindings:
        value = binding.value
        op = op_of(value)
        if op == "relax.permute_dims":
            known[binding.var] = known[value.args[0]].transpose([int(a) for a in value.attrs.axes])
        elif op in UNARY:
            known[binding.var] = UNARY[op](known[value.args[0]])
        elif op:
            known[binding.var] = known[value.args[0]].reshape(shape_of(binding.var))
        else:
            known[binding.var] = known[value]
    return known[flow.function.body.body]


def chain(shape: tuple[int, ...], moves: list) -> IRModule:
    """A function that applies the moves: a tuple reshapes, a list of axes transposes, a string is an operator."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            value = x
            for move in moves:
                if isinstance(move, str):
                    value = builder.emit(getattr(relax.op, move)(value))
                elif isinstance(move, list):
                    value = builder.emit(relax.op.permute_dims(value, move))
                else:
                    value = builder.emit(relax.op.reshape(value, move))
            out = builder.emit_output(value)
        builder.emit_func_output(out)
    return builder.finalize()


def count(module: IRModule, op: str) -> int:
    return sum(op_of(b.value) == f"relax.{op}" for b in Dataflow(module["main"]).bindings)


@st.composite
def chains(draw: st.DrawFn) -> tuple[tuple[int, ...], list]:
    """A start shape and moves between shapes of the same number of elements."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4, 5]), min_size=1, max_size=5))

    def shape() -> tuple[int, ...]:
        parts = draw(st.permutations(factors))
        out = [1]
        for f in parts:
            if draw(st.booleans()):
                out.append(f)
            else:
                out[-1] *= f
        return tuple(out)

    start = now = shape()
    moves: list = []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["reshape", "permute", "negative"]))
        if kind == "reshape":
            now = shape()
            moves.append(now)
        elif kind == "permute":
            axes = draw(st.permutations(range(len(now))))
            now = tuple(now[a] for a in axes)
            moves.append(list(axes))
        else:
            moves.append(kind)
    return start, moves


@settings(max_examples=150, deadline=None)
@given(chains())
def test_any_chain_keeps_its_meaning(case: tuple[tuple[int, ...], list]) -> None:
    """Random chains give the same tensor before and after, with at most as many transposes."""
    shape, moves = case
    before = chain(shape, moves)
    after = simplify_views(before)
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    np.testing.assert_array_equal(interpret(after, x), interpret(before, x))
    assert count(after, "permute_dims") <= count(before, "permute_dims")


def test_transposes_that_cancel_vanish() -> None:
    """Splitting heads and putting them together again is nothing at all."""
    module = simplify_views(chain((1, 197, 384), [(1, 197, 6, 64), [0, 2, 1, 3], [0, 2, 1, 3], (1, 197, 384)]))
    assert count(module, "permute_dims") == 0
    assert count(module, "reshape") == 0


def test_patch_embedding_in_channels_last_is_free() -> None:
    """NHWC to NCHW, flattened and transposed back to tokens, is a reshape."""
    module = simplify_views(chain((1, 14, 14, 384), [[0, 3, 1, 2], (1, 384, 196), [0, 2, 1]]))
    assert count(module, "permute_dims") == 0
    assert count(module, "reshape") == 1


def test_elementwise_operators_do_not_stop_a_chain() -> None:
    """A relu between two transposes that cancel leaves the relu."""
    module = simplify_views(chain((1, 8, 8, 16), [[0, 3, 1, 2], "negative", [0, 2, 3, 1]]))
    assert count(module, "permute_dims") == 0
    assert count(module, "negative") == 1
