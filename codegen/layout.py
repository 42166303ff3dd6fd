"""Which way tensors lie: with channels and features innermost, or outermost where that lets zeros save time.

Dense kernels want channels innermost (`channels_last.py`). Sparse ones want them outermost, pixels or tokens in the
vector (`kernels/spmm.py`). Images are laid out one way in the whole program, whichever the estimates say is faster, or
measurements where there are records of them; so a network never changes layout inside. A linear layer is turned on its
own, into

    x [.., k] -> permute [k, tokens] -> matmul(W [n, k], .) [n, tokens] -> permute [.., n]

and `simplify_views` takes out the transposes between layers that both were. A layer whose weight is annotated "dense"
keeps its dense kernel, a convolution between two transposes if need be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.channels_last import RULES, channels_last
from graphopt.codegen.dataflow import Array, Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.kernel_times import KernelTimes, Layer, Side, Times, image_layer
from graphopt.codegen.kernels.spmm import convolution, tokens_as_image
from graphopt.codegen.kernels.spmm_plan import plan_of
from graphopt.codegen.kernels.spmv import height_of
from graphopt.codegen.lines import lines_as_images
from graphopt.codegen.rebuild import rebuild
from graphopt.codegen.sparse_weights import Seen, SparseWeight, Weights, microseconds, shown
from graphopt.cost.register_tile import best_tile, cycles
from graphopt.sparsity import LEAST_ZEROS
from graphopt.targets.target import Target

# An estimate must be better by this much before a layout is changed for it: on Zen 5 dense products take down to 0.82
# of theirs, sparse ones 0.95 to 1.05 of theirs.
GAIN = 0.82
# And so much better a measured time, the least of many runs.
MEASURED_GAIN = 0.97
# Bytes per cycle at which a dense matrix streams from the third-level cache.
STREAM_BYTES_PER_CYCLE = 24
# Elements per cycle that a transpose moves.
TRANSPOSED_PER_CYCLE = 2.0


def lay_out(
    module: IRModule, target: Target, weights: Weights, times: KernelTimes
) -> tuple[IRModule, tuple[SparseWeight, ...]]:
    """Choose the layout of images, and turn the linear layers whose zeros pay. Says what was weighed."""
    module = lines_as_images(module)
    flow = Dataflow(module["main"])
    images = list(_images(flow, target, weights))
    # Without zeros there is nothing to gain, whatever the estimates of dense kernels differ by.
    zeros = any(not image.obstacle and image.seen and 1 - image.seen.density >= LEAST_ZEROS for image in images)
    if zeros and not any(image.times.obstacle for image in images):
        images = [image.measured_by(times) for image in images]
    total, gain = _weighed(images)
    total = Times(total.dense, total.sparse + _strangers_moved(flow))
    front = zeros and not times.only_dense and total.sparse <= gain * total.dense
    entries = _image_entries(images, front, total, target, times.only_dense)
    entries += _others(flow, ("relax.nn.conv1d", "relax.nn.conv3d"), target, weights)
    module = _some_channels_last(module, weights) if front else channels_last(module)
    flow = Dataflow(module["main"])
    entries += _others(flow, _TRANSPOSED, target, weights)

    def rewrite(binding: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
        found = _weigh_linear(flow, value, target, weights, times)
        if found is None:
            return value
        rule, entry = found
        entries.append(entry)
        return value if rule is None else rule(value, builder)

    return rebuild(module, rewrite), weights.in_order(entries)


def untouched(module: IRModule, target: Target, weights: Weights, reason: str) -> tuple[SparseWeight, ...]:
    """Entries for a target without sparse kernels."""
    operators = ("relax.matmul", "relax.nn.conv1d", "relax.nn.conv2d", "relax.nn.conv3d", *_TRANSPOSED)
    return weights.in_order(_others(Dataflow(module["main"]), operators, target, weights, reason))


_TRANSPOSED = ("relax.nn.conv1d_transpose", "relax.nn.conv2d_transpose", "relax.nn.conv3d_transpose")


def _others(
    flow: Dataflow, operators: tuple[str, ...], target: Target, weights: Weights, reason: str = ""
) -> list[SparseWeight]:
    """Entries for layers that no sparse kernel takes."""
    entries = []
    for binding in flow.bindings:
        if (op := op_of(binding.value)) not in operators:
            continue
        name = _operator(op)
        for argument in binding.value.args[:2]:
            weight = flow.constant(argument)
            if weight is not None and (seen := weights.look(weight)) is not None:
                entries.append(
                    seen.entry(weight, name, target, reason=reason or f"there is no sparse kernel for {name}")
                )
    return entries


def _operator(op: str) -> str:
    name = op.removeprefix("relax.").removeprefix("nn.")
    return "linear" if name == "matmul" else name


# Images ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Image:
    """A convolution, what is known of its weight, and its times: estimates, and as measured."""

    call: relax.Call
    weight: Array
    seen: Seen | None
    depthwise: bool
    times: Times
    measured: Times | None = None

    @property
    def obstacle(self) -> str:
        """Why its zeros cannot be made use of."""
        if self.times.obstacle:
            return self.times.obstacle
        if self.seen is not None and self.seen.dense:
            return 'annotated "dense"'
        return "depthwise: with so few taps there is nothing to gain from zeros" if self.depthwise else ""

    @property
    def stays_dense(self) -> bool:
        """Whether it is taken as dense whichever way the images lie, between two transposes if need be."""
        return self.seen is not None and self.seen.dense and not self.depthwise

    @property
    def moved(self) -> float:
        """Cycles for the transposes around it where it stays dense in a network in NCHW."""
        elements = math.prod(shape_of(self.call.args[0])) + math.prod(shape_of(self.call))
        return elements / TRANSPOSED_PER_CYCLE if self.stays_dense else 0.0

    def measured_by(self, times: KernelTimes) -> _Image:
        """With what records have of it."""
        seen = self.seen
        density = 1.0 if seen is None else seen.density
        layer = image_layer(self.call, self.weight, density, "" if seen is None else seen.form)
        if not self.stays_dense:
            return replace(self, measured=times.of(layer, self.times))
        found = times.of(layer, self.times, ("dense",))
        return self if found is None else replace(self, measured=Times(found.dense, found.dense + self.moved))


def _weighed(images: list[_Image]) -> tuple[Times, float]:
    """What all images take either way, and how much better NCHW must be.

    Those that were not measured count as estimated, corrected by what the estimates of the measured ones are off.
    """
    known = [(image.times, image.measured) for image in images if image.measured is not None]

    def total(side: Side) -> float:
        found = sum(measured.of(side) for _, measured in known)
        estimated = sum(estimate.of(side) for estimate, _ in known)
        factor = found / estimated if estimated else 1.0
        return found + factor * sum(image.times.of(side) for image in images if image.measured is None)

    times = Times(total("dense"), total("sparse"))
    return times, MEASURED_GAIN if len(known) == len(images) else GAIN


def _images(flow: Dataflow, target: Target, weights: Weights) -> Iterator[_Image]:
    for binding in flow.bindings:
        value = binding.value
        times = _image_times(flow, value, target)
        if times is None:
            continue
        weight = flow.constant(value.args[1])
        assert weight is not None, "_image_times() has seen that it is constant"
        seen = weights.look(weight)
        depthwise = _is_depthwise(value, weight)
        image = _Image(value, weight, seen, depthwise, times)
        if image.stays_dense:
            image = replace(image, times=Times(times.dense, times.dense + image.moved))
        yield image


def _image_entries(
    images: list[_Image], front: bool, total: Times, target: Target, only_dense: str
) -> list[SparseWeight]:
    """Images are laid out one way for the network as a whole, so every entry says what that took."""
    if math.isinf(total.sparse):
        first = next(image for image in images if image.times.obstacle)
        name = "a convolution" if first.seen is None or first.seen.name is None else first.seen.name
        reason = f"the network's images are NHWC: in NCHW there is no kernel for {name} ({first.times.obstacle})"
    else:
        nhwc, nchw = (shown(microseconds(cycles, target)) for cycles in (total.dense, total.sparse))
        if front:
            reason = f"the network's images are NCHW: {nchw} beats {nhwc}"
        else:
            verb = "beats" if total.dense <= total.sparse else "is hardly slower than"
            reason = f"the network's images are NHWC: {nhwc} {verb} {nchw}"
        if known := sum(image.measured is not None for image in images):
            reason += ", as measured" if known == len(images) else f", {known} of {len(images)} layers as measured"
    entries = []
    for image in images:
        if image.seen is None:
            continue
        obstacle = image.obstacle
        entries.append(
            image.seen.entry(
                image.weight,
                f"conv{image.seen.dims - 2}d",
                target,
                eligible=not obstacle,
                picked=front and not obstacle,
                reason=obstacle or only_dense or reason,
                dense=image.times.dense,
                sparse=None if obstacle else image.times.sparse,
                measured=image.measured,
            )
        )
    return entries


def _some_channels_last(module: IRModule, weights: Weights) -> IRModule:
    """In a network in NCHW, the convolutions that shall be taken as dense, and those that have no kernel there."""
    flow = Dataflow(module["main"])

    def rewrite(binding: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
        op = op_of(value)
        weight = flow.constant(value.args[1]) if op == "relax.nn.conv2d" else None
        if weight is None or _is_depthwise(value, weight):
            dense = False
        else:
            seen = weights.look(weight)
            dense = seen is not None and seen.dense
        new = RULES[op](value, builder.emit, flow) if dense or op in _STRANGERS else None
        return value if new is None else new

    return rebuild(module, rewrite)


# Convolutions that have kernels in NHWC only.
_STRANGERS = ("relax.nn.conv2d_transpose",)


def _strangers_moved(flow: Dataflow) -> float:
    """Cycles for the transposes around these in a network in NCHW."""
    values = [binding.value for binding in flow.bindings if op_of(binding.value) in _STRANGERS]
    elements = sum(math.prod(shape_of(value.args[0])) + math.prod(shape_of(value)) for value in values)
    return elements / TRANSPOSED_PER_CYCLE


def _is_depthwise(value: relax.Call, weight: Array) -> bool:
    return int(value.attrs.groups) == shape_of(value.args[0])[1] and weight.shape[1] == 1


# Linear layers --------------------------------------------------------------------------------------------------------

Rule = Callable[[relax.Call, relax.BlockBuilder], relax.Expr]


def _weigh_linear(
    flow: Dataflow, value: relax.Expr, target: Target, weights: Weights, times: KernelTimes
) -> tuple[Rule | None, SparseWeight] | None:
    """How a product with a constant matrix is rewritten, and its entry; None where there is nothing to say."""
    if op_of(value) != "relax.matmul":
        return None
    x, weight = value.args[0], flow.constant(value.args[1])
    first = weight is None
    if first:
        x, weight = value.args[1], flow.constant(value.args[0])
    if weight is None or flow.constant(x) is not None or (seen := weights.look(weight)) is None:
        return None

    def entry(reason: str, **more: Any) -> SparseWeight:
        return seen.entry(weight, "linear", target, reason=reason, **more)

    shape, zeros = shape_of(x), 1 - seen.density
    if weight.ndim != 2 or len(shape) < 2 or 0 in (*shape, *weight.shape) or (first and math.prod(shape[:-2]) != 1):
        obstacle = "it is no product of one matrix with rows"
    elif str(weight.dtype) != "float32" or dtype_of(x) != "float32":
        obstacle = f"{weight.dtype} times {dtype_of(x)}: sparse kernels are for float32"
    elif zeros < LEAST_ZEROS and not first and not seen.dense:
        obstacle = f"{zeros:.0%} zeros, of use from {LEAST_ZEROS:.0%} on"
    else:
        obstacle = ""
    if obstacle:
        return (None, entry(obstacle)) if seen.name else None
    matrix = weight.T if first else weight
    tokens = shape[-1] if first else math.prod(shape[:-1])
    estimate = linear_times(matrix, tokens, target)
    if seen.dense:
        return (_swapped(weight) if first else None), entry('annotated "dense"', dense=estimate.dense)
    if first:
        moved = _moved(matrix.shape[0], matrix.shape[1], tokens)
        reason = "the weight is the first factor: no other kernel takes it"
        dense, sparse = estimate.dense + moved, estimate.sparse - moved
        return None, entry(reason, eligible=True, picked=True, dense=dense, sparse=sparse)
    measured = times.of(Layer((tokens, matrix.shape[0]), matrix, seen.density, seen.form), estimate)
    decisive, gain = (estimate, GAIN) if measured is None else (measured, MEASURED_GAIN)
    dense, sparse = decisive.dense, decisive.sparse
    picked = not times.only_dense and sparse <= gain * dense
    if times.only_dense:
        reason = times.only_dense
    elif picked:
        reason = f"{dense / sparse:.{1 if measured is None else 2}f} times as fast"
    else:
        reason = "dense is faster" if dense <= sparse else f"dense is hardly slower: {dense / sparse:.2f} times"
    reason += "" if measured is None or times.only_dense else ", as measured"
    weighed = entry(
        reason, eligible=True, picked=picked, dense=estimate.dense, sparse=estimate.sparse, measured=measured
    )
    return (turned(weight) if picked else None), weighed


def _moved(inputs: int, outputs: int, tokens: int) -> float:
    """Cycles for both transposes around a linear layer that is turned."""
    return (inputs + outputs) * tokens / TRANSPOSED_PER_CYCLE if tokens > 1 else 0.0


def linear_times(weight: Array, tokens: int, target: Target) -> Times:
    """Estimates for a linear layer with `weight` (inputs, outputs)."""
    inputs, outputs = weight.shape
    if tokens == 1:
        stream = 4 * weight.size / STREAM_BYTES_PER_CYCLE
        return Times(max(_dense(1, outputs, inputs, target), stream), height_of(weight.T, target)[1])
    moved = _moved(inputs, outputs, tokens)
    window = tokens_as_image(inputs, tokens)
    return Times(_dense(tokens, outputs, inputs, target), plan_of(weight.T, window, target).cycles + moved)


def _dense(rows: int, columns: int, steps: int, target: Target) -> float:
    return steps * cycles(rows, columns, best_tile(rows, columns, target.isa), target.isa)


def _image_times(flow: Dataflow, value: relax.Expr, target: Target) -> Times | None:
    """Estimates for a convolution; None for anything else, and where its zeros are none."""
    if op_of(value) != "relax.nn.conv2d":
        return None
    weight = flow.constant(value.args[1])
    if weight is None:
        return None
    groups = int(value.attrs.groups)
    batch, outputs, *size = shape_of(value)
    pixels = batch * math.prod(size)
    if _is_depthwise(value, weight):
        taps = math.prod(weight.shape[2:]) * pixels * outputs / target.isa.lanes() / target.isa.fma_per_cycle
        return Times(taps * 1.5, taps * 2.0)
    found = convolution(flow, value)
    dense = groups * _dense(pixels, outputs // groups, math.prod(weight.shape[1:]), target)
    if isinstance(found, str):
        return Times(dense, math.inf, found)
    matrix, window, _ = found
    return Times(dense, plan_of(matrix, window, target).cycles)


def turned(weight: Array) -> Rule:
    """x W with features in front."""

    def rule(value: relax.Call, builder: relax.BlockBuilder) -> relax.Expr:
        x, shape, inputs = value.args[0], shape_of(value), weight.shape[0]
        # The rank stays where it can: only then do `simplify_views` and the epilogue see through the transposes.
        tokens = math.prod(shape[:-1])
        kept = len(shape) if math.prod(shape[:-2]) == 1 and len(shape) <= 3 else 2
        if kept != len(shape):
            x = builder.emit(relax.op.reshape(x, (tokens, inputs)))
        order = [*range(kept - 2), kept - 1, kept - 2]
        columns = builder.emit(relax.op.permute_dims(x, order))
        turned = builder.emit(relax.op.matmul(relax.const(np.ascontiguousarray(weight.T), "float32"), columns))
        back = relax.op.permute_dims(turned, order)
        return back if kept == len(shape) else relax.op.reshape(builder.emit(back), shape)

    return rule


def _swapped(weight: Array) -> Rule:
    """W x as (x^T W^T)^T, which dense kernels take."""

    def rule(value: relax.Call, builder: relax.BlockBuilder) -> relax.Expr:
        rank = len(shape_of(value))
        order = [*range(rank - 2), rank - 1, rank - 2]
        rows = builder.emit(relax.op.permute_dims(value.args[1], order))
        product = relax.op.matmul(rows, relax.const(np.ascontiguousarray(weight.T), "float32"))
        return relax.op.permute_dims(builder.emit(product), order)

    return rule
