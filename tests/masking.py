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

from graphopt.axes import Axes, Axis, Choice, Keep, index, owner, results_of, touched
from graphopt.axes.axes import operator_of
from graphopt.exported import arguments, user_output_places
from graphopt.shrink import checked

_REDUCE = {"mean", "var", "std", "var_mean", "amax", "amin", "prod", "all", "logsumexp", "softmax", "_softmax",
           "log_softmax", "_log_softmax", "layer_norm", "rms_norm", "group_norm", "instance_norm", "max", "min",
           "nanmean", "scaled_dot_product_attention", "std_mean", "_safe_softmax", "aminmax", "median",
           "native_layer_norm", "_fused_rms_norm"}  # fmt: skip


def masked_run(axes: Axes, keep: Mapping[Any, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the program gives by output name when the items that `keep` leaves out are masked."""
    kept = checked(axes, keep)
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


def _masked(value: Any, dims: Any, kept: Keep) -> Any:
    if isinstance(value, Tensor):
        return _zeroed(value, dims, kept)
    if isinstance(value, (list, tuple)) and dims:
        return [_masked(item, own, kept) for item, own in zip(value, results_of(dims), strict=True)]
    return value


def _zeroed(value: Tensor, dims: list[Axis], kept: Keep) -> Tensor:
    for place, axis in enumerate(dims):
        plain = {atom: indices for atom, indices in kept.items() if not isinstance(indices, Choice)}
        if touched(axis, plain):
            mask = torch.zeros(value.shape[place], dtype=torch.bool)
            mask[index(axis, plain)] = True
            value = _where(mask, [place], value)
    for inner, choice in kept.items():
        if isinstance(choice, Choice):
            value = _without_unchosen(value, dims, inner, choice)
    return value


def _without_unchosen(value: Tensor, dims: list[Axis], inner: Axis, choice: Choice) -> Tensor:
    """Zeros where an element's item of `inner` is not one that its item of the outer axis keeps."""
    stays = torch.zeros(len(choice.rows), inner.extent, dtype=torch.bool).scatter(1, choice.rows, True)
    for place, axis in enumerate(dims):
        own = owner(axis, inner)
        if bool((own < 0).all()):
            continue
        if bool((owner(axis, choice.outer) >= 0).any()):
            group = owner(axis, choice.outer)
            value = _where((own < 0) | stays[group.clamp(min=0), own.clamp(min=0)], [place], value)
            continue
        for other, axis_of_groups in enumerate(dims):
            group = owner(axis_of_groups, choice.outer)
            if bool((group >= 0).all()):
                mask = (own[None] < 0) | stays[group[:, None], own.clamp(min=0)[None]]
                value = _where(mask if other < place else mask.T, sorted((other, place)), value)
    return value


def _where(mask: Tensor, places: list[int], value: Tensor) -> Tensor:
    shape = [value.shape[n] if n in places else 1 for n in range(value.dim())]
    return torch.where(mask.reshape(shape), value, torch.zeros((), dtype=value.dtype))


def _call(node: Node, axes: Axes, kept: Keep, values: Mapping[Node, Any]) -> Any:
    name = operator_of(node)
    args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
    source = next((n for n in node.all_input_nodes), None)
    if name not in _REDUCE or source is None or (name in ("max", "min") and len(node.all_input_nodes) == 2):
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if name == "scaled_dot_product_attention":
        return _attention(node, axes, kept, args, kwargs)
    dims = results_of(axes.dims[source])[0]
    if name in ("group_norm", "instance_norm") and any(touched(axis, kept) for axis in dims):
        groups = int(args[1]) if name == "group_norm" else args[0].shape[1]
        given = args[2:] if name == "group_norm" else [*args[1:3], args[7]]
        return _group_norm(args[0], groups, given, dims, kept)
    by_shape = name in ("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
    own = range(len(dims) - len(args[1]), len(dims)) if by_shape else range(len(dims))
    plain = {atom: indices for atom, indices in kept.items() if not isinstance(indices, Choice)}
    places = [place for place in own if touched(dims[place], plain)]
    if not places:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    # The operator on what is kept, put back where it came from; in the dimensions that it reduces nothing is put back.
    taken = {place: index(dims[place], plain).sort().values for place in places}
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
    return _put_back(result, node.meta["val"], axes.dims[node], plain)


def _put_back(value: Any, like: Any, dims: Any, kept: Keep) -> Any:
    if not isinstance(value, Tensor):
        return [_put_back(*items, kept) for items in zip(value, like, results_of(dims), strict=True)]
    for place, axis in enumerate(dims):
        if touched(axis, kept) and value.shape[place] != like.shape[place]:
            shape = list(value.shape)
            shape[place] = like.shape[place]
            value = torch.zeros(shape, dtype=value.dtype).index_copy(place, index(axis, kept).sort().values, value)
    return value


def _attention(node: Node, axes: Axes, kept: Keep, args: Any, kwargs: Any) -> Tensor:
    """With the scale of the whole head, and a key that is not kept out of every softmax."""
    given = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
    given["scale"] = kwargs.get("scale") or args[0].shape[-1] ** -0.5
    keys = axes.dims[node.args[1]][-2]
    if touched(keys, kept):
        stay = index(keys, kept)
        mask = given.get("attn_mask")
        given |= {name: given[name].index_select(-2, stay) for name in ("key", "value")}
        if mask is not None and mask.shape[-1] != 1:
            given["attn_mask"] = mask.index_select(-1, stay)
    return node.target(**given)  # type: ignore[operator]


def _group_norm(x: Tensor, groups: int, given: Any, dims: list[Axis], kept: Keep) -> Tensor:
    """Each group on its own, over the channels of it and the places that are kept."""
    weight, bias = (given[n] if len(given) > n else None for n in (0, 1))
    eps = given[2] if len(given) > 2 else 1e-5
    out = torch.zeros_like(x)
    channels, each = index(dims[1], kept), x.shape[1] // groups
    places = [index(axis, kept) for axis in dims]
    for group in range(groups):
        places[1] = channels[(channels >= group * each) & (channels < (group + 1) * each)]
        if not len(places[1]):
            continue
        grid = torch.meshgrid(places, indexing="ij")
        part = x[grid]
        over = list(range(1, x.dim()))
        normal = (part - part.mean(over, keepdim=True)) / (part.var(over, keepdim=True, unbiased=False) + eps).sqrt()
        shape = [1, -1, *[1] * (x.dim() - 2)]
        normal = normal if weight is None else normal * weight[places[1]].view(shape)
        out[grid] = normal if bias is None else normal + bias[places[1]].view(shape)
    return out
