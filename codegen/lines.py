"""Convolutions over a line are ones over an image of height 1: what images have of kernels, zeros too, lines have."""

from __future__ import annotations

from tvm import relax
from tvm.ir import IRModule

from graphopt.codegen.dataflow import Dataflow, dtype_of, op_of, shape_of
from graphopt.codegen.rebuild import rebuild


def lines_as_images(module: IRModule) -> IRModule:
    """Rewrite every conv1d with a constant weight: x [n, c, w] as [n, c, 1, w], weights [o, i, k] as [o, i, 1, k]."""
    flow = Dataflow(module["main"])

    def rewrite(binding: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
        if op_of(value) != "relax.nn.conv1d":
            return value
        attrs, weight = value.attrs, flow.constant(value.args[1])
        layouts = (attrs.data_layout, attrs.kernel_layout, attrs.out_layout)
        if layouts != ("NCW", "OIW", "NCW") or weight is None:
            return value
        n, c, w = shape_of(value.args[0])
        before, behind = (int(p) for p in attrs.padding)
        image = builder.emit(
            relax.op.nn.conv2d(
                builder.emit(relax.op.reshape(value.args[0], (n, c, 1, w))),
                relax.const(weight[:, :, None, :], dtype_of(value)),
                strides=[1, *(int(s) for s in attrs.strides)],
                padding=[0, before, 0, behind],
                dilation=[1, *(int(d) for d in attrs.dilation)],
                groups=int(attrs.groups),
                out_dtype=dtype_of(value),
            )
        )
        return relax.op.reshape(image, shape_of(value))

    return rebuild(module, rewrite)
