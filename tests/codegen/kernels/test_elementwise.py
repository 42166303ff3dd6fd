"""The generic schedule: the same results as the plain loops, for whatever TVM's legalisation makes."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.tirx import PrimFunc

from graphopt.codegen.kernels.elementwise import hoist_scratch, schedule
from tests.codegen.kernels.harness import ARM, HOST, WASM, Library, aligned, assembly

op = relax.op
F32 = "float32"

CASES = {
    "gelu": (lambda x: op.nn.gelu(op.multiply(x, x)), [((3, 50, 37), F32)]),
    "silu_short": (lambda x: op.nn.silu(x), [((3,), F32)]),
    "scalar": (lambda x: op.add(x, x), [((), F32)]),
    "large": (lambda x: op.nn.relu(op.add(x, x)), [((70, 1001), F32)]),
    "channels": (lambda x, b: op.nn.relu(op.add(x, b)), [((2, 16, 5, 7), F32), ((16, 1, 1), F32)]),
    "column": (lambda x, b: op.add(x, b), [((4, 9, 5), F32), ((9, 1), F32)]),
    "concat_vectors": (lambda x, y: op.concat([x, y], axis=-1), [((4, 9, 64), F32), ((4, 9, 32), F32)]),
    "concat_rest": (lambda x, y: op.concat([x, y], axis=-1), [((4, 9, 6), F32), ((4, 9, 3), F32)]),
    "concat_rows": (lambda x, y: op.concat([x, y], axis=1), [((4, 9, 33), F32), ((4, 2, 33), F32)]),
    "mean_last": (lambda x: op.mean(x, axis=-1), [((19, 256), F32)]),
    "mean_odd": (lambda x: op.mean(x, axis=-1), [((5, 37), F32)]),
    "max_last": (lambda x: op.max(x, axis=-1), [((80, 1024), F32)]),
    "sum_middle": (lambda x: op.sum(x, axis=1), [((3, 77, 45), F32)]),
    "sum_two": (lambda x: op.sum(x, axis=[1, 2]), [((2, 7, 7, 64), F32)]),
    "sum_all": (lambda x: op.sum(x), [((19, 256), F32)]),
    "variance": (lambda x: op.variance(x, axis=[-1]), [((6, 40), F32)]),
    "softmax_middle": (lambda x: op.nn.softmax(x, axis=1), [((3, 20, 40), F32)]),
    "argmax": (lambda x: op.argmax(x, axis=1), [((3, 17), F32)]),
    "transpose": (lambda x: op.permute_dims(x, [0, 3, 1, 2]), [((1, 24, 32, 48), F32)]),
    "transpose_odd": (lambda x: op.permute_dims(x, [1, 0]), [((37, 19), F32)]),
    "take": (lambda x, i: op.take(x, i, axis=0), [((100, 48), F32), ((2, 7), "int64")]),
    "slice": (lambda x: op.strided_slice(x, [1], [2], [30], [3]), [((4, 33), F32)]),
    "pad": (lambda x: op.nn.pad(x, [0, 0, 1, 2]), [((4, 33), F32)]),
    "where": (lambda x, y: op.where(op.less(x, y), x, op.exp(y)), [((3, 40), F32), ((1, 40), F32)]),
    "equal": (lambda x, y: op.equal(x, y), [((3, 21), "int32"), ((3, 21), "int32")]),
    "int64": (lambda x, y: op.add(op.multiply(x, y), x), [((3, 21), "int64"), ((3, 21), "int64")]),
    "cast": (lambda x: op.astype(x, "int64"), [((40,), F32)]),
    "float64": (lambda x: op.exp(op.add(x, x)), [((3, 21), "float64")]),
    "half": (lambda x: op.sigmoid(x), [((3, 40), "float16")]),
    "used_twice": (lambda x: op.multiply(op.exp(x), op.sum(op.exp(x), axis=-1, keepdims=True)), [((5, 64), F32)]),
}


def functions(name: str) -> list[PrimFunc]:
    """What TVM makes of a case: fused and legalised."""
    build, shapes = CASES[name]
    builder = relax.BlockBuilder()
    params = [relax.Var(f"p{i}", relax.TensorType(s, d)) for i, (s, d) in enumerate(shapes)]
    with builder.function("main", params):
        with builder.dataflow():
            out = builder.emit_output(builder.normalize(build(*params)))
        builder.emit_func_output(out)
    t = relax.transform
    passes = [t.LegalizeOps(), t.AnnotateTIROpPattern(), t.FuseOps(), t.FuseTIR()]
    module = tvm.ir.transform.Sequential(passes)(builder.get())
    return [f for f in module.functions.values() if isinstance(f, PrimFunc)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    kernels, scratch = {}, {}
    for name in CASES:
        for i, func in enumerate(functions(name)):
            for kind, f in (("fast", schedule(func, HOST)), ("plain", func)):
                kernels[f"{name}_{i}_{kind}"], scratch[f"{name}_{i}_{kind}"] = hoist_scratch(f)
    return Library(kernels, tmp_path_factory.mktemp("elementwise")), kernels, scratch


def data(shape, dtype):
    rng = np.random.default_rng(len(shape))
    return aligned(np.asarray(rng.normal(size=shape) if "float" in dtype else rng.integers(0, 7, shape)).astype(dtype))


@pytest.mark.parametrize("name", CASES)
def test_schedule_computes_the_same(built, name):
    """Scheduled and plain loops agree; sums only to rounding, as their order differs."""
    library, kernels, scratch = built
    for i in range(sum(k.startswith(f"{name}_") and k[len(name) + 1].isdigit() for k in kernels) // 2):
        results = []
        own = kernels[f"{name}_{i}_fast"].params
        count = len(own) - len(scratch[f"{name}_{i}_fast"])
        buffers = [data(tuple(int(s) for s in p.shape), str(p.dtype)) for p in own[:count]]
        for kind in ("fast", "plain"):
            key = f"{name}_{i}_{kind}"
            out = aligned(np.zeros_like(buffers[-1]))
            extra = [aligned(np.full(s, 0xFF, np.uint8)) for s in scratch[key]]
            library(key, *buffers[:-1], out, *extra)
            results.append(out)
        np.testing.assert_allclose(*results, rtol=2e-5, atol=1e-4 if name == "sum_all" else 2e-5)


@pytest.mark.parametrize("target", [HOST, ARM, WASM], ids=lambda t: t.isa.name)
def test_chains_are_vectors_without_calls(target):
    """A gelu has no call of erf and no buffer between its steps."""
    (func,) = functions("gelu")
    fast, scratch = hoist_scratch(schedule(func, target))
    assert scratch == ()
    text = assembly(fast, target)
    assert "erff" not in text
    assert "Workspace" not in text
    assert text.count({"avx2": "vfmadd", "neon": "fmla", "simd128": "f32x4.mul"}[target.isa.name]) >= 9


def test_what_is_dear_and_used_twice_is_kept():
    """exp feeds a sum and a product: it is computed once, into scratch that the caller plans."""
    sizes = [hoist_scratch(schedule(f, HOST))[1] for f in functions("used_twice")]
    assert sum(len(s) for s in sizes) <= 2


def test_unknown_functions_stay_as_they_are():
    """A function that is not in blocks comes back unchanged."""
    (func,) = functions("cast")
    lowered = tvm.s_tir.transform.ConvertBlocksToOpaque()(tvm.ir.IRModule({"main": func}))["main"]
    assert schedule(lowered, HOST) is not None
