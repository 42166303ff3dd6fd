"""Attention: operands through strides, masks, grouped heads, every rest of every size; what is matched and covered."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tvm import relax

import graphopt
from graphopt.codegen.dataflow import shape_of
from graphopt.codegen.kernels.attention import Attention, reference
from graphopt.codegen.kernels.template import KernelCall
from graphopt.errors import Decline
from tests.codegen.kernels.harness import ARM, HOST, WASM, Library, aligned, assembly, match, relax_main

op = relax.op


def variable(name, *shape, dtype="float32"):
    return relax.Var(name, relax.TensorType(shape, dtype))


def fused(b, n, h, d, causal=None, mask=None):
    """One projection [b, n, 3 h d], split to heads as a vision transformer does, and joined again behind."""
    x = variable("x", b, n, 3 * h * d)
    params = [x] if mask is None else [x, mask]

    def build(e):
        parts = e.emit(op.permute_dims(e.emit(op.reshape(x, (b, n, 3, h, d))), [2, 0, 3, 1, 4]))
        heads = []
        for i in range(3):
            one = e.emit(op.strided_slice(parts, [0], [i], [i + 1], [1]))
            heads.append(e.emit(op.permute_dims(e.emit(op.squeeze(one, [0])), [0, 2, 1, 3])))
        out = e.emit(op.nn.attention(*heads, bias=mask, causal_mask=causal))
        return op.reshape(
            e.emit(op.permute_dims(e.emit(op.permute_dims(out, [0, 2, 1, 3])), [0, 2, 1, 3])), (b, n, h * d)
        )

    return relax_main(build, params)


def written_out(b, n, h, d, mask, *, before):
    """Two products with a softmax between them; the scale on the queries, or on the scores."""
    x = variable("x", b, n, 3 * h * d)

    def build(e):
        parts = e.emit(op.split(x, 3, axis=-1))
        q, k, v = (
            e.emit(op.permute_dims(e.emit(op.reshape(e.emit(parts[i]), (b, n, h, d))), [0, 2, 1, 3])) for i in range(3)
        )
        scale = relax.const(np.float32(d**-0.5))
        q = e.emit(op.multiply(q, scale)) if before else q
        scores = e.emit(op.matmul(q, e.emit(op.permute_dims(k, [0, 1, 3, 2]))))
        scores = scores if before else e.emit(op.multiply(scores, scale))
        if mask is not None and mask.ty.dtype == "bool":
            scores = e.emit(op.where(mask, relax.const(np.float32(-np.inf)), scores))
        elif mask is not None:
            scores = e.emit(op.add(scores, mask))
        out = e.emit(op.matmul(e.emit(op.nn.softmax(scores, axis=-1)), v))
        return op.reshape(e.emit(op.permute_dims(out, [0, 2, 1, 3])), (b, n, h * d))

    return relax_main(build, [x] if mask is None else [x, mask])


def heads_of(x, h, d):
    b, n, _ = x.shape
    return np.moveaxis(x.reshape(b, n, 3, h, d), 2, 0)


def call_of(flow, target=HOST):
    call = match(flow, Attention(), target)
    assert isinstance(call, KernelCall), call
    return call


def run(library, name, call, *arrays):
    shape = tuple(int(s) for s in call.output.ty.shape)
    out = aligned(np.full(shape, 7, arrays[0].dtype))
    scratch = [aligned(np.full(size, 0xFF, np.uint8)) for size in call.scratch_bytes]
    library(name, *map(aligned, arrays), out, *scratch)
    return out


def data(*shape, dtype=np.float32):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


SIZES = st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 3), st.sampled_from([1, 5, 8, 16, 20, 33, 64]))


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(sizes=st.lists(SIZES, min_size=5, max_size=5, unique=True))
def test_any_size(sizes, tmp_path_factory):
    """Any number of rows and any head size, causal or not, equals the reference."""
    calls = {}
    for i, size in enumerate(sizes):
        calls[f"a{i}"] = (size, i % 2, call_of(fused(*size, causal="TopLeft" if i % 2 else None)))
    library = Library({n: c.kernel for n, (_, _, c) in calls.items()}, tmp_path_factory.mktemp("attention"))
    for name, ((b, n, h, d), causal, call) in calls.items():
        x = data(b, n, 3 * h * d)
        bias = np.where(np.tri(n, dtype=bool), 0, -np.inf) if causal else None
        expected = reference(*heads_of(x.astype(float), h, d), d**-0.5, bias).reshape(b, n, h * d)
        np.testing.assert_allclose(run(library, name, call, x), expected, atol=2e-6)


def test_no_transpose_is_left():
    """The kernel reads the projection itself and writes what the next layer reads; it covers all that follows."""
    flow = fused(2, 10, 3, 16)
    call = call_of(flow)
    assert [v.name for v in call.inputs] == ["x"]
    assert call.output.same_as(flow.bindings[-1].var)
    assert len(call.covers) == 4


@pytest.mark.parametrize("before", [True, False], ids=["scaled-queries", "scaled-scores"])
@pytest.mark.parametrize("kind", ["none", "float", "bool"])
def test_written_out(tmp_path, before, kind):
    """The decomposed form is one kernel too; a row that sees nothing is NaN there, as softmax has it."""
    b, n, h, d = 2, 11, 3, 16
    mask = None if kind == "none" else variable("m", b, 1, n, n, dtype="float32" if kind == "float" else "bool")
    call = call_of(written_out(b, n, h, d, mask, before=before))
    library = Library({"a": call.kernel}, tmp_path)
    x = data(b, n, 3 * h * d)
    given_mask = data(b, 1, n, n) if kind == "float" else np.random.default_rng(1).random((b, 1, n, n)) > 0.7
    q, k, v = (torch.from_numpy(t).transpose(1, 2) for t in np.moveaxis(x.reshape(b, n, 3, h, d), 2, 0))
    scores = q @ k.transpose(-1, -2) * d**-0.5
    if kind == "bool":
        given_mask[0, 0, 3] = True
        scores = scores.masked_fill(torch.from_numpy(given_mask), -math.inf)
    elif kind == "float":
        scores = scores + torch.from_numpy(given_mask)
    expected = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, h * d).numpy()
    out = run(library, "a", call, *([x] if mask is None else [x, given_mask]))
    np.testing.assert_allclose(out, expected, atol=2e-6)
    assert np.isnan(out).any() == (kind == "bool")


@pytest.mark.parametrize("shape", [(1, 1, 1, 13), (2, 1, 1, 13), (1, 3, 13, 13), (2, 3, 13, 13)], ids=str)
def test_masks_are_broadcast(tmp_path, shape):
    """A float mask over any of batch, head and row; a row that sees nothing is zero, as PyTorch has it."""
    b, n, h, d = 2, 13, 3, 8
    call = call_of(fused(b, n, h, d, mask=variable("m", *shape)))
    x, mask = data(b, n, 3 * h * d), data(*shape)
    mask[..., 0, :] = -np.inf
    q, k, v = (torch.from_numpy(t).transpose(1, 2) for t in heads_of(x, h, d))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.from_numpy(mask)).transpose(1, 2)
    out = run(Library({"a": call.kernel}, tmp_path), "a", call, x, mask)
    np.testing.assert_allclose(out, expected.reshape(b, n, h * d).numpy(), atol=2e-6)


def test_grouped_heads_are_read_by_index(tmp_path):
    """Keys and values that the graph repeats for each group of queries are never materialised."""
    b, n, h, groups, d = 2, 9, 6, 2, 8
    q, k, v = variable("q", b, n, h * d), variable("k", b, n, groups * d), variable("v", b, n, groups * d)

    def build(e):
        def split(x, heads):
            return e.emit(op.permute_dims(e.emit(op.reshape(x, (b, n, heads, d))), [0, 2, 1, 3]))

        def shared(x):
            wide = e.emit(op.expand_dims(split(x, groups), [2]))
            wide = e.emit(op.broadcast_to(wide, (b, groups, h // groups, n, d)))
            return e.emit(op.permute_dims(e.emit(op.reshape(wide, (b, h, n, d))), [0, 2, 1, 3]))

        queries = e.emit(op.permute_dims(split(q, h), [0, 2, 1, 3]))
        return op.nn.attention(queries, shared(k), e.emit(op.repeat(e.emit(op.reshape(v, (b, n, groups, d))), 3, 2)))

    call = call_of(relax_main(build, [q, k, v]))
    assert [x.name for x in call.inputs] == ["q", "k", "v"]
    arrays = data(b, n, h * d), data(b, n, groups * d) + 1, data(b, n, groups * d)
    out = run(Library({"a": call.kernel}, tmp_path), "a", call, *arrays)
    wide = [np.repeat(a.reshape(b, n, -1, d), h // (a.shape[2] // d), 2) for a in arrays]
    np.testing.assert_allclose(out, reference(*(w.astype(float) for w in wide), d**-0.5, None), atol=2e-6)


def turned(b, n, m, h, d, *, back):
    """Queries, keys and values as [b, (h d), tokens], as products with features in front leave them; `back` so too."""
    q, k, v = variable("q", b, h * d, n), variable("k", b, h * d, m), variable("v", b, h * d, m)

    def build(e):
        def heads(x, tokens):
            return e.emit(op.permute_dims(e.emit(op.reshape(x, (b, h, d, tokens))), [0, 3, 1, 2]))

        out = e.emit(op.nn.attention(heads(q, n), heads(k, m), heads(v, m)))
        if back:
            return op.reshape(e.emit(op.permute_dims(out, [0, 2, 3, 1])), (b, h * d, n))
        return op.reshape(out, (b, n, h * d))

    return relax_main(build, [q, k, v])


@pytest.mark.parametrize("back", [True, False], ids=["turned back", "rows"])
def test_features_in_front(tmp_path, back):
    """Operands with tokens innermost are read as they lie, values through squares of registers where they fit."""
    sizes = [
        (1, 16, 16, 2, 16), (2, 13, 13, 3, 32), (1, 9, 20, 2, 8), (1, 33, 33, 1, 64), (1, 5, 17, 2, 24),
        (1, 3, 5, 2, 16), (1, 12, 12, 2, 20), (1, 1, 1, 2, 8), (1, 2, 9, 1, 1), (2, 7, 8, 2, 8),
    ]  # fmt: skip
    calls = {f"a{i}": call_of(turned(*size, back=back)) for i, size in enumerate(sizes)}
    library = Library({name: call.kernel for name, call in calls.items()}, tmp_path)
    for (name, call), (b, n, m, h, d) in zip(calls.items(), sizes, strict=True):
        assert [x.name for x in call.inputs] == ["q", "k", "v"]
        q, k, v = data(b, h * d, n), data(b, h * d, m) * 2, data(b, h * d, m) + 1
        rows = [np.moveaxis(x.astype(float).reshape(b, h, d, -1), 3, 1) for x in (q, k, v)]
        expected = reference(*rows, d**-0.5, None).reshape(b, n, h * d)
        out = run(library, name, call, q, k, v)
        np.testing.assert_allclose(out.mT if back else out, expected, atol=2e-6, rtol=1e-5, err_msg=name)


def test_values_that_are_the_same_in_a_head(tmp_path):
    """One number for each token, repeated over a head's features, lies neither way: it is laid out first."""
    b, n, h, d = 1, 9, 2, 16
    q, v = variable("q", b, n, h, d), variable("v", b, h, 1, n)

    def build(e):
        wide = e.emit(op.broadcast_to(v, (b, h, d, n)))
        return op.nn.attention(q, q, e.emit(op.permute_dims(wide, [0, 3, 1, 2])))

    call = call_of(relax_main(build, [q, v]))
    assert [shape_of(x) for x in call.inputs] == [(b, n, h, d), (b, n, h, d)]
    x, wide = data(b, n, h, d), np.ascontiguousarray(np.broadcast_to(data(b, n, h, 1), (b, n, h, d)))
    expected = reference(*(a.astype(float) for a in (x, x, wide)), d**-0.5, None)
    np.testing.assert_allclose(run(Library({"a": call.kernel}, tmp_path), "a", call, x, wide), expected, atol=2e-6)


