"""`"wanda"`: weights times the norms of what they meet."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.passes import criteria
from graphopt.passes.criteria.uses import input_norms, uses
from tests.passes.criteria.nets import (
    attention,
    axes_of,
    axis_of,
    mlp,
    residual,
    samples,
    score,
    seeded,
    settled,
    stored,
    tied,
)
from tests.programs import program_of, tiny


def inputs(data):
    """The only input of each batch."""
    return [next(iter(batch.values())) for batch in data]


def norm(values, batches):
    """Of each last entry, over everything else and per batch."""
    return (torch.cat([v.reshape(-1, v.shape[-1]) for v in values]).square().sum(0) / batches).sqrt()


def test_consumers_and_all():
    """A neuron has its column times the norm of its values; with `all` its row times the norms of its inputs, too."""
    axes = mlp()
    data = samples(axes)
    atom = axis_of(axes, "one.weight")
    x = inputs(data)
    y = [F.relu(F.linear(v, stored(axes, "one.weight"), stored(axes, "one.bias"))) for v in x]
    column = stored(axes, "two.weight").abs().sum(0) * norm(y, len(data))
    row = stored(axes, "one.weight").abs() @ norm(x, len(data))
    torch.testing.assert_close(score("wanda", axes, atom, data), column)
    torch.testing.assert_close(score("wanda", axes, atom, data, ends="all"), column + row)


def test_elements_are_the_paper_s():
    """S_ij = |W_ij| ||x_j||, and 1-D tensors have none."""
    axes = mlp()
    data = samples(axes)
    found = {member.names[0]: values for member, values in criteria.make("wanda").elements(axes, data)}
    assert set(found) == {"p_one_weight", "p_two_weight"}
    expected = stored(axes, "one.weight").abs() * norm(inputs(data), len(data))
    torch.testing.assert_close(found["p_one_weight"], expected)


def test_scaling_inputs_against_weights_changes_nothing():
    """x_j -> c x_j with W_:j -> W_:j / c leaves all scores."""

    def net(c):
        parts = {"one": settled(nn.Linear(6, 8)), "two": settled(nn.Linear(8, 5), 20)}
        parts["one"].weight.data[3] *= c
        parts["one"].bias.data[3] *= c
        parts["two"].weight.data[:, 3] /= c
        return axes_of(program_of(lambda s, x: s.two(F.relu(s.one(x))), seeded(3, 6), **parts))

    plain, scaled = (score("wanda", a := net(c), axis_of(a, "one.weight"), samples(a)) for c in (1.0, 7.0))
    torch.testing.assert_close(plain, scaled)


def test_all_consumers_of_a_residual_stream():
    """The channels of a residual stream have the columns of all that read it."""
    axes = residual()
    data = samples(axes)
    got = score("wanda", axes, axis_of(axes, "stem.weight"), data)
    total = torch.zeros(8, dtype=torch.float64)
    nodes = {"inner": [], "last": []}
    for x in inputs(data):
        y = F.conv2d(x, stored(axes, "stem.weight"), stored(axes, "stem.bias"), padding=1)
        y = F.batch_norm(y, *(stored(axes, f"norm.{n}") for n in ("running_mean", "running_var", "weight", "bias")))
        nodes["inner"].append(y)
        z = F.conv2d(y, stored(axes, "inner.weight"), stored(axes, "inner.bias"))
        z = F.batch_norm(z, *(stored(axes, f"norm1.{n}") for n in ("running_mean", "running_var", "weight", "bias")))
        z = F.conv2d(F.relu(z), stored(axes, "outer.weight"), stored(axes, "outer.bias"), padding=1)
        z = F.batch_norm(z, *(stored(axes, f"norm2.{n}") for n in ("running_mean", "running_var", "weight", "bias")))
        nodes["last"].append(F.relu(y + z))
    for name, values in nodes.items():
        own = norm([v.movedim(1, -1) for v in values], len(data))
        total += stored(axes, f"{name}.weight").abs().sum((0, 2, 3)) * own
    torch.testing.assert_close(got, total)


def test_tied_embeddings():
    """The output layer reads the stream, the embedding of the same tensor does not."""
    axes = tied()
    data = samples(axes)
    got = score("wanda", axes, axis_of(axes, "up.weight", 1), data)
    words, up, down = (stored(axes, f"{n}.weight") for n in ("words", "up", "down"))
    first = [words[ids] for ids in inputs(data)]
    inner = [F.gelu(F.linear(x, up, stored(axes, "up.bias"))) for x in first]
    last = [x + F.linear(y, down, stored(axes, "down.bias")) for x, y in zip(first, inner, strict=True)]
    expected = up.abs().sum(0) * norm(first, len(data)) + words.abs().sum(0) * norm(last, len(data))
    torch.testing.assert_close(got, expected)


def test_embeddings_count_words():
    """The norm of a word's one-hot row is the root of how often it occurs."""
    axes = tied()
    data = samples(axes)
    found = {(use.node.name, use.weight.name): norms for use, norms in input_norms(axes, uses(axes), data)}
    (norms,) = (n for (node, _), n in found.items() if "embedding" in node)
    counts = torch.bincount(torch.cat([ids.flatten() for ids in inputs(data)]), minlength=20)
    torch.testing.assert_close(norms[:, 0], (counts / len(data)).double().sqrt())


