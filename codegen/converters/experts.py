"""Products of groups of rows with a matrix each, as mixtures of experts make them."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx
from tvm import relax, te, tirx

from graphopt.codegen.converters.common import Converter, arguments
from graphopt.codegen.dataflow import dtype_of, shape_of
from graphopt.codegen.half import Importer


def _grouped_mm(node: fx.Node, importer: Importer) -> relax.Expr:
    """Rows offs[e - 1] to offs[e] times matrix e; zero behind the last group.

        Y[s, n] = sum_k X[s, k] * W[e(s), k, n],   e(s) the number of offs that are <= s

    Which rows a matrix gets is known only at run time, and how many there are in all at compile time. So the kernel
    runs over rows, and looks up the matrix of each.
    """
    a = arguments(node, importer)
    emit = importer.block_builder.emit
    x, weight = (a[key] for key in (("input", "weight") if "weight" in a else ("self", "mat2")))
    offs = a["offs"]
    if len(shape_of(x)) != 2 or len(shape_of(weight)) != 3 or offs is None:
        raise ValueError("only groups of the rows of a matrix, with a matrix for each group")
    if a.get("bias") is not None:
        raise ValueError("products of groups with a bias")
    (rows, inner), (experts, _, columns) = shape_of(x), shape_of(weight)
    places = relax.const(np.arange(rows).reshape(rows, 1), dtype_of(offs))
    passed = emit(relax.op.less_equal(emit(relax.op.reshape(offs, (1, experts))), places))
    group = emit(relax.op.sum(emit(relax.op.astype(passed, "int32")), [1]))
    dtype = dtype_of(x)
    held = "float64" if dtype == "float64" else "float32"

    def product(x: te.Tensor, weight: te.Tensor, group: te.Tensor) -> te.Tensor:
        k = te.reduce_axis((0, inner), "k")

        def element(s: Any, n: Any) -> Any:
            matrix = tirx.min(group[s], experts - 1)
            return te.sum(x[s, k].astype(held) * weight[matrix, k, n].astype(held), axis=k)

        sums = te.compute((rows, columns), element, "grouped_mm")
        return te.compute(
            (rows, columns),
            lambda s, n: tirx.if_then_else(group[s] < experts, sums[s, n], tirx.const(0, held)).astype(dtype),
            "grouped",
        )

    return importer.block_builder.emit_te(product, x, weight, group, primfunc_name_hint="grouped_mm")


TABLE: dict[str, Converter] = {
    "_grouped_mm.default": _grouped_mm,
    "grouped_mm_fallback.default": _grouped_mm,  # transformers' own, for what PyTorch's does not take
}
