"""Rules of operators that take tensors apart and put them together: cat, split, slice, index, pad, sort."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from graphopt.axes import axis as ax
from graphopt.axes.axis import Axis
from graphopt.axes.call import Call, Dims, GaveUp, Offset, Several, rule

aten = torch.ops.aten


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Dims:
    """One dimension is the concatenation of those of the tensors, the others agree."""
    tensors = [call.dims(tensor) for tensor in call.arg("tensors")]
    rank = len(call.shape)
    tensors = [dims for dims in tensors if len(dims) == rank]  # an old form of empty tensor is left out by PyTorch too
    place = call.dim("dim", rank)
    for dims in tensors[1:]:
        for n in range(rank):
            if n != place:
                call.unify(tensors[0][n], dims[n])
    joined = ax.concatenation([dims[place] for dims in tensors])
    return [joined if n == place else tensors[0][n] for n in range(rank)]


@rule("stack")
def stack(call: Call) -> Dims:
    """A new dimension runs over the tensors, which agree in all others."""
    tensors = [call.dims(tensor) for tensor in call.arg("tensors")]
    for dims in tensors[1:]:
        for first, other in zip(tensors[0], dims, strict=True):
            call.unify(first, other)
    new = Axis(len(tensors))
    call.pin(new, "stacked tensors")
    place = call.dim("dim", len(call.shape))
    return [*tensors[0][:place], new, *tensors[0][place:]]


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk", "split_copy")
def split(call: Call) -> Several:
    """One dimension is cut into segments; every form becomes split_with_sizes when they shrink."""
    dims = call.dims(call.arg("self"))
    place = call.dim("dim", len(dims))
    segments = [Axis(shape[place]) for shape in call.shapes]
    call.unify(dims[place], ax.concatenation(segments))
    call.retarget(aten.split_with_sizes.default)
    call.literal("self", call.arg("self"))
    call.literal("split_sizes", segments)
    call.literal("dim", place)
    return [[*dims[:place], segment, *dims[place + 1 :]] for segment in segments]


@rule("unbind")
def unbind(call: Call) -> Several:
    """Every item of a dimension on its own: none of them can go."""
    dims = call.dims(call.arg("self"))
    place = call.dim("dim", len(dims))
    call.pin(dims[place], "taken apart item by item")
    return [dims[:place] + dims[place + 1 :] for _ in range(dims[place].extent)]


def _cut(call: Call, axis: Axis, start: int, stop: int) -> Axis:
    """Refine `axis` so that [start, stop) is a segment of it; gives an axis that is that segment."""
    segment = Axis(stop - start)
    bounds = (Axis(start), segment, Axis(axis.extent - stop))
    if segment.extent != axis.extent:
        call.unify(axis, ax.concatenation(bounds))
        return segment
    return axis


@rule("slice")
def slice_(call: Call) -> Dims:
    """A segment of a dimension; with a step, an item of every group."""
    dims = call.dims(call.arg("self"))
    place = call.dim("dim", len(dims))
    axis = dims[place]
    start, stop, step = slice(call.arg("start"), call.arg("end"), call.arg("step")).indices(axis.extent)
    if step != 1:
        if start < step and axis.extent % step == 0 and stop > axis.extent - step + start:
            inner = Axis(step)
            call.pin(inner, "strided slice")
            outer = Axis(axis.extent // step)
            call.unify(axis, ax.product([outer, inner]))
            call.literal("end", axis)
        else:
            call.pin(axis, "strided slice")
            outer = call.fresh(pin="strided slice")[place]
        return [*dims[:place], outer, *dims[place + 1 :]]
    if stop <= start:  # it must stay empty
        call.literal("start", 0)
        call.literal("end", 0)
        return [*dims[:place], Axis(0), *dims[place + 1 :]]
    segment = _cut(call, axis, start, stop)
    call.literal("start", Offset(axis, start))
    call.literal("end", Offset(axis, stop))
    return [*dims[:place], segment, *dims[place + 1 :]]


@rule("narrow")
def narrow(call: Call) -> Dims:
    """A segment of a dimension, by start and length."""
    dims = call.dims(call.arg("self"))
    place = call.dim("dim", len(dims))
    start, length = int(call.arg("start")), int(call.arg("length"))
    segment = _cut(call, dims[place], start, start + length)
    call.literal("start", Offset(dims[place], start))
    call.literal("length", segment)
    return [*dims[:place], segment, *dims[place + 1 :]]


@rule("select")
def select(call: Call) -> Dims:
    """One item of a dimension: that item cannot go."""
    dims = call.dims(call.arg("self"))
    place = call.dim("dim", len(dims))
    axis = dims[place]
    item = int(call.arg("index")) % axis.extent
    if ax.find(axis).kind == "product":
        call.pin(axis, "one item is selected")
    else:
        call.pin(_cut(call, axis, item, item + 1), "one item is selected")
    call.literal("index", Offset(axis, item))
    return dims[:place] + dims[place + 1 :]


@rule("select_scatter", "slice_scatter", "scatter", "scatter_add", "scatter_reduce")
def scatter(call: Call) -> Dims:
    """Items along one dimension are overwritten: it is pinned; in the others all agree."""
    dims = call.dims(call.arg("self"))
    place = call.dim("dim", len(dims))
    others = call.dims(call.arg("src", None))
    if "select_scatter" in str(call.node.target):
        others = [*others[:place], Axis(1), *others[place:]]
    call.pin(dims[place], "written by index")
    by_index = "slice" not in str(call.node.target) and "select" not in str(call.node.target)
    for tensor in (others, call.dims(call.arg("index")) if by_index else []):
        if tensor and len(tensor) != len(dims):
            raise GaveUp("a scalar among its tensors")
        for n, axis in enumerate(tensor):
            if n != place and axis.extent == dims[n].extent:
                call.unify(axis, dims[n])
            else:
                call.pin(axis, "written by index")
                call.pin(dims[n], "written by index")
    return dims


@rule("index_add", "index_copy", "index_fill", "index_reduce")
def index_add(call: Call) -> Dims:
    """Slices along one dimension are overwritten: it is pinned; in the others the source agrees."""
    dims = call.dims(call.arg("self"))
    place = call.dim("dim", len(dims))
    source = call.dims(call.arg("source", None))
    for axis in (dims[place], *call.dims(call.arg("index")), *source[place : place + 1]):
        call.pin(axis, "written by index")
    if len(source) == len(dims):
        for n, axis in enumerate(source):
            if n != place:
                call.unify(axis, dims[n])
    return dims


@rule("index_put")
def index_put(call: Call) -> Dims:
    """Elements are overwritten where tensors of indices say: indexed dimensions and indices are pinned."""
    dims, indices = call.dims(call.arg("self")), list(call.arg("indices"))
    values = call.dims(call.arg("values"))
    plain = all(item is not None and not _is_mask(item) for item in indices)
    pinned = [*dims[: len(indices)], *values[: max(0, len(values) - len(dims) + len(indices))]]
    for axis in pinned if plain else [*dims, *values]:
        call.pin(axis, "written by index")
    for item in indices:
        for axis in call.dims(item):
            call.pin(axis, "index")
    if plain:
        call.tie(dims[len(indices) :], values)
    return dims


def _is_mask(item: Node) -> bool:
    return item.meta["val"].dtype in (torch.bool, torch.uint8)


@rule("index", "_unsafe_index")
def index(call: Call) -> Dims:
    """Looked up by tensors: the indexed dimensions are pinned, those of the indices come in their place."""
    dims, indices = call.dims(call.arg("self")), list(call.arg("indices"))
    indices += [None] * (len(dims) - len(indices))
    given = [place for place, item in enumerate(indices) if item is not None]
    if any(_is_mask(indices[place]) for place in given):
        raise GaveUp("looked up by a mask")
    if len(given) == 1 and (run := _run(call.constant(indices[given[0]]), dims[given[0]].extent)):
        return _as_slice(call, dims, given[0], *run)
    for place in given:
        call.pin(dims[place], "looked up by index")
    tensors = [call.dims(indices[place]) for place in given]
    rank = max((len(item) for item in tensors), default=0)
    first = given[0] if given == list(range(given[0], given[-1] + 1)) else 0
    looked_up = call.broadcast(tensors, call.shape[first : first + rank])
    rest = [axis for place, axis in enumerate(dims) if place not in given]
    return rest[:first] + looked_up + rest[first:]


def _run(indices: Tensor | None, size: int) -> tuple[int, int] | None:
    """The first and the end of stored indices that are consecutive; None for any others."""
    if indices is None or indices.dim() != 1 or not indices.numel():
        return None
    values = [int(item) % size for item in indices]
    return (values[0], values[-1] + 1) if values == list(range(values[0], values[-1] + 1)) else None


def _as_slice(call: Call, dims: Dims, place: int, start: int, stop: int) -> Dims:
    """Consecutive indices are a slice, and become one when they shrink."""
    segment = _cut(call, dims[place], start, stop)
    call.retarget(aten.slice.Tensor)
    for name, value in (("self", call.arg("self")), ("dim", place)):
        call.literal(name, value)
    call.literal("start", Offset(dims[place], start))
    call.literal("end", Offset(dims[place], stop))
    return [*dims[:place], segment, *dims[place + 1 :]]


@rule("index_select")
def index_select(call: Call) -> Dims:
    """One dimension is looked up by a list of indices."""
    dims = call.dims(call.arg("self"))
    place = call.dim("dim", len(dims))
    if dims and (run := _run(call.constant(call.arg("index")), dims[place].extent)):
        return _as_slice(call, dims, place, *run)
    call.pin(dims[place], "looked up by index")
    found = call.dims(call.arg("index")) or [Axis(1)]
    return [*dims[:place], *found, *dims[place + 1 :]]


@rule("gather", "take_along_dim")
def gather(call: Call) -> Dims:
    """Each element is looked up along one dimension; in the others index and table agree."""
    broadcast = call.has("indices")
    dims, indices = call.dims(call.arg("self")), call.dims(call.arg("indices" if broadcast else "index"))
    if call.arg("dim") is None or len(dims) != len(indices):
        raise GaveUp("looked up in all dimensions at once")
    place = call.dim("dim", len(dims))
    call.pin(dims[place], "looked up by index")
    out = []
    for n, (axis, other) in enumerate(zip(dims, indices, strict=True)):
        if n == place:
            out.append(other)
        elif axis.extent == other.extent:
            call.unify(axis, other)
            out.append(other)
        elif broadcast and 1 in (axis.extent, other.extent):
            out.append(other if axis.extent == 1 else axis)
        else:
            call.pin(axis, "looked up by index")
            call.pin(other, "looked up by index")
            out.append(other)
    return out


@rule("bucketize")
def bucketize(call: Call) -> Dims:
    """The place of each element among boundaries, which is known by its number."""
    for axis in call.dims(call.arg("boundaries")):
        call.pin(axis, "numbered items")
    return call.dims(call.arg("self"))


@rule("histc")
def histogram(call: Call) -> Dims:
    """How many items there are of each value: none of them can go."""
    for tensor in call.tensors:
        for axis in call.dims(tensor):
            call.pin(axis, "counted by value")
    return call.fresh(pin="counted by value")


@rule("isin")
def isin(call: Call) -> Dims:
    """Whether each element is one of some."""
    for axis in call.dims(call.arg("test_elements", None)):
        call.pin(axis, "a set of values")
    return call.dims(call.arg("elements", None))


@rule(
    "constant_pad_nd",
    "pad",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
    "_pad_circular",
)
def pad(call: Call) -> Dims:
    """A dimension with constants in front and behind is a concatenation; with anything else it is pinned."""
    dims, out = call.dims(call.arg("self")), call.fresh()
    amounts = list(call.arg("pad" if call.has("pad") else "padding"))
    constant = "constant" in str(call.node.target) or call.arg("mode", "") == "constant"
    for n in range(len(dims)):
        before, after = [*amounts[2 * (len(dims) - 1 - n) :], 0, 0][:2]
        if before == after == 0:
            out[n] = dims[n]
        elif constant and before >= 0 and after >= 0:
            edges = call.fresh((before, after), pin="padding")
            call.unify(out[n], ax.concatenation([edges[0], dims[n], edges[1]]))
        else:
            call.pin(dims[n], "padded")
            call.pin(out[n], "padded")
    return out


@rule("roll", "flip", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "diff", "tril", "triu", "rot90")
def ordered(call: Call) -> Dims | Several:
    """The order of items along some dimensions matters: they are pinned."""
    dims = call.dims(call.arg("self"))
    if any(isinstance(call.arg(name, None), Node) for name in ("prepend", "append")):
        raise GaveUp("something is put in front or behind")
    if "tri" in str(call.node.target):
        places = [len(dims) - 2, len(dims) - 1]
    else:
        places = call.dim_list("dims" if call.has("dims") else "dim", len(dims))
    for place in places:
        call.pin(dims[place], "its order matters")
    fresh = call.fresh(pin="its order matters")
    out = [axis if axis.extent == new.extent else new for axis, new in zip(dims, fresh, strict=True)]
    return [list(out) for _ in call.shapes] if isinstance(call.node.meta["val"], (list, tuple)) else out


@rule("topk", "sort", "argsort", "kthvalue", "msort")
def order(call: Call) -> Dims | Several:
    """Items are ordered along one dimension: it is pinned, before and after."""
    dims = call.dims(call.arg("self"))
    place = call.dim("dim", len(dims)) if call.has("dim") else 0
    call.pin(dims[place], "sorted")
    several = isinstance(call.node.meta["val"], (list, tuple))

    def result() -> Dims:
        out = list(dims)
        if len(call.shape) < len(dims):
            return dims[:place] + dims[place + 1 :]
        if call.shape[place] != dims[place].extent:
            out[place] = call.fresh([call.shape[place]], pin="sorted")[0]
        return out

    return [result() for _ in call.shapes] if several else result()
