"""Rules of operators that compute: matrix products, reductions, norms, attention."""

from __future__ import annotations

import math
from typing import Any

from torch.fx import Node

from graphopt.axes import axis as ax
from graphopt.axes.axes import Axes
from graphopt.axes.axis import Axis
from graphopt.axes.call import Call, Dims, GaveUp, Several, rule
from graphopt.axes.table import SIGNATURES


def _product(call: Call, a: Any, b: Any) -> Dims:
    """The dimensions of a (batched) matrix product of two arguments, by the rules of torch.matmul."""
    x, y = call.dims(a), call.dims(b)
    inner = y[-2] if len(y) > 1 else y[-1]
    call.unify(x[-1], inner)
    call.contracted(a, len(x) - 1)
    call.contracted(b, max(len(y) - 2, 0))
    own = ([x[-2]] if len(x) > 1 else []) + ([y[-1]] if len(y) > 1 else [])
    batch = call.shape[: len(call.shape) - len(own)]
    return call.broadcast([x[:-2], y[:-2]], batch) + own


@rule("matmul", "linalg_matmul")
def matmul(call: Call) -> Dims:
    """Batched matrix product, batch dimensions broadcast; with a stored matrix it is a linear layer, written out."""
    other = call.arg("other")
    first = call.arg("self" if call.has("self") else "input")
    out = _product(call, first, other)
    _layer(call, first, other)
    return out


@rule("bmm")
def bmm(call: Call) -> Dims:
    """A matrix product for each item of a batch; where matrices are stored, a linear layer each."""
    first, second = call.arg("self"), call.arg("mat2")
    out = _product(call, first, second)
    _layer(call, first, second)
    return out


def _layer(call: Call, *operands: Any) -> None:
    """Rows and columns of a stored matrix, or of a stack of such, are neurons, as those of a linear layer."""
    for operand in operands:
        dims = call.dims(operand)
        if len(dims) > 1 and _is_stored(call, operand):
            for axis in dims[-2:]:
                call.role(axis, "neuron")


def _is_stored(call: Call, operand: Any) -> bool:
    return isinstance(operand, Node) and call.constant(Axes.source(operand)) is not None


@rule("addmm", "baddbmm", "addmv")
def addmm(call: Call) -> Dims:
    """A matrix product and something that is broadcast to it."""
    pairs = (("mat1", "mat2"), ("batch1", "batch2"), ("mat", "vec"))
    first, second = next(pair for pair in pairs if call.has(pair[0]))
    out = _product(call, call.arg(first), call.arg(second))
    _layer(call, call.arg(first), call.arg(second))
    return call.broadcast([out, call.dims(call.arg("self"))], call.shape)


@rule("tensordot")
def tensordot(call: Call) -> Dims:
    """Some dimensions of one tensor are summed over with some of the other; the rest stay in order."""
    out: Dims = []
    summed: list[Dims] = []
    for tensor, places in (("self", "dims_self"), ("other", "dims_other")):
        dims = call.dims(call.arg(tensor))
        chosen = [int(place) % len(dims) for place in call.arg(places)]
        for place in chosen:
            call.contracted(call.arg(tensor), place)
        summed.append([dims[place] for place in chosen])
        out += [axis for place, axis in enumerate(dims) if place not in chosen]
    for a, b in zip(*summed, strict=True):
        call.unify(a, b)
    return out


@rule("cosine_similarity", "pairwise_distance", "linalg_vecdot")
def compare(call: Call) -> Dims:
    """Two tensors, broadcast against each other, are summed over one dimension."""
    names = ("x", "y") if call.has("x") else ("x1", "x2")
    dims = [call.dims(call.arg(name)) for name in names]
    if len(dims[0]) != len(dims[1]):
        raise GaveUp("tensors of different ranks")
    if call.has("p"):
        call.pin(dims[0][-1], "a little is added to each difference")
    place = call.dim("dim", len(dims[0])) if call.has("dim") else len(dims[0]) - 1
    out = call.broadcast(dims, [max(a.extent, b.extent) for a, b in zip(*dims, strict=True)])
    for name in names:
        call.contracted(call.arg(name), place)
    kept = [Axis(1)] if call.arg("keepdim", False) else []
    return [*out[:place], *kept, *out[place + 1 :]]