def test_a_product_without_softmax_is_declined():
    """A batched product alone is none of ours, and the reason says so."""
    a, b = variable("a", 2, 4, 8), variable("b", 2, 8, 4)
    result = match(relax_main(lambda e: op.matmul(a, b), [a, b]), Attention())
    assert isinstance(result, Decline)
    assert "softmax" in result.reason


@pytest.mark.parametrize(("target", "multiply"), [(HOST, "vfmadd"), (ARM, "fmla"), (WASM, "f32x4.mul")])
def test_register_tiles(target, multiply):
    """Both products are in vectors, nothing is called but the thread pool, and the tile stays in registers."""
    call = call_of(fused(1, 24, 2, 32), target)
    text = assembly(call.kernel, target)
    mr, nr = call.parameters["mr"], call.parameters["nr"]
    assert text.count(multiply) >= 2 * mr * nr // target.isa.lanes(32)
    called = re.findall(r"^\s+(?:callq?|bl|call)\s+(\S+)", text, re.M)
    assert not [c for c in called if "exp" in c or "Workspace" in c]


@pytest.mark.parametrize("masked", [lambda s, q: s + 1, lambda s, q: s + q.sum(), lambda s, q: s.where(q.sum() > 0, 0)])
def test_masks_without_dimensions(masked):
    """A scalar added to the scores, or that chooses them, is a mask that is the same everywhere."""

    class Scores(torch.nn.Module):
        def forward(self, q):
            return masked(q @ q.transpose(-1, -2), q).softmax(-1) @ q

    torch.manual_seed(0)
    module, q = Scores(), torch.randn(2, 3, 9, 16)
    with graphopt.compile(module, example_inputs=(q,)) as bundle:
        torch.testing.assert_close(torch.as_tensor(bundle(q)), module(q), rtol=1e-4, atol=1e-5)


def test_a_mask_where_heads_are_apart():
    """Batch and heads in one dimension, taken apart for the mask alone, as several older models write it."""

    class Scores(torch.nn.Module):
        def forward(self, q, mask):
            scores = (q @ q.mT).view(2, 3, 9, 9) + mask
            return scores.view(6, 9, 9).softmax(-1) @ q

    torch.manual_seed(0)
    module, q, mask = Scores(), torch.randn(6, 9, 16), torch.randn(2, 1, 9, 9)
    with graphopt.compile(module, example_inputs=(q, mask)) as bundle:
        torch.testing.assert_close(torch.as_tensor(bundle(q, mask)), module(q, mask), rtol=1e-4, atol=1e-5)
