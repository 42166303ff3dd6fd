"""What networks do with images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import fx
from tvm import relax

from graphopt.codegen.converters.common import Converter, arguments, as_dtype
from graphopt.codegen.dataflow import dtype_of, shape_of
from graphopt.codegen.half import Importer


def _pad(mode: str) -> Converter:
    def convert(node: fx.Node, importer: Importer) -> relax.Expr:
        a = arguments(node, importer)
        width = [0] * (2 * len(shape_of(a["self"])))
        for i in range(0, len(a["padding"]), 2):  # torch counts from the last dimension, Relax from the first
            at = len(width) - 2 - i
            width[at : at + 2] = a["padding"][i : i + 2]
        return importer.block_builder.emit(relax.op.nn.pad(a["self"], width, mode))

    return convert


def _ones_and_zeros(a: dict[str, Any], shape: tuple[int, ...], dtype: str) -> tuple[relax.Expr, relax.Expr]:
    """Weight and bias of a norm, and what stands for those that it does not have."""
    weight = relax.const(np.ones(shape), dtype) if a["weight"] is None else a["weight"]
    bias = relax.const(np.zeros(shape), dtype) if a["bias"] is None else a["bias"]
    return weight, bias


def _group_norm(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    x = a["input"]
    shape, dtype = shape_of(x), dtype_of(x)
    weight, bias = _ones_and_zeros(a, (shape[1],), dtype)
    if dtype == "bfloat16":  # which TVM does not take
        x, weight, bias = (emit(relax.op.astype(t, "float32")) for t in (x, weight, bias))
    axes = list(range(2, len(shape)))
    norm = relax.op.nn.group_norm(x, weight, bias, a["num_groups"], channel_axis=1, axes=axes, epsilon=a["eps"])
    return as_dtype(emit(norm), dtype, importer)


def _layer_norm(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    x, shape = a["input"], tuple(a["normalized_shape"])
    dtype = dtype_of(x)
    weight, bias = _ones_and_zeros(a, shape, dtype)
    if dtype == "bfloat16":
        x, weight, bias = (emit(relax.op.astype(t, "float32")) for t in (x, weight, bias))
    axes = list(range(-len(shape), 0))
    return as_dtype(emit(relax.op.nn.layer_norm(x, weight, bias, axes, a["eps"])), dtype, importer)


def _avg_pool2d(node: fx.Node, importer: Importer) -> relax.Expr:
    a = arguments(node, importer)
    if a["divisor_override"] is None:
        return importer._avg_pool2d(node)
    if a["ceil_mode"]:
        raise ValueError("a divisor of one's own together with ceil_mode")
    emit = importer.block_builder.emit
    kernel, padding = (list(a[k]) * (2 // len(a[k])) for k in ("kernel_size", "padding"))
    strides = list(a["stride"]) * (2 // len(a["stride"])) if a["stride"] else kernel
    mean = emit(relax.op.nn.avg_pool2d(a["self"], kernel, strides, padding * 2, count_include_pad=True))
    factor = math.prod(kernel) / a["divisor_override"]
    return emit(relax.op.multiply(mean, relax.const(factor, dtype_of(mean))))


def _upsample_nearest2d(node: fx.Node, importer: Importer) -> relax.Expr:
    """PyTorch's "nearest": the pixel at floor(i * in / out)."""
    x = arguments(node, importer)["input"]
    resized = relax.op.image.resize2d(
        x,
        tuple(node.meta["val"].shape[2:]),
        layout="NCHW",
        method="nearest_neighbor",
        coordinate_transformation_mode="asymmetric",
        rounding_method="floor",
    )
    return importer.block_builder.emit(resized)


def _grid_sampler_2d(node: fx.Node, importer: Importer) -> relax.Expr:
    """Pixels at fractional places; PyTorch has a place's two numbers last, Relax behind the batch."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    sampled = relax.op.image.grid_sample(
        a["input"],
        emit(relax.op.permute_dims(a["grid"], [0, 3, 1, 2])),
        method=("bilinear", "nearest", "bicubic")[a["interpolation_mode"]],
        layout="NCHW",
        padding_mode=("zeros", "border", "reflection")[a["padding_mode"]],
        align_corners=a["align_corners"],
    )
    return emit(sampled)


def _max_pool2d_with_indices(node: fx.Node, importer: Importer) -> relax.Expr:
    """The maxima; and, where they are asked for, their places in the flattened image."""
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    kernel, padding, dilation = (list(a[k]) * (2 // len(a[k])) for k in ("kernel_size", "padding", "dilation"))
    strides = list(a["stride"]) * (2 // len(a["stride"])) if a["stride"] else kernel
    x = a["self"]
    pooled = emit(relax.op.nn.max_pool2d(x, kernel, strides, padding * 2, dilation, bool(a["ceil_mode"])))
    if not any(user.args[1] == 1 for user in node.users):
        return emit(relax.Tuple([pooled, emit(relax.op.full(shape_of(pooled), relax.const(0, "int64"), "int64"))]))
    (*lead, height, width), (*_, rows, columns) = shape_of(x), shape_of(pooled)
    # One line per output pixel: the pixels in its window, or height * width, which holds -inf, beside the image.
    y, dy = np.arange(rows)[:, None] * strides[0] - padding[0], np.arange(kernel[0])[None] * dilation[0]
    z, dz = np.arange(columns)[:, None] * strides[1] - padding[1], np.arange(kernel[1])[None] * dilation[1]
    at_y, at_z = (y + dy)[:, None, :, None], (z + dz)[None, :, None, :]
    inside = (at_y >= 0) & (at_y < height) & (at_z >= 0) & (at_z < width)
    places = np.where(inside, at_y * width + at_z, height * width).reshape(rows * columns, -1).astype("int64")
    flat = emit(relax.op.reshape(x, (math.prod(lead), height * width)))
    flat = emit(relax.op.nn.pad(flat, [0, 0, 0, 1], "constant", -math.inf))
    windows = emit(relax.op.take(flat, relax.const(places.reshape(-1), "int64"), 1))
    windows = emit(relax.op.reshape(windows, (math.prod(lead), *places.shape)))
    best = emit(relax.op.astype(emit(relax.op.argmax(windows, 2, keepdims=True)), "int64"))
    table = emit(relax.op.broadcast_to(relax.const(places[None], "int64"), (math.prod(lead), *places.shape)))
    indices = emit(relax.op.gather_elements(table, best, 2))
    return emit(relax.Tuple([pooled, emit(relax.op.reshape(indices, shape_of(pooled)))]))


TABLE: dict[str, Converter] = {
    "avg_pool2d.default": _avg_pool2d,
    "grid_sampler_2d.default": _grid_sampler_2d,
    "group_norm.default": _group_norm,
    "layer_norm.default": _layer_norm,
    "max_pool2d_with_indices.default": _max_pool2d_with_indices,
    "reflection_pad1d.default": _pad("reflect"),
    "reflection_pad2d.default": _pad("reflect"),
    "reflection_pad3d.default": _pad("reflect"),
    "replication_pad1d.default": _pad("replicate"),
    "replication_pad2d.default": _pad("replicate"),
    "replication_pad3d.default": _pad("replicate"),
    "upsample_nearest2d.vec": _upsample_nearest2d,
}