@rule("einsum")
def einsum(call: Call) -> Dims:
    """Letters stand for axes; an ellipsis for leading dimensions that are broadcast."""
    equation = str(call.arg("equation")).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    operands = call.arg("tensors")
    names = terms.split(",")
    if not arrow:
        letters = sorted(letter for letter in set(terms) - {",", "."} if terms.count(letter) == 1)
        result = ("..." if "..." in terms else "") + "".join(letters)
    env: dict[str, Axis] = {}
    leading: list[Dims] = []
    stored: list[str] = []
    for term, operand in zip(names, operands, strict=True):
        if _is_stored(call, operand):
            stored += _neurons(term, [other for other in names if other is not term], result)
        dims = call.dims(operand)
        before, dots, after = term.partition("...")
        if not dots:
            before, after = "", term
        inner = dims[len(before) : len(dims) - len(after)]
        if dots:
            leading.append(inner)
        places = [*range(len(before)), *range(len(dims) - len(after), len(dims))]
        for letter, place in zip(before + after, places, strict=True):
            axis = dims[place]
            known = env.get(letter)
            if known is None or (known.extent == 1 and axis.extent != 1):
                env[letter] = axis
            elif axis.extent == known.extent:
                call.unify(known, axis)
            if letter not in result:
                call.contracted(operand, place)
    for letter in stored:
        call.role(env[letter], "neuron")
    before, dots, after = result.partition("...")
    if not dots:
        if leading:
            raise GaveUp("it sums over its ellipsis")
        return [env[letter] for letter in result]
    shape = call.shape[len(before) : len(call.shape) - len(after)]
    return [env[n] for n in before] + call.broadcast(leading, shape) + [env[n] for n in after]


def _neurons(term: str, others: list[str], result: str) -> list[str]:
    """The letters of a stored operand that it sums over with others, or brings in: not those of a batch of matrices."""
    elsewhere = set("".join(others))
    return [name for name in term if name.isalpha() and (name in elsewhere) != (name in result)]


# Reductions -----------------------------------------------------------------------------------------------------------


def _reduce(call: Call, *, statistics: bool = False, pinned: str | None = None) -> Dims | Several:
    source = call.arg("self") if call.has("self") else call.arg("input")
    dims = call.dims(source)
    whole = not call.has("dim")
    places = list(range(len(dims))) if whole else call.dim_list("dim", len(dims))
    for place in places:
        call.contracted(source, place)
        if statistics:
            call.statistics(dims[place])
        if pinned:
            call.pin(dims[place], pinned)
    if not whole and call.arg("keepdim", False):
        out = [Axis(1) if place in places else axis for place, axis in enumerate(dims)]
    else:
        out = [axis for place, axis in enumerate(dims) if place not in places]
    return [list(out) for _ in call.shapes] if isinstance(call.node.meta["val"], (list, tuple)) else out


@rule("sum", "linalg_vector_norm", "norm", "any", "count_nonzero", "nansum")
def total(call: Call) -> Dims | Several:
    """Reductions in which zeros do not count."""
    order = next((call.arg(name) for name in ("ord", "p") if call.has(name)), None)
    negative = isinstance(order, (int, float)) and order < 0
    return _reduce(call, pinned="a norm of negative order" if negative else None)


