"""float16 and bfloat16 models through TVM's importer, which makes every product float32 and then trips over the bias.

Products keep their float32 sums, as PyTorch's do; the bias is added to those and the result rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from tvm import relax
from tvm.ir import IRModule
from tvm.relax.frontend.torch.exported_program_translator import ExportedProgramImporter

from graphopt.codegen.dataflow import dtype_of, is_tensor, op_of, shape_of
from graphopt.codegen.rebuild import rebuild

HALVES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}


class Importer(ExportedProgramImporter):
    """TVM's importer; differs for float16 and bfloat16 only."""

    def _linear(self, node: fx.Node) -> relax.Expr:
        x, weight, *rest = self.retrieve_args(node)
        bias = rest[0] if rest else None
        if dtype_of(x) == "float32" or bias is None:
            return super()._linear(node)
        emit = self.block_builder.emit
        product = emit(relax.op.linear(x, weight, None, "float32"))
        return emit(relax.op.add(product, emit(relax.op.astype(bias, "float32"))))

    def _conv1d_impl(self, x: Any, weight: Any, bias: Any, *args: Any, **kwargs: Any) -> relax.Expr:
        return self._with_bias(super()._conv1d_impl, x, weight, bias, args, kwargs)

    def _conv2d_impl(self, x: Any, weight: Any, bias: Any, *args: Any, **kwargs: Any) -> relax.Expr:
        return self._with_bias(super()._conv2d_impl, x, weight, bias, args, kwargs)

    def _conv_transpose1d_impl(self, x: Any, weight: Any, bias: Any, *args: Any, **kwargs: Any) -> relax.Expr:
        return self._with_bias(super()._conv_transpose1d_impl, x, weight, bias, args, kwargs)

    def _conv_transpose2d_impl(self, x: Any, weight: Any, bias: Any, *args: Any, **kwargs: Any) -> relax.Expr:
        return self._with_bias(super()._conv_transpose2d_impl, x, weight, bias, args, kwargs)

    def _with_bias(self, convolve: Any, x: Any, weight: Any, bias: Any, args: Any, kwargs: Any) -> relax.Expr:
        if dtype_of(x) == "float32" or self._is_no_bias(bias):
            return convolve(x, weight, bias, *args, **kwargs)
        emit = self.block_builder.emit
        result = convolve(x, weight, None, *args, **kwargs)
        bias = emit(relax.op.reshape(bias, (1, -1, *[1] * (len(shape_of(result)) - 2))))
        return emit(relax.op.add(result, emit(relax.op.astype(bias, "float32"))))

    def rounded(self, node: fx.Node, value: Any) -> Any:
        """What a converter gave, in the dtype that PyTorch says where that is float16 or bfloat16."""
        meta = node.meta.get("val")
        wanted = HALVES.get(meta.dtype) if isinstance(meta, torch.Tensor) else None
        if wanted is None or not isinstance(value, relax.Expr) or not is_tensor(value) or dtype_of(value) != "float32":
            return value
        return self.block_builder.emit(relax.op.astype(value, wanted))


# Sums over many elements: TVM adds them up in the half type itself, and its norms take no bfloat16 at all.
_SUMS = (
    *(f"relax.nn.{name}" for name in ("layer_norm", "group_norm", "rms_norm", "instance_norm", "batch_norm")),
    *("relax.nn.softmax", "relax.nn.log_softmax", "relax.nn.avg_pool2d", "relax.nn.adaptive_avg_pool2d"),
    *("relax.mean", "relax.sum", "relax.variance", "relax.std"),
)


def widen_sums(module: IRModule) -> IRModule:
    """Let norms, softmax and means of float16 and bfloat16 compute in float32 and round at the end, as PyTorch does."""

    def rewrite(binding: relax.VarBinding, value: relax.Expr, builder: relax.BlockBuilder) -> relax.Expr:
        if op_of(value) not in _SUMS or not is_tensor(binding.var) or dtype_of(binding.var) not in HALVES.values():
            return value
        args = [builder.emit(relax.op.astype(a, "float32")) if is_tensor(a) else a for a in value.args]
        wide = builder.emit(relax.Call(value.op, args, value.attrs))
        return relax.op.astype(wide, dtype_of(binding.var))

    return rebuild(module, rewrite)
