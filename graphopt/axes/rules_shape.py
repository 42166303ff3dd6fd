"""Rules of operators that change the shape and keep the elements: views, permutations, expansions, shuffles."""

from __future__ import annotations

import torch

from graphopt.axes import axis as ax
from graphopt.axes.axis import Axis
from graphopt.axes.call import Call, Dims, GaveUp, Several, rule

aten = torch.ops.aten


@rule("view", "reshape", "_unsafe_view")
def view(call: Call) -> Dims:
    """The same elements in row-major order: the factors of both shapes are made to agree."""
    dims, out = call.dims(call.arg("self")), call.fresh()
    if not (call.has("size") or call.has("shape")):  # another dtype for the same bytes
        if len(dims) != len(out) or any(a.extent != b.extent for a, b in zip(dims, out, strict=True)):
            raise GaveUp("a dtype of another size")
        return dims
    call.reshape(dims, out)
    # Slicing makes weights contiguous, after which not every view is one.
    call.retarget(aten.reshape.default)
    call.literal("self", call.arg("self"))
    call.literal("shape", list(out))
    return out


@rule("flatten", "unsqueeze", "ravel")
def flatten(call: Call) -> Dims:
    """As view, without sizes among the arguments."""
    out = call.fresh()
    call.reshape(call.dims(call.arg("self")), out)
    return out


@rule("squeeze")
def squeeze(call: Call) -> Dims:
    """Dimensions of extent 1 go; when others shrink to 1 they stay, so those that go are named."""
    dims = call.dims(call.arg("self"))
    places = call.dim_list("dim", len(dims)) if call.has("dim") else list(range(len(dims)))
    gone = [place for place in places if dims[place].extent == 1]
    call.retarget(aten.squeeze.dims)
    call.literal("self", call.arg("self"))
    call.literal("dim", gone)
    return [axis for place, axis in enumerate(dims) if place not in gone]


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


@rule("movedim", "moveaxis")
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
    names = ("axis0", "axis1") if call.has("axis0") else ("dim0", "dim1")
    first, second = (call.dim(name, len(dims)) for name in names)
    dims[first], dims[second] = dims[second], dims[first]
    return dims


@rule("t", "numpy_T")
def t(call: Call) -> Dims:
    """All dimensions in reverse."""
    return call.dims(call.arg("self"))[::-1]


@rule("mT", "mH", "matrix_H", "adjoint")
def matrix_transpose(call: Call) -> Dims:
    """The last two dimensions change places."""
    dims = call.dims(call.arg("self"))
    return [*dims[:-2], dims[-1], dims[-2]]


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
    return [ax.product([c, own]) if c.extent * own.extent != 1 else own for c, own in zip(copies, dims, strict=True)]


@rule("repeat_interleave")
def repeat_interleave(call: Call) -> Dims:
    """Each item several times in a row: the copies are the inner factor."""
    if not isinstance(call.arg("repeats", None), int):
        raise GaveUp("repeated by a tensor")
    dims, place = call.dims(call.arg("self")), call.arg("dim")
    copies = Axis(int(call.arg("repeats")))
    call.literal("repeats", copies)
    call.role(copies, "copies")
    place = place if place is None else int(place) % len(dims)
    repeated = ax.product([*(dims if place is None else [dims[place]]), copies])
    if call.arg("output_size", None) is not None:
        call.literal("output_size", repeated)
    return [repeated] if place is None else [*dims[:place], repeated, *dims[place + 1 :]]


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


@rule("col2im")
def col2im(call: Call) -> Dims:
    """Columns, each channels times window, are added into an image."""
    dims, out = call.dims(call.arg("self")), call.fresh()
    window = call.pinned_axis(dims[-2].extent // out[-3].extent, "spatial")
    for axis in (dims[-1], *out[-2:]):
        call.pin(axis, "spatial")
    call.unify(dims[-2], ax.product([out[-3], window]))
    call.tie(dims[:-2], out[:-3])
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


@rule("arange", "linspace", "logspace", "eye", "tril_indices", "triu_indices", "randperm", "scalar_tensor", "randint")
def numbered(call: Call) -> Dims:
    """Values made from numbers: what they mean hangs on their place."""
    return call.fresh(pin="numbered items")


@rule("one_hot")
def one_hot(call: Call) -> Dims:
    """A new last dimension over all classes, which are known by their number."""
    return [*call.dims(call.arg("self")), call.pinned_axis(call.shape[-1], "numbered classes")]


@rule("view_as_complex")
def view_as_complex(call: Call) -> Dims:
    """The last dimension is real and imaginary part."""
    dims = call.dims(call.arg("self"))
    call.pin(dims[-1], "real and imaginary part")
    return dims[:-1]


@rule("view_as_real")
def view_as_real(call: Call) -> Dims:
    """A new last dimension: real and imaginary part."""
    return [*call.dims(call.arg("self")), call.pinned_axis(2, "real and imaginary part")]


@rule("diagonal", "linalg_diagonal")
def diagonal(call: Call) -> Dims:
    """The diagonal of two dimensions becomes the last one."""
    dims = call.dims(call.arg("self" if call.has("self") else "A"))
    places = [call.dim(name, len(dims)) for name in ("dim1", "dim2")]
    for place in places:
        call.pin(dims[place], "a diagonal is taken")
    rest = [axis for place, axis in enumerate(dims) if place not in places]
    return [*rest, call.pinned_axis(call.shape[-1], "a diagonal")]
