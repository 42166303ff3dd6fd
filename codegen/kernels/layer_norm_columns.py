"""Layer norm over the features of tokens that are columns: features outermost, tokens in the vector.

    Y[b, c, t] = (X[b, c, t] - mean_bt) / sqrt(var_bt + eps) * gamma[c] + beta[c]
    X  (B, C, T) in float32
    limit: X is read three times, from memory once: a panel of tokens stays in the second-level cache

It stands between sparse products (`spmm.py`), which want features in front.
Source: Ba et al., Layer Normalization, arXiv:1607.06450.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from tvm import relax, tirx
from tvm.tirx import PrimFunc
from tvm.tirx.script import builder as T

from graphopt.codegen.dataflow import Array, Dataflow, dtype_of, shape_of
from graphopt.codegen.kernels.emit import Expr, Registers, load, loop, prim_func, splat, spread, store
from graphopt.codegen.kernels.rows import PARALLEL_ELEMENTS
from graphopt.codegen.kernels.template import KernelCall, Template
from graphopt.errors import Decline
from graphopt.targets.target import Target

VECTORS = 4  # of tokens at once: as many sums in flight


class LayerNormColumns(Template):
    """layer_norm over the last dimension but one."""

    name: ClassVar[str] = "layer-norm-columns"
    anchors: ClassVar[tuple[str, ...]] = ("relax.nn.layer_norm",)

    def match(self, flow: Dataflow, binding: relax.VarBinding, target: Target) -> KernelCall | Decline:
        """Take layer norms of float32 whose features stand in front of the tokens."""
        call, where = binding.value, binding.var.name
        shape, x = shape_of(call), call.args[0]
        axes = [int(a) % len(shape) for a in call.attrs.axes]
        if len(shape) < 2 or axes != [len(shape) - 2] or dtype_of(x) != "float32" or 0 in shape:
            return Decline(where, f"norm over axes {axes} of {len(shape)}, in {dtype_of(x)}")
        weights = [flow.constant(a) for a in call.args[1:]]
        if any(weight is None for weight in weights):
            return Decline(where, "weights that are known only at run time")
        used = (bool(call.attrs.scale), bool(call.attrs.center))
        kept = [w for w, wanted in zip(weights, used, strict=True) if wanted]
        features, tokens = shape[-2:]
        batch, epsilon = math.prod(shape[:-2]), float(call.attrs.epsilon)
        lanes = min(target.isa.lanes(), 1 << (tokens.bit_length() - 1))
        return KernelCall(
            name=f"f32_layer_norm_columns_{features}__{target.isa.name}".replace("-", "_"),
            key=(batch, features, tokens, used, epsilon, target.spec),
            kernel=build(batch, features, tokens, used, epsilon, lanes, target),
            output=binding.var,
            covers=(binding.var,),
            inputs=(x,),
            constants=tuple(np.ascontiguousarray(w, np.float32).reshape(-1) for w in kept if w is not None),
        )

    def reference(self, x: Array, gamma: Array | None, beta: Array | None, epsilon: float) -> Array:
        """(B, C, T), over C."""
        x = x - x.mean(1, keepdims=True)
        y = x / np.sqrt((x * x).mean(1, keepdims=True) + epsilon)
        return y * (1 if gamma is None else gamma[:, None]) + (0 if beta is None else beta[:, None])


def build(
    batch: int, features: int, tokens: int, used: tuple[bool, bool], epsilon: float, lanes: int, target: Target
) -> PrimFunc:
    """The kernel: x, gamma and beta where there are any, y."""
    names = [name for name, wanted in zip(("gamma", "beta"), used, strict=True) if wanted]
    size = batch * features * tokens
    buffers = [("x", size, "float32"), *((name, features, "float32") for name in names), ("y", size, "float32")]
    vectors = min(VECTORS, -(-tokens // lanes))
    panels = -(-tokens // (vectors * lanes))
    width = vectors * lanes

    def body(x: Any, *rest: Any) -> None:
        weights, y = dict(zip(names, rest, strict=False)), rest[-1]
        with loop(batch * panels, target.threads and size >= PARALLEL_ELEMENTS) as task:
            image = T.Bind(tirx.floordiv(task, panels) * (features * tokens)) if batch > 1 else 0
            # A panel that is wider than what is left overlaps; one that is wider than all repeats its last vector.
            panel = T.Bind(tirx.floormod(task, panels) * width) if panels > 1 else 0
            starts = [T.Bind(image + tirx.min(panel + v * lanes, tokens - lanes)) for v in range(vectors)]
            mean, spreads = Registers(vectors, lanes, "float32"), Registers(vectors, lanes, "float32")
            with T.serial(0, features) as c:
                for v in range(vectors):
                    mean[v] = mean[v] + load(x, starts[v] + c * tokens, lanes, "float32")
            for v in range(vectors):
                mean[v] = mean[v] * splat(1 / features, lanes, "float32")

            def centred(c: Expr, v: int) -> Expr:
                return load(x, starts[v] + c * tokens, lanes, "float32") - mean[v]

            with T.serial(0, features) as c:
                for v in range(vectors):
                    apart = T.Bind(centred(c, v))
                    spreads[v] = spreads[v] + apart * apart
            for v in range(vectors):
                variance = spreads[v] * splat(1 / features, lanes, "float32") + splat(epsilon, lanes, "float32")
                spreads[v] = splat(1.0, lanes, "float32") / tirx.sqrt(variance)
            with T.serial(0, features) as c:
                around = {name: T.Bind(spread(load(w, c, 1, "float32"), lanes)) for name, w in weights.items()}
                for v in range(vectors):
                    value = centred(c, v) * spreads[v]
                    value = value * around["gamma"] if "gamma" in around else value
                    value = value + around["beta"] if "beta" in around else value
                    store(y, starts[v] + c * tokens, value, lanes, "float32")

    return prim_func(buffers, body)
