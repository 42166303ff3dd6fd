"""Programs of one operator, whose every tensor is made by one stored tensor and read by another.

    y = op(p0 * s, p1 * s, ...);  output = sum(y * v)          s: the only input, a scalar

So no axis is pinned by where it comes from or goes to, and any item that gets lost or out of order shows in the output.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from graphopt.axes import Axes, Axis, infer
from graphopt.capture import capture
from graphopt.edit import Edit
from graphopt.program import Program
from graphopt.shrink import shrink
from tests.masking import masked_run

aten = torch.ops.aten
_SCALE = 0.75
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class T:
    """A tensor argument of this shape, with values between `low` and 0.8 more."""

    shape: tuple[int, ...]
    low: float = 0.1


@dataclass(frozen=True)
class Const:
    """A stored tensor that is an argument as it is: indices, masks."""

    values: Any
    dtype: torch.dtype = torch.int64


@dataclass(frozen=True)
class Case:
    """A call, and how many atoms of it may shrink."""

    op: Any
    free: int
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


def case(op: Any, free: int, *args: Any, **kwargs: Any) -> Case:
    """`case(aten.mm.default, 3, T((3, 4)), T((4, 5)))`."""
    return Case(op, free, args, tuple(kwargs.items()))


@cache
def _base(dtype: torch.dtype) -> Program:
    class Net(nn.Module):
        def forward(self, s: Tensor) -> Tensor:
            return s + 1

    return capture(Net(), (torch.tensor(_SCALE, dtype=dtype),))


def program_of(one: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Program:
    """The program of one call."""
    edit = Edit(_base(dtype))
    generator = torch.Generator().manual_seed(seed)
    end = edit.graph.output_node()
    scale = next(node for node in edit.graph.nodes if node.op == "placeholder")

    def stored(shape: tuple[int, ...], low: float = 0.1) -> Node:
        value = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + low
        return edit.add_tensor(f"p{len(edit.exported.state_dict)}", value.to(dtype), parameter=True)

    def node_of(value: Any) -> Any:
        if isinstance(value, T):
            return edit.call(aten.mul.Tensor, (stored(value.shape, value.low / _SCALE), scale), like=end)
        if isinstance(value, Const):
            name = f"c{len(edit.exported.constants)}"
            return edit.add_tensor(name, torch.tensor(value.values, dtype=value.dtype), parameter=False)
        return type(value)(map(node_of, value)) if isinstance(value, (list, tuple)) else value

    kwargs = {name: node_of(value) for name, value in one.kwargs}
    result = edit.call(one.op, tuple(map(node_of, one.args)), kwargs, like=end)
    total = None
    for item in list(_tensors(edit, result, end)):
        value = item.meta["val"]
        if value.is_complex():
            op = (
                aten.angle.default
                if "conj" in str(one.op)
                else aten.abs.default
                if "fft" in str(one.op)
                else aten.view_as_real.default
            )
            item = edit.call(op, (item,), like=end)
        elif value.dtype != dtype:
            item = edit.call(aten._to_copy.default, (item,), {"dtype": dtype}, like=end)
        reader = stored(tuple(item.meta["val"].shape))
        product = edit.call(aten.mul.Tensor, (item, reader), like=end)
        part = edit.call(aten.sum.default, (product,), like=end)
        total = part if total is None else edit.call(aten.add.Tensor, (total, part), like=end)
    end.args = ((total,),)
    edit.graph.eliminate_dead_code()
    return _base(dtype).replace(exported=edit.finish(), name="one")


def _tensors(edit: Edit, result: Node, end: Node) -> Iterator[Node]:
    value = result.meta["val"]
    if isinstance(value, Tensor):
        yield result
        return
    for place, item in enumerate(value):
        if isinstance(item, Tensor) and item.numel():
            yield edit.call(operator.getitem, (result, place), like=end)


def random_size(axes: Axes, atom: Axis, generator: torch.Generator) -> int:
    """An extent that the atom may have."""
    step = axes.multiple(atom)
    return step * int(torch.randint(1, atom.extent // step + 1, (), generator=generator))


def keeps(axes: Axes, generator: torch.Generator, *, shuffle: bool = False) -> Iterator[dict[Any, Tensor]]:
    """A random keep of every free atom alone, then of all at once; with `shuffle`, all items in another order."""
    every = {}
    for atom in axes.free():
        kept = random_size(axes, atom, generator) if not shuffle else atom.extent
        order = torch.randperm(atom.extent, generator=generator)[:kept]
        every[atom] = order if shuffle or kept % 2 else order.sort().values
    if len(every) > 1:
        yield from ({atom: kept} for atom, kept in every.items())
    if every:
        yield every


def assert_shrinks(
    program: Program,
    *,
    seed: int = 0,
    tolerance: float | None = None,
    axes: Axes | None = None,
    alone: bool = True,
) -> Axes:
    """Any keep equals the masked program, an order alone changes nothing, and keeping all gives the same bits.

    Keeps are of all free atoms at once, and with `alone` of each.
    """
    axes = infer(program) if axes is None else axes
    examples = program.example_inputs
    assert examples is not None
    generator = torch.Generator().manual_seed(seed)
    dtype = next(iter(examples.values())).dtype
    tolerance = TOLERANCE.get(dtype, 1e-10) if tolerance is None else tolerance
    for keep in list(keeps(axes, generator))[0 if alone else -1 :]:
        assert_equal(shrink(axes, keep).run(examples), masked_run(axes, keep, examples), tolerance, keep)
    plain = program.run(examples)
    for keep in list(keeps(axes, generator, shuffle=True))[-1:]:
        assert_equal(shrink(axes, keep).run(examples), plain, tolerance, keep)
        assert_equal(shrink(axes, {atom: range(atom.extent) for atom in keep}).run(examples), plain, 0.0, "all")
    return axes


def assert_equal(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float, what: Any) -> None:
    """Equal to `tolerance` of the largest value of each output."""
    for name, value in wanted.items():
        assert got[name].shape == value.shape
        if tolerance and value.is_floating_point():
            assert value.isfinite().all(), f"{name} is no reference for {what}"
            error = (got[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)
            assert error <= tolerance, f"{name} is off by {error:.1e} for {what}"
        else:
            assert torch.equal(got[name], value), f"{name} differs for {what}"
