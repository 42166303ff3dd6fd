"""Indices that are known only at run time stay inside the tensor that they point into.

PyTorch raises an error for an index out of range; an artefact without a runtime cannot, and TVM's kernels read and
write whatever lies there. Here such an index is moved to the nearest that exists, so that bad input reaches no foreign
memory.
"""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.dataflow import Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.rebuild import rebuild


def guard_indices(module: IRModule) -> IRModule:
    """Clamp the indices of take, gather, scatter and index operators, where they are not constants that fit.

    Rows that scatter_nd writes are left to its kernels, which clamp the one index of each.
    """
    flow = Dataflow(module["main"])

    def guarded(index: relax.Expr, extent: int, builder: relax.BlockBuilder) -> relax.Expr:
        known = flow.constant(index)
        if known is not None:
            fits = np.clip(known, 0, extent - 1)
            return index if np.array_equal(fits, known) else relax.const(fits, dtype_of(index))
        first, last = (relax.const(i, dtype_of(index)) for i in (0, extent - 1))
        return builder.emit(relax.op.minimum(builder.emit(relax.op.maximum(index, first)), last))

    def rewrite(binding: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
        op = op_of(value)
        if op == "relax.take" and value.attrs.axis is not None:
            return relax.op.take(value.args[0], value.args[1], int(value.attrs.axis), mode="clip")
        if op == "relax.gather_elements":
            axis = int(value.attrs.axis)
            index = guarded(value.args[1], shape_of(value.args[0])[axis], builder)
            return relax.op.gather_elements(value.args[0], index, axis)
        if op == "relax.scatter_elements":
            axis = int(value.attrs.axis)
            index = guarded(value.args[1], shape_of(value.args[0])[axis], builder)
            return relax.op.scatter_elements(value.args[0], index, value.args[2], axis, str(value.attrs.reduction))
        if op == "relax.index_tensor":
            extents = shape_of(value.args[0])
            indices = [guarded(i, n, builder) for i, n in zip(value.args[1].fields, extents, strict=False)]
            return relax.op.index_tensor(value.args[0], indices)
        return value

    return rebuild(module, rewrite)