@rule("mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "prod", "all", "logsumexp", "nanmean", "aminmax")
def statistic(call: Call) -> Dims | Several:
    """Reductions that are statistics of the items there are."""
    return _reduce(call, statistics=True)


@rule("argmax", "argmin", "max", "min", "median", "mode")
def choose(call: Call) -> Dims | Several:
    """Reductions that give the place of an item, so none can go; as functions of two tensors they are pointwise."""
    if call.has("other"):
        return call.broadcast([call.dims(tensor) for tensor in call.tensors], call.shape)
    if not call.has("dim"):
        return _reduce(call, statistics=True)
    return _reduce(call, pinned="its order matters")


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(call: Call) -> Dims:
    """Normalised over one dimension."""
    dims = call.dims(call.arg("self"))
    if dims:
        call.statistics(dims[call.dim("dim", len(dims))])
    return dims


@rule("prelu")
def prelu(call: Call) -> Dims:
    """A slope for all, or one per channel."""
    dims, weight = call.dims(call.arg("self")), call.dims(call.arg("weight"))
    if weight and len(dims) > 1 and weight[0].extent == dims[1].extent:
        call.unify(weight[0], dims[1])
    return dims


@rule("glu")
def glu(call: Call) -> Dims:
    """The two halves of a dimension agree item by item."""
    dims = call.dims(call.arg("self"))
    place = call.dim("dim", len(dims))
    half = Axis(dims[place].extent // 2)
    call.unify(dims[place], ax.concatenation([half, half]))
    dims[place] = half
    return dims


# Norms ----------------------------------------------------------------------------------------------------------------


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Dims | Several:
    """Normalised over the last dimensions, whose extents are an argument."""
    dims = call.dims(call.arg("input"))
    own = dims[len(dims) - len(call.arg("normalized_shape")) :]
    for name in ("weight", "bias"):
        if call.has(name):
            call.tie(own, call.dims(call.arg(name)))
    for axis in own:
        call.statistics(axis)
        call.role(axis, "embedding")
    call.literal("normalized_shape", list(own))
    if not isinstance(call.node.meta["val"], (list, tuple)):
        return dims
    outer = dims[: len(dims) - len(own)]
    return [dims, *([*outer, *[Axis(1) for _ in own]] for _ in call.shapes[1:])]


@rule("group_norm")
def group_norm(call: Call) -> Dims:
    """Normalised over the channels of each group and over space: groups may go, and channels of every group alike."""
    dims = call.dims(call.arg("input"))
    groups = Axis(int(call.arg("num_groups")))
    each = Axis(dims[1].extent // groups.extent)
    call.unify(dims[1], ax.product([groups, each]))
    for name in ("weight", "bias"):
        call.tie([dims[1]], call.dims(call.arg(name)))
    for axis in (each, *dims[2:]):
        call.statistics(axis)
    call.role(dims[1], "channel")
    call.literal("num_groups", groups)
    return dims


@rule("batch_norm", "instance_norm", "_native_batch_norm_legit_no_training")
def batch_norm(call: Call) -> Dims | Several:
    """Every channel on its own; statistics over batch and space, where they are not fixed."""
    dims = call.dims(call.arg("input"))
    for name in ("weight", "bias", "running_mean", "running_var"):
        call.tie([dims[1]], call.dims(call.arg(name)))
    own = call.arg("use_input_stats", False)
    for axis in [*dims[2:], *([] if own else dims[:1])]:
        if own or call.arg("training", False):
            call.statistics(axis)
    call.role(dims[1], "channel")
    if isinstance(call.node.meta["val"], (list, tuple)):
        return [dims, *(call.fresh(shape, pin="statistics") for shape in call.shapes[1:])]
    return dims


# Attention ------------------------------------------------------------------------------------------------------------


@rule("scaled_dot_product_attention")
def attention(call: Call) -> Dims:
    """softmax(q k^T scale + mask) v; several query heads may share a head of keys and values."""
    q, k, v = (call.dims(call.arg(name)) for name in ("query", "key", "value"))
    call.unify(q[-1], k[-1])
    call.unify(k[-2], v[-2])
    for axis in (q[-1], v[-1]):
        call.role(axis, "head_dim")
    for name, dims in (("query", q), ("key", k)):
        call.contracted(call.arg(name), len(dims) - 1)
    heads = q[:-2]
    if call.arg("enable_gqa", False) and len(q) > 2 and k[-3].extent != q[-3].extent:
        if v[-3].extent != k[-3].extent:
            raise GaveUp("keys and values have different heads")
        call.unify(k[-3], v[-3])
        share = Axis(q[-3].extent // k[-3].extent)
        call.role(share, "query_group")
        call.role(k[-3], "head")
        call.unify(q[-3], ax.product([k[-3], share]))
        call.broadcast([q[:-3], k[:-3], v[:-3]], call.shape[:-3])
    else:
        heads = call.broadcast([q[:-2], k[:-2], v[:-2]], call.shape[:-2])
        if heads:
            call.role(heads[-1], "head")
    mask = call.arg("attn_mask", None)
    if isinstance(mask, Node):
        call.broadcast([[*heads, q[-2], k[-2]], call.dims(mask)], [axis.extent for axis in [*heads, q[-2], k[-2]]])
    if call.arg("is_causal", False):
        for axis in (q[-2], k[-2]):
            call.pin(axis, "causal")
    call.statistics(k[-2])
    for axis in (q[-2], k[-2]):
        call.role(axis, "token")
    # The default scale follows the extent; it must not change with it.
    if call.arg("scale", None) is None:
        call.literal("scale", 1 / math.sqrt(q[-1].extent))
    return [*heads, q[-2], v[-1]]


# Transforms, convolutions in one operator -----------------------------------------------------------------------------


@rule(
    "fft_fft",
    "fft_ifft",
    "fft_rfft",
    "fft_irfft",
    "fft_hfft",
    "fft_ihfft",
    "fft_fft2",
    "fft_ifft2",
    "fft_rfft2",
    "fft_irfft2",
    "fft_fftn",
    "fft_ifftn",
    "fft_rfftn",
    "fft_irfftn",
    "fft_fftshift",
    "fft_ifftshift",
)
def transform(call: Call) -> Dims:
    """Fourier transforms mix the items of some dimensions."""
    dims = call.dims(call.arg("self"))
    sizes = call.arg("s", None)
    places = call.dim_list("dim", len(dims))
    if call.arg("dim") is None and sizes is not None:
        places = list(range(len(dims) - len(sizes), len(dims)))
    for place in places:
        call.pin(dims[place], "mixed by a Fourier transform")
    out = call.fresh(pin="mixed by a Fourier transform")
    return [new if place in places else axis for place, (axis, new) in enumerate(zip(dims, out, strict=True))]


@rule("convolution")
def convolution(call: Call) -> Dims | Several:
    """Any convolution, as decompositions write it."""
    space = len(call.arg("stride"))
    if call.arg("transposed"):
        return call.apply(SIGNATURES[f"conv_transpose{space}d"])
    return call.apply(SIGNATURES[f"conv{space}d"])