def test_heads_are_read_by_the_output_projection():
    """A head has its columns of the output projection; query sizes, which no stored weight reads, their rows."""
    axes = attention()
    data = samples(axes)
    y = []
    for x in inputs(data):
        qkv = F.linear(x, stored(axes, "qkv.weight"), stored(axes, "qkv.bias")).reshape(2, 5, 3, 3, 4)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12))
    own = (stored(axes, "out.weight").abs().sum(0) * norm(y, len(data))).view(3, 4).sum(1)
    torch.testing.assert_close(score("wanda", axes, axes.free("head")[0], data), own)


PRODUCTS = {
    "grouped": (lambda s, x: F.conv2d(x, s.w, groups=2), (6, 2, 3, 3), (2, 4, 5, 5)),
    "depthwise": (lambda s, x: F.conv2d(x, s.w, groups=4), (4, 1, 3, 3), (2, 4, 5, 5)),
    "transposed": (lambda s, x: F.conv_transpose2d(x, s.w), (4, 3, 2, 2), (2, 4, 5, 5)),
    "conv1d": (lambda s, x: F.conv1d(x, s.w), (6, 4, 3), (2, 4, 9)),
    "matmul": (lambda s, x: x @ s.w, (4, 6), (2, 5, 4)),
    "left": (lambda s, x: s.w @ x, (6, 4), (2, 4, 5)),
    "experts": (lambda s, x: x @ s.w, (3, 4, 6), (3, 5, 4)),
    "shared": (lambda s, x: x[:, None] @ s.w, (3, 4, 6), (2, 5, 4)),
    "einsum": (lambda s, x: torch.einsum("bnc,hcd->bhnd", x, s.w), (3, 4, 6), (2, 5, 4)),
    "vector": (lambda s, x: x @ s.w, (4,), (2, 5, 4)),
}


@pytest.mark.parametrize("kind", PRODUCTS)
def test_norms_of_every_product(kind):
    """Of each element of the weight: what is found by asking which inputs it is multiplied with, one at a time."""
    function, shape, given = PRODUCTS[kind]

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(seeded(*shape))

        def forward(self, x):
            return function(self, x)

    axes = axes_of(program_of(lambda s, x: s.inner(x), seeded(*given), inner=Holder()))
    data = samples(axes, 2)
    ((use, norms),) = list(input_norms(axes, uses(axes), data))
    got = norms.broadcast_to(shape).square() * 2
    assert use.weight.name == "p_inner_w"
    # An element's inputs: the gradient of the sum of outputs with respect to it, for one input at a time.
    expected = torch.zeros(shape, dtype=torch.float64)
    for x in inputs(data):
        for place in range(x.numel()):
            alone = torch.zeros_like(x).view(-1)
            alone[place] = 1
            w = seeded(*shape).requires_grad_()
            holder = type("s", (), {"w": w})
            (touched,) = torch.autograd.grad(function(holder, alone.view_as(x)).sum(), w)
            if kind in ("grouped", "depthwise", "transposed", "conv1d"):
                taps = tuple(range(2, w.dim()))  # one norm for all taps of a channel
                touched = (touched.sum(taps, keepdim=True) > 0).double().expand(shape)
            expected += touched * x.flatten()[place] ** 2
    torch.testing.assert_close(got, expected)


def test_recurrent_layers_read_their_input_and_state():
    """A program with a recurrent layer has scores for its hidden axis."""
    axes = axes_of(tiny("crnn"))
    data = samples(axes, 2)
    found = criteria.make("wanda").scores(axes, axes.free(), data)
    assert set(found) == set(axes.free())
    assert all(bool((scores > 0).any()) for scores in found.values())
