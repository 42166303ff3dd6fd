"""Rules of operators that change the shape and keep the elements: views, permutations, expansions, shuffles."""

from __future__ import annotations

import torch

from graphopt.axes import axis as ax
from graphopt.axes.axis import Axis
from graphopt.axes.call import Call, Dims, Several, rule

aten = torch.ops.aten


@rule("view", "reshape", "_unsafe_view")
def view(call: Call) -> Dims:
    """The same elements in row-major order: the factors of both shapes are made to agree."""
    dims, out = call.dims(call.arg("self")), call.fresh()
    call.reshape(dims, out)
    size = "size" if call.has("size") else "shape"
    call.literal(size, list(out))
    return out


@rule("flatten", "squeeze", "unsqueeze", "ravel")
def squeeze(call: Call) -> Dims:
    """As view, without sizes among the arguments."""
    out = call.fresh()
    call.reshape(call.dims(call.arg("self")), out)
    return out


@rule("unflatten")
def unflatten(call: Call) -> Dims:
    """Dimension `dim` becomes several."""
    dims, out = call.dims(call.arg("self")), call.fresh()
    call.reshape(dims, out)
    at = call.dim("dim", len(dims))
    call.literal("sizes", out[at : at + len(call.arg("sizes"))])
    return out


@rule("reshape_as", "view_as")
def reshape_as(call: Call) -> Dims:
    """As view; the other tensor states the extents, so its dimensions are these."""
    out = call.dims(call.arg("other"))
    call.reshape(call.dims(call.arg("self")), out)
    return out


@rule("permute")
def permute(call: Call) -> Dims:
    """Dimensions in another order."""
    dims = call.dims(call.arg("self"))
    return [dims[place] for place in call.dim_list("dims", len(dims))]


@rule("movedim")
def movedim(call: Call) -> Dims:
    """Some dimensions go elsewhere, the others stay in order."""
    dims = call.dims(call.arg("self"))
    source, target = call.dim_list("source", len(dims)), call.dim_list("destination", len(dims))
    places = dict(zip(target, source, strict=True))
    others = iter(place for place in range(len(dims)) if place not in source)
    return [dims[places[place] if place in places else next(others)] for place in range(len(dims))]


@rule("transpose", "swapaxes", "swapdims")
def transpose(call: Call) -> Dims:
    """Two dimensions change places."""
    dims = call.dims(call.arg("self"))
    first, second = (call.dim(name, len(dims)) for name in ("dim0", "dim1"))
    dims[first], dims[second] = dims[second], dims[first]
    return dims


@rule("t", "numpy_T", "mT", "matrix_H", "adjoint")
def t(call: Call) -> Dims:
    """All dimensions in reverse, of matrices as a rule."""
    return call.dims(call.arg("self"))[::-1]


@rule("expand")
def expand(call: Call) -> Dims:
    """Dimensions of extent 1 repeat; what they become is known by the others that meet them."""
    dims, shape = call.dims(call.arg("self")), call.shape
    out = call.broadcast([dims], shape)
    for axis in out:
        if not any(axis is own for own in dims):
            call.role(axis, "copies")
    call.literal("size", list(out))
    return out


@rule("expand_as", "broadcast_to")
def expand_as(call: Call) -> Dims:
    """As expand, to the shape of another tensor."""
    if call.has("other"):
        return call.broadcast([call.dims(call.arg("self")), call.dims(call.arg("other"))], call.shape)
    return expand(call)


@rule("broadcast_tensors", "meshgrid")
def broadcast_tensors(call: Call) -> Several:
    """All tensors stretched to one shape; of meshgrid, each has a dimension of its own."""
    tensors = call.arg("tensors")
    if "meshgrid" in str(call.node.target):
        dims = [axis for tensor in tensors for axis in call.dims(tensor)]
        dims = dims if call.arg("indexing", "ij") == "ij" else [dims[1], dims[0], *dims[2:]]
        return [list(dims) for _ in tensors]
    together = call.broadcast([call.dims(tensor) for tensor in tensors], call.shape)
    return [list(together) for _ in tensors]


@rule("repeat", "tile")
def repeat(call: Call) -> Dims:
    """Copies one after another: the copies are the outer factor of a dimension."""
    name = "repeats" if call.has("repeats") else "dims"
    dims, shape = call.dims(call.arg("self")), call.shape
    counts = [1] * (len(shape) - len(call.arg(name))) + [int(count) for count in call.arg(name)]
    copies = [Axis(count) for count in counts]
    dims = [Axis(1)] * (len(shape) - len(dims)) + dims
    call.literal(name, list(copies[len(shape) - len(call.arg(name)) :]))
    return [ax.product([copy, axis]) if copy.extent * axis.extent > 1 else axis for copy, axis in zip(copies, dims)]  # noqa: B905


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Dims:
    """Each item several times in a row: the copies are the inner factor."""
    if not isinstance(call.arg("repeats", None), int):
        return call.fresh(pin="repeated by a tensor")
    dims, place = call.dims(call.arg("self")), call.arg("dim")
    copies = Axis(int(call.arg("repeats")))
    call.literal("repeats", copies)
    call.role(copies, "copies")
    if place is None:
        return [ax.product([*dims, copies])]
    place %= len(dims)
    dims[place] = ax.product([dims[place], copies])
    return dims


@rule("pixel_shuffle", "pixel_unshuffle")
def pixel_shuffle(call: Call) -> Dims:
    """r * r channels in a row become (unshuffle: were) the pixels of a square."""
    dims, out = call.dims(call.arg("self")), call.fresh()
    many, few = (dims, out) if "unshuffle" not in str(call.node.target) else (out, dims)
    square = Axis(many[-3].extent // few[-3].extent)
    call.pin(square, "pixels of a shuffle")
    call.unify(many[-3], ax.product([few[-3], square]))
    call.tie(dims[:-3], out[:-3])
    for axis in (*dims[-2:], *out[-2:]):
        call.pin(axis, "spatial")
    call.role(few[-3], "channel")
    return out


@rule("im2col")
def im2col(call: Call) -> Dims:
    """Each window of an image becomes a column: channels times window."""
    dims, out = call.dims(call.arg("self")), call.fresh()
    window = Axis(out[-2].extent // dims[-3].extent)
    for axis in (*dims[-2:], window, out[-1]):
        call.pin(axis, "spatial")
    call.unify(out[-2], ax.product([dims[-3], window]))
    call.tie(dims[:-3], out[:-2])
    return out


@rule("unfold")
def unfold(call: Call) -> Dims:
    """Sliding windows over one dimension, which become the last one."""
    dims = call.dims(call.arg("self"))
    place = call.dim("dimension", len(dims))
    call.pin(dims[place], "sliding window")
    out = call.fresh()
    for axis in (out[place], out[-1]):
        call.pin(axis, "sliding window")
    return [out[n] if n in (place, len(out) - 1) else dims[n] for n in range(len(out))]


@rule("full", "zeros", "ones", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "rand", "randn")
def create(call: Call) -> Dims:
    """The same value, or noise, everywhere: the sizes are the only trace of the axes."""
    out = call.fresh()
    call.literal("size", list(out))
    return out


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def like(call: Call) -> Dims:
    """A tensor of another one's shape."""
    return call.dims(call.arg("self"))
