"""Kernel templates, one file per kernel family."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from graphopt.codegen.kernels.template import Template

# Family to class. Where two look at the same operator, the earlier one is asked first.
TEMPLATES: dict[str, str] = {
    "attention": "Attention",
    "depthwise_planes": "DepthwisePlanes",
    "spmv": "SparseVector",
    "spmm": "SparseProduct",
    "similarity": "Similarity",
    "row_dots": "RowDots",
    "gemm": "Gemm",
    "depthwise": "DepthwiseConv2d",
    "conv2d": "Conv2d",
    "layer_norm": "LayerNorm",
    "layer_norm_columns": "LayerNormColumns",
    "transpose": "Transpose",
    "softmax": "Softmax",
    "pool_planes": "PoolPlanes",
    "pool": "Pool",
    "scatter_rows": "ScatterRows",
    "row_max": "RowMax",
    "sorting": "Sorting",
    "scan": "Scan",
}


@cache
def templates() -> tuple[Template, ...]:
    """One instance of every template, in the order in which they are asked."""
    return tuple(getattr(import_module(f"{__name__}.{file}"), cls)() for file, cls in TEMPLATES.items())
