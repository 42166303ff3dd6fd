"""Rules of operators that take tensors apart and put them together: cat, split, slice, index, pad, sort."""

from __future__ import annotations

import torch
from torch.fx import Node

from graphopt.axes import axis as ax
from graphopt.axes.axis import Axis
from graphopt.axes.call import Call, Dims, Offset, Several, rule

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
    if stop <= start:
        return call.fresh(pin="empty slice")
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


@rule("select_scatter", "slice_scatter", "diagonal_scatter", "scatter", "scatter_add", "scatter_reduce", "index_put")
def scatter(call: Call) -> Dims:
    """Items are overwritten: dimensions of one extent are the same; where anything is addressed they are pinned."""
    dims = call.dims(call.arg("self"))
    source = next((call.arg(name) for name in ("src", "values") if call.has(name)), None)
    others = call.dims(source)
    name = str(call.node.target)
    if "index_put" in name:
        indices = call.arg("indices")
        for place, item in enumerate(indices):
            if item is not None:
                call.pin(dims[place], "written by index")
        for axis in [axis for item in indices for axis in call.dims(item)]:
            call.pin(axis, "index")
        call.tie(dims[len(indices) :], others)
        for axis in others[: max(0, len(others) - len(dims) + len(indices))]:
            call.pin(axis, "written by index")
        return dims
    place = call.dim("dim", len(dims)) if call.has("dim") else 0
    call.pin(dims[place], "written by index")
    if "select_scatter" in name:
        others = [*others[:place], Axis(1), *others[place:]]
    for tensor in (others, call.dims(call.arg("index")) if "scatter" in name and call.has("index") else []):
        for n, axis in enumerate(tensor):
            if n != place and axis.extent == dims[n].extent:
                call.unify(axis, dims[n])
            elif axis.extent != 1:
                call.pin(axis, "written by index")
                call.pin(dims[n], "written by index")
    return dims


@rule("index", "_unsafe_index")
def index(call: Call) -> Dims:
    """Looked up by tensors: the indexed dimensions are pinned, those of the indices come in their place."""
    dims, indices = call.dims(call.arg("self")), list(call.arg("indices"))
    indices += [None] * (len(dims) - len(indices))
    given = [place for place, item in enumerate(indices) if item is not None]
    for place in given:
        call.pin(dims[place], "looked up by index")
    if any(item is not None and item.meta["val"].dtype in (torch.bool, torch.uint8) for item in indices):
        return call.fresh(pin="looked up by a mask")
    tensors = [call.dims(indices[place]) for place in given]
    rank = max((len(item) for item in tensors), default=0)
    first = given[0] if given == list(range(given[0], given[-1] + 1)) else 0
    looked_up = call.broadcast(tensors, call.shape[first : first + rank])
    rest = [axis for place, axis in enumerate(dims) if place not in given]
    return rest[:first] + looked_up + rest[first:]


@rule("index_select")
def index_select(call: Call) -> Dims:
    """One dimension is looked up by a list of indices."""
    dims = call.dims(call.arg("self"))
    place = call.dim("dim", len(dims))
    call.pin(dims[place], "looked up by index")
    found = call.dims(call.arg("index")) or [Axis(1)]
    return [*dims[:place], *found, *dims[place + 1 :]]


@rule("gather", "take_along_dim")
def gather(call: Call) -> Dims:
    """Each element is looked up along one dimension; in the others index and table agree."""
    dims, indices = call.dims(call.arg("self")), call.dims(call.arg("index" if call.has("index") else "indices"))
    place = call.dim("dim", len(dims))
    call.pin(dims[place], "looked up by index")
    for n, (axis, other) in enumerate(zip(dims, indices, strict=True)):
        if n != place and axis.extent == other.extent:
            call.unify(axis, other)
        elif n != place:
            call.pin(axis, "looked up by index")
    return indices


@rule("constant_pad_nd", "pad", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
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
    name = str(call.node.target)
    if "tri" in name:
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


@rule("getitem")
def getitem(call: Call) -> Dims:
    """One of several results."""
    source, place = call.node.args
    assert isinstance(source, Node)
    return call.dims(source)[place]  # type: ignore[index,return-value]
