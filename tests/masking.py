"""The reference for every shrink: the dense program with the dropped items masked out, worked out node by node.

After every node, items that are not kept are set to zero in its result. That is what dropping them means to anything
that multiplies and adds. Operators that take statistics along an axis (softmax, mean, layer norm) are run on the kept
items of that axis alone. Nothing here shares code with `graphopt.shrink` but the axes themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from graphopt.axes import Axes, Axis, find, index, results_of, touched
from graphopt.exported import arguments, op_name, user_output_places

_REDUCE = {"mean", "var", "std", "var_mean", "amax", "amin", "prod", "all", "logsumexp", "softmax", "_softmax",
           "log_softmax", "_log_softmax", "layer_norm", "rms_norm", "group_norm", "max", "min", "nanmean",
           "scaled_dot_product_attention", "std_mean", "_safe_softmax", "aminmax"}  # fmt: skip


def masked_run(axes: Axes, keep: Mapping[Axis, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the program gives by output name when the items that `keep` leaves out are masked."""
    kept = {find(axis): torch.as_tensor(indices) for axis, indices in keep.items()}
    program = axes.program
    values: dict[Node, Any] = {}
    given = iter(arguments(program.exported, dict(inputs)))
    results: Any = None
    with torch.inference_mode():
        for node in program.graph.nodes:
            if node.op == "placeholder":
                value = next(given)
                values[node] = _zeroed(value, axes.dims[node], kept) if isinstance(value, Tensor) else value
            elif node.op == "call_function":
                value = _call(node, axes, kept, values)
                values[node] = _masked(value, axes.dims.get(node), kept)
            elif node.op == "output":
                results = map_arg(node.args[0], values.__getitem__)
    places = user_output_places(program.exported)
    return {spec.name: results[place] for spec, place in zip(program.outputs, places, strict=True)}


def _masked(value: Any, dims: Any, kept: Mapping[Axis, Tensor]) -> Any:
    if isinstance(value, Tensor):
        return _zeroed(value, dims, kept)
    if isinstance(value, (list, tuple)) and dims:
        return [_masked(item, own, kept) for item, own in zip(value, results_of(dims), strict=True)]
    return value


def _zeroed(value: Tensor, dims: list[Axis], kept: Mapping[Axis, Tensor]) -> Tensor:
    for place, axis in enumerate(dims):
        if touched(axis, kept):
            mask = torch.zeros(value.shape[place], dtype=torch.bool)
            mask[index(axis, kept)] = True
            shape = [-1 if n == place else 1 for n in range(value.dim())]
            value = torch.where(mask.view(shape), value, torch.zeros((), dtype=value.dtype))
    return value


def _call(node: Node, axes: Axes, kept: Mapping[Axis, Tensor], values: Mapping[Node, Any]) -> Any:
    name = op_name(node).removeprefix("aten.").partition(".")[0]
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    source = next((n for n in node.all_input_nodes), None)
    if name not in _REDUCE or source is None:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if name == "scaled_dot_product_attention":
        return _attention(node, axes, kept, args, kwargs)
    dims = results_of(axes.dims[source])[0]
    if name == "group_norm" and touched(dims[1], kept):
        return _group_norm(args, dims, kept)
    by_shape = name in ("layer_norm", "rms_norm")
    own = range(len(dims) - len(args[1]), len(dims)) if by_shape else range(len(dims))
    places = [place for place in own if touched(dims[place], kept)]
    if not places:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    # The operator on what is kept, put back where it came from; in the dimensions that it reduces nothing is put back.
    taken = {place: index(dims[place], kept) for place in places}
    small = args[0]
    for place, indices in taken.items():
        small = small.index_select(place, indices)
    rest = list(args[1:])
    if by_shape:
        first = len(dims) - len(args[1])
        rest[0] = [len(taken[first + n]) if first + n in taken else size for n, size in enumerate(args[1])]
        for n in range(1, min(len(rest), 3)):
            if isinstance(rest[n], Tensor):
                for place, indices in taken.items():
                    rest[n] = rest[n].index_select(place - first, indices)
    result = node.target(small, *rest, **kwargs)  # type: ignore[operator]
    return _put_back(result, node.meta["val"], axes.dims[node], kept)


def _put_back(value: Any, like: Any, dims: Any, kept: Mapping[Axis, Tensor]) -> Any:
    if not isinstance(value, Tensor):
        return [_put_back(*items, kept) for items in zip(value, like, results_of(dims), strict=True)]
    for place, axis in enumerate(dims):
        if touched(axis, kept) and value.shape[place] != like.shape[place]:
            shape = list(value.shape)
            shape[place] = like.shape[place]
            value = torch.zeros(shape, dtype=value.dtype).index_copy(place, index(axis, kept), value)
    return value


def _attention(node: Node, axes: Axes, kept: Mapping[Axis, Tensor], args: Any, kwargs: Any) -> Tensor:
    """With the scale of the whole head, and a key that is not kept out of every softmax."""
    keys = axes.dims[node.args[1]][-2]
    assert not touched(keys, kept), "tests do not drop tokens of attention"
    scale = kwargs.get("scale") or args[0].shape[-1] ** -0.5
    return torch.nn.functional.scaled_dot_product_attention(*args, **{**kwargs, "scale": scale})


def _group_norm(args: Any, dims: list[Axis], kept: Mapping[Axis, Tensor]) -> Tensor:
    """Each group on its own, over the channels of it that are kept."""
    x, groups = args[0], int(args[1])
    weight, bias = (args[n] if len(args) > n else None for n in (2, 3))
    eps = args[4] if len(args) > 4 else 1e-5
    out = torch.zeros_like(x)
    channels, each = index(dims[1], kept), x.shape[1] // groups
    for group in range(groups):
        own = channels[(channels >= group * each) & (channels < (group + 1) * each)]
        if len(own):
            part = x[:, own].flatten(1)
            normal = (part - part.mean(1, keepdim=True)) / (part.var(1, keepdim=True, unbiased=False) + eps).sqrt()
            normal = normal.view(x[:, own].shape)
            shape = [1, -1, *[1] * (x.dim() - 2)]
            normal = normal if weight is None else normal * weight[own].view(shape)
            out[:, own] = normal if bias is None else normal + bias[own].view(shape)
    return out
